"""The null test: does a controller move although its student never learns? A sound one does not.

The real `LearnedExposure` is driven by the noise of a frozen student, measured once on a grid of ratios. Nothing that
the controller does can improve such a student, so any drift of its mean ratio is an artefact of the reward.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from atesd.config import CreditConfig, PolicyConfig
from atesd.control.simulation import Driven, Stats, drive, stats_of_noise
from atesd.maths import keyed
from atesd.records import UpdateStats

FROZEN_PROBE = 1.0
"""A frozen student's probe with keyed samples gives the same number every time; which number does not matter."""

SOUND_DRIFT = 0.05
"""A controller is called sound if its mean ratio ends within this of where it belongs, averaged over seeds."""


@dataclass(frozen=True, slots=True)
class MeasuredBatch:
    """What one batch of a frozen student's rollouts shows at one ratio; units as in `UpdateStats`."""

    loss: float
    kl: float
    top1_disagreement: float
    grounding: float | None
    student_confidence: float = 0.0
    train_success: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class MeasuredRatio:
    """The same batches, in the same order, scored by a teacher who sees `reveal_ratio` of the reference."""

    reveal_ratio: float
    batches: tuple[MeasuredBatch, ...]


@dataclass(frozen=True, slots=True)
class NullBand:
    """Mean and standard deviation over seeds (divisor n) of the Beta's mean, per decision."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def simulate(
    measured: Sequence[MeasuredRatio],
    credit: CreditConfig,
    policy: PolicyConfig,
    decisions: int,
    seed: int,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Driven:
    """Let a learned exposure take `decisions` decisions over a student whose noise was measured and who never learns.

    Raises `ValueError` if the grid does not run from 0 to 1 in rising order over the same number of batches.
    """
    return drive(credit, policy, decisions, seed, frozen(measured, seed), bounds)


def frozen(measured: Sequence[MeasuredRatio], seed: int, probe_noise: Mapping[str, float] | None = None) -> Stats:
    """A student who never learns. Each update draws one measured batch (keyed) and reads it at the ratio in force.

    It is interpolated between the grid's neighbours, so that a batch keeps its own ease or difficulty at every ratio.
    `probe_noise` gives probe signals, by name, a normal draw of that standard deviation at every measurement. Without
    it an unchanged student shows the same again. Raises `ValueError` as `simulate` does.
    """
    _require_grid(measured)
    batches = len(measured[0].batches)
    noisy = probe_noise or {}

    def stats(update: int, reveal_ratio: float) -> UpdateStats:
        batch = int(keyed.generator(seed, "null_test", update).integers(batches))
        shown = _stats_at(measured, batch, reveal_ratio)
        if not noisy:
            return shown
        draws = keyed.generator(seed, "null_probe", update).standard_normal(len(noisy)).tolist()
        probes: dict[str, Any] = {
            name: FROZEN_PROBE + deviation * draw for (name, deviation), draw in zip(noisy.items(), draws, strict=True)
        }
        return replace(shown, **probes)

    return stats


def null_band(
    credit: CreditConfig,
    policy: PolicyConfig,
    decisions: int,
    seeds: Sequence[int],
    bounds: tuple[float, float] = (0.0, 1.0),
) -> NullBand:
    """Where a controller wanders whose reward is nothing but noise: the band to draw behind a learned curve.

    Every signal is a standard normal draw, whatever the ratio. Its scale does not matter: advantages are normalised.
    `bounds`: the lowest and the highest ratio that may act.
    """
    curves = [drive(credit, policy, decisions, seed, noise(seed), bounds).means for seed in seeds]
    columns = list(zip(*curves, strict=True))
    means = tuple(sum(column) / len(column) for column in columns)
    deviations = tuple(
        math.sqrt(sum((value - mean) ** 2 for value in column) / len(column))
        for column, mean in zip(columns, means, strict=True)
    )
    return NullBand(means, deviations)


def drift_verdict(
    ends: Sequence[float], centre: float = 0.5, allowed: float = SOUND_DRIFT
) -> Literal["sound", "drifts up", "drifts down"]:
    """What the mean ratios at the end of several seeds say of a reward that should leave them at `centre`."""
    moved = sum(ends) / len(ends) - centre
    if abs(moved) <= allowed:
        return "sound"
    return "drifts up" if moved > 0 else "drifts down"


def with_clock(clock: CreditConfig, **reward: Any) -> CreditConfig:
    """A reward with the hold, look-ahead, discount and start of the window of `clock`."""
    kept = clock.model_dump(include={"hold_updates", "lookahead_updates", "discount", "window_start"})
    return CreditConfig(**kept, **reward)


def _stats_at(measured: Sequence[MeasuredRatio], batch: int, reveal_ratio: float) -> UpdateStats:
    """One batch at a ratio between two of the grid, linear in the ratio."""
    above = min(bisect_right([row.reveal_ratio for row in measured], reveal_ratio), len(measured) - 1)
    lower, upper = measured[above - 1], measured[above]
    weight = (reveal_ratio - lower.reveal_ratio) / (upper.reveal_ratio - lower.reveal_ratio)
    low, high = lower.batches[batch], upper.batches[batch]

    def between(at_low: float, at_high: float) -> float:
        return (1.0 - weight) * at_low + weight * at_high

    return UpdateStats(
        reveal_ratio=reveal_ratio,
        effective_ratio=reveal_ratio,
        loss=between(low.loss, high.loss),
        kl=between(low.kl, high.kl),
        top1_disagreement=between(low.top1_disagreement, high.top1_disagreement),
        student_confidence=low.student_confidence,
        probe_nll=FROZEN_PROBE,
        probe_success=FROZEN_PROBE,
        probe_gain=FROZEN_PROBE,
        probe_kl=FROZEN_PROBE,
        grounding=None if low.grounding is None or high.grounding is None else between(low.grounding, high.grounding),
        train_success=low.train_success,
    )


def noise(seed: int) -> Stats:
    """Every signal a standard normal draw (keyed), whatever the ratio."""

    def stats(update: int, reveal_ratio: float) -> UpdateStats:
        return stats_of_noise(reveal_ratio, keyed.generator(seed, "null_band", update))

    return stats


def _require_grid(measured: Sequence[MeasuredRatio]) -> None:
    ratios = [row.reveal_ratio for row in measured]
    sizes = {len(row.batches) for row in measured}
    if ratios != sorted(set(ratios)) or ratios[:1] != [0.0] or ratios[-1:] != [1.0] or len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"measured noise: ratios {ratios} with {sorted(sizes)} batches each; needed are rising ratios from 0 to 1 "
            "over the same batches"
        )
