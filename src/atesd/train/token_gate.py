"""Which tokens of a rollout are distilled, and from which view: 1 keeps a token, 0 leaves it out, other weights stay.

A gate is a `Gate` of `atesd.train.step`, the aligned choice of a view per token a `Choose`. They look at one rollout at
a time, so that micro-batches and ranks change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from atesd.errors import NonFiniteError
from atesd.maths import keyed
from atesd.maths.divergence import Objective
from atesd.maths.fused import divergence_profile
from atesd.models.score import Scored
from atesd.train.lookahead import Lookahead
from atesd.train.step import Choice, Row


@final
class AlignedGate:
    """Keeps the tokens whose step would raise verified success; all of them while success has no direction."""

    def __init__(self, lookahead: Lookahead) -> None:
        self._lookahead = lookahead

    def __call__(
        self, rows: Sequence[Row], student: Scored, teacher: Scored, tokens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Factor 1 where the alignment is positive; meters `alignment` and `curvature`."""
        if not self._lookahead.direction.known:
            return torch.ones(len(tokens), device=tokens.device), {}
        values, curvature = _measured(self._lookahead, rows, student, [teacher], tokens)
        return (values[0] > 0).float(), {"alignment": values[0], "curvature": curvature}


@final
class AlignedChoice:
    """Distils every token from the candidate whose step would raise verified success most; gated, only if it would.

    To first order no other choice of one candidate per token helps success more, since the alignment of an update is
    the weighted sum of those of its tokens. Of equal candidates the first is taken.
    """

    def __init__(self, lookahead: Lookahead, *, gated: bool) -> None:
        self._lookahead = lookahead
        self._gated = gated

    def __call__(self, rows: Sequence[Row], student: Scored, teachers: Sequence[Scored], tokens: Tensor) -> Choice:
        """Meters `alignment` (of the choice), `curvature`, `token_ratio` and `token_effective_ratio`."""
        values, curvature = _measured(self._lookahead, rows, student, teachers, tokens)
        best, places = values.max(0)
        states = torch.stack([teacher.hidden for teacher in teachers])
        chosen = states[places, torch.arange(len(tokens), device=places.device)]
        ratios = [[[c.reveal_ratio, c.effective_ratio] for c in row.candidates] for row in rows for _ in row.completion]
        both = torch.tensor(ratios, device=places.device).gather(1, places[:, None, None].expand(-1, 1, 2)).squeeze(1)
        factors = (best > 0).float() if self._gated else torch.ones_like(best)
        meters = {
            "alignment": best,
            "curvature": curvature,
            "token_ratio": both[:, 0],
            "token_effective_ratio": both[:, 1],
        }
        return Choice(Scored(chosen, teachers[0].head), factors, meters)


def _measured(
    lookahead: Lookahead, rows: Sequence[Row], student: Scored, teachers: Sequence[Scored], tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Alignments [K, N] and curvature [N]; raises `NonFiniteError` that names the first rollout without a number."""
    values, curvature = lookahead.tokens([row.student_pair for row in rows], teachers, tokens, student)
    assert curvature is not None
    for row, own in zip(rows, torch.split(values, [len(row.completion) for row in rows], dim=1), strict=True):
        if not bool(own.isfinite().all()):
            raise NonFiniteError(f"the look-ahead gives numbers that are not finite on rollout {row.key}")
    return values, curvature


def correct_gate(
    rows: Sequence[Row],
    student: Scored,  # noqa: ARG001
    teacher: Scored,  # noqa: ARG001
    tokens: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Keeps the tokens of verified rollouts: distillation on correct rollouts only."""
    return torch.tensor([float(row.correct) for row in rows for _ in row.completion], device=tokens.device), {}


@final
class RandomGate:
    """Keeps each token with a probability: the control for gating as such. Draws belong to (seed, row, position)."""

    def __init__(self, share: float, seed: int) -> None:
        self._share, self._seed = share, seed

    def __call__(
        self,
        rows: Sequence[Row],
        student: Scored,  # noqa: ARG002
        teacher: Scored,  # noqa: ARG002
        tokens: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Factor 1 with probability `share`."""
        draws = [keyed.uniforms(len(row.completion), self._seed, "gate", *row.key) for row in rows]
        kept = [float(draw < self._share) for row in draws for draw in row]
        return torch.tensor(kept, device=tokens.device), {}


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

    def __call__(
        self, rows: Sequence[Row], student: Scored, teacher: Scored, tokens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Factor 1 for the ceil(share |y|) first tokens of a rollout in the order of the meter."""
        meters = divergence_profile(
            self._objective, student.hidden, student.head, [teacher.hidden], teacher.head, tokens
        )
        factors = []
        for values in torch.split(meters[0][self._meter], [len(row.completion) for row in rows]):
            kept = values.topk(max(1, math.ceil(self._share * len(values))), largest=self._largest).indices
            factors.append(torch.zeros_like(values).index_fill(0, kept, 1.0))
        return torch.cat(factors), {}
