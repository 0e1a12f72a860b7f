"""The success direction: where in parameter space the student's verified success rises, from its own graded rollouts.

v is the gradient of sum_i A_i log q(y_i | x_i) / |y_i| over the rollouts of the last hold, with A_i = 1 for a verified
rollout (`correct`) or its reward less the mean reward at its difficulty (`centred`). No reference enters, so no foreign
style can mislead it; two misleading directions are there to be compared with: `references` (raise the likelihood of
the reference solutions) and `shuffled` (correct, but the verdicts belong to other rollouts of the hold).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TypedDict, cast, final

import torch
from torch import Tensor, nn

from atesd.aligned.line import FeatureLine, Line, TwoPoints
from atesd.config import Config
from atesd.errors import ModelError
from atesd.maths.fused import fused_likelihood
from atesd.maths.head import Head
from atesd.maths.keyed import generator
from atesd.models.prompts import PromptEncoder
from atesd.models.ranks import Gathered
from atesd.models.score import Pair, Scored, Scorer, completion_tokens
from atesd.models.weights import Weights
from atesd.train.rollouts import GradedRollout
from atesd.train.stopwatch import Stopwatch
from atesd.train.update import BatchPlan, Example, Likelihood, accumulate, per_token

_TRIAL = 1e-3  # of |theta|: the first displacement, from which the one in force is scaled
_CALIBRATION_TOKENS = 256
_ENLARGEMENTS = 6
_FEATURES = "features"  # the one part of such a direction
_NEAR = 0.75  # of the change that is wanted; curvature alone takes off less


@dataclass(frozen=True, slots=True)
class Attempt:
    """A graded rollout of the last hold; `reference` is its problem's as a completion, empty where it is not read."""

    difficulty: int
    context: tuple[int, ...]
    completion: tuple[int, ...]
    reference: tuple[int, ...]
    correct: bool


class DirectionState(TypedDict):
    """What a checkpoint holds of a direction; an attempt is its fields in order."""

    attempts: list[tuple[int, list[int], list[int], list[int], bool]]
    unit: dict[str, Tensor]
    epsilon: float


