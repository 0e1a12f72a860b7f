"""A sweep's folder as tables: one for each point of an axis, an arm for each point of another, runs over all the rest.

What is not there is named: cells without a finished run, runs of several commits or machines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atesd.errors import RunError
from atesd.rows import MetricsRow
from atesd.runs import RunFolder
from atesd.text import visible
from atesd_lab.report.groups import RunGroup, group_of
from atesd_lab.report.rows import RunRows

INDEX = "cells.json"
ARM = "arm"
NOT_BEGUN = "not begun"


@dataclass(frozen=True, slots=True)
class SweptCell:
    """A cell as cells.json lists it: its run folder, the name of its point on every axis, its seed."""

    folder: Path
    points: Mapping[str, str]
    seed: int

    def rest(self, *axes: str) -> str:
        """Its points on all other axes."""
        return "-".join(point for axis, point in self.points.items() if axis not in axes)

    @property
    def state(self) -> str:
        """Finished, or how far it has come."""
        return str(RunFolder.open(self.folder).manifest["status"]) if RunFolder.exists(self.folder) else NOT_BEGUN


@dataclass(frozen=True, slots=True)
class Layout:
    """How the axes of a sweep become tables: a row per point of `arm`, a table per combination of points of `tables`.

    `blocks` are the axes on which each seed has one place, such as the starting checkpoint: they make no table.
    """

    arm: str
    tables: tuple[str, ...]
    blocks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SweptTable:
    """The finished runs of one table, by arm, in the order of the plan.

    `wanted` has the seeds that each arm should have, `blocks` where on the remaining axes each seed stands: the seeds
    of one block (one starting checkpoint, say) are more alike than those of two.
    """

    name: str
    groups: Mapping[str, RunGroup]
    wanted: Mapping[str, tuple[int, ...]]
    blocks: Mapping[int, str]
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[RunRows]:
        """All finished runs."""
        return [run for group in self.groups.values() for run in group.runs]


def is_sweep(folder: Path) -> bool:
    """Whether it is the folder of a sweep, and no run folder."""
    return (folder / INDEX).is_file() and not RunFolder.exists(folder)


def read_cells(out: Path) -> list[SweptCell]:
    """What a sweep's folder should hold. Raises `RunError` without a readable cells.json."""
    path = out / INDEX
    try:
        return [_swept(out, row) for row in json.loads(path.read_text("utf-8"))]
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}; expected the --out of an `atesd sweep`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: is no list of cells ({error!r}); `atesd sweep PLAN --out {out}` writes it") from None


def _swept(out: Path, row: Mapping[str, Any]) -> SweptCell:
    points = {str(axis): str(point) for axis, point in dict(row["points"]).items()}
    return SweptCell(out / str(row["folder"]), points, int(row["seed"]))


def layout_of(cells: Sequence[SweptCell]) -> Layout:
    """Arms are the points of the axis `arm`, or else of the last axis that has several; see `Layout` for the rest.

    Raises `RunError` for no cells, and for cells that stand on different axes.
    """
    if not cells:
        raise RunError(f"{INDEX} lists no cell; `atesd sweep PLAN --out FOLDER` writes it anew")
    axes, own = list(cells[0].points), own_axes(cells)
    other = next((cell for cell in cells if set(cell.points) != set(axes)), None)
    if other is not None:
        raise RunError(
            f"{INDEX}: cell {other.folder.name} has the axes {', '.join(other.points) or 'none'}, the first cell "
            f"{', '.join(axes) or 'none'}; the cells of one page share their axes"
        )
    varied = [axis for axis in axes if len({cell.points[axis] for cell in cells}) > 1]
    arm = ARM if ARM in axes else (varied or axes or [""])[-1]
    rest = [axis for axis in varied if axis != arm and axis not in own]
    blocks = [axis for axis in rest if len({(cell.seed, cell.points[axis]) for cell in cells}) == _seeds(cells)]
    return Layout(arm, tuple(axis for axis in rest if axis not in blocks), tuple(blocks))


def own_axes(cells: Sequence[SweptCell]) -> tuple[str, ...]:
    """The axes on which each cell stands where the arm and the other axes say, such as a step size chosen for each arm.

    They belong to the arm, and neither make a table nor a place of a seed.
    """
    axes = [axis for axis in cells[0].points if axis != ARM] if ARM in cells[0].points else []
    varied = [axis for axis in axes if len({cell.points.get(axis) for cell in cells}) > 1]
    return tuple(axis for axis in varied if _follows_from_the_others(axis, cells))


def _follows_from_the_others(axis: str, cells: Sequence[SweptCell]) -> bool:
    """Whether no two cells differ in this axis alone, whatever their seeds, though it varies within an arm's rivals."""
    places: dict[str, set[str]] = {}
    arms: dict[str, set[str]] = {}
    for cell in cells:
        places.setdefault(cell.rest(axis), set()).add(cell.points[axis])
        arms.setdefault(cell.rest(axis, ARM), set()).add(cell.points[axis])
    return all(len(points) == 1 for points in places.values()) and any(len(points) > 1 for points in arms.values())


def _seeds(cells: Sequence[SweptCell]) -> int:
    return len({cell.seed for cell in cells})


