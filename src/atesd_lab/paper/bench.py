"""The finished cells as the experiments read them: by world and arm, one run per seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from matplotlib.figure import Figure

from atesd.table import Table
from atesd_lab.paper.claims import Claim
from atesd_lab.report.arms import Arms
from atesd_lab.report.groups import grouped, require_evaluated
from atesd_lab.report.rows import RunRows, read_run
from atesd_lab.sweep.plan import Cell

RATIOS: Mapping[str, float] = {"fixed-0": 0.0, "fixed-0.25": 0.25, "fixed-0.5": 0.5, "fixed-0.75": 0.75, "full": 1.0}
Bench = Mapping[str, Arms]
"""The arms of each world. Cells of one seed are paired."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What an experiment ends in: tables, figures by name, claims with their verdicts."""

    title: str
    tables: tuple[Table, ...]
    figures: Mapping[str, Figure]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()


def read_bench(cells: Sequence[Cell], pairs: Sequence[tuple[str, str]]) -> Bench:
    """The finished runs of some (world, arm) pairs, in their order. Raises `RunError` for runs that are no groups."""
    folders: dict[str, dict[str, list[Path]]] = {}
    for world, arm in pairs:
        mine = [cell for cell in cells if (cell.points["world"], cell.points["arm"]) == (world, arm)]
        folders.setdefault(world, {})[arm] = [cell.job.folder for cell in mine]
    return {
        world: Arms(world, {arm: grouped(arm, list(map(_read, paths))) for arm, paths in arms.items()})
        for world, arms in folders.items()
    }


def best_fixed(arms: Arms) -> str:
    """The best of the fixed ratios of a world, full exposure included."""
    return arms.best_fixed({arm: ratio for arm, ratio in RATIOS.items() if arm in arms.groups})


@cache
def _read(path: Path) -> RunRows:
    run = read_run(path)
    require_evaluated(run, path)
    return run
