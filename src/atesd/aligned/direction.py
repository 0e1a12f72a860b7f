"""The success direction: where in parameter space the student's verified success rises, from its own graded rollouts.

v is the gradient of sum_i A_i log q(y_i | x_i) / |y_i| over the rollouts of the last hold, with A_i = 1 for a verified
rollout (`correct`) or its reward less the mean reward at its difficulty (`centred`). No reference enters, so no foreign
style can mislead it; two misleading directions are there to be compared with: `references` (raise the likelihood of
the reference solutions) and `shuffled` (correct, but the verdicts belong to other rollouts of the hold).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atesd.aligned.line import HiddenLine, Line, TwoPoints
from atesd.config import Config
from atesd.errors import ModelError, NonFiniteError
from atesd.maths.advantages import difficulty_advantages
from atesd.maths.keyed import generator
from atesd.models.prompts import PromptEncoder
from atesd.models.score import MlpTail, Pair, Scored, Scorer, Tail, completion_logprobs
from atesd.models.weights import Weights, fixed
from atesd.train.rollouts import GradedRollout
from atesd.train.stopwatch import Stopwatch
from atesd.train.update import BatchPlan, Example, Likelihood, Meters, Targets, accumulate

_TRIAL = 1e-3  # of |theta|: the first displacement, from which the one in force is scaled
_CALIBRATION_TOKENS = 256
_ENLARGEMENTS = 6
_FEATURES = "features"  # the one part of such a direction
_NEAR = 0.75  # of the change that is wanted; curvature alone takes off less


@dataclass(frozen=True, slots=True)
class Attempt:
    """A graded rollout of the last hold; `reference` is its problem's as a completion, empty where it is not read.

    `context` is the problem alone. `hinted_logprob`: of a hinted rollout, its log-probability as it was written, nats.
    """

    difficulty: int
    context: tuple[int, ...]
    completion: tuple[int, ...]
    reference: tuple[int, ...]
    correct: bool
    hinted_logprob: float | None = None


class DirectionState(TypedDict):
    """What a checkpoint holds of a direction; an attempt is its fields in order, the last only if it is hinted."""

    attempts: list[tuple[int, list[int], list[int], list[int], bool, *tuple[float, ...]]]
    unit: dict[str, Tensor]
    epsilon: float
    remembered: NotRequired[float]


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
        end = scorer.end
        if end is not None and not end.parameters() & {id(parameter) for parameter in weights.trained.values()}:
            raise ModelError(
                f"alignment.parameters: {self._of} has none of the weights that are trained"
                + (
                    ""
                    if config.model.lora is None
                    else f" (model.lora.target_modules: {config.model.lora.target_modules})"
                )
                + "; set alignment.parameters: all, or train some of that part"
            )
        self._attempts: list[Attempt] = []
        self._unit: dict[str, Tensor] = {}
        self._remembered = 0.0
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
            hinted = sum(graded.rollout.logprobs) if graded.hint else None
            self._attempts.append(Attempt(graded.problem.difficulty, *graded.unhinted_pair, reference, correct, hinted))

    def renew(self, update: int) -> None:
        """Make the direction of the coming hold from what is remembered, and forget it; `known` says if there is one.

        u = v / |v|, with v the gradient of sum_i A_i log q(y_i | x_i) / |y_i| over the rollouts of the last hold, and
        A_i by `alignment.success` (see `weighted_rows`). With `alignment.memory` m it is w / |w|, w = u + m w_before,
        in which a hold without a direction leaves nothing.

        The gradients of the parameters must be clear, and are clear again afterwards. Raises `NonFiniteError` where the
        gradient, or the step along it, is not finite; then there is no direction for this hold.
        """
        attempts, self._attempts = self._attempts, []
        before, self._unit = self._unit, {}
        rows = weighted_rows(attempts, self._config, update, self._importance(attempts))
        if not rows:
            return
        rows = drawn(rows, self._config, update)
        ascent: Mapping[str, Tensor] = self._ascent(rows)
        if self._config.alignment.metric == "optimiser":
            ascent = self._step_metric(ascent)
        length = _length(ascent.values())
        if not torch.isfinite(length):
            raise NonFiniteError("the gradient of the correct rollouts, which the look-ahead follows, is not finite")
        if length == 0:
            return
        self._unit = {name: value / length for name, value in ascent.items()}
        self._remember_direction(before)
        self.epsilon = self._scaled_epsilon(rows) if self._config.alignment.displaces else 1.0
        if math.isfinite(self.epsilon) and self.epsilon != 0:
            return
        self._unit = {}
        if self.epsilon != 0:
            raise NonFiniteError("the step of the look-ahead is not finite: the logits beside the student are not")

    def _remember_direction(self, before: Mapping[str, Tensor]) -> None:
        """Turn the direction of this hold towards those of the holds before: w = u + m w_before, then w / |w|."""
        kept = self._config.alignment.memory * self._remembered if before else 0.0
        if kept:
            for name, value in before.items():
                own = self._unit.get(name)
                self._unit[name] = kept * value if own is None else own + kept * value
        # Also without memory, where |u| is 1 up to the rounding of its entries: another division may change last bits.
        self._remembered = float(_length(self._unit.values()))
        self._unit = {name: value / self._remembered for name, value in self._unit.items()}

    def line(self, batch: Sequence[Pair], student: Scored | None = None) -> Line:
        """The student along the direction, on some completions; `student` is what it makes of them, where known."""
        here = student if student or self._of == "all" else self._scorer.scored(batch)
        if here is not None and self._of == "features":
            return HiddenLine(here, here.hidden * self._unit[_FEATURES])
        if here is not None and isinstance(here.tail, MlpTail):
            return HiddenLine(here, here.tail.change(self._by_id))
        plus, minus = self._sides(batch, self.epsilon, here)
        return TwoPoints(plus, minus, self.epsilon, here)

    def displaced(self, side: int) -> AbstractContextManager[None]:
        """Inside, the student is at theta + side * epsilon * u, without gradient; afterwards it is itself, bit for bit.

        Heads read inside stay what they were (`Weights.moved`).
        """
        return self._weights.moved(self._unit, side * self.epsilon)

    def state_dict(self) -> dict[str, object]:
        """The remembered rollouts, the direction and its step."""
        attempts = [
            [a.difficulty, list(a.context), list(a.completion), list(a.reference), a.correct]
            + ([] if a.hinted_logprob is None else [a.hinted_logprob])
            for a in self._attempts
        ]
        return {"attempts": attempts, "unit": dict(self._unit), "epsilon": self.epsilon, "remembered": self._remembered}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore `state_dict`."""
        kept = cast(DirectionState, state)
        self._attempts = [Attempt(d, tuple(c), tuple(y), tuple(r), ok, *p) for d, c, y, r, ok, *p in kept["attempts"]]
        self._unit = {name: value.to(self._scorer.device) for name, value in kept["unit"].items()}
        self.epsilon = kept["epsilon"]
        self._remembered = kept.get("remembered", 1.0 if self._unit else 0.0)

    @property
    def _by_id(self) -> dict[int, Tensor]:
        """The direction by the id of the parameter."""
        trained = self._weights.trained
        return {id(trained[name]): value for name, value in self._unit.items()}

    def _ascent(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The gradient of the examples' mean log-likelihood, by name, with respect to `alignment.parameters`.

        Those of the parameters are clear afterwards. A backward pass goes no deeper than what is asked for.
        """
        config, trained = self._config, self._weights.trained
        likelihood = Likelihood(
            self._scorer, Stopwatch(self._scorer.device), config.loss_temperature, config.loss.chunk_tokens
        )
        plan = BatchPlan("sequence", config.train.micro_batch_size, config.train.micro_batch_tokens)
        if self._of == "features":
            gain = nn.Parameter(self._unit_gain(examples[0]))
            with fixed(trained.values()):
                accumulate(ScaledLikelihood(likelihood, gain), examples, plan)
            self._scorer.ranks.sum_gradients([gain])
            assert gain.grad is not None
            return {_FEATURES: -gain.grad}
        end = self._scorer.end
        asked = None if end is None else end.parameters()
        with fixed(p for p in trained.values() if asked is not None and id(p) not in asked):
            accumulate(likelihood, examples, plan)
        self._weights.add_up_gradients()
        ascent = {name: -p.grad for name, p in trained.items() if p.grad is not None}
        for parameter in trained.values():
            parameter.grad = None
        return ascent

    def _importance(self, attempts: Sequence[Attempt]) -> list[float]:
        """Weight of each attempt: 1, or of a hinted one min(q(y | x) / q(y | x, hint), `hinted.importance_cap`).

        The probabilities are those of the whole completion at the temperature of the rollouts, without its filters.
        """
        config, cap = self._config, self._config.hinted.importance_cap
        weights = [1.0] * len(attempts)
        if cap is None:
            return weights
        written = {i: a.hinted_logprob for i, a in enumerate(attempts) if a.hinted_logprob is not None}
        logprobs = completion_logprobs(
            self._scorer,
            [(attempts[i].context, attempts[i].completion) for i in written],
            temperature=config.sampling.temperature,
            micro_batch_size=config.train.micro_batch_size,
            chunk_tokens=config.loss.chunk_tokens,
        )
        for (i, then), now in zip(written.items(), logprobs, strict=True):
            weights[i] = math.exp(min(float(now.sum()) - then, math.log(cap)))
        return weights

    def _unit_gain(self, example: Example) -> Tensor:
        with torch.no_grad():
            hidden = self._scorer.hidden([example.student_pair])
        return torch.ones_like(hidden[0], dtype=torch.promote_types(hidden.dtype, torch.float32))

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
        with torch.no_grad():
            here = self._scorer.scored(pairs) if self._of == "last_layer" else None
        distance = _TRIAL * float(_length(p.detach() for p in self._weights.trained.values()))
        change = self._logit_change(pairs, distance, here)
        for _ in range(_ENLARGEMENTS):
            distance *= wanted / change if change else 10
            change = self._logit_change(pairs, distance, here)
            if change >= _NEAR * wanted:
                break
        return distance if change else 0.0

    def _logit_change(self, pairs: Sequence[Pair], distance: float, here: Scored | None) -> float:
        """Root mean square of half the difference between the logits on both sides."""
        sides = self._sides(pairs, distance, here)
        plus, minus = (side.logits(slice(_CALIBRATION_TOKENS)) for side in sides)
        return float((plus - minus).std()) / 2

    def _sides(self, batch: Sequence[Pair], distance: float, here: Scored | None) -> tuple[Scored, Scored]:
        """The student so far along the direction, both ways; where `here` has a tail, by its last layer alone."""
        found = []
        for side in (1, -1):
            with self._weights.moved(self._unit, side * distance):
                if here is not None and isinstance(here.tail, Tail):
                    found.append(Scored(here.tail.hidden(), self._scorer.head()))
                else:
                    found.append(self._scorer.scored(batch))
        return found[0], found[1]


@final
@dataclass(frozen=True, slots=True)
class ScaledLikelihood:
    """`Likelihood` of last hidden states that are multiplied entry by entry with `gain`, the one thing to learn."""

    likelihood: Likelihood
    gain: nn.Parameter

    @property
    def scorer(self) -> Scorer:
        """The student."""
        return self.likelihood.scorer

    @property
    def watch(self) -> Stopwatch:
        """Where the seconds are booked."""
        return self.likelihood.watch

    def targets(self, examples: Sequence[Example], free: bool) -> Targets:
        """There is no teacher."""
        return self.likelihood.targets(examples, free)

    def loss(
        self,
        examples: Sequence[Example],
        student: Scored,
        tokens: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
        targets: Targets,
    ) -> tuple[Float[Tensor, ""], Meters]:
        """That of the scaled states."""
        scaled = student.hidden.detach().to(self.gain.dtype) * self.gain
        return self.likelihood.loss(examples, Scored(scaled, student.head.detached()), tokens, weights, targets)


def weighted_rows(
    attempts: Sequence[Attempt], config: Config, update: int, importance: Sequence[float] | None = None
) -> list[Example]:
    """The rollouts (or references) whose likelihood is to rise, each with its advantage times its importance.

    Empty if fewer than `alignment.min_correct` are correct, or none is wrong where success is centred. Verdicts are
    shuffled, and centred, among the hinted and among the others.
    """
    weights = importance or [1.0] * len(attempts)
    settings = config.alignment
    correct = [attempt.correct for attempt in attempts]
    if sum(correct) < settings.min_correct:
        return []
    if settings.success == "references":
        return [Example(attempt.context, attempt.reference, advantage=1.0) for attempt in attempts]
    if settings.success == "shuffled":
        correct = _shuffled(attempts, config, update)
    centred, rewards = settings.success == "centred", [float(ok) for ok in correct]
    advantages = difficulty_advantages(rewards, [_baseline(a) for a in attempts]) if centred else rewards
    rows = [
        Example(attempt.context, attempt.completion, advantage=weight * own)
        for attempt, own, ok, weight in zip(attempts, advantages, correct, weights, strict=True)
        if centred or ok
    ]
    return rows if any(row.advantage for row in rows) else []


def _baseline(attempt: Attempt) -> tuple[int, bool]:
    """Which attempts share a mean reward."""
    return attempt.difficulty, attempt.hinted_logprob is not None


def _shuffled(attempts: Sequence[Attempt], config: Config, update: int) -> list[bool]:
    """Verdicts that belong to other attempts of the same kind."""
    correct = [attempt.correct for attempt in attempts]
    for hinted in (False, True):
        places = [i for i, attempt in enumerate(attempts) if (attempt.hinted_logprob is not None) == hinted]
        key = ("success", update, "hinted") if hinted else ("success", update)
        order = generator(config.train.seed, *key).permutation(len(places))
        for place, i in zip(places, order, strict=True):
            correct[place] = attempts[places[i]].correct
    return correct


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
