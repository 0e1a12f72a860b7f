"""A claim, what speaks for or against it, and the verdict by rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t

Verdict = Literal["agrees", "disagrees", "not distinguishable"]
Origin = Literal["paper", "ours"]


@dataclass(frozen=True, slots=True)
class Contrast:
    """A difference that the claim says is above 0, with its 95 % interval, in points or in another unit."""

    name: str
    value: float
    low: float
    high: float
    unit: str = "points"

    def __str__(self) -> str:
        numbers = f"{self.value:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"
        return f"{self.name}: {numbers} {self.unit}"


@dataclass(frozen=True, slots=True)
class Claim:
    """What is claimed, by whom, which number the paper prints for it ("-": none), and what was measured here."""

    text: str
    origin: Origin
    printed: str
    contrasts: tuple[Contrast, ...]

    @property
    def verdict(self) -> Verdict:
        """agrees: every interval is above 0. disagrees: one is below 0. Otherwise not distinguishable.

        An interval without width, from differences that are all the same, says nothing.
        """
        told = [one for one in self.contrasts if one.low < one.high]
        if any(one.high < 0 for one in told):
            return "disagrees"
        if told and len(told) == len(self.contrasts) and all(one.low > 0 for one in told):
            return "agrees"
        return "not distinguishable"


def over_seeds(name: str, values: Sequence[float], unit: str) -> Contrast:
    """The mean of one number per seed with Student's 95 % interval; unbounded for a single seed."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Contrast(name, mean, -math.inf, math.inf, unit)
    reach = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Contrast(name, mean, mean - reach, mean + reach, unit)
