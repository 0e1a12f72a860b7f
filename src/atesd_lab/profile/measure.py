"""What a profile measures on the model: rollouts, the teacher's scores and answers at each ratio, and the alignment.

The rollouts are those of the run's first updates. All ratios score the same tokens, from shared prefixes; the teacher
goes on from every view with the same random numbers. Success has one direction from each half of the rollouts, and
each half is scored along that of the other, so that no rollout speaks for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from atesd.aligned.direction import SuccessDirection
from atesd.aligned.scorer import AlignmentScorer, grouped
from atesd.build import objective
from atesd.data.views import shown_segments
from atesd.engine.interface import Request
from atesd.maths.fused import divergence_profile
from atesd.models.score import Pair, completion_tokens, hidden_logprobs
from atesd.models.shared_prefix import shared_hidden
from atesd.records import Alignment, Problem, View
from atesd.train.components import Components
from atesd.train.rollouts import GradedRollout, rollout_params
from atesd.train.views import TeacherPrompt
from atesd_lab.profile.suggestion import AlignmentRows

ALL = "all"
"""The name of all rollouts together, beside the difficulties."""


@dataclass(frozen=True, slots=True)
class Shown:
    """The student's graded rollout on a problem, and what the teacher reads of the problem at each ratio."""

    graded: GradedRollout
    views: tuple[View, ...]
    contexts: tuple[tuple[int, ...], ...]
    shortened: tuple[bool, ...]

    @property
    def problem(self) -> Problem:
        """The problem."""
        return self.graded.problem

    @property
    def pair(self) -> Pair:
        """The rollout as the student reads it."""
        return self.graded.pair


@dataclass(frozen=True, slots=True)
class Scores:
    """What the teacher makes of one rollout at one ratio: KL and top-1 disagreement of every token, nats and 0 or 1.

    `answer_logprob` is the log-probability per token, nats, of the boxed answer right after the view.
    """

    kl: tuple[float, ...]
    disagreement: tuple[float, ...]
    answer_logprob: float


@dataclass(frozen=True, slots=True)
class AlignmentProfile:
    """Alignment of each group at each ratio; of both halves too, and the cosine of their two directions."""

    groups: Mapping[str, Alignment]
    halves: tuple[Alignment, Alignment]
    cosine: float
    correct: tuple[int, int]


FIRST_TOKENS = (1, 4, 16)
"""How many tokens at the beginning of each completion `first_shares` is about."""


def first_shares(scores: Sequence[Scores]) -> tuple[float | None, ...]:
    """Share of the KL that lies on the first 1, 4 and 16 tokens of each rollout; None where all KL is 0.

    Where the two chat templates end differently these tokens disagree by template, whatever the teacher has read.
    """
    total = sum(map(sum, (one.kl for one in scores)))
    early = [sum(sum(one.kl[:count]) for one in scores) for count in FIRST_TOKENS]
    return tuple(part / total if total > 0 else None for part in early)


def show(components: Components, count: int, ratios: Sequence[float]) -> list[Shown]:
    """The first `count` rollouts that a run of this config would draw, graded, with the view at each ratio."""
    drawn: list[tuple[Problem, int, int]] = []
    update = 0
    while len(drawn) < count:
        batch = zip(*components.sampler.batch(update), strict=True)
        drawn += [(problem, number, update) for problem, number in batch]
        update += 1
    problems, numbers, updates = zip(*drawn[:count], strict=True)
    requests = components.sampler.requests(problems, numbers, updates)
    rollouts = components.engine.complete(requests, rollout_params(components.config))
    return [_shown(components, graded, ratios) for graded in components.sampler.graded(problems, rollouts)]


@torch.no_grad()
def score(components: Components, shown: Sequence[Shown]) -> list[list[Scores]]:
    """What the teacher makes of each rollout at each ratio: [n][K]. The student is projected once for all ratios."""
    size = components.config.train.micro_batch_size
    found: list[list[Scores]] = []
    for start in range(0, len(shown), size):
        found += _scores(components, shown[start : start + size])
    return found


def teacher_verdicts(components: Components, shown: Sequence[Shown]) -> list[list[bool]] | None:
    """Whether the teacher's own completion from its view is right: [n][K]; None without a checker.

    One sample a view, drawn like a rollout; a problem has the same uniforms at every ratio.
    """
    if components.checker is None:
        return None
    config = components.config
    requests = [
        Request(one.problem.id, place, context, (config.train.seed, "profile", one.problem.id))
        for one in shown
        for place, context in enumerate(one.contexts)
    ]
    with components.teacher.weights():
        rollouts = components.engine.complete(requests, rollout_params(config))
    graded = components.sampler.graded([one.problem for one in shown for _ in one.contexts], rollouts)
    right = iter(one.verdict == "correct" for one in graded)
    return [list(islice(right, len(one.contexts))) for one in shown]


