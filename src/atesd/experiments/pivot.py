"""A sweep's folder as tables: one for each point of an axis, an arm for each point of another, runs over all the rest.

What is not there is named: cells without a finished run, runs of several commits or machines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atesd.errors import RunError
from atesd.report.groups import RunGroup, group_of
from atesd.report.rows import RunRows
from atesd.report.text import visible
from atesd.runs import RunFolder

INDEX = "cells.json"


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
        return str(RunFolder.open(self.folder).manifest["status"]) if RunFolder.exists(self.folder) else "not begun"


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


def read_cells(out: Path) -> list[SweptCell]:
    """What a sweep's folder should hold. Raises `RunError` without a readable cells.json."""
    path = out / INDEX
    try:
        rows = json.loads(path.read_text("utf-8"))
        return [SweptCell(out / row["folder"], row["points"], row["seed"]) for row in rows]
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}; expected the --out of an `atesd sweep`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: is no list of cells ({error!r}); `atesd sweep PLAN --out {out}` writes it") from None


def read_tables(out: Path, *, table_axis: str, arm_axis: str) -> Iterator[SweptTable]:
    """The tables of a sweep's folder, one at a time, as the runs of a large sweep need not fit in memory together.

    Without `table_axis` all is one table, named like the folder. Raises `RunError` without `arm_axis`, where a seed
    stands at different points of the remaining axes, and for what `group_of` refuses.
    """
    cells = read_cells(out)
    lacking = next((cell for cell in cells if arm_axis not in cell.points), None)
    if lacking is not None:
        axes = ", ".join(lacking.points) or "none"
        raise RunError(f"{out / INDEX}: cell {lacking.folder.name} has no axis {arm_axis!r}; its axes: {axes}")
    whole = out.resolve().name
    for name in dict.fromkeys(cell.points.get(table_axis, whole) for cell in cells):
        yield _table(name, [cell for cell in cells if cell.points.get(table_axis, whole) == name], table_axis, arm_axis)


def _table(name: str, cells: Sequence[SweptCell], table_axis: str, arm_axis: str) -> SweptTable:
    blocks: dict[int, str] = {}
    for cell in cells:
        block = cell.rest(table_axis, arm_axis)
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
    return SweptTable(visible(name), groups, wanted, blocks, (*missing, *_mixtures(runs)))


def _mixtures(runs: Sequence[RunRows]) -> Iterator[str]:
    """What the runs of one table should have in common and have not."""
    commits = Counter(" then ".join(commits_of(run)) for run in runs)
    if len(commits) > 1 or any(" then " in commit for commit in commits):
        yield f"The runs are of several commits ({_counted(commits)}): a difference of arms may be one of programs."
    machines = Counter(machine_of(run) for run in runs)
    if len(machines) > 1:
        yield f"The runs are of several machines or settings of them ({_counted(machines)}): times do not compare."


def commits_of(run: RunRows) -> list[str]:
    """The commits that trained it, in order; several where it was resumed under another one."""
    manifest = run.manifest
    each = [manifest["commit"], *(session["commit"] for session in manifest["sessions"][1:])]
    return list(dict.fromkeys(_short(commit) if commit else "no commit" for commit in each))


def machine_of(run: RunRows) -> str:
    """The processor, the threads, and the torch that trained it."""
    manifest = run.manifest
    return f"{manifest['cpu']}, threads {manifest['threads']}, torch {manifest['versions']['torch']}"


def _short(commit: str) -> str:
    sha, plus, changes = commit.partition("+")
    return f"{sha[:7]}{plus}{changes}"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.most_common())
