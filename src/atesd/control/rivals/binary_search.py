"""A stochastic binary search, after AdaBack (arXiv 2506.18110, github.com/aryol/LLM-RL)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict, cast, final

import numpy as np
from pydantic import Field

from atesd.component import Fraction
from atesd.control.controlled import ControlledExposure
from atesd.control.credit import CreditConfig
from atesd.control.rivals.verdicts import Heard, RuleSettings, ruled
from atesd.control.settings import Run

Tried = tuple[float, float, float, int]
"""(ratio that taught, upper end before it, rollouts solved since, rollouts since)."""


class BinarySearchSettings(RuleSettings):
    """The binary search."""

    kind: Literal["binary_search"] = Field("binary_search", description="a search for the least ratio; AdaBack")
    granularity: Literal["per_difficulty", "per_problem"] = Field(
        "per_difficulty", description="what has an interval; source: per problem, which has to come several times"
    )
    threshold: Fraction = Field(0.5, description="success from which a ratio was enough; AdaBack")
    decay: float = Field(0.8, ge=0, lt=1, description="of the mean interval, from which new groups draw; AdaBack")

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With what has an interval of its own."""
        return f"binary search {self.granularity.replace('_', ' ')}{self.null}"

    def make(self, run: Run) -> ControlledExposure:
        """Every interval whole."""
        return ruled(BinarySearch(self), self, run)


class BinarySearchState(TypedDict):
    """What a checkpoint holds of the search: the interval of each group, its latest draw, and the mean interval."""

    intervals: dict[str, tuple[float, float]]
    tried: dict[str, Tried]
    mean: tuple[float, float]


@final
class BinarySearch:
    """A draw from a group's interval; enough of it solved, the draw becomes the upper end, else the lower end.

    What one draw taught is judged together, over all its updates. The upper end never rises again, and a draw that was
    enough takes the lower end back to the least ratio. A group met for the first time draws from the running mean of
    the intervals. In the source the draw is the part of the solution that is
    given to the student, and its own reward judges it; here it is judged by what the group solves after it was taught.
    """

    def __init__(self, config: BinarySearchSettings) -> None:
        self._config = config
        self._whole = (config.ratio_min, config.ratio_max)
        self._intervals: dict[str, tuple[float, float]] = {}
        self._tried: dict[str, Tried] = {}
        self._mean = self._whole

    def features(self) -> tuple[float, ...]:
        """The mean interval."""
        return self._mean

    def ratio(self, group: str, rng: np.random.Generator) -> float:
        """A uniform draw from the group's interval."""
        low, high = self._intervals.get(group, self._mean)
        return float(rng.uniform(low, high))

    def hear(self, heard: Mapping[str, Heard]) -> None:
        """Cut the intervals of the groups that were taught before, and move the mean one after them."""
        judged = {group: one for group, one in heard.items() if one.taught_at is not None}
        for group, one in judged.items():
            at = cast(float, one.taught_at)
            tried = self._tried.get(group)
            if tried is None or tried[0] != at:
                tried = (at, self._intervals.get(group, self._whole)[1], 0.0, 0)
            _, high, right, rollouts = tried
            right, rollouts = right + one.success * one.rollouts, rollouts + one.rollouts
            self._tried[group] = (at, high, right, rollouts)
            taught = min(at, high)
            enough = right >= self._config.threshold * rollouts
            self._intervals[group] = (self._whole[0], taught) if enough else (taught, high)
        if judged:
            lows, highs = zip(*(self._intervals[group] for group in judged), strict=True)
            kept = self._config.decay
            means = (sum(lows) / len(lows), sum(highs) / len(highs))
            self._mean = (
                kept * self._mean[0] + (1 - kept) * means[0],
                kept * self._mean[1] + (1 - kept) * means[1],
            )

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "intervals": {group: list(ends) for group, ends in self._intervals.items()},
            "tried": {group: list(tried) for group, tried in self._tried.items()},
            "mean": list(self._mean),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(BinarySearchState, state)
        self._intervals = {group: (low, high) for group, (low, high) in kept["intervals"].items()}
        self._tried = {group: (at, high, right, count) for group, (at, high, right, count) in kept["tried"].items()}
        self._mean = (kept["mean"][0], kept["mean"][1])
