"""A difference with its interval, and the one rule by which every page, table and claim reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t

from atesd.text import points_interval
from atesd_lab.stats.differences import Difference, paired_difference

Verdict = Literal["above", "below", "not distinguishable"]
POINTS = "points"
NORMAL_95 = 1.96
"""Standard errors to each side of a 95 % interval of a mean of many."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """A difference with the ends of its 95 % interval: shares where the unit is points, else numbers in that unit.

    `covers_seeds` is False where the interval is one over the problems of a single seed.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str = POINTS
    covers_seeds: bool = True

    @property
    def verdict(self) -> Verdict:
        """On which side of 0 the interval lies."""
        return self.against(0.0)

    @property
    def has_width(self) -> bool:
        """Whether the interval is wider than rounding makes it: equal differences of 1/3 leave a width of 1e-17."""
        return self.high - self.low > 1e-9 * max(1.0, abs(self.value))

    def against(self, margin: float) -> Verdict:
        """On which side of `margin` the whole interval lies.

        One without width lies on neither: where all differences are the same no noise was seen, so that nothing is
        known of how far another sample would be off.
        """
        if self.has_width and self.low > margin:
            return "above"
        if self.has_width and self.high < margin:
            return "below"
        return "not distinguishable"

    @property
    def in_unit(self) -> tuple[float, float, float]:
        """Value and ends as they are printed and drawn."""
        scale = 100.0 if self.unit == POINTS else 1.0
        return scale * self.value, scale * self.low, scale * self.high

    @property
    def in_points(self) -> str:
        """A difference of shares as +12.0 [+3.1, +20.8]."""
        return points_interval(self.value, self.low, self.high)

    def __str__(self) -> str:
        value, low, high = self.in_unit
        return f"{self.name}: {value:+.3g} [{low:+.3g}, {high:+.3g}] {self.unit}"


def contrast_of(name: str, found: Difference) -> Contrast:
    """A single difference of shares under a name."""
    return Contrast(name, float(found.value), float(found.low), float(found.high), covers_seeds=found.covers_seeds)


def paired(name: str, baseline: ArrayLike, candidate: ArrayLike) -> Contrast:
    """The `paired_difference` candidate - baseline of two tables of shares [seeds, problems], under a name."""
    return contrast_of(name, paired_difference(baseline, candidate))


def over_seeds(name: str, values: Sequence[float], unit: str) -> Contrast:
    """The mean of one number per seed with Student's 95 % interval; unbounded for a single seed."""
    return Contrast(name, float(np.mean(values)), *students_interval(values), unit)


def students_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of independent values; unbounded for a single one."""
    sample = np.asarray(values, dtype=np.float64)
    mean, count = float(sample.mean()), len(sample)
    if count < 2:
        return -math.inf, math.inf
    reach = float(t.ppf((1 + level) / 2, count - 1) * sample.std(ddof=1) / math.sqrt(count))
    return mean - reach, mean + reach
