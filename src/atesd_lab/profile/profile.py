"""The exposure profile: what a teacher would be worth at each ratio, before any training, from one set of rollouts."""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from atesd.config import AlignedSettings, Config, with_overrides
from atesd.control.fixed import FixedExposure
from atesd.data.rows import NO_ANSWER, OTHER_ANSWER
from atesd.errors import ConfigError
from atesd.records import Rollout
from atesd.runs import RunFolder
from atesd.text import duration
from atesd.train.components import Components
from atesd.train.listeners import Listeners
from atesd.train.loop import Trainer
from atesd_lab.profile.measure import (
    ALL,
    AlignmentProfile,
    Scores,
    Shown,
    align,
    first_shares,
    groups_of,
    is_shortened,
    score,
    show,
    teacher_verdicts,
)
from atesd_lab.profile.suggestion import Suggestion, suggest
from atesd_lab.stats.mismatch import Mismatch, mismatch

MOST_PROBLEMS = 256
VIEWS_MEASURED = 512  # training problems whose whole reference is rendered, for the over-long share
PLAIN = ("exposure.kind=full", "loss.gate=none", "train.grpo_weight=0", "data.on_bad_row=skip")
"""Distillation of one rollout a problem, with nothing around it."""


@dataclass(frozen=True, slots=True)
class RatioProfile:
    """One ratio on one group of rollouts (a difficulty, or all). `first_shares`: see `profile_measure.first_shares`."""

    group: str
    ratio: float
    rollouts: int
    tokens: int
    effective_ratio: float
    kl: Mismatch
    first_shares: tuple[float | None, ...]
    top1_disagreement: float
    teacher_correct: int | None
    answer_logprob: float
    view_tokens: float
    longest_view: int
    shortened_views: int


@dataclass(frozen=True, slots=True)
class DataProfile:
    """What the references look like: how many training references have how many segments, and rows left out.

    `too_long` counts references that do not fit whole, of the first `views_measured` training problems.
    """

    segments: Mapping[int, int]
    views_measured: int
    too_long: int
    gold_missing: int
    gold_disagrees: int
    other_faults: int
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Completions:
    """Lengths of the student's completions, tokens, and the share of them that was cut off at `most`."""

    mean: float
    p95: int
    longest: int
    truncated: float
    most: int


@dataclass(frozen=True, slots=True)
class UpdateCost:
    """One update of plain distillation at the suggested ratio: seconds by phase, and the peak of memory in bytes.

    On a CPU the peak is that of the whole process so far, the profile included.
    """

    seconds: Mapping[str, float]
    peak_bytes: int
    num_updates: int

    @property
    def total(self) -> float:
        """Seconds of the update."""
        return sum(self.seconds.values())


@dataclass(frozen=True, slots=True)
class Profile:
    """All that a profile measured. `student` counts correct rollouts by group; None where nothing can be verified.

    `alignment` is a sentence where it could not be measured.
    """

    ratios: tuple[float, ...]
    rows: tuple[RatioProfile, ...]
    student: Mapping[str, int] | None
    alignment: AlignmentProfile | str
    completions: Completions
    data: DataProfile
    suggestion: Suggestion
    cost: UpdateCost
    seconds: Mapping[str, float]


def profiled_config(config: Config) -> Config:
    """The config under which a recipe is profiled: plain distillation, bad rows counted instead of refused.

    Raises `ConfigError` for a method without a teacher.
    """
    if not config.distils:
        raise ConfigError(f"profile: train.method: {config.train.method} has no teacher; set train.method: distill")
    return with_overrides(config, PLAIN).model_copy(update={"alignment": config.alignment})


def ratios_of(config: Config) -> tuple[float, ...]:
    """The ratios of the recipe's look-ahead; the usual ones where it has none."""
    return (config.exposure if isinstance(config.exposure, AlignedSettings) else AlignedSettings()).ratios


def default_problems(components: Components) -> int:
    """Rollouts where no number is given: those of eight updates, at most 256 and at most one for each problem."""
    return min(8 * components.config.train.batch_size, MOST_PROBLEMS, len(components.problems.train))


