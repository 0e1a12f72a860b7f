"""How the divergence of teacher and student is spread over tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TAIL = 0.05
"""Share of the tokens, those of the largest KL, that the concentration is about."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How the KL is spread over tokens, nats: mean, quantiles, mean of the largest 5 %, and the share these carry.

    `tail_share` is None where all KL is 0.
    """

    mean: float
    p95: float
    p99: float
    tail_mean: float
    tail_share: float | None


def mismatch(kl: Sequence[float]) -> Mismatch:
    """How the KL of these tokens, nats, is spread. The tail is the largest ceil(0.05 n) of them."""
    values = np.sort(np.array(kl, dtype=np.float64))
    tail = values[-math.ceil(TAIL * len(values) - 1e-9) :]
    total = float(values.sum())
    p95, p99 = np.quantile(values, [0.95, 0.99])
    share = float(tail.sum()) / total if total > 0 else None
    return Mismatch(float(values.mean()), float(p95), float(p99), float(tail.mean()), share)
