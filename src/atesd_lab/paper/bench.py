"""The finished cells as the experiments read them: by world and arm, one run per seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from matplotlib.figure import Figure

from atesd.data.benchmarks import registry
from atesd.errors import RunError
from atesd.table import Table
from atesd_lab.paper.claims import Claim
from atesd_lab.paper.pooling import Pooling, pooling_of
from atesd_lab.report.arms import Arms
from atesd_lab.report.groups import grouped, require_evaluated
from atesd_lab.report.rows import RunRows, read_run
from atesd_lab.sweep.plan import Cell

RATIOS: Mapping[str, float] = {"fixed-0": 0.0, "fixed-0.25": 0.25, "fixed-0.5": 0.5, "fixed-0.75": 0.75, "full": 1.0}
SIZES = ("qwen3-1.7b", "qwen3-4b", "qwen3-8b")
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


def read_bench(cells: Sequence[Cell], pairs: Sequence[tuple[str, str]], pooling: Pooling | None = None) -> Bench:
    """The finished runs of some (world, arm) pairs, in their order. Raises `RunError` for runs that are no groups.

    With `pooling` their test problems are those of the benchmarks.
    """
    folders: dict[str, dict[str, list[Path]]] = {}
    for world, arm in pairs:
        mine = [cell for cell in cells if (cell.points["world"], cell.points["arm"]) == (world, arm)]
        folders.setdefault(world, {})[arm] = [cell.job.folder for cell in mine]
    return {
        world: Arms(world, {arm: grouped(arm, _pooled(paths, pooling)) for arm, paths in arms.items()})
        for world, arms in folders.items()
    }


def pooling_for(cells: Sequence[Cell], finished: Set[Path]) -> Pooling | None:
    """The benchmarks on which the cells were evaluated, with the base rows that any finished one holds.

    Raises `RunError` where an evaluation of others has come later.
    """
    scoring = cells[0].job.scoring
    if scoring is None:
        return None
    done = [cell for cell in cells if cell.job.folder in finished]
    other = next((cell.job.folder for cell in done if not cell.job.was_finished()), None)
    if other is not None:
        raise RunError(f"{other}: its newest evaluations are of other benchmarks or samples; choose another --out")
    runs = [_read(cell.job.folder) for cell in done]
    return pooling_of([one.name for one in scoring.asked], runs)


def _pooled(paths: Sequence[Path], pooling: Pooling | None) -> list[RunRows]:
    runs = list(map(_read, paths))
    return runs if pooling is None else list(map(pooling.pooled, runs))


def main_world(bench: Bench) -> str:
    """The world that an experiment looks at most closely: its first."""
    return next(iter(bench))


def paper_model(bench: Bench) -> str:
    """Which of the paper's models stands beside ours: that of the runs where it is one of them, else its smallest."""
    arms = bench[main_world(bench)]
    name = Path(arms.runs(next(iter(arms.groups)))[0].config.model.path).name.lower()
    return name if name in SIZES else SIZES[0]


def benchmarks_of(arms: Arms) -> tuple[str, ...]:
    """The benchmarks whose problems are the test problems; none: those of the world."""
    row = arms.base_test()[0]
    names = tuple(row["by_difficulty"])
    return names if all(name in registry().benchmarks for name in names) else ()


def best_fixed(arms: Arms) -> str:
    """The best of the fixed ratios of a world, full exposure included."""
    return arms.best_fixed({arm: ratio for arm, ratio in RATIOS.items() if arm in arms.groups})


@cache
def _read(path: Path) -> RunRows:
    run = read_run(path)
    require_evaluated(run, path)
    return run
