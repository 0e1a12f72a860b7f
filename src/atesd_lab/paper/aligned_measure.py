"""What the arms of `atesd sweep aligned` came to in one world: scores, paired gaps, equal time, verdicts by interval.

All intervals are 95 % over seeds and problems, by `stats.differences`. Where the seeds stand on several starting
checkpoints, each gap has a second interval in which a checkpoint counts once, so that it covers a new checkpoint too:
wide with three, and the stricter reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

from atesd.config import Config, FixedSettings, FullSettings
from atesd.errors import RunError
from atesd.rows import Estimate
from atesd.runs import RunFolder
from atesd_lab.report.arms import Arms, evaluated_on
from atesd_lab.report.groups import RunGroup, common_updates, shares_at
from atesd_lab.report.rows import RunRows
from atesd_lab.stats.contrast import Contrast, Verdict, paired
from atesd_lab.stats.differences import mean_share
from atesd_lab.sweep.pivot import SweptCell, SweptTable, own_axes, require_axis

Floats = NDArray[np.float64]

BEST_FIXED = "best fixed"
GRPO = "grpo"
GATE = "gate"
SDAR = "sdar"
NULL_CONTROLS = ("gate-shuffled", "gate-random")
NOT_ANSWERED = "not answered"
Word = Literal["ahead", "behind", "not distinguishable", "one seed, no verdict"]
ONE_SEED: Word = "one seed, no verdict"
WORDS: Mapping[Verdict, Word] = {"above": "ahead", "below": "behind", "not distinguishable": "not distinguishable"}
AHEAD_BY = 0.15  # of every fixed ratio: what prototypes made expect of the gate in the leap worlds


@dataclass(frozen=True, slots=True)
class Gap:
    """A difference over the seeds that both arms have, paired.

    `by_block` is the mean of each starting checkpoint, `over_blocks` the interval in which each counts once (empty and
    None for one checkpoint).
    """

    contrast: Contrast
    seeds: tuple[int, ...]
    by_block: Mapping[str, float]
    over_blocks: tuple[float, float] | None

    @property
    def word(self) -> Word:
        """By the interval over seeds and problems."""
        return WORDS[self.contrast.verdict] if self.contrast.covers_seeds else ONE_SEED


@dataclass(frozen=True, slots=True)
class TimedGap:
    """A gap on validation at equal time: after so many updates of the baseline and of the candidate."""

    gap: Gap
    baseline_updates: float
    candidate_updates: float


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm. Accuracies are shares; `gaps` and `timed` are against full exposure, the best fixed ratio and GRPO.

    `pace` is seconds per update relative to full exposure. `curve` is the mean on validation after each evaluated
    update. `ratio` is that of an arm that is nothing but a fixed ratio.
    """

    arm: str
    ratio: float | None
    seeds: tuple[int, ...]
    wanted: tuple[int, ...]
    base: float
    last: Estimate
    gaps: Mapping[str, Gap]
    timed: Mapping[str, TimedGap]
    kept_share: float | None
    pace: Estimate | None
    curve: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """A question that the sweep was to answer, the answer by rule, and the difference that it rests on.

    `detail` says against which arm the difference is, or why there is no answer.
    """

    question: str
    answer: str
    detail: str
    gap: Gap | None


@dataclass(frozen=True, slots=True)
class WorldResult:
    """One world: every arm in the order of the plan, which fixed ratio validation chose, verdicts, what is odd."""

    world: str
    leaps: bool
    updates: int
    test: tuple[int, int]
    validation: tuple[int, int]
    best_fixed: str | None
    arms: tuple[ArmResult, ...]
    absent: tuple[str, ...]
    verdicts: tuple[Answer, ...]
    notes: tuple[str, ...]

    def arm(self, name: str) -> ArmResult | None:
        """The arm of this name, if it has a finished run; `best fixed` is the one that validation chose."""
        wanted = self.best_fixed if name == BEST_FIXED else name
        return next((one for one in self.arms if one.arm == wanted), None)


