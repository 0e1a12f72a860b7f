"""What the audit measures of a frozen student: every signal, how exactly it comes again, and its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from atesd.control.interface import Measurement
from atesd.evaluate.probes import graded, probe_requests
from atesd.train.batches import rollout_params
from atesd.train.parts import Parts
from atesd_lab.audit.null_measure import Say, as_batches, redrawn, score_rollouts
from atesd_lab.audit.null_simulation import MeasuredRatio

COARSE = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Ratios at which the rollouts are scored; between them is interpolated."""

REDRAWN_BATCHES = 64
"""Batches made of the measured rollouts; more would only repeat them."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A signal of the frozen student: its level, by how much a second reading differs, and its noise.

    `noise` is the standard deviation that fresh draws give one reading; None where a signal draws nothing, so that what
    a changed student would meet cannot be known before training. `top` is the level at ratio 1, where the ratio
    matters; `level` is then that at ratio 0. What was not read has no level.
    """

    signal: str
    level: float | None
    top: float | None
    again: float | None
    noise: float | None
    source: str


@dataclass(frozen=True, slots=True)
class MeasuredStudent:
    """All that the simulations need of a frozen student. A signal without a reading needs a checker that is missing."""

    rollouts: int
    ratios: tuple[MeasuredRatio, ...]
    readings: tuple[Reading, ...]

    def reading(self, signal: str) -> Reading | None:
        """By name."""
        return next((reading for reading in self.readings if reading.signal == signal), None)

    @property
    def verified(self) -> bool:
        """Whether the student solves some of its probe problems, and not all: else success cannot move."""
        found = self.reading("probe_success")
        return found is not None and found.level is not None and 0.0 < found.level < 1.0


def measure_student(
    parts: Parts, rollouts: int, repeats: int, say: Say, ratios: Sequence[float] = COARSE
) -> MeasuredStudent:
    """Score the frozen student's rollouts at every ratio, and read its probes twice and with `repeats` fresh draws."""
    config = parts.config
    scored = score_rollouts(parts, rollouts, ratios, say)
    groups = redrawn(rollouts, config.train.batch_size, REDRAWN_BATCHES, config.train.seed)
    measured = as_batches(scored, groups, config.loss.reduction)
    readings = (*read_probes(parts, repeats, say), *read_batches(measured))
    return MeasuredStudent(rollouts, tuple(measured), readings)


def read_batches(measured: Sequence[MeasuredRatio]) -> tuple[Reading, ...]:
    """The signals that come with every batch: loss, grounding and, where graded, success."""
    low, middle, high = measured[0].batches, measured[len(measured) // 2].batches, measured[-1].batches
    between = "batches at the middle ratio"
    readings = [
        Reading(
            "train_kl",
            fmean(b.loss for b in low),
            fmean(b.loss for b in high),
            None,
            pstdev([b.loss for b in middle]),
            between,
        )
    ]
    grounding = [[b.grounding for b in some if b.grounding is not None] for some in (low, middle, high)]
    if all(grounding):
        ends = fmean(grounding[0]), fmean(grounding[2])
        readings.append(Reading("grounding", *ends, None, pstdev(grounding[1]), between))
    success = [fmean(share for _, share in b.train_success) for b in low if b.train_success]
    if success:
        readings.append(Reading("train_success", fmean(success), None, None, pstdev(success), "batches"))
    return tuple(readings)


def read_probes(parts: Parts, repeats: int, say: Say) -> tuple[Reading, ...]:
    """The probe signals; what a run would sample for is read on fresh draws only, unless it is the recipe's own."""
    readings = []
    for name in ("probe_nll", "probe_success", "probe_kl", "probe_gain"):
        if name in ("probe_success", "probe_gain") and parts.checker is None:
            continue
        readings.append(_read(parts, name, repeats))
        say(f"{name} read")
    return tuple(readings)


def _read(parts: Parts, name: Measurement, repeats: int) -> Reading:
    """A probe signal as a run reads it, and once more; what the recipe does not use is read if it is cheap or tells."""
    fresh = fresh_success(parts, repeats) if name == "probe_success" else None
    source = "no draws: not known" if fresh is None else f"{repeats} fresh draws"
    if name in (parts.config.credit.progress_signal, "probe_nll"):
        first, second = (parts.probes.measure(frozenset({name}))[name] for _ in range(2))
        return Reading(name, first, None, second - first, fresh and fresh[1], source)
    if fresh is None:
        return Reading(name, None, None, None, None, "not used here, not read")
    return Reading(name, fresh[0], None, None, fresh[1], source)


def fresh_success(parts: Parts, repeats: int) -> tuple[float, float]:
    """Mean probe success over fresh draws, and the standard deviation that they give it; the problems stay the same.

    From the variance within each problem over `repeats` independent answers, unbiased: sqrt(sum_i var_i) / n.
    """
    if parts.checker is None or repeats < 2:
        raise ValueError(f"{repeats} repeats and checker {parts.checker}: needed are two repeats and a checker")
    problems, params = parts.problems.probe, rollout_params(parts.config)
    answers = []
    for repeat in range(repeats):
        requests = probe_requests(
            problems,
            encoder=parts.encoder,
            renderer=parts.renderer,
            seed=parts.config.train.seed,
            key=("audit", repeat),
        )
        rollouts = parts.engine.complete(requests, params)
        answers.append(graded(rollouts, problems, encoder=parts.encoder, checker=parts.checker))
    shares = [fmean(own) for own in zip(*answers, strict=True)]
    within = [share * (1.0 - share) * repeats / (repeats - 1) for share in shares]
    return fmean(shares), math.sqrt(sum(within)) / len(within)
