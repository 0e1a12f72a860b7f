"""Which tokens of a rollout are distilled, without a look-ahead: the baselines of the aligned gate.

They look at one rollout at a time, so that micro-batches and ranks change nothing. Factor 1 keeps a token, 0 leaves it
out; other weights stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
from jaxtyping import Int
from torch import Tensor

from atesd.maths import keyed
from atesd.maths.divergence import Objective
from atesd.maths.fused import divergence_profile
from atesd.models.score import Scored
from atesd.train.update import Example, Selection


@final
class CorrectGate:
    """Keeps the tokens of verified rollouts: distillation on correct rollouts only."""

    def select(
        self,
        examples: Sequence[Example],
        student: Scored,  # noqa: ARG002
        teachers: Sequence[Scored],
        tokens: Int[Tensor, " N"],
    ) -> Selection:
        """Factor 1 for every token of a verified rollout."""
        [teacher] = teachers
        kept = [float(example.correct) for example in examples for _ in example.completion]
        return Selection(teacher, torch.tensor(kept, device=tokens.device))


@final
class RandomGate:
    """Keeps each token with a probability: the control for gating as such. Draws belong to (seed, row, position)."""

    def __init__(self, share: float, seed: int) -> None:
        self._share, self._seed = share, seed

    def select(
        self,
        examples: Sequence[Example],
        student: Scored,  # noqa: ARG002
        teachers: Sequence[Scored],
        tokens: Int[Tensor, " N"],
    ) -> Selection:
        """Factor 1 with probability `share`."""
        [teacher] = teachers
        draws = [keyed.uniforms(len(e.completion), self._seed, "gate", *e.key) for e in examples]
        kept = [float(draw < self._share) for row in draws for draw in row]
        return Selection(teacher, torch.tensor(kept, device=tokens.device))


@final
class RankedGate:
    """Keeps a share of each rollout's tokens, those with the most (or least) disagreement or entropy.

    Disagreement is the forward KL from the teacher. At least one token is kept.
    """

    def __init__(
        self, by: Literal["disagreement", "entropy"], share: float, side: Literal["low", "high"], objective: Objective
    ) -> None:
        self._meter = {"disagreement": "kl", "entropy": "student_entropy"}[by]
        self._share, self._largest, self._objective = share, side == "high", objective

    def select(
        self, examples: Sequence[Example], student: Scored, teachers: Sequence[Scored], tokens: Int[Tensor, " N"]
    ) -> Selection:
        """Factor 1 for the ceil(share |y|) first tokens of a rollout in the order of the meter."""
        [teacher] = teachers
        meters = divergence_profile(
            self._objective, student.hidden, student.head, [teacher.hidden], teacher.head, tokens
        )
        factors = []
        for values in torch.split(meters[0][self._meter], [len(example.completion) for example in examples]):
            kept = values.topk(max(1, math.ceil(self._share * len(values))), largest=self._largest).indices
            factors.append(torch.zeros_like(values).index_fill(0, kept, 1.0))
        return Selection(teacher, torch.cat(factors))
