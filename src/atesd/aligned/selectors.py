"""Which tokens are distilled, and from which view, by their alignment with success.

They look at one rollout at a time, so that micro-batches and ranks change nothing. Factor 1 keeps a token, 0 leaves it
out, others weigh it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atesd.aligned.scorer import AlignmentScorer
from atesd.errors import NonFiniteError
from atesd.maths.gates import soft_weights
from atesd.models.score import Scored
from atesd.train.update import EveryToken, Example, Meters, Selection, by_example


@final
class AlignedGate:
    """Keeps the tokens whose step would raise verified success; all of them while success has no direction.

    With `sharpness` it weighs every token by a smooth function of its alignment instead (`maths.gates.soft_weights`).
    `skips_rollouts`: a rollout whose mean alignment is negative is left out whole.
    """

    def __init__(
        self, scorer: AlignmentScorer, sharpness: float | None = None, *, skips_rollouts: bool = False
    ) -> None:
        self._scorer, self._sharpness, self._skips_rollouts = scorer, sharpness, skips_rollouts

    def select(
        self, examples: Sequence[Example], student: Scored, teachers: Sequence[Scored], tokens: Int[Tensor, " N"]
    ) -> Selection:
        """The factors of the tokens; meters `alignment`, and `curvature` where it is measured."""
        [teacher] = teachers
        if not self._scorer.direction.known:
            return Selection(teacher, torch.ones(len(tokens), device=tokens.device))
        values, curvature = _measured(self._scorer, examples, student, teachers, tokens)
        rows = by_example(values[0], examples)
        return Selection(teacher, torch.cat([self._weights(row) for row in rows]), {"alignment": values[0]} | curvature)

    def _weights(self, alignment: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Those of one rollout."""
        if self._skips_rollouts and bool(alignment.mean() < 0):
            return torch.zeros_like(alignment)
        return (alignment > 0).float() if self._sharpness is None else soft_weights(alignment, self._sharpness)


@final
class AlignedChoice:
    """Distils every token from the candidate whose step would raise verified success most; gated, only if it would.

    To first order no other choice of one candidate per token helps success more, since the alignment of an update is
    the weighted sum of those of its tokens. Of equal candidates the first is taken. Without candidates, that is while
    success has no direction, every token is distilled from its one view.
    """

    def __init__(self, scorer: AlignmentScorer, *, gated: bool) -> None:
        self._scorer = scorer
        self._gated = gated
        self._without_candidates = AlignedGate(scorer) if gated else EveryToken()

    def select(
        self, examples: Sequence[Example], student: Scored, teachers: Sequence[Scored], tokens: Int[Tensor, " N"]
    ) -> Selection:
        """Meters `alignment` (of the choice), `token_ratio`, `token_effective_ratio`, `curvature` where measured."""
        if not examples[0].candidates:
            return self._without_candidates.select(examples, student, teachers, tokens)
        values, curvature = _measured(self._scorer, examples, student, teachers, tokens)
        best, places = values.max(0)
        states = torch.stack([teacher.hidden for teacher in teachers])
        chosen = states[places, torch.arange(len(tokens), device=places.device)]
        ratios = [[[c.reveal_ratio, c.effective_ratio] for c in e.candidates] for e in examples for _ in e.completion]
        both = torch.tensor(ratios, device=places.device).gather(1, places[:, None, None].expand(-1, 1, 2)).squeeze(1)
        factors = (best > 0).float() if self._gated else torch.ones_like(best)
        meters = {
            "alignment": best,
            "token_ratio": both[:, 0],
            "token_effective_ratio": both[:, 1],
        }
        return Selection(Scored(chosen, teachers[0].head), factors, meters | curvature)


def _measured(
    scorer: AlignmentScorer,
    examples: Sequence[Example],
    student: Scored,
    teachers: Sequence[Scored],
    tokens: Int[Tensor, " N"],
) -> tuple[Float[Tensor, "K N"], Meters]:
    """Alignments, and the meter `curvature` if there is one.

    Raises `NonFiniteError` that names the first rollout without a number.
    """
    values, curvature = scorer.tokens([e.student_pair for e in examples], teachers, tokens, student)
    for example, own in zip(examples, by_example(values, examples, dim=1), strict=True):
        if not bool(own.isfinite().all()):
            raise NonFiniteError(f"the look-ahead gives numbers that are not finite on rollout {example.key}")
    return values, {} if curvature is None else {"curvature": curvature}
