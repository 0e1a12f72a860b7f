"""What aligned exposure and the token gate cost: seconds of an update, the look-ahead's share of them, and peak memory.

Each arm trains in a fresh process, in turns. The first hold is left out: it has no rollouts to take a direction from,
so nothing looks ahead.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from pathlib import Path
from typing import Any

from atesd.build import Silent, build, close
from atesd.config import load_config
from atesd.runs import RunFolder
from atesd.train.loop import Trainer
from benchmarks.children import ROOT, Mark, in_child
from benchmarks.harness import Case, Goal, Result, Settings, spread

BASE = "full exposure"
ARMS = {
    BASE: ["exposure.kind=full"],
    "aligned, per update": ["exposure.kind=aligned"],
    "aligned, per problem": ["exposure.kind=aligned", "exposure.granularity=per_problem"],
    "aligned, per token": ["exposure.kind=aligned", "exposure.granularity=per_token"],
    "token gate": ["exposure.kind=full", "loss.token_gate=aligned"],
}
SMALL = ["train.batch_size=4", "data.probe_size=4", "data.train_size=16", "aligned.min_correct=1"]
LIMIT = 0.25  # of an update


def run(settings: Settings) -> Result:
    """Recipe `micro`, then SmolLM2 where the adapter that `smollm2-sums` begins with has been trained."""
    holds, rounds = {"full": (8, 3), "quick": (3, 1), "small": (2, 1)}[settings.size]
    asked = {"micro": (4 * holds, rounds)}
    if settings.size != "small" and (ROOT / load_config("smollm2-sums").model.path).exists():
        asked["smollm2-sums"] = (8, 1)
    cases, goals = [], []
    for recipe, (updates, repeats) in asked.items():
        case, shares = measured(recipe, updates, repeats, settings)
        cases.append(case)
        goals += [
            Goal(f"look-ahead, recipe {recipe}, {arm}: share of an update", "at most", LIMIT, spread(share), "")
            for arm, share in shares.items()
            if arm != BASE
        ]
    return Result("lookahead", cases, goals)


def measured(recipe: str, updates: int, rounds: int, settings: Settings) -> tuple[Case, dict[str, list[float]]]:
    """Seconds of an update per round, the highest peak of any round, and the look-ahead's shares."""
    small = settings.size == "small"
    measure = train_a_little if small else functools.partial(in_child, train_a_little)
    words = ["train.evaluate_every=0", *(SMALL if small else [])]
    found = [
        {arm: measure(recipe=recipe, words=[*words, *own], updates=updates) for arm, own in ARMS.items()}
        for _ in range(rounds)
    ]
    case = Case(
        f"recipe {recipe}, {updates} updates",
        [{arm: one["update"] for arm, one in row.items()} for row in found],
        {arm: max(row[arm]["peak"] for row in found) for arm in ARMS},
    )
    return case, {arm: [row[arm]["share"] for row in found] for arm in ARMS}


def train_a_little(recipe: str, words: list[str], updates: int) -> dict[str, Any]:
    """Mean seconds of an update after the first hold, the look-ahead's share, and the peak in bytes over the model."""
    config = load_config(recipe, words)
    parts = build(config)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(parts, RunFolder(Path(folder) / "run", "benchmark"), Silent())
            mark = Mark("cpu")
            seconds = [trainer.update(update)[2]["seconds"] for update in range(updates)]
            peak = mark.rise()
    finally:
        close(parts)
    late = seconds[config.credit.hold_updates :]
    total = statistics.fmean(sum(row.values()) for row in late)
    return {"update": total, "share": statistics.fmean(row["control"] for row in late) / total, "peak": peak}
