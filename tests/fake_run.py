"""A small run folder with the rows of a real one: a learned exposure on the embedded leap world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from atesd.config import Config, config_from_mapping
from atesd.runs import RunFolder, new_manifest

PROBLEMS = 40
SAMPLES = 2


def fake_config(updates: int, seed: int = 0, kind: str = "learned", **groups: Any) -> Config:
    replayed = {"replay_run": "elsewhere"} if kind == "replay" else {}
    distils = groups.get("train", {}).get("method", "distill") == "distill"
    return config_from_mapping(
        {
            "data": {"source": "world", "leap_share": 0.5},
            **({"exposure": {"kind": kind, **replayed}} if distils else {}),
            "sampling": {"completion_tokens": 40},
            "train": {"num_updates": updates, "seed": seed},
            **groups,
        }
    )


def begin_run(path: Path, config: Config) -> RunFolder:
    """A run folder without a single row."""
    manifest = new_manifest(config, data_fingerprint="b7d1c9", command=["atesd", "train", "micro"])
    return RunFolder.create(path, config, manifest | {"started": "2026-01-02T03:04:05+00:00", "commit": "0123abcd"})


def write_fake_run(path: Path, updates: int = 60, seed: int = 0, kind: str = "learned", **groups: Any) -> RunFolder:
    """A finished run of `updates` updates: accuracy climbs to about 0.7 and then falls a little."""
    config = fake_config(updates, seed, kind, **groups)
    run = begin_run(path, config)
    noise = np.random.default_rng(seed)
    hold = config.credit.hold_updates
    ratios = [0.25 + 0.5 * float(noise.random()) if kind == "learned" else 1.0 for _ in range(0, updates, hold)]
    for update in range(updates):
        if update % 20 == 0:
            run.append("evaluations", evaluation_row(update, 0.45 + 0.25 * update / updates, noise))
        run.append("metrics", metric_row(update, ratios[update // hold], noise))
    for index, ratio in enumerate(ratios if kind == "learned" else []):
        run.append("decisions", decision_row(index * hold, ratio, noise, pending=index == len(ratios) - 1))
    for split in ("validation", "test"):
        run.append("evaluations", evaluation_row(updates, 0.66, noise, split))
    run.append("evaluations", evaluation_row(0, 0.45, noise, "test"))
    run.append("samples", sample_row(0, ["The", " answer", " is", " \\boxed{7}"], noise))
    run.append("samples", sample_row(updates, ["Add", " 3", " and", " 4", ":", "\n", "\\boxed{7}"], noise))
    run.end_session("finished")
    return run


def metric_row(update: int, ratio: float, noise: np.random.Generator, **changes: Any) -> dict[str, Any]:
    fall = float(np.exp(-update / 40))
    wobble = float(noise.normal(0, 0.02))
    row = {
        "update": update,
        "loss": 0.30 * fall + 0.1 + wobble,
        "kl": 0.34 * fall + 0.1 + wobble,
        "top1_disagreement": 0.12 * fall + 0.05,
        "student_confidence": 0.9 - 0.2 * fall,
        "teacher_entropy": 0.2,
        "student_entropy": 0.5 * fall + 0.1,
        "clipped_share": 0.01,
        "reversed_mass": 0.0,
        "reveal_ratio": ratio,
        "effective_ratio": round(ratio * 6) / 6,
        "completion_tokens": 22.0 + 3 * fall + 20 * wobble,
        "truncated_share": 0.03,
        "loop_share": 0.01,
        "accuracy": 0.7 - 0.25 * fall + wobble,
        "grad_norm": 1.2 + 5 * wobble,
        "learning_rate": 5e-4,
        "probe_nll": 0.8 * fall + 0.3 if update % 4 == 0 else None,
        "probe_success": 0.7 - 0.25 * fall if update % 4 == 0 else None,
        "probe_kl": None,
        "grounding": -0.4,
        "skipped": "loss is not finite" if update == 33 else None,
        "seconds": {
            "sample": 0.42,
            "teacher": 0.11,
            "student": 0.1,
            "loss_backward": 0.31,
            "control": 0.05,
            "evaluate": 1.5 if update % 20 == 0 else 0.0,
        },
    }
    return row | changes


def decision_row(update: int, ratio: float, noise: np.random.Generator, pending: bool = False) -> dict[str, Any]:
    progress = float(noise.normal(0.02, 0.03))
    return {
        "update": update,
        "state": [float(value) for value in noise.normal(size=7)],
        "concentration1": 1.7 + update / 20,
        "concentration0": 1.7 + update / 30,
        "samples": {"": ratio},
        "reveal_ratio": ratio,
        "effective_ratio": round(ratio * 6) / 6,
        "window": [update, update + 4],
        "progress_signal": [-0.5, None, None, None, -0.5 - progress],
        "grounding_signal": [-0.4, -0.4, -0.4, -0.4],
        "ratios_in_window": [ratio] * 4,
        "progress": None if pending else progress,
        "grounding": None if pending else -0.4,
        "reward": None if pending else progress,
        "advantage": None if pending else float(noise.normal()),
        "status": "pending" if pending else "finished",
        "logged_at": update + 8,
    }


def evaluation_row(
    update: int, accuracy: float, noise: np.random.Generator, split: str = "validation", problems: int = PROBLEMS
) -> dict[str, Any]:
    counts = {f"p{index}": int(noise.binomial(SAMPLES, accuracy)) for index in range(problems)}
    value = sum(counts.values()) / (SAMPLES * problems)
    average = {"value": value, "low": max(0.0, value - 0.08), "high": min(1.0, value + 0.08)}
    correct = sum(counts.values())
    return {
        "update": update,
        "split": split,
        "problems": problems,
        "samples": SAMPLES,
        "average": average,
        "pass_at_k": {"value": min(1.0, value + 0.1), "low": value, "high": min(1.0, value + 0.18)},
        "by_difficulty": {level: {"average": average, "problems": problems // 3} for level in ("2", "4", "10")},
        "verdicts": {
            "correct": correct,
            "wrong": max(0, SAMPLES * problems - correct - 1),
            "unparseable": 1,
            "timeout": 0,
        },
        "mean_tokens": 23.4,
        "truncated_share": 0.03,
        "loop_share": 0.01,
        "sampler": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "completion_tokens": 40, "seed": 0},
        "correct_counts": counts,
    }


def sample_row(update: int, tokens: list[str], noise: np.random.Generator, **changes: Any) -> dict[str, Any]:
    row = {
        "update": update,
        "problem_id": "p7",
        "difficulty": 3,
        "reveal_ratio": 0.5,
        "effective_ratio": 0.5,
        "student_context": "Problem: 3 plus 4\n\nReason step by step.",
        "teacher_context": "Problem: 3 plus 4\n\nReference solution:\n<<<\n3 + 4 = 7\n>>>\n\nReason step by step.",
        "completion": "".join(tokens),
        "verdict": "correct",
        "truncated": False,
        "tokens": tokens,
        "token_kl": [float(value) for value in noise.gamma(0.4, 0.5, len(tokens))],
    }
    return row | changes


def overwrite_rows(folder: Path, kind: str, text: str) -> None:
    """Other rows in a finished run, of which its manifest then says nothing."""
    (folder / f"{kind}.jsonl").write_text(text, "utf-8")
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text("utf-8")), "rows": None}), "utf-8")
