"""Teacher scoring with a shared prefix: five ratios of one problem, under each the rollout and the reference answer.

A context is the problem, the shown share of the reference, and a closing text; the contexts of the five ratios are
nested up to their closings. Separate passes score each of the ten pairs by itself, so that they waste nothing on
padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atesd.models.score import Pair, Scorer
from atesd.models.shared_prefix import shared_hidden
from benchmarks.harness import Case, Goal, Result, Settings, in_turns, single, spread
from benchmarks.models import SPECIAL, TOY, about_12m, random_model

RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0)
TOLERANCE = 1e-5
SEPARATE, PADDED, SHARED = "separate passes", "separate passes, five rows each", "ours, shared prefix"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the reference and the rollout, and of what surrounds them."""

    reference: int
    rollout: int
    problem: int = 64
    closing: int = 32
    answer: int = 16

    def __str__(self) -> str:
        return f"R {self.reference:,}, T {self.rollout:,}"


def pairs_of(lengths: Lengths, vocabulary: int) -> list[Pair]:
    """The rollout under every ratio, then the answer under every ratio."""
    draws = np.random.default_rng(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(draws.integers(len(SPECIAL), vocabulary, n).tolist())

    problem, reference, closing = ids(lengths.problem), ids(lengths.reference), ids(lengths.closing)
    contexts = [(*problem, *reference[: round(ratio * lengths.reference)], *closing) for ratio in RATIOS]
    return [(context, completion) for completion in (ids(lengths.rollout), ids(lengths.answer)) for context in contexts]


def separate(scorer: Scorer, pairs: list[Pair], rows: int = 1) -> Tensor:
    """The plain way: `rows` pairs per pass."""
    with torch.no_grad():
        return torch.cat([scorer.hidden(pairs[start : start + rows]) for start in range(0, len(pairs), rows)])


def shared(scorer: Scorer, pairs: list[Pair]) -> Tensor:
    """All pairs as one group."""
    return torch.cat(shared_hidden(scorer, [pairs])[0])


def difference(scorer: Scorer, pairs: list[Pair]) -> float:
    """Of the hidden states of both ways, relative."""
    plain, ours = separate(scorer, pairs).float(), shared(scorer, pairs).float()
    return float((ours - plain).norm() / plain.norm())


def require_same(scorer: Scorer, lengths: Lengths, vocabulary: int) -> None:
    """Raise `ValueError` if the shared prefix changes the hidden states by more than rounding in float32."""
    found = difference(scorer, pairs_of(lengths, vocabulary))
    if found > TOLERANCE:
        raise ValueError(f"the shared prefix changes hidden states by {found:.1e}")


def run_case(
    scorer: Scorer, lengths: Lengths, vocabulary: int, settings: Settings, limit: float = 2.2
) -> tuple[Case, list[Goal]]:
    """One pair of lengths."""
    pairs = pairs_of(lengths, vocabulary)
    error = difference(scorer, pairs)
    work = {
        SEPARATE: lambda: separate(scorer, pairs),
        PADDED: lambda: separate(scorer, pairs, len(RATIOS)),
        SHARED: lambda: shared(scorer, pairs),
    }
    rounds = in_turns(work, settings.rounds, settings.device)
    name = f"prefix, five ratios and answers, {lengths}"
    goals = [
        Goal(
            f"{name}: speed over {SEPARATE}", "at least", limit, spread([row[SEPARATE] / row[SHARED] for row in rounds])
        ),
        Goal(f"{name}: relative difference", "at most", TOLERANCE, single(error), ""),
    ]
    return Case(name, rounds, figures={"relative difference of the hidden states": error}), goals


def run(settings: Settings) -> Result:
    """The three pairs of lengths of the goal, on the model of 12M parameters."""
    if settings.size == "small":
        shape, asked = TOY, [Lengths(40, 10, 4, 3, 2)]
    else:
        shape, asked = about_12m(4096), [Lengths(512, 256), Lengths(1024, 256), Lengths(1024, 128)]
    scorer = Scorer(random_model(shape))
    found = [run_case(scorer, lengths, shape.vocabulary, settings) for lengths in asked]
    return Result("prefix", [case for case, _ in found], [goal for _, goals in found for goal in goals])
