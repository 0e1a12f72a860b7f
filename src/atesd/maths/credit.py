"""Delayed credit: what an exposure decision is worth, from the signals measured after it (arXiv 2605.11458).

Throughout, `None` marks an update at which a signal was not measured. A non-finite signal gives a non-finite result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

SAME_REWARD = 1e-8
"""A standard deviation below this is none at all: the rewards of the buffer are equal (ours)."""


WEIGHT_CAP = 10.0
"""No rollout counts for more than ten of its kind in `reweighted_gain` (ours): a little bias for a bounded variance."""


def reweighted_gain(correct: Sequence[float], then: Sequence[float], now: Sequence[float]) -> float:
    """How much more often the student succeeds now than when it wrote these rollouts, in [-1, WEIGHT_CAP - 1].

    mean_i correct_i * (min(exp(now_i - then_i), WEIGHT_CAP) - 1): importance sampling, with the log-probability of
    rollout i, in nats, under the student of then, which drew it, and of now. Unbiased but for the cap. Only rollouts
    that became more or less likely contribute, so it varies far less than the difference of two samples; an unchanged
    student gives exactly 0.

    Unbiased only where the student of then could write all that the student of now may: E_then[c now/then] is the
    success of now over the support of then. A top-p, top-k or min-p filter moves the support. Unfiltered probabilities
    are then those of neither student; filtered ones lose what the new filter admits and the old one forbade, a rollout
    that no sample of then holds. No weight mends that, so the settings refuse filters beside this signal.
    """
    weights = importance_weights(then, now, WEIGHT_CAP)
    return sum(c * (weight - 1.0) for c, weight in zip(correct, weights, strict=True)) / len(weights)


def importance_weights(then: Sequence[float], now: Sequence[float], cap: float) -> list[float]:
    """min(exp(now_i - then_i), cap): truncated importance sampling (Ionides 2008, DOI 10.1198/106186008X320456).

    The log-densities or log-probabilities of draw i, in nats, under what drew it and under what learns from it now.
    """
    return [min(math.exp(min(after - before, 700.0)), cap) for before, after in zip(then, now, strict=True)]


def discounted_progress(
    signal: Sequence[float | None], discount: float, drop: Literal["signed", "positive"]
) -> float | None:
    """How far the progress signal l fell after a decision, in units of l.

    sum_{i=1..L} discount^(i-1) * drop_i with drop_i = l_{t+i-1} - l_{t+i}, or max(0, drop_i) for `positive` (the
    paper's equation). `signal` is l_t .. l_{t+L}, each measured before its update. Over a gap the drop is the one
    between the two measurements around it, discounted as of the later. None where fewer than two were measured.
    """
    measured = [(offset, value) for offset, value in enumerate(signal) if value is not None]
    if len(measured) < 2:
        return None
    total = 0.0
    for (_, earlier), (offset, later) in pairwise(measured):
        fall = earlier - later
        total += discount ** (offset - 1) * (max(fall, 0.0) if drop == "positive" else fall)
    return total


def discounted_grounding(signal: Sequence[float | None], discount: float) -> float | None:
    """Discounted mean of the grounding g after a decision, in nats per token.

    sum_i discount^(i-1) g_{t+i} / sum_i discount^(i-1), both sums over the measured i. `signal` is g_{t+1} .. g_{t+L}.
    None where nothing was measured.
    """
    weights = [0.0 if value is None else discount**offset for offset, value in enumerate(signal)]
    if not any(weights):
        return None
    weighted = sum(weight * value for weight, value in zip(weights, signal, strict=True) if value is not None)
    return weighted / sum(weights)


def rewards(
    progress: Sequence[float],
    grounding: Sequence[float],
    grounding_weight: float,
    mixing: Literal["raw", "standardised"],
) -> list[float]:
    """The reward of each decision of a buffer: progress + grounding_weight * grounding.

    `raw` is the paper's formula. `standardised` (ours) first turns each component into z-scores over the buffer, so
    that the weight does not depend on their units; a component that is the same for all decisions then counts 0.
    """
    if mixing == "standardised":
        progress, grounding = _z_scores(progress), _z_scores(grounding)
    return [p + grounding_weight * g for p, g in zip(progress, grounding, strict=True)]


def advantages(rewards: Sequence[float]) -> list[float] | None:
    """(reward - mean) / (std + 1e-6) over a buffer, std with divisor n.

    None where std < 1e-8: all rewards are the same, and a policy update would only amplify rounding.
    """
    mean, deviation = _mean_and_deviation(rewards)
    if deviation < SAME_REWARD:
        return None
    return [(reward - mean) / (deviation + 1e-6) for reward in rewards]


def _z_scores(values: Sequence[float]) -> list[float]:
    mean, deviation = _mean_and_deviation(values)
    return [0.0 if deviation < SAME_REWARD else (value - mean) / deviation for value in values]


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
