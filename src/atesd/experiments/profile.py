"""The exposure profile: what a teacher would be worth at each ratio, before any training, from one set of rollouts.

The rollouts are those of the run's first updates. All ratios score the same tokens, from shared prefixes; the teacher
goes on from every view with the same random numbers. Success has one direction from each half of the rollouts, and
each half is scored along that of the other, so that no rollout speaks for itself.
"""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from atesd.build import Silent
from atesd.config import Config, with_overrides
from atesd.control.fixed import FixedExposure
from atesd.data.rows import NO_ANSWER, OTHER_ANSWER
from atesd.data.views import shown_segments
from atesd.errors import ConfigError
from atesd.experiments.suggestion import AlignmentRows, Suggestion, suggest
from atesd.maths.fused import divergence_profile
from atesd.maths.keyed import uniforms
from atesd.models.load import trainable_parameters
from atesd.models.sample import Request, sample
from atesd.models.score import Pair, completion_tokens, hidden_logprobs
from atesd.models.shared_prefix import shared_hidden
from atesd.records import Alignment, Problem, Rollout, Verdict, View
from atesd.report.text import duration
from atesd.runs import RunFolder
from atesd.train.batches import batch_at, grade, request, rollout_sampler, teacher_view
from atesd.train.lookahead import Lookahead, grouped
from atesd.train.loop import Trainer, objective
from atesd.train.parts import Parts
from atesd.train.success import SuccessDirection

TAIL = 0.05
"""Share of the tokens, those of the largest KL, that the concentration is about."""

MOST_PROBLEMS = 256
VIEWS_MEASURED = 512  # training problems whose whole reference is rendered, for the over-long share
ALL = "all"
PLAIN = ("loss.token_gate=none", "train.grpo_weight=0")
"""Distillation of one rollout a problem, with nothing around it."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A problem, the student's rollout on it, and what the teacher reads of it at each ratio."""

    problem: Problem
    rollout: Rollout
    verdict: Verdict | None
    views: tuple[View, ...]
    contexts: tuple[tuple[int, ...], ...]
    shortened: tuple[bool, ...]

    @property
    def pair(self) -> Pair:
        """The rollout as the student reads it."""
        return self.rollout.prompt_ids, self.rollout.completion_ids


