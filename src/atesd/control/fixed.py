"""Exposure fixed before the run: a constant (OPSD at 1), random ratios, a ramp, or a recorded run's ratios.

Of the run itself it takes in nothing. Each kind below is a plan under its settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, final

from pydantic import Field

from atesd.component import Fraction
from atesd.control.credit import CreditConfig
from atesd.control.interface import Measurement
from atesd.control.settings import BoundedSettings, ExposureSettings, GranularSettings, RatioSettings, Run
from atesd.errors import ConfigError
from atesd.maths import keyed
from atesd.records import FinishedDecision, UpdateStats

Plan = Callable[[int, str], float]
"""(update, group) -> reveal ratio in [0, 1]."""


@final
class FixedExposure:
    """Follows a plan and learns nothing. `FixedExposure(1.0)` is OPSD (arXiv 2601.18734). It has no state."""

    def __init__(self, plan: float | Plan) -> None:
        self._plan: Plan = plan if callable(plan) else lambda _update, _group: plan

    @property
    def dropped(self) -> dict[str, int]:
        """No decision was taken."""
        return {}

    def reveal_ratio(self, update: int, group: str = "") -> float:
        """The planned ratio."""
        return self._plan(update, group)

    def measurements(self, update: int) -> frozenset[Measurement]:  # noqa: ARG002
        """Nothing."""
        return frozenset()

    def observe(self, update: int, stats: UpdateStats) -> list[FinishedDecision]:  # noqa: ARG002
        """Ignored: no decision was taken."""
        return []

    def pending(self) -> list[FinishedDecision]:
        """No decision was taken."""
        return []

    def state_dict(self) -> dict[str, object]:
        """Empty: a plan depends on the update alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Nothing to restore."""


def random_ratios(ratio_min: float, ratio_max: float, hold_updates: int, seed: int) -> Plan:
    """Uniform on [ratio_min, ratio_max], one draw per hold and group: the control of a learned exposure."""

    def plan(update: int, group: str) -> float:
        uniform = float(keyed.uniforms(1, seed, "exposure", update // hold_updates, group)[0])
        return ratio_min + (ratio_max - ratio_min) * uniform

    return plan


def ramp(shape: Literal["linear", "cosine"], start: float, end: float, num_updates: int) -> Plan:
    """(1 - w) * start + w * end; down if start > end.

    w = p (linear) or (1 - cos(pi p)) / 2 (cosine), with p = update / (num_updates - 1), so the last update has `end`.
    """

    def plan(update: int, _group: str) -> float:
        progress = min(update / max(num_updates - 1, 1), 1.0)
        weight = progress if shape == "linear" else (1.0 - math.cos(math.pi * progress)) / 2.0
        return (1.0 - weight) * start + weight * end

    return plan


def replayed(
    ratios: Sequence[float], order: Literal["recorded", "shuffled"], num_updates: int, seed: int, hold_updates: int = 1
) -> Plan:
    """The first `num_updates` ratios of a recorded run, in order or with its holds in a keyed permutation.

    `hold_updates` is the recorded run's: what is shuffled is which hold comes when, so that a ratio acts as long as it
    did there, and just the recorded ratios act. Raises `ConfigError` if they are fewer than `num_updates`.
    """
    if len(ratios) < num_updates:
        raise ConfigError(
            f"exposure.replay_run: it recorded {len(ratios)} ratios, but train.num_updates is {num_updates}; "
            f"allowed are at most {len(ratios)} updates: lower train.num_updates or replay a longer run"
        )
    used = list(ratios[:num_updates])
    if order == "shuffled":
        holds = [used[start : start + hold_updates] for start in range(0, num_updates, hold_updates)]
        used = [ratio for i in keyed.generator(seed, "replay").permutation(len(holds)) for ratio in holds[i]]
    return lambda update, _group: used[update]


class FullPlan(RatioSettings):
    """The teacher sees the whole reference: OPSD."""

    kind: Literal["full"] = Field("full", description="OPSD: the whole reference")

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """OPSD, by its name."""
        return "OPSD (full exposure)"

    def make(self, run: Run) -> FixedExposure:  # noqa: ARG002
        """Ratio 1 throughout."""
        return FixedExposure(1.0)


class FixedPlan(RatioSettings):
    """One ratio for the whole run."""

    kind: Literal["fixed"] = Field("fixed", description="one ratio throughout; the paper's sweep")
    reveal_ratio: Fraction = Field(1.0, description="paper alpha")

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With the ratio."""
        return f"fixed ratio {self.reveal_ratio:g}"

    def make(self, run: Run) -> FixedExposure:  # noqa: ARG002
        """The ratio, throughout."""
        return FixedExposure(self.reveal_ratio)


class RandomPlan(BoundedSettings):
    """A ratio drawn for every hold and group: the control of a learned exposure."""

    kind: Literal["random"] = Field("random", description="paper: a control; uniform between the bounds")

    @property
    def holds(self) -> bool:
        """A draw holds as long as a decision would."""
        return True

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """Random."""
        return "random ratio"

    def make(self, run: Run) -> FixedExposure:
        """Keyed draws, so that they are planned before the run as well."""
        return FixedExposure(random_ratios(self.ratio_min, self.ratio_max, run.credit.hold_updates, run.seed))


class SchedulePlan(RatioSettings):
    """A ramp from the first update to the last."""

    kind: Literal["schedule"] = Field("schedule", description="a ramp over the run; ours")
    schedule: Literal["linear", "cosine"] = Field("linear", description="shape of the ramp; ours")
    schedule_start: Fraction = Field(0.0, description="ratio at the first update; swap with the end to ramp down")
    schedule_end: Fraction = Field(1.0, description="ratio at the last update")

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With shape and ends."""
        return f"{self.schedule} schedule {self.schedule_start:g} to {self.schedule_end:g}"

    def make(self, run: Run) -> FixedExposure:
        """The ramp over the updates of the run."""
        return FixedExposure(ramp(self.schedule, self.schedule_start, self.schedule_end, run.num_updates))


class FullSettings(FullPlan, ExposureSettings):
    """`exposure.kind: full`."""


class FixedSettings(FixedPlan, ExposureSettings):
    """`exposure.kind: fixed`."""


class RandomSettings(RandomPlan, GranularSettings):
    """`exposure.kind: random`."""

    granularity: Literal["update", "per_difficulty", "per_problem"] = Field(
        "update", description="what has a draw of its own"
    )


class ScheduleSettings(SchedulePlan, ExposureSettings):
    """`exposure.kind: schedule`."""


class ReplaySettings(ExposureSettings):
    """The ratios of a recorded run."""

    kind: Literal["replay"] = Field("replay", description="a recorded run's ratios, whatever this run shows; ours")
    replay_run: str = Field(description="run folder whose ratios are replayed")
    replay_order: Literal["recorded", "shuffled"] = Field("recorded", description="shuffled: the same holds, permuted")

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With the order."""
        return f"replay ({self.replay_order})"

    def make(self, run: Run) -> FixedExposure:
        """`run.replay` in its order. Raises `ConfigError` if it is shorter than the run."""
        return FixedExposure(replayed(run.replay, self.replay_order, run.num_updates, run.seed, run.replay_hold))
