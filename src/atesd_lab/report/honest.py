"""Selection-honest comparison of groups of runs: every rule of selection, paired differences, and a verdict in words.

The columns *peak per benchmark*, *best common checkpoint* and *fixed last* differ by about as much as the claims of
papers do, so all are shown, each with what chose the checkpoint and what scored it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from atesd.errors import RunError
from atesd.table import Table
from atesd.text import MISSING, percent
from atesd_lab.report.groups import LAST, RunGroup, Scores, fixed_last, notes_on, selections
from atesd_lab.stats.contrast import Contrast, Verdict, contrast_of
from atesd_lab.stats.differences import Needed, needed, paired_difference, sampling_noise, unpaired_difference

POINT = 0.01
POWER = (1.960 + 0.842) / 1.960  # of the half width of a 95 % interval: found with 80 % power
WORDS: Mapping[Verdict, str] = {"above": "better", "below": "worse"}
MARKDOWN_SPECIAL = str.maketrans({"|": "\\|", "\n": " "})


@dataclass(frozen=True, slots=True)
class Comparison:
    """Candidate - baseline under one rule of selection. Shares in [0, 1]; the verdict is a sentence.

    `noise` is the standard deviation that k samples per problem alone give the difference (`noise_is_exact` False: at
    most that). `settles_observed` and `settles_point` say what would show, at 80 % power, a true difference of the
    observed size and of one point.
    """

    rule: str
    short: str
    split: str
    honest: bool
    baseline: float
    candidate: float
    contrast: Contrast
    paired: bool
    seeds: tuple[int, int]
    problems: int
    samples: tuple[int, int]
    noise: float
    noise_is_exact: bool
    settles_observed: Needed
    settles_point: Needed
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, those of the contrast among the others."""
        found = asdict(self)
        contrast = found.pop("contrast")
        names = ("rule", "short", "split", "honest", "baseline", "candidate")
        first = {name: found.pop(name) for name in names}
        interval = {"difference": contrast["value"], "interval": (contrast["low"], contrast["high"])}
        return {**first, **interval, "paired": found.pop("paired"), "covers_seeds": contrast["covers_seeds"], **found}


@dataclass(frozen=True, slots=True)
class Report:
    """Every rule's comparison of two groups, the fixed last first, and what a reader must know."""

    baseline: str
    candidate: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "comparisons": [one.as_json() for one in self.comparisons]}


def compare_groups(baseline: RunGroup, candidate: RunGroup) -> Report:
    """Compare two groups of runs under every rule of selection that their evaluations allow.

    Paired by seed where both have the same seeds and problems. Raises `RunError` for other problems or samplers.
    """
    groups = (baseline, candidate)
    if baseline.name == candidate.name:
        raise RunError(f"both groups are called {baseline.name}; two names are needed")
    _require_disjoint(groups)
    paired = are_paired(baseline, candidate)
    found = selections(groups)
    comparisons = tuple(_compare(scores, baseline, candidate, paired) for scores in found)
    notes = (_pairing_note(groups, paired), *_power_notes(comparisons), *_notes(groups, found))
    return Report(baseline.name, candidate.name, comparisons, notes)


def compare_last(baseline: RunGroup, candidate: RunGroup) -> Comparison:
    """`compare_groups` after the last update alone, where no checkpoint is selected."""
    return _compare(fixed_last((baseline, candidate)), baseline, candidate, are_paired(baseline, candidate))


def are_paired(baseline: RunGroup, candidate: RunGroup) -> bool:
    """Whether the two have the same seeds and the same problems, so that seed s is one experiment of both."""
    return baseline.seeds == candidate.seeds and baseline.fingerprints == candidate.fingerprints


def comparison_table(report: Report) -> Table:
    """One row per rule of selection, and below it what each rule did and found."""
    ordered = tuple(reversed(report.comparisons))
    rows = tuple(
        (
            one.short,
            percent(one.baseline),
            percent(one.candidate),
            one.contrast.in_points,
            _noise(one),
            short_verdict(one),
        )
        for one in ordered
    )
    columns = (
        "checkpoint",
        report.baseline,
        report.candidate,
        "difference, points",
        "sampling noise, points",
        "verdict",
    )
    title = f"Average@k in %: {report.candidate} against {report.baseline}"
    verdicts = [f"{capital(one.rule)}: {one.verdict}" for one in report.comparisons if one.honest]
    return Table(title, columns, rows, (*verdicts, *report.notes))


