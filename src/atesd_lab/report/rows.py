"""A run folder as the report reads it: its rows, frozen, in the order of the updates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from atesd.config import Config
from atesd.errors import RunError
from atesd.rows import DecisionRow, EvaluationRow, MetricsRow, SampleRow, late_mean
from atesd.runs import RunFolder
from atesd.text import finite

Manifest = Mapping[str, Any]
R = TypeVar("R", MetricsRow, DecisionRow, EvaluationRow, SampleRow)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunRows:
    """One run: what it was asked to do, and what it logged. Any of the four kinds of rows may be empty."""

    name: str
    config: Config
    manifest: Manifest
    metrics: tuple[MetricsRow, ...]
    decisions: tuple[DecisionRow, ...]
    evaluations: tuple[EvaluationRow, ...]
    samples: tuple[SampleRow, ...]

    @property
    def updates_done(self) -> int:
        """How many student updates have been logged."""
        return int(self.metrics[-1]["update"]) + 1 if self.metrics else 0

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that were evaluated, test first."""
        found = {str(row["split"]) for row in self.evaluations}
        return tuple(sorted(found, key=lambda split: (split != "test", split)))

    def evaluated(self, split: str) -> tuple[EvaluationRow, ...]:
        """The evaluations of one split, by update."""
        return tuple(row for row in self.evaluations if row["split"] == split)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Updates and values of a metric, without the updates at which it was not measured."""
        pairs = [(int(row["update"]), finite(row.get(key))) for row in self.metrics]
        kept = [(update, value) for update, value in pairs if value is not None]
        return [update for update, _ in kept], [value for _, value in kept]

    def at(self, split: str, update: int) -> EvaluationRow | None:
        """The evaluation of a split after so many updates, if there is one."""
        return next((row for row in self.evaluated(split) if row["update"] == update), None)

    @property
    def late_ratio(self) -> float | None:
        """The mean reveal ratio over the last quarter of its updates; None where none revealed anything."""
        ratios = self.series("reveal_ratio")[1]
        return late_mean(ratios) if ratios else None

    @property
    def seedless(self) -> Config:
        """Its config with seed 0: equal for runs that differ in the seed alone."""
        return self.config.model_copy(update={"train": self.config.train.model_copy(update={"seed": 0})})


def average(row: EvaluationRow) -> float:
    """Average@k of an evaluation, a share."""
    return float(row["average"]["value"])


def validated(run: RunRows) -> tuple[list[int], list[float]]:
    """Updates and Average@k on validation, shares."""
    rows = run.evaluated("validation")
    return [row["update"] for row in rows], list(map(average, rows))


def peak(evaluations: Sequence[EvaluationRow]) -> EvaluationRow | None:
    """The evaluation with the highest Average@k, the earliest of equals; it is selected on the data it reports."""
    return max(evaluations, key=average, default=None)


def at_common_updates(
    what: str, series: Sequence[tuple[Sequence[int], Sequence[T]]]
) -> tuple[list[int], list[list[T]]]:
    """The updates that all series have, and the values of each there; a skipped update is missing from its run's.

    Raises `RunError` in the name of `what` where there is no such update.
    """
    each = [dict(zip(*one, strict=True)) for one in series]
    common = sorted(set.intersection(*map(set, each)))
    if not common:
        raise RunError(f"{what}: there is no update at which every run has it")
    return common, [[one[update] for update in common] for one in each]


def shares(rows: Sequence[EvaluationRow], problems: Sequence[str] | None = None) -> NDArray[np.float64]:
    """Shares correct [rows, problems] of evaluations; without `problems` those of the first row, by name."""
    names = sorted(rows[0]["correct_counts"]) if problems is None else problems
    return np.array([[row["correct_counts"][name] / row["samples"] for name in names] for row in rows])


def read_run(path: Path, name: str | None = None) -> RunRows:
    """Read a run folder, finished or still growing. Raises `RunError` if it is none, `ConfigError` on its settings."""
    folder = RunFolder.open(path)
    folder.require_rows()
    return RunRows(
        name=name or path.resolve().name,
        config=folder.config,
        manifest=folder.manifest,
        metrics=_newest_by(folder.whole_rows("metrics"), itemgetter("update")),
        decisions=_newest_by(folder.whole_rows("decisions"), itemgetter("update")),
        evaluations=_newest_by(folder.whole_rows("evaluations"), itemgetter("update", "split")),
        samples=tuple(folder.whole_rows("samples")),
    )


def read_runs(paths: Sequence[Path]) -> list[RunRows]:
    """Read several run folders, with names that tell them apart."""
    if not paths:
        raise RunError("no run folder given; expected at least one, for example runs/micro")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = ["/".join(path.resolve().parts[-2:]) for path in paths]
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def natural(text: str) -> tuple[tuple[float, str], ...]:
    """A sort key that puts difficulty 10 after difficulty 9, and words after numbers."""
    return tuple((int(digits) if digits else math.inf, word) for digits, word in re.findall(r"(\d+)|(\D+)", text))


def _newest_by(rows: Sequence[R], key: Callable[[R], Hashable]) -> tuple[R, ...]:
    """One row per key, the last written, by update: a decision logged as pending may come again as finished."""
    newest = {key(row): row for row in rows}
    return tuple(sorted(newest.values(), key=itemgetter("update")))
