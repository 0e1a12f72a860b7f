"""What the controller costs: its share of an update, from the seconds in metrics.jsonl, evaluation left out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from atesd.config import load_config
from atesd.rows import MetricsRow
from atesd.session import train
from benchmarks.harness import Case, Goal, Result, Settings, spread

LIMITS = {"paper": 0.03, "sound": 0.15}


def run(settings: Settings) -> Result:
    """Recipe `micro` under both presets; one share per block of eight updates, as long as a decision's cycle.

    A probe or a score is not due at every update, so that single updates say little.
    """
    updates = {"full": 48, "quick": 24, "small": 2}[settings.size]
    found: dict[str, dict[str, float]] = {}
    goals = []
    for preset, limit in LIMITS.items():
        rows = metrics(preset, updates, settings)
        blocks = [rows[i : i + 8] for i in range(0, len(rows), 8)]
        share = spread([share_of(block, "control") for block in blocks])
        phases = [phase for phase in rows[0]["seconds"] if phase != "evaluate"]
        found[preset] = {phase: share_of(rows, phase) for phase in phases}
        what = f"control, recipe micro, preset {preset}: share of an update"
        goals.append(Goal(what, "at most", limit, share, ""))
    return Result("control", [Case(f"share of each phase, recipe micro, {updates} updates", figures=found)], goals)


def share_of(rows: Sequence[MetricsRow], phase: str) -> float:
    """Share of a phase in the seconds of these updates, evaluation left out."""
    total = sum(s for row in rows for name, s in row["seconds"].items() if name != "evaluate")
    return float(sum(row["seconds"].get(phase, 0.0) for row in rows) / total)


def metrics(preset: str, updates: int, settings: Settings) -> list[MetricsRow]:
    """The rows of metrics.jsonl of a short run."""
    words = [f"credit.preset={preset}", f"train.num_updates={updates}", "train.evaluate_every=0"]
    if settings.size == "small":
        words += ["train.batch_size=4", "data.probe_size=4", "data.train_size=16", "sampling.completion_tokens=8"]
    with tempfile.TemporaryDirectory() as folder:
        return train(load_config("micro", words), Path(folder) / "run").run.rows("metrics")
