"""The success direction: where in parameter space the student's verified success rises, from its own graded rollouts.

v is the gradient of sum_i A_i log q(y_i | x_i) / |y_i| over the rollouts of the last hold, with A_i = 1 for a verified
rollout (`correct`) or its reward less the mean reward at its difficulty (`centred`). No reference enters, so no foreign
style can mislead it; two misleading directions are there to be compared with: `references` (raise the likelihood of
the reference solutions) and `shuffled` (correct, but the verdicts belong to other rollouts of the hold).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, final

import torch
from torch import Tensor, nn

from atesd.config import Config
from atesd.maths.keyed import generator
from atesd.models.prompts import PromptEncoder
from atesd.models.score import Pair, Scorer
from atesd.records import Problem, Rollout, Verdict
from atesd.train.step import Row, maximise_likelihood

_TRIAL = 1e-3  # of |theta|: the first displacement, from which the one in force is scaled
_CALIBRATION_TOKENS = 256
_ENLARGEMENTS = 6
_NEAR = 0.75  # of the change that is wanted; curvature alone takes off less


@dataclass(frozen=True, slots=True)
class Attempt:
    """A graded rollout of the last hold; `reference` is its problem's as a completion, empty where it is not read."""

    difficulty: int
    context: tuple[int, ...]
    completion: tuple[int, ...]
    reference: tuple[int, ...]
    correct: bool


@final
class SuccessDirection:
    """Remembers the rollouts of a hold, turns them into a unit direction, and displaces the student along it.

    Rollouts that gave a direction are then forgotten: what is scored along it is always newer. `step_metric` turns a
    gradient into the step that the optimiser would make of it; read under `alignment.metric: optimiser`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        scorer: Scorer,
        encoder: PromptEncoder,
        config: Config,
    ) -> None:
        self._parameters = parameters
        self._scorer = scorer
        self._encoder = encoder
        self._config = config
        self.step_metric: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
        self._attempts: list[Attempt] = []
        self._unit: dict[str, Tensor] = {}
        self.epsilon = 0.0

    @property
    def known(self) -> bool:
        """Whether there is a direction: the last hold had enough correct rollouts, and wrong ones where they count."""
        return bool(self._unit)

    def remember(
        self, problems: Sequence[Problem], rollouts: Sequence[Rollout], verdicts: Sequence[Verdict | None]
    ) -> None:
        """Keep the graded rollouts of an update."""
        for problem, rollout, verdict in zip(problems, rollouts, verdicts, strict=True):
            read = self._config.alignment.success == "references"
            reference = self._encoder.completion(problem.reference) if read else ()
            context, completion = rollout.prompt_ids, rollout.completion_ids
            self._attempts.append(
                Attempt(problem.difficulty, context, completion, reference, correct=verdict == "correct")
            )

    def renew(self, update: int) -> None:
        """Make the direction of the coming hold from what is remembered, and forget it; `known` says whether it exists.

        The gradients of the parameters must be clear, and are clear again afterwards.
        """
        attempts, self._attempts = self._attempts, []
        self._unit = {}
        rows = weighted_rows(attempts, self._config, update)
        if not rows:
            return
        rows = drawn(rows, self._config, update)
        maximise_likelihood(
            self._scorer,
            rows,
            temperature=self._config.loss_temperature,
            reduction="sequence",
            micro_batch_size=self._config.train.micro_batch_size,
            micro_batch_tokens=self._config.train.micro_batch_tokens,
            chunk_tokens=self._config.loss.chunk_tokens,
        )
        self._scorer.ranks.sum_gradients(self._parameters.values())
        ascent = {name: -p.grad for name, p in self._parameters.items() if p.grad is not None}
        for parameter in self._parameters.values():
            parameter.grad = None
        if self._config.alignment.metric == "optimiser":
            ascent = self.step_metric(ascent)
        length = _length(ascent.values())
        if not torch.isfinite(length) or length == 0:
            return
        self._unit = {name: value / length for name, value in ascent.items()}
        self.epsilon = self._scaled_epsilon(rows)
        if not math.isfinite(self.epsilon) or self.epsilon == 0:
            self._unit = {}

    @contextmanager
    def displaced(self, side: int) -> Iterator[None]:
        """Inside, the student is at theta + side * epsilon * u, without gradient; afterwards it is itself, bit for bit.

        The tensors of the parameters are exchanged, not overwritten: heads read inside stay what they were.
        """
        with self._moved(side * self.epsilon):
            yield

    def state_dict(self) -> dict[str, Any]:
        """The remembered rollouts, the direction and its step."""
        attempts = [
            [a.difficulty, list(a.context), list(a.completion), list(a.reference), a.correct] for a in self._attempts
        ]
        return {"attempts": attempts, "unit": dict(self._unit), "epsilon": self.epsilon}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._attempts = [Attempt(d, tuple(c), tuple(y), tuple(r), ok) for d, c, y, r, ok in state["attempts"]]
        self._unit = {name: value.to(self._parameters[name].device) for name, value in state["unit"].items()}
        self.epsilon = state["epsilon"]

    @contextmanager
    def _moved(self, distance: float) -> Iterator[None]:
        kept = {name: self._parameters[name].data for name in self._unit}
        with torch.no_grad():
            try:
                for name, value in self._unit.items():
                    self._parameters[name].data = kept[name] + distance * value
                yield
            finally:
                for name, value in kept.items():
                    self._parameters[name].data = value

    def _scaled_epsilon(self, rows: Sequence[Row]) -> float:
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
        distance = _TRIAL * float(_length(p.detach() for p in self._parameters.values()))
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
            with self._moved(side * distance):
                hidden = self._scorer.hidden(pairs)[:_CALIBRATION_TOKENS]
                logits.append(self._scorer.head().logits(hidden))
        return float((logits[0] - logits[1]).std()) / 2


def weighted_rows(attempts: Sequence[Attempt], config: Config, update: int) -> list[Row]:
    """The rollouts (or references) whose likelihood is to rise, each with its advantage as `scale`.

    Empty if fewer than `alignment.min_correct` are correct, or none is wrong where success is centred.
    """
    settings = config.alignment
    correct = [attempt.correct for attempt in attempts]
    if sum(correct) < settings.min_correct:
        return []
    if settings.success == "references":
        return [Row(attempt.context, attempt.reference) for attempt in attempts]
    if settings.success == "shuffled":
        order = generator(config.train.seed, "success", update).permutation(len(correct))
        correct = [correct[i] for i in order]
    if settings.success != "centred":
        return [Row(a.context, a.completion) for a, ok in zip(attempts, correct, strict=True) if ok]
    rewards = defaultdict(list)
    for attempt, ok in zip(attempts, correct, strict=True):
        rewards[attempt.difficulty].append(float(ok))
    rows = [
        Row(a.context, a.completion, scale=ok - fmean(rewards[a.difficulty]))
        for a, ok in zip(attempts, correct, strict=True)
    ]
    return rows if any(row.scale for row in rows) else []


def drawn(rows: list[Row], config: Config, update: int) -> list[Row]:
    """At most `alignment.direction_rollouts` of the rows, drawn by key: the direction is a backward pass over them."""
    most = config.alignment.direction_rollouts
    if most is None or len(rows) <= most:
        return rows
    chosen = generator(config.train.seed, "direction", update).permutation(len(rows))[:most]
    return [rows[i] for i in sorted(chosen)]


def _length(tensors: Iterable[Tensor]) -> Tensor:
    squares = [tensor.double().square().sum() for tensor in tensors]
    return torch.stack(squares).sum().sqrt()