def align(
    components: Components, shown: Sequence[Shown], ratios: Sequence[float]
) -> tuple[AlignmentRows, AlignmentProfile] | str:
    """The alignment of every rollout at every ratio along the direction of the other half, or why there is none.

    Halves are the even and the odd places in the order of the data.
    """
    config = components.config
    if components.checker is None:
        return "there is no checker (data.checker: none)"
    halves = [place % 2 for place in range(len(shown))]
    sides = [[one for one, half in zip(shown, halves, strict=True) if half == side] for side in (0, 1)]
    correct = tuple(sum(one.graded.verdict == "correct" for one in side) for side in sides)
    least = config.alignment.min_correct
    if min(correct) < least:
        return (
            f"only {correct[0]} of {len(sides[0])} and {correct[1]} of {len(sides[1])} rollouts of the two halves are "
            f"correct, alignment.min_correct wants {least} in each; raise --problems"
        )
    directions = [_direction(components, side) for side in sides]
    if not all(direction.known for direction in directions):
        return f"alignment.success: {config.alignment.success} gives no direction on these rollouts; raise --problems"
    scored = [_along(components, directions[1 - half], sides[half], ratios) for half in (0, 1)]
    cursors = [iter(rows) for rows in scored]
    rows = [next(cursors[half]) for half in halves]
    by_group = {group: grouped(ratios, [rows[i] for i in m], [group] * len(m)) for group, m in groups_of(shown).items()}
    first, second = (grouped(ratios, some, [ALL] * len(some))[ALL] for some in scored)
    profile = AlignmentProfile(
        groups={group: found[group] for group, found in by_group.items()},
        halves=(first, second),
        cosine=_cosine(*(direction.unit for direction in directions)),
        correct=(correct[0], correct[1]),
    )
    return AlignmentRows(tuple(map(tuple, rows)), tuple(halves)), profile


def is_shortened(components: Components, view: View, ratio: float) -> bool:
    """Whether the view shows less than the ratio asks for because it would be too long."""
    if components.config.exposure.reference_ablation == "none" or components.config.views.answer == "only":
        return False
    return view.shown_segments < shown_segments(ratio, view.total_segments)


def groups_of(shown: Sequence[Shown]) -> dict[str, list[int]]:
    """By name, the places of all rollouts, and of those of each difficulty where there are several."""
    levels = sorted({one.problem.difficulty for one in shown})
    of = {str(level): [i for i, one in enumerate(shown) if one.problem.difficulty == level] for level in levels}
    return {ALL: list(range(len(shown))), **(of if len(levels) > 1 else {})}


def _shown(components: Components, graded: GradedRollout, ratios: Sequence[float]) -> Shown:
    prompts: list[TeacherPrompt] = [components.prompts.view(graded.problem, ratio) for ratio in ratios]
    views = tuple(prompt.view for prompt in prompts)
    shortened = tuple(is_shortened(components, view, ratio) for view, ratio in zip(views, ratios, strict=True))
    return Shown(graded, views, tuple(prompt.context for prompt in prompts), shortened)


def _scores(components: Components, shown: Sequence[Shown]) -> list[list[Scores]]:
    """`score` on one micro-batch. Completion and answer of all ratios are one tree per rollout."""
    device, pairs = components.scorer.device, [one.pair for one in shown]
    answers = [components.encoder.completion(f"\\boxed{{{one.problem.answer}}}")[:-1] for one in shown]
    count = len(shown[0].contexts)
    groups = [
        [(context, text) for text in (one.graded.rollout.completion_ids, answer) for context in one.contexts]
        for one, answer in zip(shown, answers, strict=True)
    ]
    with components.teacher.weights():
        states = shared_hidden(components.scorer, groups)
        head = components.scorer.head()
    tokens = completion_tokens(pairs, device)
    teachers = [torch.cat([row[k] for row in states]) for k in range(count)]
    sides = components.scorer.hidden(pairs), components.scorer.head(), teachers, head
    meters = divergence_profile(
        objective(components.config), *sides, tokens, chunk_tokens=components.config.loss.chunk_tokens
    )
    lengths = [len(completion) for _, completion in pairs]
    kl, differs = ([torch.split(m[name], lengths) for m in meters] for name in ("kl", "top1_disagreement"))
    found = []
    for i, (row, answer) in enumerate(zip(states, answers, strict=True)):
        ids = torch.tensor(answer, device=device)
        own = [float(hidden_logprobs(head, state, ids).double().mean()) for state in row[count:]]
        found.append([Scores(tuple(kl[k][i].tolist()), tuple(differs[k][i].tolist()), own[k]) for k in range(count)])
    return found


def _direction(components: Components, shown: Sequence[Shown]) -> SuccessDirection:
    direction = SuccessDirection(components.weights, components.scorer, components.encoder, components.config)
    direction.remember([one.graded for one in shown])
    direction.renew(0)
    return direction


def _along(
    components: Components, direction: SuccessDirection, shown: Sequence[Shown], ratios: Sequence[float]
) -> list[list[float]]:
    """Alignment of these rollouts along a direction, [n][K]."""
    train, chunk = components.config.train, components.config.loss.chunk_tokens
    scorer = AlignmentScorer(
        direction,
        components.scorer,
        components.teacher,
        objective(components.config),
        ratios,
        micro_batch_size=train.micro_batch_size,
        chunk_tokens=chunk,
        reduction=components.config.loss.reduction,
    )
    return scorer.by_ratio([one.pair for one in shown], list(zip(*(one.contexts for one in shown), strict=True)))


def _cosine(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """The inner product of two unit directions."""
    return float(sum((first[name].double() * second[name].double()).sum() for name in first))
