"""How often the intervals of `atesd compare` hold a known truth: `python -m validation.coverage`.

Groups of runs are made up whose true difference is known: problems of different difficulty, seeds of different luck,
arms that suit different problems, and k samples of each, in part with the same draws where seeds are paired. Each
regime is drawn many times; printed is the share of intervals that hold the truth. And how much a peak flatters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit

from atesd.maths.keyed import generator
from atesd.maths.statistics import hierarchical_bootstrap
from atesd.table import Table, render_text
from atesd_lab.stats.differences import Difference, paired_difference, unpaired_difference
from atesd_lab.stats.selection import cross_fitted, halves_of

Floats = NDArray[np.float64]

_NODES, _MASS = np.polynomial.hermite_e.hermegauss(81)
_MASS = _MASS / _MASS.sum()
_BLOCK = 4_000_000  # cells that exist at one time


@dataclass(frozen=True, slots=True)
class Regime:
    """A made-up experiment. Accuracy, difference and seed deviation are shares; the other deviations are log-odds."""

    paired: bool = True
    seeds: tuple[int, int] = (5, 5)  # baseline, candidate
    problems: int = 300
    samples: int = 2
    accuracy: float = 0.5
    difference: float = 0.0
    seed_deviation: tuple[float, float] = (0.01, 0.01)
    difficulty: float = 1.0  # between problems
    taste: float = 0.3  # of an arm for a problem
    luck: float = 0.5  # of a seed on a problem


@dataclass(frozen=True, slots=True)
class Coverage:
    """The share of intervals of a regime that hold the truth, ours and the percentile bootstrap's, and mean widths."""

    regime: Regime
    ours: float
    width: float
    percentile: float | None
    percentile_width: float | None


