"""What the runs of a plan came to, and the commands that train them elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import BaseFileLock, FileLock

from atesd.errors import RunError
from atesd.rows import EvaluationRow, late_mean, revealed
from atesd.runs import RunFolder, write_atomic
from atesd.table import Table, render_text
from atesd.text import MISSING, percent
from atesd_lab.report.groups import group_of
from atesd_lab.report.honest import results_table
from atesd_lab.sweep.plan import Cell, stages

NOTES = (
    "Average@k in %. Best: the highest validation, and after which update; picked on the data that it is read on, it",
    "is too high: compare the last. Late ratio: mean reveal ratio over the last quarter of the updates.",
)


def write_index(cells: Sequence[Cell], out: Path, keep: bool = False) -> None:
    """cells.json: what each folder of a sweep is, for whatever reads the sweep. `RunError` if `out` cannot be made.

    `keep`: the cells that it lists already stay, as several commands share the folder.
    """
    rows = {
        cell.job.name: {"folder": cell.job.name, "group": cell.group, "points": dict(cell.points), "seed": cell.seed}
        for cell in cells
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out}: cannot make the folder: {error.strerror}; choose another --out") from None
    path = out / "cells.json"
    with _shared(path):
        listed = _listed(path) if keep else {}
        write_atomic(path, (json.dumps(list({**listed, **rows}.values()), indent=1) + "\n").encode())


def _listed(path: Path) -> dict[str, Any]:
    try:
        return {row["folder"]: row for row in json.loads(path.read_bytes())}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: it is written anew
        return {}


def write_shared(path: Path, text: str) -> None:
    """Write a file that several sweeps of one folder may write at the same time."""
    with _shared(path):
        write_atomic(path, text.encode())


def _shared(path: Path) -> BaseFileLock:
    return FileLock(path.with_name(f".{path.name}.lock"))


def command_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """One `atesd train` a line for what is not finished; a comment says where to wait for the lines above."""
    finished = {cell.job.folder for cell in cells if cell.job.is_finished()}
    if finished:
        yield f"# {len(finished)} of {len(cells)} cells are finished and not listed"
    waiting = False
    for some in stages(cells):
        left = [cell for cell in some if cell.job.folder not in finished]
        if waiting and left:
            yield "# wait here: each of the following reads a run above"
        yield from (cell.job.command_line for cell in left)
        waiting = waiting or bool(left)


def sweep_tables(cells: Sequence[Cell]) -> str:
    """Tables of the finished cells: every cell, the mean over seeds of each group, the groups against the first."""
    scored = [(cell, scores(cell.job.folder)) for cell in cells if cell.job.is_finished()]
    columns = ("base", "last validation", "best validation", "last test", "late ratio")
    groups: dict[str, list[dict[str, float | None]]] = {}
    for cell, found in scored:
        groups.setdefault(cell.group, []).append(found)
    means = [(group, str(len(some)), *_cells(_mean(some), spread=some)) for group, some in groups.items()]
    singles = [(cell.job.name, *_cells(found)) for cell, found in scored]
    return (
        render_text(Table("Every cell", ("cell", *columns), tuple(singles)))
        + "\n"
        + render_text(Table("Means over seeds", ("cells", "seeds", *columns), tuple(means), NOTES))
        + "".join(f"\n{text}" for text in comparisons(cells))
    )


def comparisons(cells: Sequence[Cell]) -> Iterator[str]:
    """For each set of problems a table of every group of finished cells against the plan's first one on them.

    Where runs cannot share a table, the reason stands in its place.
    """
    by_problems: dict[str, dict[str, list[Path]]] = {}
    for cell in cells:
        if cell.job.is_finished():
            fingerprint = RunFolder.open(cell.job.folder).manifest["data_fingerprint"]
            by_problems.setdefault(fingerprint, {}).setdefault(cell.group, []).append(cell.job.folder)
    for arms in by_problems.values():
        if len(arms) > 1:
            try:
                groups = {name: group_of(name, folders) for name, folders in arms.items()}
                yield render_text(results_table(groups, next(iter(groups))))
            except RunError as error:
                yield f"{', '.join(arms)} are not compared: {error}\n"


def scores(folder: Path) -> dict[str, float | None]:
    """The figures of a finished run: shares in [0, 1]; None where nothing was evaluated."""
    run = RunFolder.open(folder)
    rows = run.rows("evaluations")
    test, validation = (_by_update(rows, split) for split in ("test", "validation"))
    ratios = revealed(run.rows("metrics"))
    best = max(validation, key=lambda update: (validation[update], -update), default=None)
    return {
        "base": test[min(test)] if test else None,
        "validation": validation[max(validation)] if validation else None,
        "best": validation[best] if best is not None else None,
        "best_update": best,
        "test": test[max(test)] if test else None,
        "late_ratio": late_mean(ratios) if ratios else None,
    }


def _by_update(rows: Sequence[EvaluationRow], split: str) -> dict[int, float]:
    """The first evaluation at each update: later ones, with other samples, were asked for by hand."""
    found: dict[int, float] = {}
    for row in rows:
        if row["split"] == split:
            found.setdefault(row["update"], row["average"]["value"])
    return found


def _mean(some: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for key in some[0]:
        values = [value for one in some if (value := one[key]) is not None]
        found[key] = fmean(values) if values else None
    return found


def _cells(found: dict[str, float | None], spread: Sequence[dict[str, Any]] = ()) -> tuple[str, ...]:
    best = percent(found["best"])
    if found["best_update"] is not None and not spread:
        best += f" ({found['best_update']:g})"
    test = percent(found["test"])
    values = [one["test"] for one in spread if one["test"] is not None]
    if len(values) > 1:
        test += f" ({percent(min(values))} to {percent(max(values))})"
    late = MISSING if found["late_ratio"] is None else f"{found['late_ratio']:.2f}"
    return percent(found["base"]), percent(found["validation"]), best, test, late