@dataclass(frozen=True, slots=True)
class Scores:
    """What the teacher makes of one rollout at one ratio: KL and top-1 disagreement of every token, nats and 0 or 1.

    `answer_logprob` is the log-probability per token, nats, of the boxed answer right after the view.
    """

    kl: tuple[float, ...]
    disagreement: tuple[float, ...]
    answer_logprob: float


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How the KL is spread over tokens, nats: mean, quantiles, mean of the largest 5 %, and the share these carry.

    `tail_share` is None where all KL is 0.
    """

    mean: float
    p95: float
    p99: float
    tail_mean: float
    tail_share: float | None


@dataclass(frozen=True, slots=True)
class RatioProfile:
    """One ratio on one group of rollouts (a difficulty, or all)."""

    group: str
    ratio: float
    rollouts: int
    tokens: int
    effective_ratio: float
    kl: Mismatch
    top1_disagreement: float
    teacher_correct: int | None
    answer_logprob: float
    view_tokens: float
    longest_view: int
    shortened_views: int


@dataclass(frozen=True, slots=True)
class AlignmentProfile:
    """Alignment of each group at each ratio; of both halves too, and the cosine of their two directions."""

    groups: Mapping[str, Alignment]
    halves: tuple[Alignment, Alignment]
    cosine: float
    correct: tuple[int, int]


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
    data: DataProfile
    suggestion: Suggestion
    cost: UpdateCost
    seconds: Mapping[str, float]


def profiled_config(config: Config) -> Config:
    """The config under which a recipe is profiled: plain distillation, bad rows counted instead of refused.

    Raises `ConfigError` for a method without a teacher.
    """
    if config.train.method != "distill":
        raise ConfigError(f"profile: train.method: {config.train.method} has no teacher; set train.method: distill")
    return with_overrides(config, ["exposure.kind=full", "exposure.granularity=update", *PLAIN, "data.on_bad_row=skip"])


def default_problems(parts: Parts) -> int:
    """Rollouts where no number is given: those of eight updates, at most 256 and at most one for each problem."""
    return min(8 * parts.config.train.batch_size, MOST_PROBLEMS, len(parts.problems.train))


def measure_profile(parts: Parts, problems: int | None = None, say: Callable[[str], None] | None = None) -> Profile:
    """Profile the student of `parts`, whose config is a `profiled_config`, on as many training problems.

    `say` is told what is done and how long it took.

    The last thing it does is one update, after which the student is no longer the one that was profiled. Raises
    `ConfigError` for more problems than there are.
    """
    available = len(parts.problems.train)
    count = default_problems(parts) if problems is None else problems
    if not 2 <= count <= available:
        raise ConfigError(f"--problems {count}: expected 2 to {available}, the number of training problems")
    ratios = tuple(sorted(set(parts.config.aligned.ratios)))
    watch = _Watch(say, f"{count} rollouts at ratios {', '.join(f'{ratio:g}' for ratio in ratios)}")
    shown = show(parts, count, ratios)
    watch.lap("rollouts")
    scores = score(parts, shown)
    watch.lap("teacher scores")
    teacher = teacher_verdicts(parts, shown)
    watch.lap("teacher's own answers")
    alignment = align(parts, shown, ratios)
    watch.lap("alignment")
    rows = _rows(ratios, shown, scores, teacher)
    correct = [one.verdict == "correct" for one in shown] if parts.checker is not None else None
    suggestion = suggest(
        ratios,
        alignment if isinstance(alignment, str) else alignment[0],
        correct,
        teacher,
        [row.kl.mean for row in rows if row.group == ALL],
    )
    data = data_profile(parts)
    watch.lap("references")
    cost = measure_update(parts, suggestion.reveal_ratio)
    watch.lap("one update")
    return Profile(
        ratios=ratios,
        rows=rows,
        student=None if correct is None else {g: sum(correct[i] for i in m) for g, m in _groups(shown).items()},
        alignment=alignment if isinstance(alignment, str) else alignment[1],
        data=data,
        suggestion=suggestion,
        cost=cost,
        seconds=watch.laps,
    )


def show(parts: Parts, count: int, ratios: Sequence[float]) -> list[Shown]:
    """The first `count` rollouts that a run of this config would draw, graded, with the view at each ratio."""
    drawn: list[tuple[Problem, int, int]] = []
    update = 0
    while len(drawn) < count:
        batch = zip(*batch_at(parts.problems.train, parts.config, update), strict=True)
        drawn += [(problem, number, update) for problem, number in batch]
        update += 1
    drawn = drawn[:count]
    requests = [request(problem, number, at, parts) for problem, number, at in drawn]
    rollouts = sample(parts.loaded, requests, rollout_sampler(parts.config))
    problems = [problem for problem, _, _ in drawn]
    graded = zip(problems, rollouts, grade(problems, rollouts, parts), strict=True)
    return [_shown(parts, *row, ratios) for row in graded]


@torch.no_grad()
def score(parts: Parts, shown: Sequence[Shown]) -> list[list[Scores]]:
    """What the teacher makes of each rollout at each ratio: [n][K]. The student is projected once for all ratios."""
    size = parts.config.train.micro_batch_size
    found: list[list[Scores]] = []
    for start in range(0, len(shown), size):
        found += _scores(parts, shown[start : start + size])
    return found


def teacher_verdicts(parts: Parts, shown: Sequence[Shown]) -> list[list[bool]] | None:
    """Whether the teacher's own completion from its view is right: [n][K]; None without a checker.

    One sample a view, drawn like a rollout; a problem has the same uniforms at every ratio.
    """
    if parts.checker is None:
        return None
    config = parts.config
    requests = [
        Request(
            one.problem.id,
            place,
            context,
            uniforms(config.sampling.completion_tokens, config.train.seed, "profile", one.problem.id),
        )
        for one in shown
        for place, context in enumerate(one.contexts)
    ]
    with parts.teacher.weights():
        rollouts = sample(parts.loaded, requests, rollout_sampler(config))
    verdicts = grade([one.problem for one in shown for _ in one.contexts], rollouts, parts)
    right = iter(verdict == "correct" for verdict in verdicts)
    return [list(islice(right, len(one.contexts))) for one in shown]


def align(
    parts: Parts, shown: Sequence[Shown], ratios: Sequence[float]
) -> tuple[AlignmentRows, AlignmentProfile] | str:
    """The alignment of every rollout at every ratio along the direction of the other half, or why there is none.

    Halves are the even and the odd places in the order of the data.
    """
    config = parts.config
    if parts.checker is None:
        return "there is no checker (data.checker: none)"
    halves = [place % 2 for place in range(len(shown))]
    sides = [[one for one, half in zip(shown, halves, strict=True) if half == side] for side in (0, 1)]
    correct = tuple(sum(one.verdict == "correct" for one in side) for side in sides)
    least = config.aligned.min_correct
    if min(correct) < least:
        return (
            f"only {correct[0]} of {len(sides[0])} and {correct[1]} of {len(sides[1])} rollouts of the two halves are "
            f"correct, aligned.min_correct wants {least} in each; raise --problems"
        )
    directions = [_direction(parts, side) for side in sides]
    if not all(direction.known for direction in directions):
        return f"aligned.success: {config.aligned.success} gives no direction on these rollouts; raise --problems"
    scored = [_along(parts, directions[1 - half], sides[half], ratios) for half in (0, 1)]
    cursors = [iter(rows) for rows in scored]
    rows = [next(cursors[half]) for half in halves]
    by_group = {group: grouped(ratios, [rows[i] for i in m], [group] * len(m)) for group, m in _groups(shown).items()}
    first, second = (grouped(ratios, some, [ALL] * len(some))[ALL] for some in scored)
    profile = AlignmentProfile(
        groups={group: found[group] for group, found in by_group.items()},
        halves=(first, second),
        cosine=_cosine(*(direction.state_dict()["unit"] for direction in directions)),
        correct=(correct[0], correct[1]),
    )
    return AlignmentRows(tuple(map(tuple, rows)), tuple(halves)), profile


def mismatch(kl: Sequence[float]) -> Mismatch:
    """How the KL of these tokens, nats, is spread. The tail is the largest ceil(0.05 n) of them."""
    values = np.sort(np.array(kl, dtype=np.float64))
    tail = values[-math.ceil(TAIL * len(values) - 1e-9) :]
    total = float(values.sum())
    p95, p99 = np.quantile(values, [0.95, 0.99])
    share = float(tail.sum()) / total if total > 0 else None
    return Mismatch(float(values.mean()), float(p95), float(p99), float(tail.mean()), share)


def data_profile(parts: Parts) -> DataProfile:
    """Segments, references that do not fit whole, and the rows that were left out."""
    some = parts.problems.train[:VIEWS_MEASURED]
    skipped = parts.problems.skipped
    missing = sum(NO_ANSWER in reason for reason in skipped)
    disagrees = sum(any(words in reason for words in OTHER_ANSWER) for reason in skipped)
    return DataProfile(
        segments=dict(sorted(Counter(len(problem.segments) for problem in parts.problems.train).items())),
        views_measured=len(some),
        too_long=sum(_is_shortened(parts, _view(parts, problem, 1.0)[0], 1.0) for problem in some),
        gold_missing=missing,
        gold_disagrees=disagrees,
        other_faults=len(skipped) - missing - disagrees,
        faults=skipped[:5],
    )


def measure_update(parts: Parts, reveal_ratio: float) -> UpdateCost:
    """Time and memory of the first update at a ratio. Nothing is written; the student has then taken a step."""
    device = parts.loaded.device
    timed = replace(parts, exposure=FixedExposure(reveal_ratio))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        row = Trainer(timed, RunFolder(Path(folder), "profile"), Silent()).update(0)[2]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_of_process()
    return UpdateCost(row["seconds"], peak, parts.config.train.num_updates)


def peak_of_process() -> int:
    """The most memory that this process has held so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _view(parts: Parts, problem: Problem, ratio: float) -> tuple[View, tuple[int, ...]]:
    return teacher_view(problem, ratio, parts.config, parts.encoder, parts.renderer, parts.problems.train)


