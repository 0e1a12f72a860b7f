"""A search of its own for every problem (or difficulty): exposure follows what the student can do there. Ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, TypedDict, cast, final

import numpy as np
from pydantic import Field

from atesd.component import Fraction
from atesd.control.controlled import ControlledExposure, as_exposure
from atesd.control.credit import CreditConfig
from atesd.control.settings import ControllerSettings, GranularSettings, Run, clipped
from atesd.records import FinishedDecision, UpdateStats


class StaircaseSettings(GranularSettings, ControllerSettings):
    """A staircase per problem or difficulty. All ours."""

    kind: Literal["staircase"] = Field("staircase", description="a search kept per problem or difficulty; ours")
    granularity: Literal["per_difficulty", "per_problem"] = Field("per_problem", description="what has a staircase")
    step_solved: float = Field(0.1, ge=-1, le=1, description="change of the ratio after a verified rollout; ours")
    step_unsolved: float = Field(-0.1, ge=-1, le=1, description="change of the ratio after any other rollout; ours")
    start: Fraction = Field(0.5, description="the ratio of the first problems; ours")

    follows_verdicts: ClassVar[bool] = True

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With what is searched for."""
        return "search " + self.granularity.replace("_", " ")

    def make(self, run: Run) -> ControlledExposure:
        """Staircases at their first ratio."""
        return as_exposure(Staircase(self), self, run)


class StaircaseState(TypedDict):
    """What a checkpoint holds of the staircases."""

    ratios: dict[str, float]
    first: float


@final
class Staircase:
    """A staircase per group: its ratio moves by `step_solved` for a solved rollout, by `step_unsolved` for another.

    Several rollouts of one update move it by their mean step. By default solved means up and unsolved down, after the
    paper's sweep (figure 2C): easy problems do best at full exposure, hard ones at the lowest. A group met for the
    first time starts at the mean over the groups graded so far, so that the search gets somewhere even where no
    problem comes twice.
    """

    def __init__(self, config: StaircaseSettings) -> None:
        self._config = config
        self._bounds = (config.ratio_min, config.ratio_max)
        self._ratios: dict[str, float] = {}
        self._first = clipped(config.start, self._bounds)

    def features(self) -> tuple[float, ...]:
        """The ratio of a group not met before."""
        return (self._first,)

    def propose(self, group: str, rng: np.random.Generator) -> float:  # noqa: ARG002
        """Where the group's staircase stands. It is no draw."""
        return self._ratios.get(group, self._first)

    def on_update(self, stats: UpdateStats) -> None:
        """Move the staircases of the groups whose rollouts were graded."""
        steps: dict[str, list[float]] = {}
        for group, correct in stats.group_success:
            step = correct * self._config.step_solved + (1.0 - correct) * self._config.step_unsolved
            steps.setdefault(group, []).append(step)
        for group, some in steps.items():
            before = self._ratios.get(group, self._first)
            self._ratios[group] = clipped(before + sum(some) / len(some), self._bounds)
        if self._ratios:
            self._first = math.fsum(self._ratios.values()) / len(self._ratios)

    def on_reward(self, finished: FinishedDecision) -> None:
        """Rewards are only logged."""

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {"ratios": dict(self._ratios), "first": self._first}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(StaircaseState, state)
        self._ratios, self._first = dict(kept["ratios"]), kept["first"]
