"""Exposures driven without a model: by a made-up student, or by measurements of a real one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from atesd.control.credit import CreditConfig
from atesd.control.interface import Exposure, Measurement
from atesd.control.learned import LearnedExposure, PolicyConfig
from atesd.control.settings import Granularity, group_of
from atesd.maths import keyed
from atesd.records import FinishedDecision, UpdateStats
from atesd.rows import late_mean

NOT_MEASURED: dict[Measurement, Any] = {
    "probe_nll": None,
    "probe_success": None,
    "probe_gain": None,
    "probe_kl": None,
    "grounding": None,
    "train_success": (),
}


_MOST_UPDATES, _DIFFICULTIES = 200, 4  # of a run with a frozen student; longer runs settle before
Stats = Callable[[int, float], UpdateStats]
"""What an update shows at a reveal ratio."""


@dataclass(frozen=True, slots=True)
class Driven:
    """How a controller behaved.

    `means` holds the mean of the Beta of each decision, `end_mean` its mean over the last quarter of the decisions.
    `learned_from` are the decisions that were rewarded in time and consumed.
    """

    end_mean: float
    policy_updates: int
    means: tuple[float, ...]
    learned_from: tuple[FinishedDecision, ...] = ()


def drive(
    credit: CreditConfig,
    policy: PolicyConfig,
    decisions: int,
    seed: int,
    stats: Stats,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Driven:
    """The training loop without a model. As in a real run, an exposure sees no measurement that it did not ask for.

    `bounds`: the lowest and the highest ratio that may act.
    """
    num_updates = decisions * credit.hold_updates
    exposure = LearnedExposure(
        num_updates=num_updates,
        credit=credit,
        policy=policy,
        seed=seed,
        ratio_min=bounds[0],
        ratio_max=bounds[1],
    )
    learned_from: list[FinishedDecision] = []
    for update in range(num_updates):
        wanted = exposure.measurements(update)
        unasked: dict[str, Any] = {name: empty for name, empty in NOT_MEASURED.items() if name not in wanted}
        learned_from += exposure.observe(update, replace(stats(update, exposure.reveal_ratio(update)), **unasked))
    means = tuple(_mean_ratio(finished) for finished in (*learned_from, *exposure.pending()))
    return Driven(late_mean(means), exposure.policy_updates, means, tuple(learned_from))


def _mean_ratio(finished: FinishedDecision) -> float:
    concentration1, concentration0 = finished.decision.concentrations
    return concentration1 / (concentration1 + concentration0)


def late_ratio_of_a_frozen_student(
    exposure: Exposure, granularity: Granularity, num_updates: int, rollouts: int, success: float, seed: int = 0
) -> float:
    """The mean ratio that an exposure shows, late in the run, to a student who never learns.

    Each update has `rollouts` new problems of four difficulties, solved with the chance `success` whatever was shown;
    every signal that an exposure can ask for is noise. Of a long run the first 200 updates are driven.
    """
    shown = []
    for update in range(min(num_updates, _MOST_UPDATES)):
        draws = keyed.generator(seed, "frozen_student", update)
        names = [group_of(granularity, f"{update}-{place}", place % _DIFFICULTIES) for place in range(rollouts)]
        verdicts = (draws.random(rollouts) < success).astype(float).tolist()
        ratio = fmean(exposure.reveal_ratio(update, name) for name in names)
        graded = tuple(zip(names, verdicts, strict=True))
        exposure.observe(update, replace(stats_of_noise(ratio, draws), group_success=graded))
        shown.append(ratio)
    return late_mean(shown)


def stats_of_noise(ratio: float, draws: np.random.Generator) -> UpdateStats:
    """An update at a ratio whose every signal is a standard normal draw."""
    signal, grounding, other = draws.standard_normal(3).tolist()
    return UpdateStats(
        ratio,
        ratio,
        loss=signal,
        kl=abs(other),
        top1_disagreement=abs(other),
        student_confidence=abs(other),
        probe_nll=math.exp(signal),
        probe_success=signal,
        probe_gain=signal,
        probe_kl=signal,
        grounding=grounding,
        train_success=((0, signal),),
    )
