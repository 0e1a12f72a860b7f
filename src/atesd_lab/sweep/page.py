"""The page of a whole sweep, from its folder: which cells there are, how each stands, what the arms came to."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final
from urllib.parse import quote

from atesd.errors import AtesdError, ConfigError
from atesd.refusals import refusals_told
from atesd.runs import RunFolder, write_atomic
from atesd.text import MISSING, duration
from atesd_lab.report.figures import phase_seconds
from atesd_lab.report.grid import FINISHED, GridCell, GridTable
from atesd_lab.report.grid_page import Head, Part, read_part, render_grid
from atesd_lab.report.page import status
from atesd_lab.report.rows import RunRows, read_run
from atesd_lab.sweep.pivot import (
    NOT_BEGUN,
    Layout,
    SweptCell,
    cells_by_table,
    commits_of,
    layout_of,
    machine_of,
    mixtures,
    read_cells,
)

PAGE = "report.html"
UNREADABLE = "unreadable"
STATES = (FINISHED, "running", "stopped", "failed", NOT_BEGUN, UNREADABLE)


def write_sweep_report(folder: Path, out: Path | None = None, baseline: str | None = None) -> Path:
    """Read the runs of a sweep's folder, write the page (whole or not at all) to `out` or report.html, return where.

    `baseline` is the arm that the others are compared with; without it, the plan's first. Raises `RunError` without a
    readable cells.json, `ConfigError` for a baseline that is no arm. A run that cannot be read is named on the page.
    """
    page = out or folder / PAGE
    cells = read_cells(folder)
    layout, whole = layout_of(cells), folder.resolve().name
    tables = cells_by_table(cells, layout, whole)
    arms = dict.fromkeys(arm for rows in tables.values() for arm in rows)
    if baseline is not None and baseline not in arms:
        raise ConfigError(f"--baseline {baseline}: is no arm of {folder}; its arms: {', '.join(arms)}")
    seen, parts = Seen(), []
    for place, (name, rows) in enumerate(tables.items(), start=1):
        parts.append(_part(name, rows, layout, f"table{place}", baseline, page, seen))
    text = render_grid(Head(whole, tuple(_facts(cells, layout, seen)), tuple(seen.mixtures())), parts)
    with refusals_told(page, "written"):
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(page, text.encode())
    return page


@final
@dataclass(slots=True)
class Seen:
    """What is counted over all the runs of a sweep while they are read."""

    states: Counter[str] = field(default_factory=Counter)
    recipes: Counter[str] = field(default_factory=Counter)
    commits: list[tuple[str, ...]] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, run: RunRows) -> None:
        """Count a run that could be read."""
        self.recipes[_recipe(run)] += 1
        self.commits.append(tuple(commits_of(run)))
        self.machines.append(machine_of(run))
        self.seconds += sum(phase_seconds(run).values())

    def mixtures(self) -> Iterator[str]:
        """What the runs should have in common and have not."""
        return mixtures(self.commits, self.machines)


def _part(
    name: str,
    rows: Mapping[str, Mapping[int, SweptCell]],
    layout: Layout,
    anchor: str,
    baseline: str | None,
    page: Path,
    seen: Seen,
) -> Part:
    arms = {arm: {seed: _read(cell, page, seen) for seed, cell in sorted(some.items())} for arm, some in rows.items()}
    return read_part(GridTable(name, arms, tuple(_block_notes(rows, layout))), baseline, anchor)


def _block_notes(rows: Mapping[str, Mapping[int, SweptCell]], layout: Layout) -> Iterator[str]:
    """Where seeds are more alike than two seeds are."""
    cells = {seed: cell for some in rows.values() for seed, cell in some.items()}
    for axis in layout.blocks:
        places: dict[str, list[str]] = {}
        for seed in sorted(cells):
            places.setdefault(cells[seed].points[axis], []).append(str(seed))
        words = "; ".join(f"{point}: {', '.join(seeds)}" for point, seeds in places.items())
        yield f"The seeds stand on several points of {axis} ({words}); the intervals take them as independent."


def _read(cell: SweptCell, page: Path, seen: Seen) -> GridCell:
    """The cell with its rows, or with the reason why it has none."""
    folder, own = cell.folder.name, cell.folder / PAGE
    link = quote(os.fsencode(os.path.relpath(own, page.parent))) if own.is_file() else None
    if not RunFolder.exists(cell.folder):
        seen.states[NOT_BEGUN] += 1
        return GridCell(folder, link, NOT_BEGUN, "there is no run in the folder; `atesd sweep` begins it", None)
    try:
        run = read_run(cell.folder)
        seen.add(run)
    except (AtesdError, OSError, KeyError, TypeError, ValueError) as error:
        seen.states[UNREADABLE] += 1
        return GridCell(folder, link, UNREADABLE, f"cannot be read: {error or repr(error)}", None)
    state = str(run.manifest["status"])
    seen.states[state] += 1
    return GridCell(folder, link, state, "" if state == FINISHED else status(run), run)


def _facts(cells: Sequence[SweptCell], layout: Layout, seen: Seen) -> Iterator[tuple[str, str]]:
    axes = {axis: list(dict.fromkeys(cell.points[axis] for cell in cells)) for axis in cells[0].points}
    roles = {layout.arm: "rows", **dict.fromkeys(layout.tables, "tables"), **dict.fromkeys(layout.blocks, "by seed")}
    yield "recipe", _counted(seen.recipes)
    for axis, points in axes.items():
        yield f"{axis} ({roles.get(axis, 'the same everywhere')})", ", ".join(points)
    yield "seeds", ", ".join(map(str, sorted({cell.seed for cell in cells})))
    words = {"running": "running, or killed"}
    order = [*STATES, *(state for state in seen.states if state not in STATES)]
    states = [f"{seen.states[state]} {words.get(state, state)}" for state in order if seen.states[state]]
    yield "cells", f"{len(cells)}: {', '.join(states)}"
    yield "commit", _counted(Counter(" then ".join(commits) for commits in seen.commits))
    yield "machine", _counted(Counter(seen.machines))
    yield (
        "time in updates",
        f"{duration(seen.seconds)} of wall clock, summed over the runs" if seen.commits else MISSING,
    )


def _counted(counts: Counter[str]) -> str:
    if len(counts) < 2:
        return next(iter(counts), MISSING)
    return "; ".join(f"{name} ({count})" for name, count in counts.most_common())


def _recipe(run: RunRows) -> str:
    """The recipe as the run's command names it: the word after `train`."""
    words = list(map(str, run.manifest.get("command") or []))
    return words[words.index("train") + 1] if "train" in words[:-1] else shlex.join(words) or MISSING
