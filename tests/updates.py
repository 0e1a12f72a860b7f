"""What tests of an update share: a batch as the loop makes it, and one step's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from atesd.aligned.direction import SuccessDirection
from atesd.aligned.foresight import AlignedForesight
from atesd.aligned.scorer import AlignmentScorer
from atesd.maths.divergence import Objective
from atesd.models.score import Scorer
from atesd.models.teacher import Teacher
from atesd.train.components import Components
from atesd.train.reveal import Batch, reveal
from atesd.train.stopwatch import Stopwatch
from atesd.train.update import (
    BatchPlan,
    Distillation,
    EveryToken,
    Example,
    Likelihood,
    Selector,
    StepMeters,
    accumulate,
)


def batch_of(c: Components, update: int) -> Batch:
    """The batch of an update, up to the point where the step would be taken."""
    rollouts = c.sampler.rollouts(update)
    alignment = c.foresight.look(update, rollouts, c.exposure)
    rows = reveal(rollouts, c.exposure, update, prompts=c.prompts, foresight=c.foresight, config=c.config)
    return Batch(rows, alignment)


def alignment_scorer(components: Components) -> AlignmentScorer:
    """The look-ahead of a config that has one."""
    assert isinstance(components.foresight, AlignedForesight)
    return components.foresight.scorer


def direction_of(components: Components) -> SuccessDirection:
    """The success direction of a config that has one."""
    return alignment_scorer(components).direction


def selector_of(components: Components) -> Selector:
    """What decides which tokens are distilled."""
    assert isinstance(components.method, Distillation)
    return components.method.selector


def distill(
    scorer: Scorer,
    teacher: Teacher,
    examples: Sequence[Example],
    objective: Objective,
    *,
    selector: Selector | None = None,
    reduction: Literal["sequence", "token"] = "sequence",
    micro_batch_size: int = 8,
    micro_batch_tokens: int | None = None,
    chunk_tokens: int | None = None,
) -> StepMeters:
    """Accumulate the gradient of distillation on some examples."""
    watch = Stopwatch(scorer.device)
    method = Distillation(scorer, watch, teacher, objective, selector or EveryToken(), chunk_tokens)
    return accumulate(method, examples, BatchPlan(reduction, micro_batch_size, micro_batch_tokens))


def maximise_likelihood(
    scorer: Scorer,
    examples: Sequence[Example],
    *,
    temperature: float = 1.0,
    reduction: Literal["sequence", "token"] = "sequence",
    micro_batch_size: int = 8,
    chunk_tokens: int | None = None,
) -> StepMeters:
    """Accumulate the gradient of the weighted likelihood of some examples."""
    method = Likelihood(scorer, Stopwatch(scorer.device), temperature, chunk_tokens)
    return accumulate(method, examples, BatchPlan(reduction, micro_batch_size))
