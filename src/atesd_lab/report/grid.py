"""A grid of runs as numbers: arms by seeds, their means, and each arm's difference from a baseline.

Whoever knows how a grid is laid out hands over its cells; this module reads no folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from atesd.errors import RunError
from atesd.rows import Estimate, EvaluationRow
from atesd.text import MISSING
from atesd_lab.report.groups import RunGroup, common_pair, fixed_last, grouped
from atesd_lab.report.honest import Comparison, compare_last, short_verdict
from atesd_lab.report.rows import RunRows, average
from atesd_lab.stats.differences import mean_share

FINISHED = "finished"
NOT_EVALUATED = "not evaluated"
SPLITS = ("test", "validation")


@dataclass(frozen=True, slots=True)
class GridCell:
    """One cell of a grid: its folder's name, a link to its own page, how it stands, its rows if it has begun.

    `state` is short and stands in the grid; `detail` says the whole of what keeps it out of the means.
    """

    folder: str
    link: str | None
    state: str
    detail: str
    run: RunRows | None

    @property
    def counted(self) -> RunRows | None:
        """The rows that may count in a mean: those of a finished run."""
        return self.run if self.state == FINISHED else None


@dataclass(frozen=True, slots=True)
class GridTable:
    """One table of a grid: its cells by arm and seed, in the order of the plan. `notes` are the maker's."""

    name: str
    arms: Mapping[str, Mapping[int, GridCell]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ArmScore:
    """What an arm came to after the last update: the share of each seed, the mean, and the difference in words.

    `verdict` is a word or two, `sentence` the whole of it, with what would settle an open difference.
    """

    arm: str
    shares: Mapping[int, float]
    mean: Estimate | None
    difference: str
    verdict: str
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class ScoredTable:
    """A table of a grid with its numbers. `groups` are the runs that they are of; `cells` says how all stand.

    `size` is that of the evaluations: problems x samples.
    """

    name: str
    split: str
    size: str
    baseline: str | None
    cells: Mapping[str, Mapping[int, GridCell]]
    groups: Mapping[str, RunGroup]
    scores: tuple[ArmScore, ...]
    notes: tuple[str, ...]

    @property
    def seeds(self) -> list[int]:
        """Every seed that an arm of it should have."""
        return sorted({seed for cells in self.cells.values() for seed in cells})


def score_table(table: GridTable, baseline: str | None = None) -> ScoredTable:
    """The numbers of one table, on test if any run has it after its last update, else on validation.

    Without `baseline` the first arm that has a finished and evaluated run takes its place. What cannot be compared is
    a note with the reason.
    """
    split = _split(table)
    cells = {
        arm: {seed: _required(cell, split) for seed, cell in by_seed.items()} for arm, by_seed in table.arms.items()
    }
    notes = list(table.notes)
    groups = {}
    for arm, by_seed in cells.items():
        runs = [run for cell in by_seed.values() if (run := cell.counted) is not None]
        try:
            if runs:
                groups[arm] = grouped(arm, runs)
        except RunError as error:
            notes.append(f"{arm} has no mean: {error}.")
    against = baseline if baseline is not None else next(iter(groups), None)
    if baseline is not None and baseline not in groups:
        notes.append(f"The baseline {baseline} has no finished and evaluated run here: no differences.")
    elif against is not None and baseline is None and against != next(iter(cells)):
        notes.append(f"{next(iter(cells))}, the first arm, has no finished and evaluated run: {against} stands in.")
    single = [arm for arm, group in groups.items() if len(group.runs) == 1]
    if single:
        notes.append(f"One run only, so that its bracket is over problems alone: {', '.join(single)}.")
    scores = tuple(_score(arm, by_seed, split, groups, against, notes) for arm, by_seed in cells.items())
    return ScoredTable(
        table.name, split, _size(cells, split), against, cells, groups, scores, tuple(dict.fromkeys(notes))
    )


def end_row(run: RunRows, split: str) -> EvaluationRow | None:
    """The evaluation of a split after the last planned update."""
    row = run.at(split, run.config.train.num_updates)
    return row if row is not None and row.get("correct_counts") else None


def _split(table: GridTable) -> str:
    runs = [cell.run for cells in table.arms.values() for cell in cells.values() if cell.run is not None]
    return next((split for split in SPLITS if any(end_row(run, split) for run in runs)), SPLITS[0])


def _size(cells: Mapping[str, Mapping[int, GridCell]], split: str) -> str:
    runs = [run for row in cells.values() for cell in row.values() if (run := cell.counted) is not None]
    rows = [row for run in runs if (row := end_row(run, split)) is not None]
    sizes = sorted({(int(row["problems"]), int(row["samples"])) for row in rows})
    return " or ".join(f"{problems} problems x {samples}" for problems, samples in sizes) or "no evaluation"


def _required(cell: GridCell, split: str) -> GridCell:
    """The cell, which counts only if it is finished and was evaluated on the table's split after its last update."""
    run = cell.counted
    if run is None or end_row(run, split) is not None:
        return cell
    end = run.config.train.num_updates
    detail = f"finished, but has no {split} evaluation after its last update, {end}; `atesd evaluate` its folder"
    return GridCell(cell.folder, cell.link, NOT_EVALUATED, detail, cell.run)


def _score(
    arm: str,
    cells: Mapping[int, GridCell],
    split: str,
    groups: Mapping[str, RunGroup],
    baseline: str | None,
    notes: list[str],
) -> ArmScore:
    shares = {
        seed: average(row)
        for seed, cell in cells.items()
        if (run := cell.counted) is not None and (row := end_row(run, split)) is not None
    }
    if arm not in groups:
        return ArmScore(arm, shares, None, MISSING, MISSING)
    try:
        mean = mean_share(fixed_last([groups[arm]]).shares[arm])
    except RunError as error:
        notes.append(f"{arm} has no mean: {error}.")
        return ArmScore(arm, shares, None, MISSING, "not compared")
    if arm == baseline:
        return ArmScore(arm, shares, mean, MISSING, "baseline")
    if baseline is None or baseline not in groups:
        return ArmScore(arm, shares, mean, MISSING, MISSING)
    try:
        found = _against(groups[baseline], groups[arm], notes)
    except RunError as error:
        notes.append(f"{arm} is not compared with {baseline}: {error}.")
        return ArmScore(arm, shares, mean, MISSING, "not compared")
    return ArmScore(arm, shares, mean, found.contrast.in_points, short_verdict(found), found.verdict)


def _against(baseline: RunGroup, candidate: RunGroup, notes: list[str]) -> Comparison:
    """The comparison after the last update, over the seeds that both have, if there are any."""
    pair = common_pair(baseline, candidate)
    if pair and baseline.seeds != candidate.seeds:
        baseline, candidate = pair
        seeds = ", ".join(map(str, baseline.seeds))
        notes.append(f"{candidate.name} against {baseline.name}: seeds {seeds}, which both have finished.")
    found = compare_last(baseline, candidate)
    if not found.paired:
        notes.append(f"{candidate.name} against {baseline.name}: not paired, as they differ in seeds or problems.")
    return found


def absent(tables: Sequence[ScoredTable]) -> Iterator[tuple[str, str, str]]:
    """Table, folder and reason of every cell that is in no mean."""
    for table in tables:
        for cells in table.cells.values():
            for cell in cells.values():
                if cell.state != FINISHED:
                    yield table.name, cell.folder, cell.detail
