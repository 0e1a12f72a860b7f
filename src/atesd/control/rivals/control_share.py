"""A standing share of holds at ratio 0, as Agent-G2 (arXiv 2608.23318) and POPE (arXiv 2601.18779) have of rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, TypedDict, cast, final

import numpy as np
from pydantic import Field, model_validator

from atesd.control.budget import decisions
from atesd.control.controlled import ControlledExposure, as_exposure
from atesd.control.credit import CreditConfig
from atesd.control.settings import ControllerSettings, Run, clipped
from atesd.records import FinishedDecision, UpdateStats


class ControlShareSettings(ControllerSettings):
    """A control inside the run. That the ratio follows it is ours."""

    kind: Literal["control_share"] = Field("control_share", description="a share of holds at ratio 0; Agent-G2")
    share: float = Field(0.25, gt=0, lt=1, description="of the holds at ratio 0; ours")
    start: float = Field(0.5, gt=0, le=1, description="the first ratio of the other holds; ours")
    step: float = Field(0.1, gt=0, le=1, description="change of the ratio per rewarded hold, and its least value; ours")
    decay: float = Field(0.8, ge=0, lt=1, description="of both mean rewards, per hold of their kind; ours")

    learns_from_rewards: ClassVar[bool] = True

    @model_validator(mode="after")
    def _control_at_zero(self) -> ControlShareSettings:
        if self.ratio_min > 0:
            raise ValueError(f"ratio_min {self.ratio_min} would lift the control holds off 0; leave it out")
        if self.step > self.ratio_max:
            raise ValueError(f"step {self.step} is above ratio_max {self.ratio_max}; lower step, the least ratio shown")
        return self

    def label(self, credit: CreditConfig) -> str:
        """With the share and the reward."""
        return f"{self.share:.0%} of the holds at 0 ({credit.label})"

    def budget(self, run: Run, rollouts: int) -> str:  # noqa: ARG002
        """How many holds of either kind there are, and how well their means can be told apart."""
        taken = decisions(run.num_updates, run.credit)
        control, shown = self.share * taken, (1 - self.share) * taken
        error = math.sqrt(1 / control + 1 / shown)
        return (
            f"rule: about {control:.0f} of {taken} holds at ratio 0; over all of them the two mean rewards differ with "
            f"a standard error of {error:.2f} deviations of a reward"
        )

    def make(self, run: Run) -> ControlledExposure:
        """At the first ratio, with no reward of either kind."""
        return as_exposure(ControlShare(self), self, run)


class ControlShareState(TypedDict):
    """What a checkpoint holds of a standing share."""

    ratio: float
    means: dict[str, float]


@final
class ControlShare:
    """Each hold is at ratio 0 with probability `share`; the others climb while they earn more than those.

    After each rewarded hold that showed something, the ratio goes up by `step` if the mean reward of such holds lies
    above that of the holds at 0, and down if below. So it ends at the largest ratio that still does no harm, which need
    not be the best: the control says whether exposure helps, not how much is right. In the source a share of the
    episodes runs without a prefix and is left out of the statistics; here whole holds are, since only they show what a
    ratio did.
    """

    def __init__(self, config: ControlShareSettings) -> None:
        self._config = config
        self._bounds = (config.step, config.ratio_max)
        self._ratio = clipped(config.start, self._bounds)
        self._means: dict[str, float] = {}

    def features(self) -> tuple[float, ...]:
        """The ratio of the holds that show something."""
        return (self._ratio,)

    def propose(self, group: str, rng: np.random.Generator) -> float:  # noqa: ARG002
        """0 or the ratio."""
        return 0.0 if rng.random() < self._config.share else self._ratio

    def on_update(self, stats: UpdateStats) -> None:
        """Only rewards count."""

    def on_reward(self, finished: FinishedDecision) -> None:
        """Take the reward into the mean of its kind of hold, and move the ratio after one that showed something."""
        (ratio,) = finished.decision.samples.values()
        kind = "shown" if ratio > 0 else "control"
        before = self._means.get(kind, finished.reward)
        self._means[kind] = self._config.decay * before + (1.0 - self._config.decay) * finished.reward
        if kind == "shown" and "control" in self._means:
            ahead = self._means["shown"] - self._means["control"]
            step = self._config.step * ((ahead > 0) - (ahead < 0))
            self._ratio = clipped(self._ratio + step, self._bounds)

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {"ratio": self._ratio, "means": dict(self._means)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(ControlShareState, state)
        self._ratio, self._means = kept["ratio"], dict(kept["means"])
