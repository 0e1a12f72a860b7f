"""Runs that differ in the seed alone, taken together: the only intervals here that cover the choice of seed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atesd.config import dump_config, method_name
from atesd.rows import EvaluationRow
from atesd.table import Table
from atesd.text import percent_interval
from atesd_lab.report.rows import RunRows, shares
from atesd_lab.stats.contrast import paired
from atesd_lab.stats.differences import mean_share


@dataclass(frozen=True, slots=True)
class SeedGroup:
    """Runs of one config, by seed, evaluated on `problems` at `update`; `correct` is [seeds, problems], in [0, 1]."""

    name: str
    seeds: tuple[int, ...]
    update: int
    problems: tuple[str, ...]
    correct: NDArray[np.float64]


def seeds_table(runs: Sequence[RunRows], split: str) -> Table | None:
    """Average@k over seeds and problems, and paired differences of groups with the same seeds; None without a group."""
    groups = seed_groups(runs, split)
    if not groups:
        return None
    rows = [
        (group.name, percent_interval(mean_share(group.correct)), str(len(group.seeds)), str(group.update))
        for group in groups
    ]
    for first, second in itertools.combinations(groups, 2):
        if (first.seeds, first.problems, first.update) == (second.seeds, second.problems, second.update):
            name, found = f"{second.name} - {first.name}, points", paired("", first.correct, second.correct)
            rows.append((name, found.in_points, str(len(first.seeds)), str(first.update)))
    notes = ("Last common update; 95 % interval over seeds and problems (Student's t on the crossed mean squares).",)
    return Table(f"Over seeds, on {split}, %", ("runs", "Average@k", "seeds", "update"), tuple(rows), notes)


def seed_groups(runs: Sequence[RunRows], split: str) -> list[SeedGroup]:
    """The groups of at least two runs that differ in `train.seed` alone and share evaluated problems."""
    by_config: dict[str, dict[int, RunRows]] = {}
    for run in runs:
        by_config.setdefault(dump_config(run.seedless), {})[run.config.train.seed] = run
    groups = [_group([members[seed] for seed in sorted(members)], split) for members in by_config.values()]
    return [group for group in groups if group is not None]


def _group(runs: Sequence[RunRows], split: str) -> SeedGroup | None:
    by_update = [{int(row["update"]): row for row in run.evaluated(split)} for run in runs]
    common = set.intersection(*map(set, by_update))
    if len(runs) < 2 or not common:
        return None
    rows: list[EvaluationRow] = [evaluations[max(common)] for evaluations in by_update]
    problems = tuple(sorted(set.intersection(*(set(row.get("correct_counts") or {}) for row in rows))))
    if len(problems) < 2:
        return None
    seeds = tuple(run.config.train.seed for run in runs)
    return SeedGroup(
        f"{method_name(runs[0].config)} as {runs[0].name}", seeds, max(common), problems, shares(rows, problems)
    )