def short_verdict(one: Comparison) -> str:
    """The verdict in a word or two."""
    if not one.honest:
        return "none: selected on itself"
    word = WORDS.get(one.contrast.verdict)
    if word is None:
        return one.contrast.verdict
    return word if one.contrast.covers_seeds else f"{word}, for this seed"


def results_table(groups: Mapping[str, RunGroup], baseline: str, paper: Mapping[str, str] | None = None) -> Table:
    """One row per arm: seeds, accuracy under each rule, differences from the arm `baseline` with 95 % intervals.

    `paper` gives the paper's number of an arm, as it is to be printed. Raises `RunError` for runs that cannot share a
    table, and for a baseline that is no arm.
    """
    if baseline not in groups:
        raise RunError(f"baseline {baseline!r} is none of the arms: {', '.join(groups)}")
    found = selections(list(groups.values()))
    fair = [scores for scores in found if scores.honest]
    rows = []
    for name, group in groups.items():
        cells = [name, *([(paper or {}).get(name, MISSING)] if paper is not None else []), str(len(group.seeds))]
        cells += [percent(float(scores.shares[name].mean())) for scores in reversed(found)]
        against = [] if name == baseline else _against(fair, groups[baseline], group)
        cells += [one.contrast.in_points for one in reversed(against)] or [MISSING] * len(fair)
        cells += [_noise(against[0]), short_verdict(against[0])] if against else [MISSING, MISSING]
        rows.append(tuple(cells))
    columns = ["arm", *(["paper"] if paper is not None else []), "seeds", *(one.short for one in reversed(found))]
    columns += [f"{one.short} - {baseline}, points" for one in reversed(fair)]
    columns += ["sampling noise of the last difference, points", "verdict at the last"]
    notes = [
        _pairing_note((groups[baseline], group), are_paired(groups[baseline], group))
        for name, group in groups.items()
        if name != baseline
    ]
    return Table(
        f"Average@k in %, against {baseline}",
        tuple(columns),
        tuple(rows),
        (*dict.fromkeys(notes), *_notes(list(groups.values()), found)),
    )


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, its notes as a list below."""
    lines = [table.columns, tuple("---" if index == 0 else "---:" for index in range(len(table.columns))), *table.rows]
    body = ["| " + " | ".join(cell.translate(MARKDOWN_SPECIAL) for cell in line) + " |" for line in lines]
    return "\n".join([f"**{table.title}**", "", *body, "", *(f"- {note}" for note in table.notes)]) + "\n"


def _against(fair: Sequence[Scores], baseline: RunGroup, group: RunGroup) -> list[Comparison]:
    return [_compare(scores, baseline, group, are_paired(baseline, group)) for scores in fair]


def _compare(scores: Scores, baseline: RunGroup, candidate: RunGroup, paired: bool) -> Comparison:
    names = (baseline.name, candidate.name)
    a, b = (scores.shares[name] for name in names)
    found = paired_difference(a, b) if paired else unpaired_difference(a, b)
    noises = [sampling_noise(scores.shares[name] * scores.samples[name], scores.samples[name]) for name in names]
    seeds, problems = (len(baseline.runs), len(candidate.runs)), a.shape[1]
    contrast = contrast_of(f"{candidate.name} - {baseline.name}", found)
    settles = [needed(found, min(seeds), problems, effect, paired=paired) for effect in (contrast.value, POINT)]
    samples = (scores.samples[baseline.name], scores.samples[candidate.name])
    return Comparison(
        rule=scores.rule,
        short=scores.short,
        split=scores.split,
        honest=scores.honest,
        baseline=float(a.mean()),
        candidate=float(b.mean()),
        contrast=contrast,
        paired=paired,
        seeds=seeds,
        problems=problems,
        samples=samples,
        noise=float(np.hypot(noises[0][0], noises[1][0])),
        noise_is_exact=all(exact for _, exact in noises),
        settles_observed=settles[0],
        settles_point=settles[1],
        verdict=_verdict(contrast, names, seeds, problems, samples, settles),
    )


def _verdict(
    found: Contrast,
    names: tuple[str, str],
    seeds: tuple[int, int],
    problems: int,
    samples: tuple[int, int],
    settles: Sequence[Needed],
) -> str:
    size, low, high = found.in_unit
    beyond = "" if found.covers_seeds else " One seed a side: true of these problems, not of another seed."
    if not found.has_width:
        return "every problem gave the same difference; the interval has no width and says nothing." + beyond
    word = WORDS.get(found.verdict)
    if word is not None:
        return f"{names[1]} is {word} than {names[0]} by {abs(size):.1f} points [{low:+.1f}, {high:+.1f}]." + beyond
    ways = [_ways(one, min(seeds), problems, max(samples)) for one in settles]
    text = f"not distinguishable: {size:+.1f} points [{low:+.1f}, {high:+.1f}]; to settle 1.0 point takes {ways[1]}"
    return text + (f", to settle {abs(size):.1f} points {ways[0]}." if abs(size) >= 0.05 else ".") + beyond


def _ways(one: Needed, seeds: int, problems: int, samples: int) -> str:
    ways = []
    if one.seeds is not None:
        ways.append(f"about {one.seeds} seeds of these {problems} problems x {samples} samples")
    if one.problems is not None:
        ways.append(f"about {one.problems} problems x {samples} with {seeds} seed{'s' if seeds > 1 else ''}")
    return " or ".join(ways) or "more problems and more seeds together"


def capital(text: str) -> str:
    """The text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def _noise(one: Comparison) -> str:
    return f"{'' if one.noise_is_exact else 'at most '}{100 * one.noise:.1f}"


