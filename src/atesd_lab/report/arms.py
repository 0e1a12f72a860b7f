"""The arms of one world after their last update: what each came to, and differences over the seeds that two share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import final

import numpy as np
from numpy.typing import NDArray

from atesd.errors import RunError
from atesd.rows import EvaluationRow
from atesd.table import Table
from atesd.text import MISSING, percent
from atesd_lab.report.groups import RunGroup, common_pair, shares_at
from atesd_lab.report.honest import compare_groups, results_table
from atesd_lab.report.rows import RunRows, average
from atesd_lab.stats.contrast import Contrast, paired
from atesd_lab.stats.selection import best_fixed

Floats = NDArray[np.float64]


@final
class Arms:
    """Finished runs by arm, in the order of the plan; each arm's in the order of the seeds."""

    def __init__(self, name: str, groups: Mapping[str, RunGroup]) -> None:
        self.name = name
        self.groups = groups

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that any arm has."""
        return tuple(sorted({seed for group in self.groups.values() for seed in group.seeds}))

    def runs(self, arm: str) -> Sequence[RunRows]:
        """The runs of an arm, one per seed."""
        return self.groups[arm].runs

    def last_test(self, arm: str) -> list[EvaluationRow]:
        """The evaluation of each seed on test after the last update."""
        return [evaluated_on(run, "test")[-1] for run in self.runs(arm)]

    def base_test(self) -> list[EvaluationRow]:
        """The evaluation of each seed on test before the first update: the same for all arms."""
        return [evaluated_on(run, "test")[0] for run in self.runs(next(iter(self.groups)))]

    def accuracies(self, arm: str) -> list[float]:
        """Average@k of each seed on test after the last update, in [0, 1]."""
        return list(map(average, self.last_test(arm)))

    def late_ratios(self, arm: str) -> list[float]:
        """The late ratio of each seed; empty if nothing was revealed."""
        return [ratio for run in self.runs(arm) if (ratio := run.late_ratio) is not None]

    def common(self, *arms: str) -> tuple[int, ...]:
        """The seeds that all of these arms have, in order; none where one of them has no finished run."""
        each = [set(self.groups[arm].seeds) if arm in self.groups else set() for arm in arms]
        return tuple(sorted(set.intersection(*each)))

    def pair(self, baseline: str, candidate: str) -> tuple[RunGroup, RunGroup]:
        """Both arms over the seeds that they share. Raises `RunError` where they share none."""
        pair = common_pair(self.groups[baseline], self.groups[candidate])
        if pair is None:
            raise RunError(f"{self.name}: {baseline} and {candidate} have no seed in common; finish the sweep")
        return pair

    def difference(self, baseline: str, candidate: str, problems: Sequence[str] | None = None) -> Contrast:
        """The gain of a candidate over a baseline on test after the last update, paired by seed and problem."""
        pair = self.pair(baseline, candidate)
        tables = shares_at(pair, "test", {group.name: group.last for group in pair}, problems)
        return paired(f"{candidate} - {baseline}", tables[baseline], tables[candidate])

    def gain(self, arm: str) -> Contrast:
        """What training with an arm brought on test, paired by seed and problem."""
        group = self.groups[arm]
        base, last = (shares_at([group], "test", {arm: update})[arm] for update in (0, group.last))
        return paired(f"{arm} - base", base, last)

    def selected(self, baseline: str, candidate: str) -> Contrast:
        """The gain at each run's own best checkpoint, chosen on one half of validation and scored on the other.

        Raises `RunError` where there is nothing to choose from.
        """
        found = compare_groups(self.groups[baseline], self.groups[candidate]).comparisons
        one = next((one for one in found if one.honest and one.short.startswith("peak")), None)
        if one is None:
            raise RunError(
                f"{self.name}: {baseline} and {candidate} share fewer than two validations after the start, so that no "
                "checkpoint can be selected; set train.evaluate_every to half of train.num_updates or less"
            )
        return replace(one.contrast, name=f"{candidate} - {baseline}, selected")

    def best_fixed(self, ratios: Mapping[str, float]) -> str:
        """Of the arms with these fixed ratios the one that was validated best after the last update.

        By the mean over the seeds that all of them have; the lowest ratio of equals. `RunError` without such a seed.
        """
        common = self.common(*ratios)
        if not common:
            raise RunError(f"{self.name}: the fixed ratios have no seed in common; finish the sweep")
        validated = {
            arm: fmean(
                average(evaluated_on(run, "validation")[-1])
                for run in self.runs(arm)
                if run.config.train.seed in common
            )
            for arm in ratios
        }
        return best_fixed(ratios, validated)

    def table(self, arms: Sequence[str], baseline: str, paper: Mapping[str, str] | None = None) -> Table:
        """The selection-honest table of some arms, with the base model's row and the late ratios."""
        table = results_table({arm: self.groups[arm] for arm in arms}, baseline, paper)
        base = dict.fromkeys(table.columns, MISSING)
        base |= {"arm": "base", "seeds": str(len(self.seeds)), "paper": (paper or {}).get("base", MISSING)}
        last = next(column for column in table.columns if column.startswith("last (test)"))
        base[last] = percent(fmean(map(average, self.base_test())))
        late = [self.late_ratios(arm) for arm in arms]
        ratios = [MISSING, *(f"{fmean(some):.2f}" if some else MISSING for some in late)]
        rows = [tuple(base[column] for column in table.columns), *table.rows]
        return replace(
            table,
            title=f"{self.name}: {table.title}",
            columns=(*table.columns, "late ratio"),
            rows=tuple((*row, ratio) for row, ratio in zip(rows, ratios, strict=True)),
        )


def evaluated_on(run: RunRows, split: str) -> tuple[EvaluationRow, ...]:
    """Its evaluations on a split. Raises `RunError` where there is none."""
    rows = run.evaluated(split)
    if not rows:
        raise RunError(f"{run.name}: never evaluated on {split}; set data.{split}_size above 0 and train it anew")
    return rows
