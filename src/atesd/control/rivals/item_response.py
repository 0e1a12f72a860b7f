"""An item-response curve over the ratio, fitted during the run, after SEELE (arXiv 2509.06923)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, cast, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atesd.control.controlled import ControlledExposure
from atesd.control.credit import CreditConfig
from atesd.control.rivals.verdicts import Heard, RuleSettings, ruled
from atesd.control.settings import Run

Seen = tuple[float, float, int]
"""(ratio that taught, rollouts solved, rollouts)."""
NEWTON_ROUNDS = 24  # of the fit, each step at most 1 long: a whole one could overshoot where the curve is flat
LEAST_SLOPE = 0.1  # of log-odds per unit of ratio; a flatter curve reaches the target nowhere near [0, 1]


class ItemResponseSettings(RuleSettings):
    """The item-response curve."""

    kind: Literal["item_response"] = Field("item_response", description="a fitted curve of success by ratio; SEELE")
    target: float = Field(0.5, gt=0, lt=1, description="success aimed at; SEELE")
    window: int = Field(32, ge=2, description="updates of a group that the fit remembers; ours")
    prior_slope: float = Field(4.0, gt=0, description="log-odds per unit of ratio before any verdict; ours")
    prior_deviation: float = Field(2.0, gt=0, description="of slope and of the log-odds at ratio 0.5; ours")

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With what has a curve of its own."""
        return f"item response {self.granularity.replace('_', ' ')}{self.null}"

    def make(self, run: Run) -> ControlledExposure:
        """The prior's curve for every group."""
        return ruled(ItemResponse(self), self, run)


class ItemResponseState(TypedDict):
    """What a checkpoint holds of the curves."""

    seen: dict[str, list[Seen]]


@final
class ItemResponse:
    """The ratio at which a group's curve, log-odds of success = level + slope (ratio - 0.5), reaches the target.

    Level ~ N(0, prior_deviation^2) and slope ~ N(prior_slope, prior_deviation^2) a priori; the curve is the posterior's
    mode over the group's last `window` updates, each paired with the ratio that taught it. The source fits the success
    of several rounds of hinted rollouts of one prompt in one step, with a third parameter for guessing; here a round is
    an update of the group, and what it was taught at comes before what it solves.
    """

    def __init__(self, config: ItemResponseSettings) -> None:
        self._config = config
        self._aim = math.log(config.target / (1.0 - config.target))
        self._seen: dict[str, list[Seen]] = {}

    def features(self) -> tuple[float, ...]:
        """None: a curve per group is too much for a row."""
        return ()

    def ratio(self, group: str, rng: np.random.Generator) -> float:  # noqa: ARG002
        """Where the curve reaches the target. It is no draw."""
        level, slope = map(float, self.curve(self._seen.get(group, ())))
        return 0.5 + (self._aim - level) / max(slope, LEAST_SLOPE)

    def curve(self, seen: Sequence[Seen]) -> NDArray[np.float64]:
        """(level, slope) at the mode of the posterior, by Newton's method from the prior's mean."""
        mean = np.array([0.0, self._config.prior_slope])
        precision = np.eye(2) / self._config.prior_deviation**2
        table = np.array(seen, dtype=np.float64).reshape(-1, 3)
        rows = np.stack([np.ones(len(table)), table[:, 0] - 0.5], axis=1)
        found = mean
        for _ in range(NEWTON_ROUNDS):
            chance = 0.5 * (1.0 + np.tanh(0.5 * (rows @ found)))  # the logistic curve, which cannot overflow so
            gradient = rows.T @ (table[:, 1] - table[:, 2] * chance) - precision @ (found - mean)
            curvature = rows.T @ (rows * (table[:, 2] * chance * (1.0 - chance))[:, None]) + precision
            step = np.linalg.solve(curvature, gradient)
            found = found + step / max(1.0, float(np.linalg.norm(step)))
        return found

    def hear(self, heard: Mapping[str, Heard]) -> None:
        """Remember what groups that were taught before have solved."""
        for group, one in heard.items():
            if one.taught_at is not None:
                row = (one.taught_at, one.success * one.rollouts, one.rollouts)
                self._seen[group] = [*self._seen.get(group, ()), row][-self._config.window :]

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {"seen": {group: [list(row) for row in rows] for group, rows in self._seen.items()}}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        seen = cast(ItemResponseState, state)["seen"]
        self._seen = {group: [(at, right, count) for at, right, count in rows] for group, rows in seen.items()}
