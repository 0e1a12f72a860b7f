"""The finished cells as the experiments read them: by world and arm, one run per seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import final

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from atesd.errors import RunError
from atesd.runs import RunFolder
from atesd.table import Table
from atesd.text import MISSING, percent
from atesd_lab.paper.claims import Claim, Contrast
from atesd_lab.report.groups import grouped
from atesd_lab.report.honest import compare_groups, results_table
from atesd_lab.report.rows import Row, RunRows, read_run
from atesd_lab.stats.differences import paired_difference
from atesd_lab.sweep.plan import Cell

Floats = NDArray[np.float64]
RATIOS: Mapping[str, float] = {"fixed-0": 0.0, "fixed-0.25": 0.25, "fixed-0.5": 0.5, "fixed-0.75": 0.75, "full": 1.0}


@dataclass(frozen=True, slots=True)
class Findings:
    """What an experiment ends in: tables, figures by name, claims with their verdicts."""

    title: str
    tables: tuple[Table, ...]
    figures: Mapping[str, Figure]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()


@final
class Bench:
    """Finished runs by (world, arm), in the order of the seeds. Cells of one seed are paired."""

    def __init__(self, cells: Sequence[Cell], pairs: Sequence[tuple[str, str]]) -> None:
        self._folders: dict[tuple[str, str], list[Path]] = {pair: [] for pair in pairs}
        for cell in sorted(cells, key=lambda cell: cell.seed):
            pair = (cell.points["world"], cell.points["arm"])
            if pair in self._folders:
                self._folders[pair].append(cell.job.folder)
        self.seeds = tuple(sorted({cell.seed for cell in cells}))

    @property
    def worlds(self) -> list[str]:
        """The worlds, in order."""
        return list(dict.fromkeys(world for world, _ in self._folders))

    def arms(self, world: str) -> list[str]:
        """The arms of a world, in order."""
        return [arm for other, arm in self._folders if other == world]

    def runs(self, world: str, arm: str) -> list[RunRows]:
        """The runs of an arm, one per seed."""
        return [_read(path) for path in self._folders[world, arm]]

    def last_test(self, world: str, arm: str) -> list[Row]:
        """The evaluation of each seed on test after the last update."""
        return [run.evaluated("test")[-1] for run in self.runs(world, arm)]

    def base_test(self, world: str) -> list[Row]:
        """The evaluation of each seed on test before the first update: the same for all arms of a world."""
        return [run.evaluated("test")[0] for run in self.runs(world, self.arms(world)[0])]

    def accuracies(self, world: str, arm: str) -> list[float]:
        """Average@k of each seed on test after the last update, in [0, 1]."""
        return [float(row["average"]["value"]) for row in self.last_test(world, arm)]

    def late_ratios(self, world: str, arm: str) -> list[float]:
        """The mean reveal ratio of each seed over the last quarter of the updates; empty if nothing was revealed."""
        found = []
        for run in self.runs(world, arm):
            ratios = run.series("reveal_ratio")[1]
            found += [fmean(ratios[-max(1, len(ratios) // 4) :])] if ratios else []
        return found

    def difference(self, world: str, baseline: str, candidate: str, problems: Sequence[str] | None = None) -> Contrast:
        """The gain of a candidate over a baseline at the last update on test, in points, paired by seed and problem."""
        a, b = (shares(self.last_test(world, arm), problems) for arm in (baseline, candidate))
        return _points(f"{candidate} - {baseline}", a, b)

    def selected(self, world: str, baseline: str, candidate: str) -> Contrast:
        """The gain at each run's own best checkpoint, chosen on one half of validation and scored on the other.

        Raises `RunError` where there is nothing to choose from.
        """
        groups = (grouped(arm, self.runs(world, arm)) for arm in (baseline, candidate))
        found = compare_groups(*groups).comparisons
        one = next((one for one in found if one.honest and one.short.startswith("peak")), None)
        if one is None:
            raise RunError(
                f"{world}: {baseline} and {candidate} share fewer than two validations after the start, so that no "
                "checkpoint can be selected; set train.evaluate_every to half of train.num_updates or less"
            )
        value, low, high = (100 * number for number in (one.difference, *one.interval))
        return Contrast(f"{candidate} - {baseline}, selected", value, low, high)

    def gain(self, world: str, arm: str) -> Contrast:
        """What training with an arm brought, in points of test, paired by seed and problem."""
        return _points(f"{arm} - base", shares(self.base_test(world)), shares(self.last_test(world, arm)))

    def best_fixed(self, world: str) -> str:
        """The fixed ratio with the highest mean validation after the last update; the lowest of equals."""

        def validated(arm: str) -> float:
            return fmean(float(run.evaluated("validation")[-1]["average"]["value"]) for run in self.runs(world, arm))

        return max((arm for arm in self.arms(world) if arm in RATIOS), key=validated)

    def table(self, world: str, arms: Sequence[str], baseline: str, paper: Mapping[str, str] | None = None) -> Table:
        """The selection-honest table of some arms, with the base model's row and the late ratios."""
        folders = {arm: [RunFolder.open(path) for path in self._folders[world, arm]] for arm in arms}
        table = results_table(folders, baseline, paper)
        base = dict.fromkeys(table.columns, MISSING)
        base |= {"arm": "base", "seeds": str(len(self.seeds)), "paper": (paper or {}).get("base", MISSING)}
        last = next(column for column in table.columns if column.startswith("last (test)"))
        base[last] = percent(fmean(float(row["average"]["value"]) for row in self.base_test(world)))
        late = [self.late_ratios(world, arm) for arm in arms]
        ratios = [MISSING, *(f"{fmean(some):.2f}" if some else MISSING for some in late)]
        rows = [tuple(base[column] for column in table.columns), *table.rows]
        return replace(
            table,
            title=f"{world}: {table.title}",
            columns=(*table.columns, "late ratio"),
            rows=tuple((*row, ratio) for row, ratio in zip(rows, ratios, strict=True)),
        )


def shares(rows: Sequence[Row], problems: Sequence[str] | None = None) -> Floats:
    """Shares correct [seeds, problems] of evaluations of the same problems, by name."""
    names = sorted(rows[0]["correct_counts"]) if problems is None else problems
    return np.array([[row["correct_counts"][name] / row["samples"] for name in names] for row in rows])


def _points(name: str, baseline: Floats, candidate: Floats) -> Contrast:
    found = paired_difference(baseline, candidate)
    value, low, high = (100 * float(number) for number in (found.value, found.low, found.high))
    return Contrast(name, value, low, high)


@cache
def _read(path: Path) -> RunRows:
    return read_run(path)
