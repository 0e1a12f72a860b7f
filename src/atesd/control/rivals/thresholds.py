"""Two thresholds for every problem or difficulty, after SAGE (arXiv 2602.03143, github.com/BaohaoLiao/SAGE)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypedDict, cast, final

import numpy as np
from pydantic import Field

from atesd.component import Fraction
from atesd.control.controlled import ControlledExposure
from atesd.control.credit import CreditConfig
from atesd.control.rivals.verdicts import Heard, RuleSettings, ruled
from atesd.control.settings import Run, clipped


class ThresholdsSettings(RuleSettings):
    """Two thresholds."""

    kind: Literal["thresholds"] = Field("thresholds", description="up at no success, down above a threshold; SAGE")
    granularity: Literal["per_difficulty", "per_problem"] = Field("per_problem", description="what has a ratio; SAGE")
    upper: float = Field(0.35, ge=0, lt=1, description="success above which a group is shown less; SAGE")
    step: float = Field(0.25, gt=0, le=1, description="change of the ratio; ours (source: one of its hint levels)")
    start: Fraction = Field(0.5, description="the ratio of the first groups; ours (source: no hint)")

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With what has a ratio of its own."""
        return f"thresholds {self.granularity.replace('_', ' ')}{self.null}"

    def make(self, run: Run) -> ControlledExposure:
        """No group met yet."""
        return ruled(Thresholds(self), self, run)


class ThresholdsState(TypedDict):
    """What a checkpoint holds of the thresholds."""

    ratios: dict[str, float]
    first: float


@final
class Thresholds:
    """A group none of whose rollouts is solved goes up by `step`; one that solves more than `upper` goes down by it.

    A group met for the first time stands at the mean of those met. In the source a hint reopens a prompt on which all
    samples failed; here no rollout is rescued, and a failed problem is taught with more of its reference when it, or
    its difficulty, comes again.
    """

    def __init__(self, config: ThresholdsSettings) -> None:
        self._config = config
        self._bounds = (config.ratio_min, config.ratio_max)
        self._ratios: dict[str, float] = {}
        self._first = clipped(config.start, self._bounds)

    def features(self) -> tuple[float, ...]:
        """The ratio of a group not met before."""
        return (self._first,)

    def ratio(self, group: str, rng: np.random.Generator) -> float:  # noqa: ARG002
        """Where the group stands. It is no draw."""
        return self._ratios.get(group, self._first)

    def hear(self, heard: Mapping[str, Heard]) -> None:
        """Move the groups that were met."""
        for group, one in heard.items():
            step = self._config.step * ((one.success == 0) - (one.success > self._config.upper))
            self._ratios[group] = clipped(self._ratios.get(group, self._first) + step, self._bounds)
        self._first = math.fsum(self._ratios.values()) / len(self._ratios)

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {"ratios": dict(self._ratios), "first": self._first}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(ThresholdsState, state)
        self._ratios, self._first = dict(kept["ratios"]), kept["first"]