def draw_groups(regime: Regime, repeats: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Shares correct of both groups, [repeats, seeds, problems]; their expected difference is `regime.difference`.

    The log-odds of a sample are a sum of normals, and each arm's centre is solved by quadrature, so that the truth is
    exact. Paired seeds have half the variance of their luck in common, and half of their draws.
    """
    shared = float(np.hypot(np.hypot(regime.difficulty, regime.taste), regime.luck))
    goals = (regime.accuracy, regime.accuracy + regime.difference)
    scales = [deviation / _slope(_centre(regime.accuracy, shared), shared) for deviation in regime.seed_deviation]
    difficulty = regime.difficulty * rng.standard_normal((repeats, 1, regime.problems))
    common = rng.standard_normal((repeats, regime.seeds[0], 1)) if regime.paired else None
    chances = []
    for goal, scale, seeds in zip(goals, scales, regime.seeds, strict=True):
        own = rng.standard_normal((repeats, seeds, 1))
        fortune = own if common is None else np.sqrt(0.5) * (common + own)
        taste = regime.taste * rng.standard_normal((repeats, 1, regime.problems))
        luck = regime.luck * rng.standard_normal((repeats, seeds, regime.problems))
        chances.append(
            expit(_centre(goal, float(np.hypot(shared, scale))) + difficulty + taste + scale * fortune + luck)
        )
    together = regime.samples // 2 if regime.paired else 0
    alone = [rng.binomial(regime.samples - together, chance) for chance in chances]
    met = _same_draws(chances[0], chances[1], together, rng) if together else (0, 0)
    first, second = ((count + seen) / regime.samples for count, seen in zip(alone, met, strict=True))
    return first, second


def measure(regime: Regime, repeats: int, seed: int = 0, bootstrap: int = 0) -> Coverage:
    """Coverage over `repeats` draws of a regime; the bootstrap's over the first `bootstrap` of them (0: not at all)."""
    rng = generator(seed, "coverage", repr(regime))
    block = max(1, _BLOCK // (sum(regime.seeds) * regime.problems))
    held: list[NDArray[np.bool_]] = []
    widths: list[Floats] = []
    percentiles: list[tuple[float, float]] = []
    for first in range(0, repeats, block):
        groups = draw_groups(regime, min(block, repeats - first), rng)
        found = difference_of(regime, *groups)
        held.append(np.atleast_1d((found.low <= regime.difference) & (regime.difference <= found.high)))
        widths.append(np.atleast_1d(found.high - found.low))
        percentiles += _bootstrapped(regime, *(group[: max(0, bootstrap - first)] for group in groups))
    inside = [low <= regime.difference <= high for low, high in percentiles]
    return Coverage(
        regime,
        float(np.concatenate(held).mean()),
        float(np.concatenate(widths).mean()),
        float(np.mean(inside)) if inside else None,
        float(np.mean([high - low for low, high in percentiles])) if inside else None,
    )


def difference_of(regime: Regime, baseline: Floats, candidate: Floats) -> Difference:
    """The difference as `atesd compare` works it out."""
    return (paired_difference if regime.paired else unpaired_difference)(baseline, candidate)


def regimes(seed: int = 0, count: int = 40) -> Iterator[Regime]:
    """`count` corners and middles of what users have, paired and unpaired in turn, drawn by key."""
    rng = generator(seed, "coverage regimes")
    for index in range(count):
        paired = index % 2 == 0
        seeds = int(rng.choice([3, 4, 5, 10]))
        other = seeds if paired or rng.random() < 0.6 else int(rng.choice([3, 5, 10]))
        deviation = float(rng.choice([0.0, 0.01, 0.03]))
        ratio = 1.0 if paired or rng.random() < 0.6 else 3.0
        yield Regime(
            paired=paired,
            seeds=(seeds, other),
            problems=int(rng.choice([60, 150, 300, 600])),
            samples=int(rng.choice([1, 2, 4, 12])),
            accuracy=float(rng.choice([0.05, 0.2, 0.5, 0.8, 0.93])),
            difference=float(rng.choice([0.0, 0.02])),
            seed_deviation=(deviation, deviation / ratio),
            difficulty=float(rng.choice([0.0, 1.0, 2.5])),
            taste=float(rng.choice([0.0, 0.3, 1.0])),
            luck=float(rng.choice([0.0, 0.5, 1.0])),
        )


def optimism(
    problems: int, samples: int, checkpoints: int = 8, repeats: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """By how much the best of equally good checkpoints scores too high on average: its peak, and its two halves.

    The checkpoints of a run have one accuracy on every problem, 50 % over problems of different difficulty.
    """
    rng = generator(seed, "coverage optimism", problems, samples, checkpoints)
    halves = halves_of(problems)
    gains = []
    for _ in range(repeats):
        chance = expit(rng.standard_normal(problems))
        scores = rng.binomial(samples, chance, size=(checkpoints, 1, problems)) / samples - chance
        gains.append((scores.mean(axis=(1, 2)).max(), cross_fitted(scores + chance, halves)[0].mean() - chance.mean()))
    peak, fair = np.mean(gains, axis=0)
    return float(peak), float(fair)


def coverage_table(rows: Sequence[Coverage]) -> Table:
    """One row per regime, worst first, in per cent and points."""
    ordered = sorted(rows, key=lambda row: row.ours)
    cells = [
        (
            "paired" if row.regime.paired else "unpaired",
            "/".join(map(str, row.regime.seeds)),
            f"{row.regime.problems} x {row.regime.samples}",
            f"{100 * row.regime.accuracy:.0f}",
            f"{100 * row.regime.difference:+.0f}",
            "/".join(f"{100 * deviation:.2g}" for deviation in row.regime.seed_deviation),
            f"{row.regime.difficulty:g}, {row.regime.taste:g}, {row.regime.luck:g}",
            f"{100 * row.ours:.1f}",
            f"{100 * row.width:.1f}",
            "–" if row.percentile is None else f"{100 * row.percentile:.1f}",
            "–" if row.percentile_width is None else f"{100 * row.percentile_width:.1f}",
        )
        for row in ordered
    ]
    columns: tuple[str, ...] = ("design", "seeds", "problems x k", "accuracy, %", "truth, points", "seed sd, points")
    columns += ("sd of difficulty, taste, luck", "ours covers, %", "width", "percentile bootstrap covers, %", "width")
    shares = np.array([row.ours for row in rows])
    inside = int(np.sum((shares >= 0.93) & (shares <= 0.97)))
    notes = (
        f"{inside} of {len(rows)} within 93 to 97 %; mean {100 * shares.mean():.1f} %, "
        f"least {100 * shares.min():.1f} %, most {100 * shares.max():.1f} %.",
    )
    return Table("Coverage of 95 % intervals of a difference", columns, tuple(cells), notes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--regimes", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--bootstrap", type=int, default=200, help="repeats on which the percentile bootstrap is tried")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    rows = [measure(one, asked.repeats, asked.seed, asked.bootstrap) for one in regimes(asked.seed, asked.regimes)]
    print(render_text(coverage_table(rows)))
    for problems, samples in ((60, 1), (200, 2), (600, 4)):
        peak, fair = (f"{100 * gain:+.1f}" for gain in optimism(problems, samples, seed=asked.seed))
        print(f"best of 8 equal checkpoints, {problems} x {samples}: peak {peak}, halves {fair} points")


def _bootstrapped(regime: Regime, baseline: Floats, candidate: Floats) -> list[tuple[float, float]]:
    """Percentile intervals of paired groups, for comparison."""
    if not regime.paired:
        return []
    return [hierarchical_bootstrap(table, resamples=500, seed=i) for i, table in enumerate(candidate - baseline)]


def _same_draws(first: Floats, second: Floats, count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Correct samples of both arms among `count` that meet the same uniforms: below min(p) both are correct."""
    low, high = np.minimum(first, second), np.maximum(first, second)
    both = rng.binomial(count, low)
    one = rng.binomial(count - both, np.clip((high - low) / np.maximum(1 - low, 1e-12), 0, 1))
    first_met = np.asarray(both + np.where(first > second, one, 0), dtype=np.float64)
    return first_met, np.asarray(both + np.where(second > first, one, 0), dtype=np.float64)


def _mean(centre: float, deviation: float) -> float:
    return float(expit(centre + deviation * _NODES) @ _MASS)


def _centre(accuracy: float, deviation: float) -> float:
    """The log-odds about which a normal of that deviation has this mean accuracy."""
    return float(brentq(lambda centre: _mean(centre, deviation) - accuracy, -60, 60))


def _slope(centre: float, deviation: float) -> float:
    """What a unit of log-odds is worth in mean accuracy."""
    chance = expit(centre + deviation * _NODES)
    return float((chance * (1 - chance)) @ _MASS)


if __name__ == "__main__":
    main()
