"""The step size of every arm in every world, from the finished runs of `atesd sweep aligned-tuning`.

    python -m atesd_lab.paper.step_sizes OUT...

The rule: the learning rate with the highest figure, the mean over seeds of the mean validation accuracy over all
evaluations after the first, so that speed and steadiness count. Of equals the smaller. No test accuracy is read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from atesd.errors import AtesdError, RunError
from atesd.runs import RunFolder
from atesd.table import Table
from atesd.text import MISSING, duration, percent
from atesd_lab.report.honest import markdown
from atesd_lab.sweep.pivot import SweptCell, read_cells, seconds_of

Figures = dict[str, dict[str, dict[float, float]]]
"""By world, arm and learning rate."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table per world, with what was chosen, and the cost."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("out", type=Path, nargs="+", help="the --out of a sweep over world, arm and train.learning_rate")
    try:
        cells = [cell for folder in asked.parse_args(arguments).out for cell in read_cells(folder)]
        print(page(cells))
    except AtesdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def page(cells: Sequence[SweptCell]) -> str:
    """The tables and the cost. Raises `RunError` where no run is finished, or a cell has not these axes."""
    lacking = next((cell for cell in cells if not {"world", "arm"} <= set(cell.points)), None)
    if lacking is not None:
        axes = ", ".join(lacking.points) or "none"
        raise RunError(f"{lacking.folder.name}: its axes are {axes}; expected world and arm among them")
    done = [cell for cell in cells if cell.state == "finished"]
    if not done:
        raise RunError("no run is finished; run the sweep first")
    tables = [markdown(_table(world, arms)) for world, arms in figures(done).items()]
    spent = seconds_of(row for cell in done for row in RunFolder.open(cell.folder).rows("metrics"))
    return "\n".join([*tables, f"{len(done)} of {len(cells)} runs are finished; {duration(spent)} of runs."])


def figures(done: Sequence[SweptCell]) -> Figures:
    """The figure of each world, arm and learning rate, over the seeds that are there."""
    by_seed: dict[tuple[str, str, float], list[float]] = {}
    for cell in done:
        run = RunFolder.open(cell.folder)
        place = cell.points["world"], cell.points["arm"], run.config.train.learning_rate
        by_seed.setdefault(place, []).append(_figure(run))
    found: Figures = {}
    for (world, arm, rate), values in by_seed.items():
        found.setdefault(world, {}).setdefault(arm, {})[rate] = fmean(values)
    return found


def chosen(by_rate: dict[float, float]) -> float:
    """The learning rate with the highest figure; of equals the smaller."""
    return max(sorted(by_rate), key=by_rate.__getitem__)


def _figure(run: RunFolder) -> float:
    """The mean validation accuracy over all evaluations after the first, each update once."""
    rows = run.rows("evaluations")
    late = {row["update"]: row["average"]["value"] for row in rows if row["split"] == "validation" and row["update"]}
    if not late:
        raise RunError(f"{run.path}: was never evaluated on validation after an update; set train.evaluate_every")
    return fmean(late.values())


def _table(world: str, arms: dict[str, dict[float, float]]) -> Table:
    rates = sorted({rate for by_rate in arms.values() for rate in by_rate})
    rows = []
    for arm, by_rate in arms.items():
        cells = [percent(by_rate[rate]) if rate in by_rate else MISSING for rate in rates]
        rows.append((arm, *cells, f"{chosen(by_rate):g}"))
    columns = ("arm", *(f"{rate:g}" for rate in rates), "chosen")
    return Table(f"{world}: mean validation accuracy after the start, %", columns, tuple(rows))


if __name__ == "__main__":
    sys.exit(main())