def _shown(parts: Parts, problem: Problem, rollout: Rollout, verdict: Verdict | None, ratios: Sequence[float]) -> Shown:
    views, contexts = zip(*(_view(parts, problem, ratio) for ratio in ratios), strict=True)
    shortened = tuple(_is_shortened(parts, view, ratio) for view, ratio in zip(views, ratios, strict=True))
    return Shown(problem, rollout, verdict, views, contexts, shortened)


def _is_shortened(parts: Parts, view: View, ratio: float) -> bool:
    """Whether the view shows less than the ratio asks for because it would be too long."""
    if parts.config.exposure.control == "none" or parts.config.views.answer == "only":
        return False
    return view.shown_segments < shown_segments(ratio, view.total_segments)


def _scores(parts: Parts, shown: Sequence[Shown]) -> list[list[Scores]]:
    """`score` on one micro-batch. Completion and answer of all ratios are one tree per rollout."""
    device, pairs = parts.scorer.device, [one.pair for one in shown]
    answers = [parts.encoder.completion(f"\\boxed{{{one.problem.answer}}}")[:-1] for one in shown]
    count = len(shown[0].contexts)
    groups = [
        [(context, text) for text in (one.rollout.completion_ids, answer) for context in one.contexts]
        for one, answer in zip(shown, answers, strict=True)
    ]
    with parts.teacher.weights():
        states = shared_hidden(parts.scorer, groups)
        head = parts.scorer.head()
    tokens = completion_tokens(pairs, device)
    teachers = [torch.cat([row[k] for row in states]) for k in range(count)]
    sides = parts.scorer.hidden(pairs), parts.scorer.head(), teachers, head
    meters = divergence_profile(objective(parts.config), *sides, tokens, chunk_tokens=parts.config.loss.chunk_tokens)
    lengths = [len(completion) for _, completion in pairs]
    kl, differs = ([torch.split(m[name], lengths) for m in meters] for name in ("kl", "top1_disagreement"))
    found = []
    for i, (row, answer) in enumerate(zip(states, answers, strict=True)):
        ids = torch.tensor(answer, device=device)
        own = [float(hidden_logprobs(head, state, ids).double().mean()) for state in row[count:]]
        found.append([Scores(tuple(kl[k][i].tolist()), tuple(differs[k][i].tolist()), own[k]) for k in range(count)])
    return found