def _pairing_note(groups: Sequence[RunGroup], paired: bool) -> str:
    first, second = groups
    if paired:
        return f"Paired by seed: {_seed_list(first)}."
    if first.seeds != second.seeds:
        return (
            f"Not paired: {first.name} has {_seed_list(first)}, {second.name} {_seed_list(second)}. "
            "The same seeds on both sides give narrower intervals."
        )
    return f"Not paired: {first.name} and {second.name} have different data fingerprints."


def _seed_list(group: RunGroup) -> str:
    return f"seed{'s' if len(group.seeds) > 1 else ''} {', '.join(map(str, group.seeds))}"


def _notes(groups: Sequence[RunGroup], found: Sequence[Scores]) -> list[str]:
    """What a reader must know before believing the table."""
    sizes = {scores.split: (next(iter(scores.shares.values())).shape[1], scores.samples) for scores in found}
    protocol = [
        f"{split} {problems} x {'/'.join(str(k) for k in dict.fromkeys(samples.values()))}"
        for split, (problems, samples) in sizes.items()
    ]
    counts = [len(group.runs) for group in groups]
    notes = [
        f"Problems x samples: {', '.join(protocol)}.",
        "Brackets: 95 % interval over problems and seeds (Student's t on the crossed mean squares)."
        if min(counts) > 1
        else "Brackets: 95 % interval over problems and sampling; a group of one seed says nothing of another seed."
        if max(counts) == 1
        else "A group of one seed is given the other's variance between seeds.",
        "Sampling noise: the standard deviation of the difference from k samples per problem alone, were all "
        "independent.",
    ]
    if len(groups) > 2:
        notes.append(
            f"{len(groups) - 1} arms against one, each interval at 95 %: if none differs, one in twenty seems to."
        )
    selected = [scores for scores in found if scores.rule != LAST]
    if not selected:
        notes.append("No checkpoint to select: the runs share fewer than two validations after the start.")
    elif not any(scores.split == "test" for scores in selected):
        notes.append("Test was evaluated at the ends only: what is selected is scored on validation, in halves.")
    if any(len(set(scores.samples.values())) > 1 for scores in found):
        notes.append("The groups have different numbers of samples per problem: means compare, the noise differs.")
    return notes + notes_on(groups)


def _power_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Which true differences at the last update these runs would find, from the width of the intervals."""
    widths = {
        one.split: (one.contrast.in_unit[2] - one.contrast.in_unit[1]) / 2 * POWER
        for one in comparisons
        if one.rule == LAST and np.isfinite(one.contrast.in_unit[2]) and one.contrast.has_width
    }
    told = ", ".join(f"{split} {width:.1f}" for split, width in widths.items())
    words = "points; true differences of that size are found with about 80 % power by as many runs and samples"
    return [f"Tells apart: {told} {words}."] if told else []


def _require_disjoint(groups: Sequence[RunGroup]) -> None:
    ids = [{str(run.manifest["run_id"]) for run in group.runs} for group in groups]
    both = set.intersection(*ids)
    if both:
        names = [run.name for run in groups[0].runs if run.manifest["run_id"] in both]
        raise RunError(f"{names[0]} is on both sides; a run cannot be compared with itself")
