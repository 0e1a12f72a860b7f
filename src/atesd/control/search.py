"""A search of its own for every problem (or difficulty): exposure follows what the student can do there. Ours."""

from __future__ import annotations

import math
from typing import Any, final

import numpy as np

from atesd.config import SearchConfig
from atesd.records import FinishedDecision, UpdateStats


@final
class GroupSearch:
    """A staircase per group: its ratio moves by `step_solved` for a solved rollout, by `step_unsolved` for another.

    Several rollouts of one update move it by their mean step. By default solved means up and unsolved down, after the
    paper's sweep (figure 2C): easy problems do best at full exposure, hard ones at the lowest. A group met for the
    first time starts at the mean over the groups graded so far, so that the search gets somewhere even where no
    problem comes twice.
    """

    def __init__(self, config: SearchConfig, ratio_min: float = 0.0, ratio_max: float = 1.0) -> None:
        self._config = config
        self._bounds = (ratio_min, ratio_max)
        self._ratios: dict[str, float] = {}
        self._first = self._clipped(config.start)

    def features(self) -> tuple[float, ...]:
        """The ratio of a group not met before."""
        return (self._first,)

    def choose(self, group: str, rng: np.random.Generator) -> float:  # noqa: ARG002
        """Where the group's staircase stands. It is no draw."""
        return self._ratios.get(group, self._first)

    def watch(self, stats: UpdateStats) -> None:
        """Move the staircases of the groups whose rollouts were graded."""
        steps: dict[str, list[float]] = {}
        for group, correct in stats.group_success:
            step = correct * self._config.step_solved + (1.0 - correct) * self._config.step_unsolved
            steps.setdefault(group, []).append(step)
        for group, some in steps.items():
            before = self._ratios.get(group, self._first)
            self._ratios[group] = self._clipped(before + sum(some) / len(some))
        if self._ratios:
            self._first = math.fsum(self._ratios.values()) / len(self._ratios)

    def learn(self, finished: FinishedDecision) -> None:
        """Rewards are only logged."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {"ratios": dict(self._ratios), "first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._ratios, self._first = dict(state["ratios"]), state["first"]

    def _clipped(self, ratio: float) -> float:
        lowest, highest = self._bounds
        return min(max(ratio, lowest), highest)
