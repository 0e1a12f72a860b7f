"""What a run writes down: the rows of metrics.jsonl, decisions.jsonl and samples.jsonl."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from atesd.records import FinishedDecision, UpdateStats
from atesd.train.batches import Batch
from atesd.train.parts import Parts
from atesd.train.step import StepMeters

METRICS = (
    "update",
    "loss",
    "kl",
    "top1_disagreement",
    "student_confidence",
    "teacher_entropy",
    "student_entropy",
    "clipped_share",
    "reversed_mass",
    "reveal_ratio",
    "effective_ratio",
    "completion_tokens",
    "truncated_share",
    "loop_share",
    "accuracy",
    "probe_nll",
    "probe_success",
    "probe_gain",
    "probe_kl",
    "grounding",
    "alignment",
    "kept_share",
    "curvature",
    "grad_norm",
    "learning_rate",
    "skipped",
    "seconds",
)
"""The keys of a row of metrics.jsonl."""


def metrics_row(
    update: int, batch: Batch, meters: StepMeters, stats: UpdateStats, looping: Callable[[Sequence[int]], bool]
) -> dict[str, Any]:
    """The measured part of a row of metrics.jsonl. What was not measured, or is not finite, is None."""
    distilled = "kl" in meters.means
    graded = [verdict == "correct" for verdict in batch.verdicts if verdict is not None]
    means = meters.means
    row: dict[str, Any] = {
        "update": update,
        "loss": stats.loss,
        "kl": stats.kl if distilled else None,
        "top1_disagreement": stats.top1_disagreement if distilled else None,
        "student_confidence": stats.student_confidence,
        "teacher_entropy": means.get("teacher_entropy"),
        "student_entropy": means["student_entropy"],
        "clipped_share": _share(means["clipped_mass"], means["loss"]) if distilled else None,
        "reversed_mass": means.get("reversed_mass"),
        "reveal_ratio": stats.reveal_ratio if distilled else None,
        "effective_ratio": stats.effective_ratio if distilled else None,
        "completion_tokens": statistics.fmean(len(rollout.completion_ids) for rollout in batch.rollouts),
        "truncated_share": statistics.fmean(rollout.truncated for rollout in batch.rollouts),
        "loop_share": statistics.fmean(looping(rollout.completion_ids) for rollout in batch.rollouts),
        "accuracy": statistics.fmean(graded) if graded else None,
        "probe_nll": stats.probe_nll,
        "probe_success": stats.probe_success,
        "probe_gain": stats.probe_gain,
        "probe_kl": stats.probe_kl,
        "grounding": stats.grounding,
        "kept_share": means.get("kept"),
        "curvature": means.get("curvature"),
    }
    measured = {name: finite_or_none(value) for name, value in row.items()}
    return {**measured, "alignment": asdict(batch.alignment) if batch.alignment else None}


def skipped_row(update: int, reason: str, learning_rate: float) -> dict[str, Any]:
    """The row of an update that never came to a step: nothing measured, and why."""
    unknown = dict.fromkeys(METRICS)
    return {**unknown, "update": update, "learning_rate": learning_rate, "skipped": reason, "seconds": {}}


def decision_row(finished: FinishedDecision, update: int, status: str) -> dict[str, Any]:
    """A decision as a row of decisions.jsonl."""
    decision = finished.decision
    return {
        "update": decision.update,
        "state": list(decision.state),
        "concentration1": decision.concentration1,
        "concentration0": decision.concentration0,
        "samples": decision.samples,
        "reveal_ratio": finished.reveal_ratio,
        "effective_ratio": finished.effective_ratio,
        "window": list(finished.window),
        "progress_signal": list(finished.progress_signal),
        "grounding_signal": list(finished.grounding_signal),
        "ratios_in_window": list(finished.ratios_in_window),
        "progress": finished.progress,
        "grounding": finished.grounding,
        "reward": finished.reward,
        "advantage": finished.advantage,
        "status": status,
        "logged_at": update,
    }


def sample_rows(update: int, batch: Batch, meters: StepMeters, parts: Parts) -> Iterator[dict[str, Any]]:
    """The first rollouts of an update with both contexts, as rows of samples.jsonl."""
    encoder = parts.encoder
    for i in range(min(parts.config.train.log_samples, len(batch.rows))):
        problem, rollout, view = batch.problems[i], batch.rollouts[i], batch.views[i]
        yield {
            "update": update,
            "problem_id": problem.id,
            "difficulty": problem.difficulty,
            "reveal_ratio": batch.reveal_ratios[i],
            "effective_ratio": view.effective_ratio,
            "student_context": encoder.student_text(parts.renderer.student(problem)),
            "teacher_context": encoder.teacher_text(view.text) if view.text else "",
            "completion": encoder.decode(rollout.completion_ids),
            "verdict": batch.verdicts[i],
            "truncated": rollout.truncated,
            "tokens": encoder.pieces(rollout.completion_ids),
            "token_kl": _of_tokens(meters, "kl", i),
            "token_alignment": _of_tokens(meters, "alignment", i),
            "token_ratio": _of_tokens(meters, "token_ratio", i),
        }


def _of_tokens(meters: StepMeters, name: str, row: int) -> list[float | None]:
    """A meter of every token of a row; empty if it was not measured."""
    return [finite_or_none(value) for value in meters.tokens[name][row]] if name in meters.tokens else []


def _share(clipped: float, kept: float) -> float | None:
    """Share of the divergence that the clip cut off; None where there is no divergence at all."""
    return clipped / (clipped + kept) if clipped + kept else None


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN: what is not finite is not known."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