def measure(table: SweptTable, baseline: str, paces: Mapping[str, Estimate]) -> WorldResult:
    """Everything of one world, with the `paces` of the arms, where they are known.

    Raises `RunError` where `baseline` has no finished run, or evaluations do not compare.
    """
    if baseline not in table.groups:
        raise RunError(
            f"{table.name}: the baseline {baseline!r} has no finished run; with finished runs: "
            f"{', '.join(table.groups) or 'none'}"
        )
    scored = Scored(table, baseline, paces)
    first = table.groups[baseline].runs[0]
    test, validation = (evaluated_on(first, split)[-1] for split in ("test", "validation"))
    return WorldResult(
        world=table.name,
        leaps=first.config.data.leaps,
        updates=scored.last_update,
        test=(test["problems"], test["samples"]),
        validation=(validation["problems"], validation["samples"]),
        best_fixed=scored.best_fixed,
        arms=tuple(scored.result(arm) for arm in table.groups),
        absent=tuple(arm for arm in table.wanted if arm not in table.groups),
        verdicts=tuple(_verdicts(scored)),
        notes=table.notes,
    )


@final
class Scored:
    """The arms of a world with what this sweep asks of them: checkpoints, paces, and which ratios are fixed."""

    def __init__(self, table: SweptTable, baseline: str, paces: Mapping[str, Estimate]) -> None:
        groups = list(table.groups.values())
        lengths = {group.name: group.last for group in groups}
        if len(set(lengths.values())) > 1:
            raise RunError(f"{table.name}: arms of different train.num_updates do not share a table: {lengths}")
        self._table = table
        self._paces = paces
        self.arms = Arms(table.name, table.groups)
        self.baseline, self.wanted = baseline, tuple(table.wanted)
        self.last_update = groups[0].last
        self._base, self._last = (shares_at(groups, "test", dict.fromkeys(lengths, at)) for at in (0, self.last_update))
        self._updates = [0, *common_updates(groups)]
        self._validation = [shares_at(groups, "validation", dict.fromkeys(lengths, at)) for at in self._updates]
        self.fixed = fixed_ratios(table.groups, baseline)
        self.best_fixed = self.arms.best_fixed(self.fixed) if self.arms.common(*self.fixed) else None

    def rivals(self, arm: str) -> dict[str, str]:
        """What an arm is compared with, by name: full exposure, the best fixed ratio, GRPO; never itself."""
        named = {self.baseline: self.baseline, BEST_FIXED: self.best_fixed, GRPO: GRPO}
        return {name: rival for name, rival in named.items() if rival and rival != arm and self.arms.common(rival, arm)}

    def result(self, arm: str) -> ArmResult:
        """Everything of one arm."""
        group, rivals = self._table.groups[arm], self.rivals(arm)
        return ArmResult(
            arm=arm,
            ratio=self.fixed.get(arm),
            seeds=group.seeds,
            wanted=self._table.wanted[arm],
            base=float(self._base[arm].mean()),
            last=mean_share(self._last[arm]),
            gaps={name: self.gap(rival, arm) for name, rival in rivals.items()},
            timed={name: self.timed(rival, arm) for name, rival in rivals.items() if self.is_timed(rival, arm)},
            kept_share=_kept_share(group),
            pace=self._paces.get(arm),
            curve={at: float(by[arm].mean()) for at, by in zip(self._updates, self._validation, strict=True)},
        )

    def gap(self, baseline: str, candidate: str) -> Gap:
        """The candidate less the baseline on test after the last update, over their common seeds."""
        return self._gap(baseline, self._last[baseline], candidate, self._last[candidate])

    def timed(self, baseline: str, candidate: str, share: float = 1.0) -> TimedGap:
        """The candidate less the baseline on validation, at a share of the time in which the faster makes all updates.

        The slower is stopped there. Between two evaluations the score of each (seed, problem) is on the line.
        """
        pace = self._paces[candidate]["value"] / self._paces[baseline]["value"]
        last = share * self.last_update
        ours, theirs = last * min(1.0, 1 / pace), last * min(1.0, pace)
        gap = self._gap(baseline, self.validated(baseline, theirs), candidate, self.validated(candidate, ours))
        return TimedGap(gap, theirs, ours)

    def is_timed(self, *arms: str) -> bool:
        """Whether the pace of all these arms is known."""
        return all(arm in self._paces for arm in arms)

    def validated(self, arm: str, update: float) -> Floats:
        """Shares on validation [seeds, problems] after so many updates, between two evaluations on the line."""
        after = int(np.searchsorted(self._updates, update))
        if self._updates[min(after, len(self._updates) - 1)] == update:
            return self._validation[after][arm]
        first, second = self._updates[after - 1], self._updates[after]
        weight = (update - first) / (second - first)
        return (1 - weight) * self._validation[after - 1][arm] + weight * self._validation[after][arm]

    def _gap(self, baseline: str, a: Floats, candidate: str, b: Floats) -> Gap:
        seeds, name = self.arms.common(baseline, candidate), f"{candidate} - {baseline}"
        a, b = (
            table[[self._table.groups[arm].seeds.index(seed) for seed in seeds]]
            for arm, table in ((baseline, a), (candidate, b))
        )
        blocks = [self._table.blocks[seed] for seed in seeds]
        members = {block: np.array(blocks) == block for block in dict.fromkeys(blocks)}
        if len(members) == 1:
            return Gap(paired(name, a, b), seeds, {}, None)
        first, second = (np.stack([side[rows].mean(axis=0) for rows in members.values()]) for side in (a, b))
        over = paired(name, first, second)
        by_block = {block: float((b[rows] - a[rows]).mean()) for block, rows in members.items()}
        return Gap(paired(name, a, b), seeds, by_block, (over.low, over.high))