def cells_by_table(
    cells: Sequence[SweptCell], layout: Layout, whole: str
) -> dict[str, dict[str, dict[int, SweptCell]]]:
    """The cells by table, arm and seed, in the order of the plan; what has no axis of its own is called `whole`.

    Raises `RunError` where two cells are one arm and seed of one table.
    """
    tables: dict[str, dict[str, dict[int, SweptCell]]] = {}
    for cell in cells:
        name = ", ".join(cell.points[axis] for axis in layout.tables) or whole
        arm = cell.points.get(layout.arm, whole)
        seeds = tables.setdefault(name, {}).setdefault(arm, {})
        if cell.seed in seeds:
            raise RunError(
                f"{INDEX}: {seeds[cell.seed].folder.name} and {cell.folder.name} are both {arm}, seed {cell.seed}; "
                "a cell is one run"
            )
        seeds[cell.seed] = cell
    return tables


def read_tables(out: Path, *, table_axis: str, arm_axis: str) -> Iterator[SweptTable]:
    """The tables of a sweep's folder, one at a time, as the runs of a large sweep need not fit in memory together.

    Without `table_axis` all is one table, named like the folder. Raises `RunError` without `arm_axis`, where a seed
    stands at different points of the remaining axes, and for what `group_of` refuses.
    """
    cells = read_cells(out)
    require_axis(cells, arm_axis)
    whole = out.resolve().name
    for name in dict.fromkeys(cell.points.get(table_axis, whole) for cell in cells):
        mine = [cell for cell in cells if cell.points.get(table_axis, whole) == name]
        yield _table(name, mine, table_axis, arm_axis, own_axes(cells))


def require_axis(cells: Sequence[SweptCell], axis: str) -> None:
    """Raise `RunError` where a cell does not stand on an axis."""
    lacking = next((cell for cell in cells if axis not in cell.points), None)
    if lacking is not None:
        index, axes = lacking.folder.parent / INDEX, ", ".join(lacking.points) or "none"
        raise RunError(f"{index}: cell {lacking.folder.name} has no axis {axis!r}; its axes: {axes}")


def _table(name: str, cells: Sequence[SweptCell], table_axis: str, arm_axis: str, own: tuple[str, ...]) -> SweptTable:
    blocks: dict[int, str] = {}
    for cell in cells:
        block = cell.rest(table_axis, arm_axis, *own)
        if blocks.setdefault(cell.seed, block) != block:
            raise RunError(
                f"{name}: seed {cell.seed} stands at {blocks[cell.seed]} and at {block}; runs are paired by seed, so "
                "a plan must give each seed one place on the axes besides "
                f"{table_axis} and {arm_axis} (see `exclude`)"
            )
    groups, wanted, missing = {}, {}, []
    for arm in dict.fromkeys(cell.points[arm_axis] for cell in cells):
        mine = [cell for cell in cells if cell.points[arm_axis] == arm]
        states = {cell.folder: cell.state for cell in mine}
        paths = [folder for folder, state in states.items() if state == "finished"]
        wanted[arm] = tuple(sorted(cell.seed for cell in mine))
        if paths:
            groups[arm] = group_of(arm, paths)
        if len(paths) < len(mine):
            lost = ", ".join(f"{folder.name} ({state})" for folder, state in states.items() if state != "finished")
            missing.append(f"{arm}: {len(paths)} of {len(mine)} runs are finished; not there: {lost}.")
    runs = [run for group in groups.values() for run in group.runs]
    mixed = mixtures(map(commits_of, runs), map(machine_of, runs))
    return SweptTable(visible(name), groups, wanted, blocks, (*missing, *mixed))


def mixtures(commits: Iterable[Sequence[str]], machines: Iterable[str]) -> Iterator[str]:
    """What some runs should have in common and have not, from the commits and the machine of each."""
    by_commit = Counter(map(" then ".join, commits))
    if len(by_commit) > 1 or any(" then " in commit for commit in by_commit):
        yield f"The runs are of several commits ({_counted(by_commit)}): a difference of arms may be one of programs."
    by_machine = Counter(machines)
    if len(by_machine) > 1:
        yield f"The runs are of several machines or settings of them ({_counted(by_machine)}): times do not compare."


def commits_of(run: RunRows) -> list[str]:
    """The commits that trained it, in order; several where it was resumed under another one."""
    manifest = run.manifest
    each = [manifest["commit"], *(session["commit"] for session in manifest["sessions"][1:])]
    return list(dict.fromkeys(_short(commit) if commit else "no commit" for commit in each))


def machine_of(run: RunRows) -> str:
    """The processor, the threads, and the torch that trained it."""
    manifest = run.manifest
    return f"{manifest['cpu']}, threads {manifest['threads']}, torch {manifest['versions']['torch']}"


def seconds_of(rows: Iterable[MetricsRow]) -> float:
    """Seconds of all phases of these updates together; an update that was skipped has none."""
    return sum(sum((row.get("seconds") or {}).values()) for row in rows)


def _short(commit: str) -> str:
    sha, plus, changes = commit.partition("+")
    return f"{sha[:7]}{plus}{changes}"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.most_common())