StepMetric = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Turns gradients, by name, into the steps that an optimiser would make of them."""


@final
class SuccessDirection:
    """Remembers the rollouts of a hold, turns them into a unit direction, and displaces the student along it.

    Rollouts that gave a direction are then forgotten: what is scored along it is always newer. `step_metric` is read
    under `alignment.metric: optimiser`.
    """

    def __init__(
        self,
        weights: Weights,
        scorer: Scorer,
        encoder: PromptEncoder,
        config: Config,
        step_metric: StepMetric = dict,
    ) -> None:
        self._weights = weights
        self._scorer = scorer
        self._encoder = encoder
        self._config = config
        self._step_metric = step_metric
        self._of = config.alignment.parameters
        if self._of == "features" and not scorer.has_separable_head:
            raise ModelError(
                f"{config.model.path}: its output head is not a linear layer that atesd knows how to read, so that "
                "alignment.parameters: features cannot be; set alignment.parameters: all"
            )
        self._attempts: list[Attempt] = []
        self._unit: dict[str, Tensor] = {}
        self.epsilon = 0.0

    @property
    def known(self) -> bool:
        """Whether there is a direction: the last hold had enough correct rollouts, and wrong ones where they count."""
        return bool(self._unit)

    @property
    def unit(self) -> Mapping[str, Tensor]:
        """The direction, a unit vector over all trained parameters, by name; empty where there is none."""
        return self._unit

    def remember(self, rollouts: Sequence[GradedRollout]) -> None:
        """Keep the graded rollouts of an update."""
        read = self._config.alignment.success == "references"
        for graded in rollouts:
            reference = self._encoder.completion(graded.problem.reference) if read else ()
            correct = graded.verdict == "correct"
            self._attempts.append(Attempt(graded.problem.difficulty, *graded.pair, reference, correct=correct))

    def renew(self, update: int) -> None:
        """Make the direction of the coming hold from what is remembered, and forget it; `known` says if there is one.

        u = v / |v|, with v the gradient of sum_i A_i log q(y_i | x_i) / |y_i| over the rollouts of the last hold, and
        A_i by `alignment.success` (see `weighted_rows`).

        The gradients of the parameters must be clear, and are clear again afterwards.
        """
        attempts, self._attempts = self._attempts, []
        self._unit = {}
        rows = weighted_rows(attempts, self._config, update)
        if not rows:
            return
        rows = drawn(rows, self._config, update)
        ascents = {"all": self._ascent, "last_layer": self._last_layer_ascent, "features": self._features_ascent}
        ascent: Mapping[str, Tensor] = ascents[self._of](rows)
        if self._config.alignment.metric == "optimiser":
            ascent = self._step_metric(ascent)
        length = _length(ascent.values())
        if not torch.isfinite(length) or length == 0:
            return
        self._unit = {name: value / length for name, value in ascent.items()}
        self.epsilon = 1.0 if self._of == "features" else self._scaled_epsilon(rows)
        if not math.isfinite(self.epsilon) or self.epsilon == 0:
            self._unit = {}

    def line(self, batch: Sequence[Pair], student: Scored | None = None) -> Line:
        """The student along the direction, on some completions; `student` is what it makes of them, where known."""
        if self._of == "features":
            return FeatureLine(student or self._scorer.scored(batch), self._unit[_FEATURES])
        here = (student or self._scorer.scored(batch)) if self._of == "last_layer" else student
        tail = None if here is None else here.tail
        sides = []
        for side in (1, -1):
            with self.displaced(side):
                sides.append(self._scorer.scored(batch) if tail is None else Scored(tail.hidden(), self._scorer.head()))
        return TwoPoints(sides[0], sides[1], self.epsilon, here)

    def displaced(self, side: int) -> AbstractContextManager[None]:
        """Inside, the student is at theta + side * epsilon * u, without gradient; afterwards it is itself, bit for bit.

        Heads read inside stay what they were (`Weights.moved`).
        """
        return self._weights.moved(self._unit, side * self.epsilon)

    def state_dict(self) -> dict[str, object]:
        """The remembered rollouts, the direction and its step."""
        attempts = [
            [a.difficulty, list(a.context), list(a.completion), list(a.reference), a.correct] for a in self._attempts
        ]
        return {"attempts": attempts, "unit": dict(self._unit), "epsilon": self.epsilon}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore `state_dict`."""
        kept = cast(DirectionState, state)
        self._attempts = [Attempt(d, tuple(c), tuple(y), tuple(r), ok) for d, c, y, r, ok in kept["attempts"]]
        self._unit = {name: value.to(self._scorer.device) for name, value in kept["unit"].items()}
        self.epsilon = kept["epsilon"]

    def _ascent(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The gradient of the examples' mean log-likelihood, by name; those of the parameters are clear afterwards."""
        config = self._config
        likelihood = Likelihood(
            self._scorer, Stopwatch(self._scorer.device), config.loss_temperature, config.loss.chunk_tokens
        )
        train = config.train
        accumulate(likelihood, examples, BatchPlan("sequence", train.micro_batch_size, train.micro_batch_tokens))
        self._weights.add_up_gradients()
        ascent = {name: -p.grad for name, p in self._weights.trained.items() if p.grad is not None}
        for parameter in self._weights.trained.values():
            parameter.grad = None
        return ascent

    def _last_layer_ascent(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The same by the parameters of the last layer alone: the backward pass goes through nothing else."""
        layer = self._scorer.last_layer
        assert layer is not None
        wanted = layer.parameters()
        with torch.no_grad():
            head = self._scorer.head()
        self._accumulate(examples, self._last_states, head)
        self._weights.add_up_gradients()
        trained = self._weights.trained
        ascent = {name: -p.grad for name, p in trained.items() if p.grad is not None and id(p) in wanted}
        for parameter in trained.values():
            parameter.grad = None
        return ascent

    def _features_ascent(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The same by a factor, 1, of every entry of the last hidden state: no backward pass through the model."""
        with torch.no_grad():
            head, hidden = self._scorer.head(), self._scorer.hidden([examples[0].student_pair])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        gain = nn.Parameter(torch.ones_like(hidden[0], dtype=wide))
        self._accumulate(examples, partial(self._fixed_states, gain=gain), head)
        self._scorer.ranks.sum_gradients([gain])
        assert gain.grad is not None
        return {_FEATURES: -gain.grad}

    def _accumulate(self, examples: Sequence[Example], states: Callable[[Sequence[Pair]], Tensor], head: Head) -> None:
        """Accumulate the gradient of the examples' mean negative log-likelihood by what `states` and `head` let in."""
        train, ranks, device = self._config.train, self._scorer.ranks, self._scorer.device
        plan = BatchPlan("sequence", train.micro_batch_size, train.micro_batch_tokens)
        own, weights = ranks.shard(examples), ranks.shard(plan.weights(examples))
        with ranks.gathering(Gathered[None]()) as gathered:
            for places in plan.micro_batches(own):
                batch = [own[place] for place in places]
                factors = per_token([weights[place] * own[place].advantage for place in places], batch, device)
                pairs = [example.student_pair for example in batch]
                hidden = states(pairs)
                likelihood, _ = fused_likelihood(
                    hidden,
                    head,
                    completion_tokens(pairs, device),
                    factors.to(torch.promote_types(hidden.dtype, torch.float32)),
                    temperature=self._config.loss_temperature,
                    chunk_tokens=self._config.loss.chunk_tokens,
                )
                likelihood.backward()  # type: ignore[no-untyped-call]
            gathered.own = None

    def _last_states(self, pairs: Sequence[Pair]) -> Tensor:
        with torch.no_grad():
            tail = self._scorer.scored(pairs).tail
        assert tail is not None
        return tail.hidden()

    def _fixed_states(self, pairs: Sequence[Pair], gain: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self._scorer.hidden(pairs)
        return hidden.to(gain.dtype) * gain

    def _scaled_epsilon(self, rows: Sequence[Example]) -> float:
        """The step that changes logits by `alignment.logit_change` nats (root mean square), from a trial step.

        Enlarged while it changes them by clearly less: what a small step changes in bfloat16 is mostly rounding. 0 if
        no step changes anything.
        """
        pairs, count = [], 0
        for row in rows:
            pairs.append(row.student_pair)
            count += len(row.completion)
            if count >= _CALIBRATION_TOKENS:
                break
        wanted = self._config.alignment.logit_change
        distance = _TRIAL * float(_length(p.detach() for p in self._weights.trained.values()))
        change = self._logit_change(pairs, distance)
        for _ in range(_ENLARGEMENTS):
            distance *= wanted / change if change else 10
            change = self._logit_change(pairs, distance)
            if change >= _NEAR * wanted:
                break
        return distance if change else 0.0

    def _logit_change(self, pairs: Sequence[Pair], distance: float) -> float:
        """Root mean square of half the difference between the logits on both sides."""
        logits = []
        for side in (1, -1):
            with self._weights.moved(self._unit, side * distance):
                hidden = self._scorer.hidden(pairs)[:_CALIBRATION_TOKENS]
                logits.append(self._scorer.head().logits(hidden))
        return float((logits[0] - logits[1]).std()) / 2


def weighted_rows(attempts: Sequence[Attempt], config: Config, update: int) -> list[Example]:
    """The rollouts (or references) whose likelihood is to rise, each with its advantage.

    Empty if fewer than `alignment.min_correct` are correct, or none is wrong where success is centred.
    """
    settings = config.alignment
    correct = [attempt.correct for attempt in attempts]
    if sum(correct) < settings.min_correct:
        return []
    if settings.success == "references":
        return [Example(attempt.context, attempt.reference, advantage=1.0) for attempt in attempts]
    if settings.success == "shuffled":
        order = generator(config.train.seed, "success", update).permutation(len(correct))
        correct = [correct[i] for i in order]
    if settings.success != "centred":
        kept = [a for a, ok in zip(attempts, correct, strict=True) if ok]
        return [Example(a.context, a.completion, advantage=1.0) for a in kept]
    rewards = defaultdict(list)
    for attempt, ok in zip(attempts, correct, strict=True):
        rewards[attempt.difficulty].append(float(ok))
    rows = [
        Example(a.context, a.completion, advantage=ok - fmean(rewards[a.difficulty]))
        for a, ok in zip(attempts, correct, strict=True)
    ]
    return rows if any(row.advantage for row in rows) else []


def drawn(rows: list[Example], config: Config, update: int) -> list[Example]:
    """At most `alignment.direction_rollouts` of the rows, drawn by key: the direction is a backward pass over them."""
    most = config.alignment.direction_rollouts
    if most is None or len(rows) <= most:
        return rows
    chosen = generator(config.train.seed, "direction", update).permutation(len(rows))[:most]
    return [rows[i] for i in sorted(chosen)]


def _length(tensors: Iterable[Tensor]) -> Tensor:
    squares = [tensor.double().square().sum() for tensor in tensors]
    return torch.stack(squares).sum().sqrt()
