"""What a frozen student shows, measured on the recipe's own model and data: the input of null test and audit.

Every rollout is sampled once and scored at all ratios; it is kept by itself, so that batches can be made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch

from atesd.build import objective
from atesd.maths import keyed
from atesd.train.components import Components
from atesd.train.rollouts import GradedRollout
from atesd.train.stopwatch import Stopwatch
from atesd.train.update import Distillation, Example, StepMeters, accumulate
from atesd_lab.audit.null_simulation import MeasuredBatch, MeasuredRatio

GRID = tuple(i / 10 for i in range(11))

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """One rollout at one ratio: means over its tokens in nats or shares; the grounding over the answer's tokens.

    `grounding` is None where there is no answer to read, `success` where nothing was graded.
    """

    tokens: int
    loss: float
    kl: float
    top1_disagreement: float
    student_confidence: float
    grounding: float | None
    difficulty: int
    success: float | None


@dataclass(frozen=True, slots=True)
class ScoredRollouts:
    """The same rollouts, in the same order, at every ratio."""

    ratios: tuple[float, ...]
    rows: tuple[tuple[ScoredRollout, ...], ...]


def measure(components: Components, batches: int, ratios: Sequence[float] = GRID) -> list[MeasuredRatio]:
    """Score the rollouts of the first `batches` updates at every ratio, never taking a step."""
    size = components.config.train.batch_size
    groups = [range(start, start + size) for start in range(0, batches * size, size)]
    return as_batches(score_rollouts(components, batches * size, ratios), groups, components.config.loss.reduction)


@torch.no_grad()
def score_rollouts(
    components: Components, count: int, ratios: Sequence[float] = GRID, say: Say | None = None
) -> ScoredRollouts:
    """Sample the first `count` rollouts of the run and score them at every ratio. The weights stay what they are.

    Ratios that show a rollout's teacher the same are scored once.
    """
    size = components.config.train.batch_size
    by_ratio: list[list[ScoredRollout]] = [[] for _ in ratios]
    for update in range(-(-count // size)):
        done = min((update + 1) * size, count)
        rollouts = components.sampler.rollouts(update)
        for rows, scored in zip(
            by_ratio, _at_ratios(components, rollouts[: done - update * size], ratios), strict=True
        ):
            rows.extend(scored)
        if say is not None:
            say(f"{done} of {count} rollouts sampled and scored at {len(ratios)} ratios")
    return ScoredRollouts(tuple(ratios), tuple(map(tuple, by_ratio)))


def as_batches(
    rollouts: ScoredRollouts, groups: Sequence[Sequence[int]], reduction: Literal["sequence", "token"]
) -> list[MeasuredRatio]:
    """Batches made of the rollouts at the given places, averaged as the loss is."""
    return [
        MeasuredRatio(ratio, tuple(_batch([rows[place] for place in group], reduction) for group in groups))
        for ratio, rows in zip(rollouts.ratios, rollouts.rows, strict=True)
    ]


def redrawn(rollouts: int, batch_size: int, batches: int, seed: int) -> list[list[int]]:
    """Places of `batches` batches drawn from so many rollouts, with replacement: their noise from few rollouts."""
    draws = keyed.generator(seed, "audit_batches", rollouts).integers(rollouts, size=(batches, batch_size))
    return [list(map(int, row)) for row in draws]


def _batch(rows: Sequence[ScoredRollout], reduction: Literal["sequence", "token"]) -> MeasuredBatch:
    weights = [float(row.tokens) if reduction == "token" else 1.0 for row in rows]

    read = [row.grounding for row in rows if row.grounding is not None]

    def mean(values: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)

    return MeasuredBatch(
        loss=mean([row.loss for row in rows]),
        kl=mean([row.kl for row in rows]),
        top1_disagreement=mean([row.top1_disagreement for row in rows]),
        grounding=fmean(read) if read else None,
        student_confidence=mean([row.student_confidence for row in rows]),
        train_success=tuple((row.difficulty, row.success) for row in rows if row.success is not None),
    )


def _at_ratios(
    components: Components, rollouts: Sequence[GradedRollout], ratios: Sequence[float]
) -> list[list[ScoredRollout]]:
    """The rollouts at every ratio."""
    seen = [[_shown(components, one, ratio) for one in rollouts] for ratio in ratios]
    distinct = list(dict.fromkeys((place, example) for row in seen for place, example in enumerate(row)))
    config, scorer = components.config, components.scorer
    method = Distillation(
        scorer,
        Stopwatch(scorer.device),
        components.teacher,
        objective(config),
        chunk_tokens=config.loss.chunk_tokens,
    )
    meters = accumulate(method, [example for _, example in distinct], components.plan)
    scored = {key: _scored(meters, index, rollouts[key[0]]) for index, key in enumerate(distinct)}
    return [[scored[place, example] for place, example in enumerate(row)] for row in seen]


def _shown(components: Components, one: GradedRollout, reveal_ratio: float) -> Example:
    """A rollout as the teacher reads it at a ratio, with what the grounding is measured on."""
    prompt = components.prompts.view(one.problem, reveal_ratio)
    return components.prompts.with_answer(Example(*one.pair, prompt.context), one.problem, prompt.view)


def _scored(meters: StepMeters, index: int, one: GradedRollout) -> ScoredRollout:
    tokens = {name: meters.tokens[name][index] for name in ("loss", "kl", "top1_disagreement")}
    logprobs = torch.tensor(meters.tokens["logprob"][index])
    return ScoredRollout(
        tokens=len(logprobs),
        **{name: fmean(values) for name, values in tokens.items()},
        student_confidence=float(logprobs.exp().mean()),
        grounding=fmean(meters.answers[index]) if meters.answers[index] else None,
        difficulty=one.problem.difficulty,
        success=None if one.verdict is None else float(one.verdict == "correct"),
    )
