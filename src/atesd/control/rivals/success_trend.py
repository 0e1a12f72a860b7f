"""The ratio times earlier over present success, after G2RPO-A (arXiv 2508.13023, github.com/T-Lab-CUHKSZ/G2RPO-A)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict, cast, final

import numpy as np
from pydantic import Field

from atesd.control.controlled import ControlledExposure
from atesd.control.credit import CreditConfig
from atesd.control.rivals.verdicts import Heard, RuleSettings, ruled
from atesd.control.settings import Run, clipped


class SuccessTrendSettings(RuleSettings):
    """The trend of success."""

    kind: Literal["success_trend"] = Field("success_trend", description="ratio times earlier/present success; G2RPO-A")
    granularity: Literal["update"] = Field("update", description="one ratio per update, as in the source")
    window: int = Field(4, ge=1, description="earlier holds whose mean success the present one is compared with; ours")
    start: float = Field(0.5, gt=0, le=1, description="the first ratio; ours")
    ratio_min: float = Field(0.05, gt=0, le=1, description="lowest ratio: a product never leaves 0; ours")

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With the window."""
        return f"trend of success over {self.window} holds{self.null}"

    def make(self, run: Run) -> ControlledExposure:
        """At the first ratio."""
        return ruled(SuccessTrend(self), self, run)


class SuccessTrendState(TypedDict):
    """What a checkpoint holds of a trend."""

    ratio: float
    earlier: list[float]
    right: float
    rollouts: int


@final
class SuccessTrend:
    """ratio <- ratio x (mean success of the `window` holds before the last) / (success of the last hold).

    A student that gets better is shown less, one that gets worse more, and a level that stays changes nothing. A
    success of 0 counts as half a rollout. In the source the guidance opens the student's own answer, so that its length
    is in the success; here the two meet only through what the student learned.
    """

    def __init__(self, config: SuccessTrendSettings) -> None:
        self._window = config.window
        self._bounds = (config.ratio_min, config.ratio_max)
        self._ratio = clipped(config.start, self._bounds)
        self._earlier: list[float] = []
        self._right, self._rollouts = 0.0, 0

    def features(self) -> tuple[float, ...]:
        """Ratio and mean earlier success; only the ratio before there is one."""
        return (self._ratio, sum(self._earlier) / len(self._earlier)) if self._earlier else (self._ratio,)

    def ratio(self, group: str, rng: np.random.Generator) -> float:  # noqa: ARG002
        """The next ratio, from the hold that has just ended. It is no draw."""
        if self._rollouts:
            present = max(self._right, 0.5) / self._rollouts
            if self._earlier:
                factor = sum(self._earlier) / len(self._earlier) / present
                self._ratio = clipped(self._ratio * factor, self._bounds)
            self._earlier = [*self._earlier, present][-self._window :]
            self._right, self._rollouts = 0.0, 0
        return self._ratio

    def hear(self, heard: Mapping[str, Heard]) -> None:
        """Count the rollouts of the hold."""
        for one in heard.values():
            self._right += one.success * one.rollouts
            self._rollouts += one.rollouts

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "ratio": self._ratio,
            "earlier": list(self._earlier),
            "right": self._right,
            "rollouts": self._rollouts,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(SuccessTrendState, state)
        self._ratio, self._earlier = kept["ratio"], list(kept["earlier"])
        self._right, self._rollouts = kept["right"], kept["rollouts"]