def _direction(parts: Parts, shown: Sequence[Shown]) -> SuccessDirection:
    direction = SuccessDirection(trainable_parameters(parts.loaded), parts.scorer, parts.encoder, parts.config)
    direction.remember([one.problem for one in shown], [one.rollout for one in shown], [one.verdict for one in shown])
    direction.renew(0)
    return direction


def _along(
    parts: Parts, direction: SuccessDirection, shown: Sequence[Shown], ratios: Sequence[float]
) -> list[list[float]]:
    """Alignment of these rollouts along a direction, [n][K]."""
    train, chunk = parts.config.train, parts.config.loss.chunk_tokens
    lookahead = Lookahead(
        direction,
        parts.scorer,
        parts.teacher,
        objective(parts.config),
        ratios,
        micro_batch_size=train.micro_batch_size,
        chunk_tokens=chunk,
    )
    places = {ratio: k for k, ratio in enumerate(ratios)}
    return lookahead.by_ratio([one.pair for one in shown], lambda ratio: [one.contexts[places[ratio]] for one in shown])


def _cosine(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """The inner product of two unit directions."""
    return float(sum((first[name].double() * second[name].double()).sum() for name in first))


def _groups(shown: Sequence[Shown]) -> dict[str, list[int]]:
    """Places of all rollouts, and of those of each difficulty where there are several."""
    levels = sorted({one.problem.difficulty for one in shown})
    of = {str(level): [i for i, one in enumerate(shown) if one.problem.difficulty == level] for level in levels}
    return {ALL: list(range(len(shown))), **(of if len(levels) > 1 else {})}


def _rows(
    ratios: Sequence[float],
    shown: Sequence[Shown],
    scores: Sequence[Sequence[Scores]],
    teacher: Sequence[Sequence[bool]] | None,
) -> tuple[RatioProfile, ...]:
    return tuple(
        _row(group, ratio, k, members, shown, scores, teacher)
        for group, members in _groups(shown).items()
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
