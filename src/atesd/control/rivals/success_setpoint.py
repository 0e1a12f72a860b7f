"""A set-point on success with a spread, after Agent-G2 (arXiv 2608.23318, github.com/ZJU-REAL/Agent-G2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict, cast, final

import numpy as np
from pydantic import Field, model_validator

from atesd.component import Fraction
from atesd.control.controlled import ControlledExposure
from atesd.control.credit import CreditConfig
from atesd.control.rivals.verdicts import Heard, RuleSettings, ruled
from atesd.control.settings import Run, clipped


class SuccessSetpointSettings(RuleSettings):
    """The set-point on success. The defaults are those of the source's program where it says no other."""

    kind: Literal["success_setpoint"] = Field("success_setpoint", description="a set-point on success; Agent-G2")
    gain: float = Field(0.5, gt=0, description="ratio per unit of a group's success below 0.5; ours")
    start: Fraction = Field(0.5, description="the common mean before any verdict; ours (source: 0)")
    low: Fraction = Field(0.4, description="success of an update below which the common mean rises")
    high: Fraction = Field(0.6, description="success of an update above which the common mean falls")
    step: float = Field(0.1, ge=0, le=1, description="of the common mean, per update")
    decay: float = Field(0.8, ge=0, lt=1, description="of the averages per group, per update that has it")
    deviation: float = Field(0.1, ge=0, description="least deviation of the draws")
    spread: float = Field(1.0, ge=0, description="deviation per unit of a group's variance of verdicts")

    @model_validator(mode="after")
    def _band_in_order(self) -> SuccessSetpointSettings:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}; swap them")
        return self

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With what has a mean of its own."""
        return f"set-point on success {self.granularity.replace('_', ' ')}{self.null}"

    def make(self, run: Run) -> ControlledExposure:
        """Every group at the start."""
        return ruled(SuccessSetpoint(self), self, run)


class SuccessSetpointState(TypedDict):
    """What a checkpoint holds; a group has its averages of success and variance."""

    common: float
    groups: dict[str, tuple[float, float]]


@final
class SuccessSetpoint:
    """A ratio is a draw from N(common + gain (0.5 - success), max(deviation, spread x variance)^2) of its group.

    Success and variance are exponential averages over the group's updates, that of the verdicts p (1 - p). The common
    mean rises by `step` after an update with a success below `low` and falls by it above `high`. In the source the
    prefix stands in the agent's own context; here a teacher is shown more for as long as the student solves less than
    half.
    """

    def __init__(self, config: SuccessSetpointSettings) -> None:
        self._config = config
        self._common = config.start
        self._groups: dict[str, tuple[float, float]] = {}

    def features(self) -> tuple[float, ...]:
        """The common mean."""
        return (self._common,)

    def ratio(self, group: str, rng: np.random.Generator) -> float:
        """A draw around the group's mean; a group not heard of yet has success 0.5."""
        success, variance = self._groups.get(group, (0.5, 0.0))
        mean = self._common + self._config.gain * (0.5 - success)
        return float(rng.normal(clipped(mean, (0.0, 1.0)), max(self._config.deviation, self._config.spread * variance)))

    def hear(self, heard: Mapping[str, Heard]) -> None:
        """Move the averages of the groups, and the common mean."""
        for group, one in heard.items():
            variance = one.success * (1.0 - one.success)
            before, spread = self._groups.get(group, (one.success, variance))
            kept = self._config.decay
            self._groups[group] = (
                kept * before + (1.0 - kept) * one.success,
                kept * spread + (1.0 - kept) * variance,
            )
        rollouts = sum(one.rollouts for one in heard.values())
        success = sum(one.success * one.rollouts for one in heard.values()) / rollouts
        step = self._config.step * ((success < self._config.low) - (success > self._config.high))
        self._common = clipped(self._common + step, (0.0, 1.0))

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {"common": self._common, "groups": {group: list(some) for group, some in self._groups.items()}}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(SuccessSetpointState, state)
        self._common = kept["common"]
        self._groups = {group: (success, variance) for group, (success, variance) in kept["groups"].items()}