def paces_of(cells: Sequence[SweptCell], baseline: str) -> dict[str, Estimate]:
    """Seconds per update of each arm over those of the baseline's paired cells: median and range over all pairs."""
    seconds: dict[str, dict[tuple[str, int], float]] = {}
    own = own_axes(cells)
    require_axis(cells, "arm")
    for cell in cells:
        if cell.state == "finished":
            by_place = seconds.setdefault(cell.points["arm"], {})
            by_place[cell.rest("arm", *own), cell.seed] = seconds_per_update(RunFolder.open(cell.folder))
    reference = seconds.get(baseline, {})
    found = {}
    for arm, by_place in seconds.items():
        ratios = [value / reference[place] for place, value in by_place.items() if place in reference]
        if ratios:
            found[arm] = Estimate(value=median(ratios), low=min(ratios), high=max(ratios))
    return found


def seconds_per_update(run: RunFolder) -> float:
    """Mean wall-clock seconds of an update without evaluations.

    The mean, not the median: a look-ahead is renewed once a hold, and a median over updates would not see it.
    """
    rows = [row["seconds"] for row in run.rows("metrics") if row["seconds"]]  # a skipped update has none
    if not rows:
        raise RunError(f"{run.path}: no row of metrics.jsonl has `seconds`; equal time cannot be worked out")
    return fmean(sum(value for phase, value in seconds.items() if phase != "evaluate") for seconds in rows)


def fixed_ratios(groups: Mapping[str, RunGroup], baseline: str) -> dict[str, float]:
    """The ratios of the arms that differ from the baseline in a fixed ratio and a step size of their own alone."""
    reference = _apart_from_exposure(groups[baseline].runs[0])
    found = {}
    for name, group in groups.items():
        config = group.runs[0].config
        exposure = config.exposure
        fixed = isinstance(exposure, FullSettings | FixedSettings) and exposure.reference_ablation == "off"
        if fixed and _apart_from_exposure(group.runs[0]) == reference:
            found[name] = exposure.reveal_ratio if isinstance(exposure, FixedSettings) else 1.0
    if baseline not in found:
        raise RunError(f"{baseline} has exposure.kind {groups[baseline].runs[0].config.exposure.kind}; expected full")
    return found


def _apart_from_exposure(run: RunRows) -> Config:
    """The config without what seeds, starting checkpoints, exposures and step sizes of their own make differ."""
    config = run.seedless
    model, train = config.model.model_copy(update={"path": ""}), config.train.model_copy(update={"learning_rate": 0.0})
    return config.model_copy(update={"exposure": FullSettings(), "model": model, "train": train})


