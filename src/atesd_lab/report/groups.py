"""Groups of runs that differ in the seed alone, read so that two of them can be compared; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atesd.config import dump_config
from atesd.errors import RunError
from atesd.rows import EvaluationRow
from atesd_lab.report.rows import RunRows, read_runs, shares
from atesd_lab.stats.selection import biased_peaks, cross_fitted, fair_peaks, halves_of

Floats = NDArray[np.float64]
LAST = "fixed last"
"""The rule that selects nothing."""


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Finished runs with different seeds, in the order of the seeds."""

    name: str
    runs: tuple[RunRows, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each run."""
        return tuple(run.config.train.seed for run in self.runs)

    @property
    def fingerprints(self) -> set[str]:
        """The fingerprints of the problems; more than one is refused before a comparison."""
        return {str(run.manifest["data_fingerprint"]) for run in self.runs}

    @property
    def last(self) -> int:
        """The update after which the runs ended."""
        return self.runs[0].config.train.num_updates


@dataclass(frozen=True, slots=True)
class Scores:
    """What the checkpoints that one rule selects are worth: shares correct [seeds, problems] of each group, by name.

    `rule` says how a checkpoint is chosen and on what it is scored, `short` is its column. `honest` is False where the
    problems that chose a checkpoint also score it. `samples` is k of Average@k of each group.
    """

    rule: str
    short: str
    split: str
    honest: bool
    shares: Mapping[str, Floats]
    samples: Mapping[str, int]


def group_of(name: str, paths: Sequence[Path]) -> RunGroup:
    """The runs of a group. Raises `RunError` for a run twice, unfinished, never evaluated, or of a seed already there.

    A group is one method: its members share problems, length and number of samples.
    """
    if not paths:
        raise RunError(f"no run folder for {name}; expected at least one, as in: atesd compare RUN... -- RUN...")
    runs = read_runs(list(paths))
    for run, path in zip(runs, paths, strict=True):
        require_evaluated(run, path)
    return grouped(name, runs)


def require_evaluated(run: RunRows, path: Path) -> None:
    """Refuse a run that is not finished, or was not evaluated after its last update."""
    status = run.manifest["status"]
    if status != "finished":
        raise RunError(f"{path} is {status}; let `atesd train` finish it, or leave it out")
    end = run.config.train.num_updates
    if not any(row["update"] == end for row in run.evaluations):
        data = run.config.data
        problems = "" if data.test_size or data.validation_size else " --data FILE.jsonl"
        raise RunError(
            f"{path} has no evaluation after its last update, {end}; run `atesd evaluate {path}{problems}`"
            + (", with one file for every run" if problems else ", or train with train.evaluate_every above 0")
        )


def grouped(name: str, runs: Sequence[RunRows]) -> RunGroup:
    """Finished and evaluated runs as a group. Raises `RunError` for a seed twice, and for what is not one method."""
    ordered = sorted(runs, key=lambda run: run.config.train.seed)
    seeds = [run.config.train.seed for run in ordered]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise RunError(
            f"{name}: seed {twice[0]} occurs twice ({', '.join(run.name for run in ordered)}); runs of one group "
            "differ in train.seed, and runs of another method go to the other side of --"
        )
    group = RunGroup(name, tuple(ordered))
    if len(group.fingerprints) > 1:
        raise RunError(f"{name}: the runs have different problems (data_fingerprint in manifest.json); keep one kind")
    lengths = sorted({run.config.train.num_updates for run in ordered})
    if len(lengths) > 1:
        raise RunError(f"{name}: train.num_updates is {' and '.join(map(str, lengths))}; a group has one length")
    return group


def common_pair(baseline: RunGroup, candidate: RunGroup) -> tuple[RunGroup, RunGroup] | None:
    """Both groups cut to the seeds that both have; None where there is no such seed."""
    common = set(baseline.seeds) & set(candidate.seeds)
    if not common:
        return None
    first, second = (
        RunGroup(group.name, tuple(run for run in group.runs if run.config.train.seed in common))
        for group in (baseline, candidate)
    )
    return first, second


def selections(groups: Sequence[RunGroup]) -> list[Scores]:
    """Scores by every rule that the evaluations allow: fixed last, best common checkpoint, each run's own peak.

    A checkpoint is selected on validation. It is scored on test where every run has a test evaluation there; otherwise
    on the half of the validation problems that did not choose it. The last rule scores the peak on the problems that
    chose it, as papers do, and says so. Files on which every run was evaluated at its end are scored besides.
    """
    found = lasts(groups)
    updates = common_updates(groups)
    if len(updates) > 1:
        found += [_best_common(groups, updates), *_peaks(groups, updates)]
    return found


def fixed_last(groups: Sequence[RunGroup]) -> Scores:
    """Scores after the last update, which nothing has chosen: on test where every run has it, else on validation.

    Runs without either are scored on the first of the files on which all were evaluated.
    """
    return lasts(groups)[0]


def lasts(groups: Sequence[RunGroup]) -> list[Scores]:
    """Scores after the last update on test, or else on validation, and on every file that all runs share."""
    each = [{row["split"] for row in run.evaluations if row["update"] == g.last} for g in groups for run in g.runs]
    shared = set.intersection(*each)
    held_out = [split for split in ("test", "validation") if split in shared][:1]
    files = sorted(shared - {"test", "validation"})
    if not held_out and not files:
        raise RunError(
            "no problems were evaluated after the last update of every run; run `atesd evaluate RUN` for each, with "
            "--data FILE.jsonl where runs hold out none"
        )
    return [_last(groups, split) for split in (*held_out, *files)]


def _last(groups: Sequence[RunGroup], split: str) -> Scores:
    tables = shares_at(groups, split, {group.name: group.last for group in groups})
    samples = _samples(groups, split, {group.name: [group.last] for group in groups})
    return Scores(LAST, f"last ({split})", split, True, tables, samples)


def common_updates(groups: Sequence[RunGroup]) -> list[int]:
    """The trained updates at which every run was validated."""
    each = [{int(row["update"]) for row in run.evaluated("validation")} for group in groups for run in group.runs]
    return sorted(set.intersection(*each) - {0}) if each else []


def shares_at(
    groups: Sequence[RunGroup], split: str, updates: Mapping[str, int], only: Sequence[str] | None = None
) -> dict[str, Floats]:
    """Shares correct [seeds, problems] by group, of `only` these problems or of all, in the order of their names.

    Raises `RunError` for evaluations of other problems or with other samplers, and for fewer than two problems.
    """
    rows = [(run.name, _found(run, split, updates[group.name])) for group in groups for run in group.runs]
    first_name, first = rows[0]
    problems = sorted(first["correct_counts"])
    for name, row in rows[1:]:
        if sorted(row["correct_counts"]) != problems:
            raise RunError(
                f"{first_name} and {name} were evaluated on different {split} problems; compare runs of the same data "
                "settings, or evaluate both on one set of problems with atesd evaluate"
            )
        if _sampler(row) != _sampler(first):
            raise RunError(
                f"{first_name} and {name} were evaluated with different samplers: {_sampler(first)} and "
                f"{_sampler(row)}; run `atesd evaluate RUN --split {split} --set evaluation...` for both alike"
            )
    if len(only or problems) < 2:
        raise RunError(f"{split}: {len(only or problems)} evaluated problem; an interval needs at least two")
    told = [(name, content) for name, row in rows if (content := _content(row)) is not None]
    other = next((one for one in told if one[1] != told[0][1]), None)
    if other is not None:
        raise RunError(
            f"{told[0][0]} and {other[0]} were scored on other contents of {split}: {told[0][1]} and {other[1]}; "
            "evaluate both on one with atesd evaluate --benchmark or --data"
        )
    return {
        group.name: shares([_found(run, split, updates[group.name]) for run in group.runs], only or problems)
        for group in groups
    }


def notes_on(groups: Sequence[RunGroup]) -> list[str]:
    """What is odd about groups that can be compared all the same."""
    notes = []
    for group in groups:
        settings = {dump_config(run.seedless) for run in group.runs}
        if len(settings) > 1:
            notes.append(f"{group.name}: its runs differ in more than the seed; they are taken as one method anyway.")
    rows = [row for group in groups for run in group.runs for row in run.evaluations if row["update"] == group.last]
    known, unknown = ({row["split"] for row in rows if (_content(row) is None) == lacks} for lacks in (False, True))
    notes += [
        f"Not every evaluation says which content of {split} it was made on." for split in sorted(known & unknown)
    ]
    if len({group.last for group in groups}) > 1:
        ends = ", ".join(f"{group.name} {group.last}" for group in groups)
        notes.append(f"The runs end at different updates ({ends}): 'last' is not the same budget.")
    if len(set.union(*(group.fingerprints for group in groups))) > 1:
        notes.append(
            "The data fingerprints differ: the evaluated problems have the same names, but training data or references "
            "differ. Seeds are not paired."
        )
    return notes


def _best_common(groups: Sequence[RunGroup], updates: Sequence[int]) -> Scores:
    """One update for all runs, by the mean over groups on validation, so that no arm chooses for itself."""
    tables = _over_updates(groups, updates)
    by_group = np.stack([table.mean(axis=1) for table in tables.values()], axis=1)
    best = updates[int(by_group.mean(axis=(1, 2)).argmax())]
    if all(run.at("test", best) is not None for group in groups for run in group.runs):
        held_out = shares_at(groups, "test", {group.name: best for group in groups})
        rule = f"best common checkpoint: update {best}, chosen on validation, scored on test"
        samples = _samples(groups, "test", {group.name: [best] for group in groups})
        return Scores(rule, f"best common @{best} (test)", "test", True, held_out, samples)
    halves = halves_of(by_group.shape[2])
    _, chosen = cross_fitted(by_group, halves)
    parts = {name: np.where(halves == 0, table[chosen[0]], table[chosen[1]]) for name, table in tables.items()}
    at = "/".join(str(updates[index]) for index in chosen)
    rule = f"best common checkpoint: update {at}, chosen on one half of validation, scored on the other"
    samples = _samples(groups, "validation", {group.name: updates for group in groups})
    return Scores(rule, f"best common @{at} (validation halves)", "validation", True, parts, samples)


def _peaks(groups: Sequence[RunGroup], updates: Sequence[int]) -> list[Scores]:
    """Each run's own best checkpoint: scored on the half that did not choose it, and on the problems that did."""
    tables = _over_updates(groups, updates)
    fair, peak = ({name: score(table) for name, table in tables.items()} for score in (fair_peaks, biased_peaks))
    samples = _samples(groups, "validation", {group.name: updates for group in groups})
    rule = "peak of each run: chosen on one half of validation, scored on the other"
    biased = "peak of each run: chosen and scored on the same validation problems, so too high"
    return [
        Scores(rule, "peak (validation halves)", "validation", True, fair, samples),
        Scores(biased, "peak (validation, too high)", "validation", False, peak, samples),
    ]


def _over_updates(groups: Sequence[RunGroup], updates: Sequence[int]) -> dict[str, Floats]:
    """Shares on validation by group: [updates, seeds, problems]."""
    each = [shares_at(groups, "validation", {group.name: update for group in groups}) for update in updates]
    return {group.name: np.stack([tables[group.name] for tables in each]) for group in groups}


def _samples(groups: Sequence[RunGroup], split: str, updates: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Samples per problem, k, of each group. Raises `RunError` where evaluations of one group differ in it."""
    found = {}
    for group in groups:
        rows = [_found(run, split, update) for run in group.runs for update in updates[group.name]]
        counts = sorted({int(row["samples"]) for row in rows})
        if len(counts) > 1:
            numbers = " and ".join(map(str, counts))
            raise RunError(f"{group.name}: {numbers} samples per {split} problem; evaluate its runs with one number")
        found[group.name] = counts[0]
    return found


def _found(run: RunRows, split: str, update: int) -> EvaluationRow:
    row = run.at(split, update)
    if row is None or not row.get("correct_counts"):
        raise RunError(f"{run.name}: no evaluation of {split} with correct_counts after update {update}")
    return row


def _content(row: EvaluationRow) -> str | None:
    """The hash of a benchmark's problems and answers, or of a file's with its checker; None where it is not known."""
    if "content" in row:
        return f"{row['content']['sha256']} (checker {row['content'].get('checker', 'of the run')})"
    return row["benchmark"]["sha256"] if "benchmark" in row else None


def _sampler(row: EvaluationRow) -> dict[str, float | int]:
    return {key: value for key, value in row["sampler"].items() if key != "seed"}
