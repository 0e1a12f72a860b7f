"""Feedback instead of reward: keep the divergence between teacher and student where it should be. Ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypedDict, cast, final

import numpy as np
from pydantic import Field

from atesd.component import Fraction
from atesd.control.controlled import ControlledExposure, as_exposure
from atesd.control.credit import CreditConfig
from atesd.control.settings import ControllerSettings, Run, clipped
from atesd.records import FinishedDecision, UpdateStats

LEAST_KL = 1e-6  # nats per token; below it a log means nothing


class SetpointSettings(ControllerSettings):
    """Feedback toward a target KL. All ours."""

    kind: Literal["setpoint"] = Field("setpoint", description="feedback toward a target KL; ours")
    target_kl: float | None = Field(None, gt=0, description="nats per token; None: that of the first decision; ours")
    gain: float = Field(0.1, gt=0, description="ratio per nat of log KL and decision; ours")
    start: Fraction = Field(0.5, description="the first ratio; ours")

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With the target."""
        target = "its first" if self.target_kl is None else f"{self.target_kl:g} nats"
        return f"set-point on KL ({target})"

    def make(self, run: Run) -> ControlledExposure:
        """A controller at its first ratio."""
        return as_exposure(Setpoint(self), self, run)


class SetpointState(TypedDict):
    """What a checkpoint holds of a set-point."""

    ratio: float
    target: float | None
    kls: list[float]


@final
class Setpoint:
    """An integral controller on the log of the KL, one step per decision.

    ratio <- clip(ratio + gain * (log target - log KL)), with KL the mean over the updates since the last decision. A
    teacher who sees more differs more from its student, so a KL below the target raises the ratio. Without a target the
    first decision's KL is it: the student learns, the KL at a given ratio falls, and the ratio rises as fast as the
    student can take it. The ratio itself is clipped, which keeps the integral from winding up at a bound.
    """

    def __init__(self, config: SetpointSettings) -> None:
        self._gain = config.gain
        self._bounds = (config.ratio_min, config.ratio_max)
        self._ratio = clipped(config.start, self._bounds)
        self._target = config.target_kl
        self._kls: list[float] = []

    def features(self) -> tuple[float, ...]:
        """The KL since the last decision and the target, nats per token; empty before there are both."""
        return (self._mean_kl(), self._target) if self._kls and self._target is not None else ()

    def propose(self, group: str, rng: np.random.Generator) -> float:  # noqa: ARG002
        """The next ratio. It is no draw."""
        if self._kls:
            kl = self._mean_kl()
            self._target = kl if self._target is None else self._target
            self._ratio = clipped(self._ratio + self._gain * (math.log(self._target) - math.log(kl)), self._bounds)
            self._kls = []
        return self._ratio

    def on_update(self, stats: UpdateStats) -> None:
        """Take in the KL; one that is not finite belongs to an update that the trainer reports as skipped."""
        if math.isfinite(stats.kl):
            self._kls.append(stats.kl)

    def on_reward(self, finished: FinishedDecision) -> None:
        """Rewards are only logged."""

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {"ratio": self._ratio, "target": self._target, "kls": list(self._kls)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(SetpointState, state)
        self._ratio, self._target, self._kls = kept["ratio"], kept["target"], list(kept["kls"])

    def _mean_kl(self) -> float:
        return max(sum(self._kls) / len(self._kls), LEAST_KL)
