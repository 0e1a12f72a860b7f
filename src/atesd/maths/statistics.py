"""Accuracy over k samples, pass@k, and intervals by bootstrap over problems and seeds.

Intervals are percentile intervals of a mean. They cover about as often as they promise from some 30 problems on; they
are too narrow for a handful, and have no width where all values are equal (all right, or all wrong).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atesd.maths.keyed import generator

_POWER = 2.802  # standard errors: 1.960 for the 5 % level, two-sided, and 0.842 for 80 % power
_BLOCK = 2**20  # drawn indices that exist at one time


def average_at_k(correct: ArrayLike, samples: int) -> float:
    """Average@k: the mean over problems of (correct samples / k), in [0, 1]; `correct` is [problems], k is `samples`.

    Raises ValueError without problems, and for a count outside 0..samples.
    """
    return float(np.mean(_counts(correct, samples) / samples))


def pass_at_k(correct: ArrayLike, samples: int, k: int) -> NDArray[np.float64]:
    """The chance that at least one of k samples of a problem is correct: [problems] from counts [problems].

    1 - C(n - c, k) / C(n, k) with n samples of which c are correct: unbiased for every k <= n (Chen et al. 2021, arXiv
    2107.03374). As the product over i = n-c+1..n of (1 - k/i), so that no binomial coefficient overflows.
    Raises ValueError for k outside 1..samples, and for a count outside 0..samples.
    """
    counts = _counts(correct, samples)
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, allowed: 1 to the number of samples, {samples}")
    i = np.arange(1, samples + 1)
    factors = np.where(i > samples - counts[:, None], np.maximum(1.0 - k / i, 0.0), 1.0)
    none_correct: NDArray[np.float64] = np.prod(factors, axis=1)
    return 1.0 - none_correct


def detectable_difference(correct: ArrayLike, samples: int) -> float | None:
    """The difference in Average@k that two models like this one show with 80 % power at the 5 % level, a share.

    Each evaluated once on these very problems: (1.960 + 0.842) sqrt(2 V), V the variance of Average@k over the samples,
    p (1 - p) / (k - 1) for each problem (unbiased), over the number of problems squared. From one sample a problem V is
    at most that of the mean's p. Seeds and other problems are not in it. None: all samples alike, no noise was seen.
    """
    shares = _counts(correct, samples) / samples
    if samples == 1:
        variance = float(shares.mean() * (1 - shares.mean())) / shares.size
    else:
        variance = float(np.mean(shares * (1 - shares))) / (samples - 1) / shares.size
    return _POWER * math.sqrt(2 * variance) or None


def bootstrap_interval(
    values: ArrayLike, *, seed: int = 0, key: str = "mean", level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """(low, high) of the mean of `values` [problems]: percentiles of the means of that many resampled sets of problems.

    The draws are a function of seed, key and the number of problems. Raises ValueError without problems.
    """
    problems = np.asarray(values, dtype=np.float64)
    if problems.ndim != 1 or problems.size == 0:
        raise ValueError(f"one value per problem is needed, and at least one problem; got shape {problems.shape}")
    means = [problems[rows].mean(axis=1) for rows in _resampled(problems.size, resamples, seed, key)]
    return _percentiles(np.concatenate(means), level)


def paired_bootstrap(
    values_a: ArrayLike,
    values_b: ArrayLike,
    *,
    seed: int = 0,
    key: str = "difference",
    level: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """(low, high) of mean(values_a) - mean(values_b), both [problems] on the same problems in the same order.

    A problem is drawn with both its values, so that what the problem is worth cancels: narrower than two intervals.
    """
    a, b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"pairs are needed: {a.shape} values against {b.shape}")
    return bootstrap_interval(a - b, seed=seed, key=key, level=level, resamples=resamples)


def hierarchical_bootstrap(
    matrix: ArrayLike, *, seed: int = 0, key: str = "seeds", level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """(low, high) of the mean of `matrix` [seeds, problems], where every seed answered the same problems.

    Seeds and problems are drawn each on their own, and a resample is the block where they cross, since a hard problem
    is hard for every seed (Owen 2007, "The pigeonhole bootstrap"). With S seeds the variance between seeds counts only
    (S - 1) / S: three seeds say little of a fourth. For a paired difference pass the difference of two matrices.
    """
    table = np.asarray(matrix, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"a matrix [seeds, problems] is needed, at least 1 by 1; got shape {table.shape}")
    by_seed = _weights(table.shape[0], resamples, seed, f"{key}/seeds")
    by_problem = _weights(table.shape[1], resamples, seed, f"{key}/problems")
    return _percentiles(np.sum((by_seed @ table) * by_problem, axis=1), level)


def _counts(correct: ArrayLike, samples: int) -> NDArray[np.float64]:
    counts = np.asarray(correct, dtype=np.float64)
    if samples < 1 or counts.ndim != 1 or counts.size == 0:
        raise ValueError(f"one count per problem and a sample are needed; got shape {counts.shape}, {samples} samples")
    if counts.min() < 0 or counts.max() > samples:
        raise ValueError(f"counts run from {counts.min():g} to {counts.max():g}, allowed: 0 to {samples} samples")
    return counts


def _resampled(size: int, resamples: int, seed: int, key: str) -> Iterator[NDArray[np.int64]]:
    """Rows of `size` places drawn with replacement, [at most a block of rows, size] at a time, `resamples` in all."""
    rng = generator(seed, "statistics", key, size)
    rows = max(1, _BLOCK // size)
    for first in range(0, resamples, rows):
        yield rng.integers(size, size=(min(rows, resamples - first), size))


def _weights(size: int, resamples: int, seed: int, key: str) -> NDArray[np.float64]:
    """How often each place was drawn, as a share: [resamples, size], rows sum to 1."""
    blocks = [
        np.stack([np.bincount(row, minlength=size) for row in rows]) for rows in _resampled(size, resamples, seed, key)
    ]
    return np.concatenate(blocks) / size


def _percentiles(means: NDArray[np.float64], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, allowed: above 0 and below 1")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def is_looping(ids: Sequence[int], ngram: int = 8, repeats: int = 4) -> bool:
    """Whether some `ngram` consecutive tokens occur at least `repeats` times, anywhere and overlapping or not.

    A loop of period p shows from ngram + (repeats - 1) * p tokens on. Definition and numbers are ours.
    """
    occurrences = Counter(tuple(ids[start : start + ngram]) for start in range(len(ids) - ngram + 1))
    return max(occurrences.values(), default=0) >= repeats