def measure_profile(
    components: Components,
    problems: int | None = None,
    say: Callable[[str], None] | None = None,
    ratios: Sequence[float] = AlignedSettings().ratios,
) -> Profile:
    """Profile the student of `components`, whose config is a `profiled_config`, on as many training problems.

    `say` is told what is done and how long it took. The last thing done is one update, after which the student is no
    longer the one that was profiled. Raises `ConfigError` for more problems than there are, or a single ratio.
    """
    ratios = tuple(sorted(set(ratios)))
    if len(ratios) < 2:
        raise ConfigError(f"exposure.ratios: {ratios[0]:g} alone; a profile needs two ratios or more")
    available = len(components.problems.train)
    count = default_problems(components) if problems is None else problems
    if not 2 <= count <= available:
        raise ConfigError(f"--problems {count}: expected 2 to {available}, the number of training problems")
    watch = _Watch(say, f"{count} rollouts at ratios {', '.join(f'{ratio:g}' for ratio in ratios)}")
    shown = show(components, count, ratios)
    watch.lap("rollouts")
    scores = score(components, shown)
    watch.lap("teacher scores")
    teacher = teacher_verdicts(components, shown)
    watch.lap("teacher's own answers")
    alignment = align(components, shown, ratios)
    watch.lap("alignment")
    rows = _rows(ratios, shown, scores, teacher)
    correct = [one.graded.verdict == "correct" for one in shown] if components.checker is not None else None
    suggestion = suggest(
        ratios,
        alignment if isinstance(alignment, str) else alignment[0],
        correct,
        teacher,
        [row.kl.mean for row in rows if row.group == ALL],
    )
    data = data_profile(components)
    watch.lap("references")
    cost = measure_update(components, suggestion.reveal_ratio)
    watch.lap("one update")
    return Profile(
        ratios=ratios,
        rows=rows,
        student=None if correct is None else {g: sum(correct[i] for i in m) for g, m in groups_of(shown).items()},
        alignment=alignment if isinstance(alignment, str) else alignment[1],
        completions=completions_of([one.graded.rollout for one in shown], components.config.sampling.completion_tokens),
        data=data,
        suggestion=suggestion,
        cost=cost,
        seconds=watch.laps,
    )


def completions_of(rollouts: Sequence[Rollout], most: int) -> Completions:
    """How long completions are; `most`: the longest that is allowed."""
    lengths = sorted(len(rollout.completion_ids) for rollout in rollouts)
    p95 = lengths[math.ceil(0.95 * len(lengths)) - 1]
    return Completions(fmean(lengths), p95, lengths[-1], fmean(rollout.truncated for rollout in rollouts), most)


def data_profile(components: Components) -> DataProfile:
    """Segments, references that do not fit whole, and the rows that were left out."""
    some = components.problems.train[:VIEWS_MEASURED]
    skipped = components.problems.skipped
    missing = sum(NO_ANSWER in reason for reason in skipped)
    disagrees = sum(any(words in reason for words in OTHER_ANSWER) for reason in skipped)
    return DataProfile(
        segments=dict(sorted(Counter(len(problem.segments) for problem in components.problems.train).items())),
        views_measured=len(some),
        too_long=sum(is_shortened(components, components.prompts.view(problem, 1.0).view, 1.0) for problem in some),
        gold_missing=missing,
        gold_disagrees=disagrees,
        other_faults=len(skipped) - missing - disagrees,
        faults=skipped[:5],
    )


def measure_update(components: Components, reveal_ratio: float) -> UpdateCost:
    """Time and memory of the first update at a ratio. Nothing is written; the student has then taken a step."""
    device = components.loaded.device
    timed = replace(components, exposure=FixedExposure(reveal_ratio))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        row = Trainer(timed, RunFolder(Path(folder), "profile"), Listeners(())).update(0).row
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_of_process()
    return UpdateCost(row["seconds"], peak, components.config.train.num_updates)


def peak_of_process() -> int:
    """The most memory that this process has held so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _rows(
    ratios: Sequence[float],
    shown: Sequence[Shown],
    scores: Sequence[Sequence[Scores]],
    teacher: Sequence[Sequence[bool]] | None,
) -> tuple[RatioProfile, ...]:
    return tuple(
        _row(group, ratio, k, members, shown, scores, teacher)
        for group, members in groups_of(shown).items()
        for k, ratio in enumerate(ratios)
    )


def _row(
    group: str,
    ratio: float,
    k: int,
    members: Sequence[int],
    shown: Sequence[Shown],
    scores: Sequence[Sequence[Scores]],
    teacher: Sequence[Sequence[bool]] | None,
) -> RatioProfile:
    own, views = [scores[i][k] for i in members], [shown[i].views[k] for i in members]
    kl = [value for one in own for value in one.kl]
    lengths = [len(shown[i].contexts[k]) for i in members]
    return RatioProfile(
        group=group,
        ratio=ratio,
        rollouts=len(members),
        tokens=len(kl),
        effective_ratio=fmean(view.effective_ratio for view in views),
        kl=mismatch(kl),
        first_shares=first_shares(own),
        top1_disagreement=fmean(value for one in own for value in one.disagreement),
        teacher_correct=None if teacher is None else sum(teacher[i][k] for i in members),
        answer_logprob=fmean(one.answer_logprob for one in own),
        view_tokens=fmean(lengths),
        longest_view=max(lengths),
        shortened_views=sum(shown[i].shortened[k] for i in members),
    )


class _Watch:
    """Seconds of the parts of a profile."""

    def __init__(self, say: Callable[[str], None] | None, plan: str) -> None:
        self.laps: dict[str, float] = {}
        self._say = say
        self._tell(plan)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.laps[part] = now - self._last
        self._tell(f"{part}: {duration(self.laps[part])}")
        self._last = now

    def _tell(self, text: str) -> None:
        if self._say is not None:
            self._say(text)
