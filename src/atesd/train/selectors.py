"""Which tokens of a rollout are distilled, without a look-ahead: the baselines and rivals of the aligned gate.

They look at one rollout at a time, so that micro-batches and ranks change nothing. Factor 1 keeps a token, 0 leaves it
out, others weigh it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atesd.maths import keyed
from atesd.maths.divergence import Objective
from atesd.maths.fused import divergence_profile, token_blocks
from atesd.maths.gates import bounded_weights, influence, sdar_weights
from atesd.models.score import Scored, hidden_logprobs
from atesd.train.update import Example, Selection, Selector, by_example, per_token


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
        self,
        by: Literal["disagreement", "entropy"],
        share: float,
        side: Literal["low", "high"],
        objective: Objective,
        chunk_tokens: int | None,
    ) -> None:
        self._meter = {"disagreement": "kl", "entropy": "student_entropy"}[by]
        self._share, self._largest = share, side == "high"
        self._objective, self._chunk_tokens = objective, chunk_tokens

    def select(
        self, examples: Sequence[Example], student: Scored, teachers: Sequence[Scored], tokens: Int[Tensor, " N"]
    ) -> Selection:
        """Factor 1 for the ceil(share |y|) first tokens of a rollout in the order of the meter."""
        [teacher] = teachers
        meters = divergence_profile(
            self._objective,
            student.hidden,
            student.head,
            [teacher.hidden],
            teacher.head,
            tokens,
            chunk_tokens=self._chunk_tokens,
        )
        factors = []
        for values in by_example(meters[0][self._meter], examples):
            kept = values.topk(max(1, math.ceil(self._share * len(values))), largest=self._largest).indices
            factors.append(torch.zeros_like(values).index_fill(0, kept, 1.0))
        return Selection(teacher, torch.cat(factors))


@final
class SdarGate:
    """Weighs each token by how much likelier the teacher finds it than the student: SDAR's gate."""

    def __init__(self, beta: float, temperature: float, chunk_tokens: int | None) -> None:
        self._beta, self._temperature, self._chunk_tokens = beta, temperature, chunk_tokens

    def select(
        self,
        examples: Sequence[Example],  # noqa: ARG002
        student: Scored,
        teachers: Sequence[Scored],
        tokens: Int[Tensor, " N"],
    ) -> Selection:
        """The factor of every token, in (0, 1)."""
        [teacher] = teachers
        p, q = (
            hidden_logprobs(
                one.head, one.hidden, tokens, temperature=self._temperature, chunk_tokens=self._chunk_tokens
            )
            for one in (teacher, student)
        )
        return Selection(teacher, sdar_weights(p, q, self._beta))


@final
class InfluenceGate:
    """Weighs each token by its influence on the policy-gradient surrogate of its rollout, from the logits at hand."""

    def __init__(self, scale: float, bound: float, objective: Objective, chunk_tokens: int | None) -> None:
        self._scale, self._bound = scale, bound
        self._objective, self._chunk_tokens = objective, chunk_tokens

    def select(
        self, examples: Sequence[Example], student: Scored, teachers: Sequence[Scored], tokens: Int[Tensor, " N"]
    ) -> Selection:
        """Factors of mean 1 in every rollout; meter `influence`."""
        [teacher] = teachers
        values = self._influence(examples, student, teacher, tokens)
        rows = by_example(values, examples)
        weights = torch.cat([bounded_weights(row, self._scale, self._bound) for row in rows])
        return Selection(teacher, weights, {"influence": values})

    def _influence(
        self, examples: Sequence[Example], student: Scored, teacher: Scored, tokens: Int[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """That of every token, a block of logits at a time."""
        outcomes = per_token([example.outcome for example in examples], examples, tokens.device).float()
        blocks = token_blocks(len(tokens), student.vocabulary, tokens.device, self._chunk_tokens)
        return torch.cat(
            [
                influence(self._objective, teacher.logits(own), student.logits(own), tokens[own], outcomes[own])
                for own in blocks
            ]
        )


@final
class PermutedGate:
    """The weights of another gate, dealt to the tokens of their rollout at random: its null control.

    Draws belong to (seed, rollout). Every rollout keeps the sum of its weights, and its share of tokens left out.
    """

    def __init__(self, gate: Selector, seed: int) -> None:
        self._gate, self._seed = gate, seed

    def select(
        self, examples: Sequence[Example], student: Scored, teachers: Sequence[Scored], tokens: Int[Tensor, " N"]
    ) -> Selection:
        """That of the gate, with its factors permuted within each rollout."""
        chosen = self._gate.select(examples, student, teachers, tokens)
        if chosen.factors is None:
            return chosen
        dealt = []
        for example, own in zip(examples, by_example(chosen.factors, examples), strict=True):
            order = keyed.generator(self._seed, "permuted gate", *example.key).permutation(len(own))
            dealt.append(own[torch.from_numpy(order).to(own.device)])
        return replace(chosen, factors=torch.cat(dealt))
