"""What aligned exposure and the token gate cost: seconds of an update and peak memory beside full exposure.

Each arm trains in a fresh process, in turns. The first hold is left out: it has no rollouts to take a direction from,
so nothing looks ahead. The look-ahead's share of an update is what it takes longer than full exposure: what
metrics.jsonl calls `control` misses the teacher's further ratios where every token chooses its own.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from pathlib import Path
from typing import Any

from atesd.build import build, close
from atesd.config import load_config
from atesd.runs import RunFolder
from atesd.train.listeners import Listeners
from atesd.train.loop import Trainer
from benchmarks.children import ROOT, Mark, in_child
from benchmarks.harness import Case, Goal, Result, Settings, spread

BASE = "full exposure"
ARMS = {
    BASE: ["exposure.kind=full"],
    "aligned, per update": ["exposure.kind=aligned"],
    "aligned, per problem": ["exposure.kind=aligned", "exposure.granularity=per_problem"],
    "aligned, per token": ["exposure.kind=aligned", "exposure.granularity=per_token"],
    "token gate": ["exposure.kind=full", "loss.gate=aligned"],
    "aligned, per update, by the last layer": ["exposure.kind=aligned", "alignment.parameters=last_layer"],
    "aligned, per update, by features": ["exposure.kind=aligned", "alignment.parameters=features"],
    "aligned, per update, by the last half": ["exposure.kind=aligned", "alignment.parameters=last_half"],
    "token gate, by the last half": ["exposure.kind=full", "loss.gate=aligned", "alignment.parameters=last_half"],
    "aligned, per update, by the last MLP": ["exposure.kind=aligned", "alignment.parameters=last_mlp"],
    "token gate, by the last MLP": ["exposure.kind=full", "loss.gate=aligned", "alignment.parameters=last_mlp"],
    "token gate, by the last layer": ["exposure.kind=full", "loss.gate=aligned", "alignment.parameters=last_layer"],
    "token gate, by features": ["exposure.kind=full", "loss.gate=aligned", "alignment.parameters=features"],
}
SMALL = ["train.batch_size=4", "data.probe_size=4", "data.train_size=16"]
LOW_BAR = ["alignment.min_correct=1"]  # so that the few rollouts of a small run give a direction
LIMIT = 0.25  # of an update


def run(settings: Settings) -> Result:
    """Recipe `micro`, then SmolLM2 where the adapter that `smollm2-sums` begins with has been trained."""
    holds, rounds = {"full": (8, 3), "quick": (3, 1), "small": (2, 1)}[settings.size]
    asked = {"micro": (4 * holds, rounds)}
    if settings.size != "small" and (ROOT / load_config("smollm2-sums").model.path).exists():
        asked["smollm2-sums"] = (8, 1)
    cases = [measured(recipe, updates, repeats, settings) for recipe, (updates, repeats) in asked.items()]
    return Result("lookahead", cases, [goal for case in cases for goal in goals_of(case)])


def goals_of(case: Case) -> list[Goal]:
    """At most a quarter of an update, in every round, for every arm that looks ahead."""
    return [
        Goal(
            f"look-ahead, {case.name}, {arm}: share of an update",
            "at most",
            LIMIT,
            spread([1 - row[BASE] / row[arm] for row in case.rounds]),
            "",
        )
        for arm in ARMS
        if arm != BASE
    ]


def measured(recipe: str, updates: int, rounds: int, settings: Settings) -> Case:
    """Seconds of an update per round, and the highest peak of any round."""
    small = settings.size == "small"
    measure = train_a_little if small else functools.partial(in_child, train_a_little)
    bar = {arm: LOW_BAR if small and arm != BASE else [] for arm in ARMS}
    words = ["train.evaluate_every=0", *(SMALL if small else [])]
    found = [
        {arm: measure(recipe=recipe, words=[*words, *own, *bar[arm]], updates=updates) for arm, own in ARMS.items()}
        for _ in range(rounds)
    ]
    return Case(
        f"recipe {recipe}, {updates} updates",
        [{arm: one["update"] for arm, one in row.items()} for row in found],
        {arm: max(row[arm]["peak"] for row in found) for arm in ARMS},
    )


def train_a_little(recipe: str, words: list[str], updates: int) -> dict[str, Any]:
    """Mean seconds of an update after the first hold, those under `control`, and the peak in bytes over the model."""
    config = load_config(recipe, words)
    components = build(config)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(components, RunFolder(Path(folder) / "run", "benchmark"), Listeners(()))
            mark = Mark("cpu")
            seconds = [trainer.update(update).row["seconds"] for update in range(updates)]
            peak = mark.rise()
    finally:
        close(components)
    late = seconds[config.credit.hold_updates :]
    total, control = (
        statistics.fmean(some) for some in zip(*((sum(r.values()), r["control"]) for r in late), strict=True)
    )
    return {"update": total, "control": control, "peak": peak}