def _kept_share(group: RunGroup) -> float | None:
    """The mean share of tokens that were distilled, over all updates of all runs; None where no gate was measured."""
    values = [fmean(kept) for run in group.runs if (kept := run.series("kept_share")[1])]
    return fmean(values) if values else None


def _verdicts(scored: Scored) -> Iterator[Answer]:
    """The questions of the sweep, in words; one whose arms have no run is not answered, but for arms of no plan."""
    groups = scored.arms.groups
    aligned = [arm for arm, group in groups.items() if group.runs[0].config.exposure.kind == "aligned"]
    for arm in aligned or [arm for arm in scored.wanted if arm == "aligned"]:
        yield _against(scored, arm, scored.best_fixed, f"{arm}, against the best fixed ratio")
    if groups[scored.baseline].runs[0].config.data.leaps:
        yield _ahead_of_every_fixed(scored)
    yield _against(scored, GATE, scored.best_fixed, "gate, against the best fixed ratio")
    for control in NULL_CONTROLS:
        yield _against(scored, control, GATE, f"null control {control}, against the gate")
    yield _against(scored, GATE, GRPO, "gate, against GRPO at equal rollouts")
    yield _against(scored, GATE, GRPO, "gate, against GRPO at equal time (validation)", timed=True)
    half = "gate, against GRPO at half of that time (validation)"
    yield _against(scored, GATE, GRPO, half, timed=True, share=0.5)
    yield _against(
        scored, GATE, scored.best_fixed, "gate, against the best fixed ratio at equal time (validation)", timed=True
    )
    if SDAR in groups:
        yield _against(scored, SDAR, scored.best_fixed, "SDAR's gate, against the best fixed ratio")
        yield _against(scored, SDAR, GRPO, "SDAR's gate, against GRPO at equal time (validation)", timed=True)
        yield _against(scored, GATE, SDAR, "gate, against SDAR's gate at equal rollouts")


def _against(
    scored: Scored, candidate: str, rival: str | None, question: str, timed: bool = False, share: float = 1.0
) -> Answer:
    lacking = _lacking(scored, candidate, [rival], timed)
    if rival is None or lacking:
        return Answer(question, NOT_ANSWERED, lacking, None)
    gap = scored.timed(rival, candidate, share).gap if timed else scored.gap(rival, candidate)
    return Answer(question, gap.word, rival, gap)


def _ahead_of_every_fixed(scored: Scored) -> Answer:
    """Yes if every interval lies above the margin, no if one lies below it, otherwise what was measured."""
    margin = f"{100 * AHEAD_BY:.0f}"
    question = f"gate, ahead of every fixed ratio by at least {margin} points"
    lacking = _lacking(scored, GATE, list(scored.fixed), timed=False)
    if lacking:
        return Answer(question, NOT_ANSWERED, lacking, None)
    gaps = {arm: scored.gap(arm, GATE) for arm in scored.fixed}
    nearest = min(gaps, key=lambda arm: gaps[arm].contrast.value)
    contrasts = [gap.contrast for gap in gaps.values()]
    found = [one.against(AHEAD_BY) for one in contrasts]
    if not all(one.covers_seeds for one in contrasts):
        answer: str = ONE_SEED
    elif "below" in found:
        answer = "no"
    elif set(found) == {"above"}:
        answer = "yes"
    else:
        answer = f"measured {'yes' if gaps[nearest].contrast.value >= AHEAD_BY else 'no'}, not beyond doubt"
    return Answer(question, answer, nearest, gaps[nearest])


def _lacking(scored: Scored, candidate: str, rivals: Sequence[str | None], timed: bool) -> str:
    """Why a question about these arms cannot be answered; empty if it can."""
    for arm in (candidate, *rivals):
        if arm is None:
            return "the fixed ratios have no seed in common"
        if arm not in scored.arms.groups:
            return f"{arm} has no finished run"
        if not scored.arms.common(arm, candidate):
            return f"{candidate} and {arm} have no finished runs of one seed"
        if timed and not scored.is_timed(arm):
            return f"the pace of {arm} is not known"
    return ""
