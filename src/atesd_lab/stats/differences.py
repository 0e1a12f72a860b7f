"""The difference of two groups of runs with an interval that covers, for few seeds too, and what would settle it.

The tables are [seeds, problems] of shares correct. A score is the sum of a seed's, a problem's and their own part,
crossed: y = mu + a(seed) + b(problem) + e(seed, problem), where e holds the noise of k samples. The mean over S seeds
and P problems then has the variance V = var(a) / S + var(b) / P + var(e) / (S P), and the mean squares of the two-way
table estimate each part (Cornfield and Tukey 1956). The interval is that of Student's t with Satterthwaite's (1946)
degrees of freedom. A percentile bootstrap over few seeds is too narrow: it knows var(a) only times (S - 1) / S, and
nothing of the tails. `validation.coverage` measures both.

Every function takes leading axes as well, one comparison each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from atesd.rows import Estimate

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Reduced = Floats | np.float64  # an array over the leading axes; a number where there are none

LUCKY = 0.05
"""A mean square of seeds is not believed below this quantile of what problems and sampling alone would make it."""
MOST_SEEDS = 10_000
MOST_PROBLEMS = 10_000_000


@dataclass(frozen=True, slots=True)
class Difference:
    """candidate - baseline as shares, its interval, and where its variance comes from.

    The three variances are those of a difference between one seed each: of seeds, of problems, and of a single
    (seed, problem), sampling included. `covers_seeds` is False where both sides have one seed. Fields are arrays over
    the leading axes of the tables, and numbers without any.
    """

    value: Reduced
    low: Reduced
    high: Reduced
    standard_error: Reduced
    freedom: Reduced
    seed_variance: Reduced
    problem_variance: Reduced
    rest_variance: Reduced
    covers_seeds: bool


@dataclass(frozen=True, slots=True)
class Needed:
    """What would show a difference: seeds on the same problems, or problems with the same seeds. None: no number."""

    seeds: int | None
    problems: int | None


@dataclass(frozen=True, slots=True)
class _Squares:
    """Mean squares of a [seeds, problems] table of at least two seeds."""

    seeds: Reduced
    problems: Reduced
    rest: Reduced


def paired_difference(baseline: ArrayLike, candidate: ArrayLike, *, level: float = 0.95) -> Difference:
    """The difference candidate - baseline where row s of both [..., seeds, problems] is one seed: common noise cancels.

    V = [MS_seeds + max(0, MS_problems - MS_rest)] / (S P) of the table of differences. One seed leaves only
    MS_problems / P. Raises ValueError for tables of different shapes or fewer than two problems.
    """
    table = _table(candidate) - _table(baseline, like=candidate)
    seeds, problems = table.shape[-2:]
    value = table.mean(axis=(-2, -1))
    if seeds == 1:
        return _single(value, table[..., 0, :], level)
    squares = _mean_squares(table)
    rest = squares.rest / (seeds * problems)
    between = np.maximum(squares.seeds, _floor(seeds - 1) * squares.rest) / (seeds * problems)
    column = squares.problems / (seeds * problems)
    return _difference(
        value,
        level,
        seed_parts=[(between, seeds - 1)],
        column=(column, problems - 1),
        rests=[(rest, (seeds - 1) * (problems - 1))],
        components=(
            np.maximum(squares.seeds - squares.rest, 0) / problems,
            np.maximum(squares.problems - squares.rest, 0) / seeds,
            squares.rest,
        ),
    )


def mean_share(shares: ArrayLike, *, level: float = 0.95) -> Estimate:
    """The mean of shares [seeds, problems] with its interval, the difference from nothing, cut to [0, 1]."""
    found = paired_difference(np.zeros_like(shares), shares, level=level)
    return {"value": float(found.value), "low": max(0.0, float(found.low)), "high": min(1.0, float(found.high))}


def unpaired_difference(baseline: ArrayLike, candidate: ArrayLike, *, level: float = 0.95) -> Difference:
    """The difference candidate - baseline where the seeds of [..., seeds, problems] differ and the problems do not.

    V = MS_seeds / (S P) of each group + max(0, var(difference per problem) / P - MS_rest / (S P) of each group). Each
    group has its own MS_seeds (Welch), unless one has fewer than three seeds: then both share what they have, as one
    method may vary more from seed to seed than another. Raises ValueError for other problems, or fewer than two.
    """
    a, b = _table(baseline), _table(candidate)
    problems = a.shape[-1]
    if b.shape[-1] != problems:
        raise ValueError(f"the same problems are needed: {problems} against {b.shape[-1]}")
    sizes = (a.shape[-2], b.shape[-2])
    value = b.mean(axis=(-2, -1)) - a.mean(axis=(-2, -1))
    by_problem = b.mean(axis=-2) - a.mean(axis=-2)
    if max(sizes) == 1:
        return _single(value, by_problem, level)
    squares = [_mean_squares(table) if table.shape[-2] > 1 else None for table in (a, b)]
    known = [(found, size) for found, size in zip(squares, sizes, strict=True) if found is not None]
    filled = [found or known[0][0] for found in squares]
    between = [np.maximum(found.seeds, _floor(size - 1) * found.rest) / problems for found, size in known]
    if min(sizes) < 3:
        freedom = sum(size - 1 for _, size in known)
        shared = sum(part * (size - 1) for part, (_, size) in zip(between, known, strict=True)) / freedom
        seed_parts = [(shared * (1 / sizes[0] + 1 / sizes[1]), freedom)]
    else:
        seed_parts = [(part / size, size - 1) for part, (_, size) in zip(between, known, strict=True)]
    rests = [
        (found.rest / (size * problems), (max(size, 2) - 1) * (problems - 1))
        for found, size in zip(filled, sizes, strict=True)
    ]
    column = by_problem.var(axis=-1, ddof=1) / problems
    components = (
        sum(np.maximum(found.seeds - found.rest, 0) for found in filled) / problems,
        np.maximum(column - rests[0][0] - rests[1][0], 0) * problems,
        filled[0].rest + filled[1].rest,
    )
    return _difference(value, level, seed_parts, (column, problems - 1), rests, components)


def sampling_noise(counts: ArrayLike, samples: int) -> tuple[float, bool]:
    """The standard deviation of the mean of [seeds, problems] counts / k that comes from k samples per problem alone.

    sum of p (1 - p) / k over the cells, over (S P)^2, with c (k - c) / (k (k - 1)) for p (1 - p): unbiased from two
    samples on. With one sample the seeds stand in for samples, or with one seed the mean of all problems for each
    problem's: both can only be too high. Returns the deviation and whether it is exact (False: at most that).
    """
    table = np.asarray(counts, dtype=np.float64)
    seeds, problems = table.shape
    if samples > 1:
        spread = np.mean(table * (samples - table)) / (samples * (samples - 1))
    elif seeds > 1:
        spread = np.mean(table.var(axis=0, ddof=1))
    else:
        spread = table.mean() * (1 - table.mean())
    return float(np.sqrt(spread / (samples * seeds * problems))), samples > 1


def needed(
    difference: Difference, seeds: int, problems: int, effect: float, *, paired: bool, power: float = 0.8
) -> Needed:
    """Seeds per group, or problems, from which a true difference of `effect` (a share) is found with that power.

    (t_0.975 + t_power) sqrt(V) <= |effect|, V from the estimated variances. `seeds` and `problems` are those at hand:
    one is held while the other grows. With one seed at hand nothing is known of seeds, and only problems are told. The
    degrees of freedom are those at the number that is told, not those at hand (Satterthwaite).
    """
    size = abs(effect)
    if size == 0:
        return Needed(None, None)
    between, column, rest = (
        float(part) for part in (difference.seed_variance, difference.problem_variance, difference.rest_variance)
    )
    groups = 1 if paired else 2
    enough = None
    if difference.covers_seeds:
        counts = np.arange(2, MOST_SEEDS + 1)
        parts = between / counts + rest / (counts * problems), column / problems
        enough = _first(counts, _detectable(parts, (groups * (counts - 1), problems - 1), power) <= size)
    few = np.unique(np.geomspace(2, MOST_PROBLEMS, 2000).astype(np.int64))
    ends = _first(few, _with_problems(few, difference, seeds, groups, power) <= size)
    if ends is None:
        return Needed(enough, None)
    below = few[few < ends]
    counts = np.arange(int(below[-1]) if below.size else 2, ends + 1)
    return Needed(enough, _first(counts, _with_problems(counts, difference, seeds, groups, power) <= size))


def _with_problems(counts: Integers, difference: Difference, seeds: int, groups: int, power: float) -> Floats:
    """The smallest effect that so many problems find with that power, the seeds being those at hand."""
    between, column, rest = (
        float(part) for part in (difference.seed_variance, difference.problem_variance, difference.rest_variance)
    )
    if not difference.covers_seeds:
        return _detectable((np.zeros(len(counts)), (column + rest / seeds) / counts), (1, counts - 1), power)
    parts = between / seeds + rest / (seeds * counts), column / counts
    return _detectable(parts, (groups * max(seeds - 1, 1), counts - 1), power)


def _detectable(parts: tuple[ArrayLike, ArrayLike], freedoms: tuple[ArrayLike, ArrayLike], power: float) -> Floats:
    """(t_0.975 + t_power) sqrt(V), V the sum of two variances, each with its degrees of freedom (Satterthwaite)."""
    first, second = (np.asarray(part, dtype=np.float64) for part in parts)
    total = first + second
    freedom = total**2 / (first**2 / np.asarray(freedoms[0]) + second**2 / np.asarray(freedoms[1]) + 1e-300)
    return np.asarray(_quantiles(power, freedom) * np.sqrt(total), dtype=np.float64)


def _first(counts: Integers, enough: NDArray[np.bool_]) -> int | None:
    """The first count that is enough; None if none is."""
    found = counts[enough]
    return int(found[0]) if found.size else None


def _table(values: ArrayLike, like: ArrayLike | None = None) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim < 2 or table.shape[-1] < 2 or table.shape[-2] < 1:
        raise ValueError(f"a table [seeds, problems] of at least 1 by 2 is needed; got shape {table.shape}")
    if like is not None and table.shape != np.shape(like):
        raise ValueError(f"pairs are needed: {table.shape} against {np.shape(like)}")
    return table


def _mean_squares(table: Floats) -> _Squares:
    seeds, problems = table.shape[-2:]
    by_seed, by_problem = table.mean(axis=-1, keepdims=True), table.mean(axis=-2, keepdims=True)
    grand = table.mean(axis=(-2, -1), keepdims=True)
    rest = np.sum((table - by_seed - by_problem + grand) ** 2, axis=(-2, -1))
    return _Squares(
        seeds=problems * np.sum((by_seed - grand) ** 2, axis=(-2, -1)) / (seeds - 1),
        problems=seeds * np.sum((by_problem - grand) ** 2, axis=(-2, -1)) / (problems - 1),
        rest=rest / ((seeds - 1) * (problems - 1)),
    )


def _floor(freedom: int) -> float:
    """The share of its expectation below which a mean square falls with probability `LUCKY`."""
    return float(stats.chi2.ppf(LUCKY, freedom) / freedom)


def _single(value: Reduced, by_problem: Floats, level: float) -> Difference:
    """One seed a side: the problems and the sampling are all that can be estimated."""
    problems = by_problem.shape[-1]
    variance = by_problem.var(axis=-1, ddof=1)
    nothing = np.zeros_like(variance)
    components = (nothing, nothing, variance)
    return _difference(value, level, [], (variance / problems, problems - 1), [], components)


def _difference(
    value: Reduced,
    level: float,
    seed_parts: list[tuple[Reduced, int]],
    column: tuple[Reduced, int],
    rests: list[tuple[Reduced, int]],
    components: tuple[Reduced, Reduced, Reduced],
) -> Difference:
    """Student's interval from mean squares, each with its degrees of freedom: seeds + max(0, column - rests)."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, allowed: above 0 and below 1")
    by_seed = sum((part for part, _ in seed_parts), np.zeros_like(value))
    by_problem = column[0] - sum(part for part, _ in rests)
    variance = by_seed + np.maximum(by_problem, 0)
    spread = sum((part**2 / freedom for part, freedom in seed_parts), np.zeros_like(value))
    spread = spread + (by_problem > 0) * sum(part**2 / freedom for part, freedom in [column, *rests])
    least = min([column[1], *(freedom for _, freedom in seed_parts)])
    freedom = np.where(spread > 0, variance**2 / np.where(spread > 0, spread, 1.0), least)
    error = np.sqrt(variance)
    reach = stats.t.ppf((1 + level) / 2, np.maximum(freedom, least)) * error
    return Difference(value, value - reach, value + reach, error, freedom, *components, covers_seeds=bool(seed_parts))


def _quantiles(power: float, freedom: ArrayLike) -> Reduced:
    quantiles: Reduced = stats.t.ppf(0.975, freedom) + stats.t.ppf(power, freedom)
    return quantiles
