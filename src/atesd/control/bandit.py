"""Thompson sampling over a few ratios (Thompson 1933), with a Gaussian belief that is smooth in the ratio. Ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, TypedDict, cast, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atesd.control.controlled import ControlledExposure, as_exposure
from atesd.control.credit import CreditConfig
from atesd.control.settings import ControllerSettings, Run
from atesd.maths.credit import SAME_REWARD
from atesd.records import FinishedDecision, UpdateStats

NOISE_ROUNDS = 3  # of the fixed point between belief and noise; it hardly moves after two


class BanditSettings(ControllerSettings):
    """Thompson sampling over a few ratios. All ours."""

    kind: Literal["bandit"] = Field("bandit", description="Thompson sampling over a few ratios; ours")
    arms: int = Field(5, ge=2, description="ratios, evenly spaced from ratio_min to ratio_max; ours")
    prior_deviation: float = Field(
        1.0, gt=0, description="of an arm's mean reward before any, in deviations of the reward; ours"
    )
    smoothness: float = Field(0.35, gt=0, description="ratio over which mean rewards are alike; small: unrelated; ours")
    discount: float = Field(
        0.98, gt=0, le=1, description="of earlier rewards, per decision; 1: none is forgotten; ours"
    )

    learns_from_rewards: ClassVar[bool] = True

    def label(self, credit: CreditConfig) -> str:
        """With the number of arms and the reward."""
        return f"bandit over {self.arms} ratios ({credit.label})"

    def make(self, run: Run) -> ControlledExposure:
        """A bandit that knows nothing yet."""
        return as_exposure(Bandit(self), self, run)


class BanditState(TypedDict):
    """What a checkpoint holds of a bandit."""

    sums: list[list[float]]


@final
class Bandit:
    """Plays the arm whose mean reward is highest in one draw from its belief.

    Bayesian regression of the standardised rewards on three things: the arm, with prior covariance prior_deviation^2
    exp(-(ratio_a - ratio_b)^2 / (2 smoothness^2)); where the progress signal stood when the decision was taken, with a
    N(0, 1) slope, since a student who stands low gains from anything; and a N(0, 1) constant. The variance of the noise
    is what the regression leaves, counted with one more residual of 1. Each new reward makes all earlier ones count
    `discount` times as much: the belief follows an optimum that moves, and an arm that was not played for long becomes
    unknown again.
    """

    def __init__(self, config: BanditSettings) -> None:
        self.ratios = np.linspace(config.ratio_min, config.ratio_max, config.arms)
        self._discount = config.discount
        apart = (self.ratios[:, None] - self.ratios[None, :]) / config.smoothness
        self._prior = np.eye(config.arms + 2)
        self._prior[:-2, :-2] = config.prior_deviation**2 * np.exp(-0.5 * apart**2)
        # Discounted sums of row x row^T, over rows (1 for the arm played, 0 for others; the standing; 1; the reward).
        self._sums = np.zeros((config.arms + 3, config.arms + 3))

    def belief(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean [arms] and covariance [arms, arms] of what each arm adds, in deviations of the reward."""
        arms, count = len(self.ratios), self._sums[-2, -2]
        scales = self._standardise() if count else None
        if scales is None:
            return np.zeros(arms), self._prior[:arms, :arms]
        sums = scales @ self._sums @ scales.T
        gram, with_reward, of_reward = sums[:-1, :-1], sums[:-1, -1], sums[-1, -1]
        noise = 1.0
        for _ in range(NOISE_ROUNDS):
            # (prior^-1 + gram / noise)^-1 without inverting the prior, which is nearly singular for smooth arms.
            covariance = np.linalg.solve(np.eye(arms + 2) + self._prior @ gram / noise, self._prior)
            mean = covariance @ with_reward / noise
            left = of_reward - 2 * mean @ with_reward + mean @ gram @ mean
            noise = (max(left, 0.0) + 1.0) / (count + 1.0)
        covariance = (covariance + covariance.T) / 2
        return mean[:arms], covariance[:arms, :arms]

    def features(self) -> tuple[float, ...]:
        """The belief's mean for each arm, lowest ratio first."""
        return tuple(self.belief()[0].tolist())

    def propose(self, group: str, rng: np.random.Generator) -> float:  # noqa: ARG002
        """The ratio of the arm that is best in a draw from the belief."""
        mean, covariance = self.belief()
        values, vectors = np.linalg.eigh(covariance)
        draw = mean + vectors @ (np.sqrt(np.maximum(values, 0.0)) * rng.standard_normal(len(mean)))
        return float(self.ratios[int(np.argmax(draw))])

    def on_update(self, stats: UpdateStats) -> None:
        """Only rewards count."""

    def on_reward(self, finished: FinishedDecision) -> None:
        """Take in the reward of the arm that was played."""
        (ratio,) = finished.decision.samples.values()
        row = np.zeros(len(self._sums))
        row[int(np.argmin(np.abs(self.ratios - ratio)))] = 1.0
        standing = next((value for value in finished.progress_signal if value is not None), 0.0)
        row[-3:] = standing, 1.0, finished.reward
        self._sums = self._discount * self._sums + np.outer(row, row)

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {"sums": self._sums.tolist()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        self._sums = np.array(cast(BanditState, state)["sums"])

    def _standardise(self) -> NDArray[np.float64] | None:
        """The matrix that standardises standing and reward in a row; None if the rewards were all the same."""
        count, matrix = self._sums[-2, -2], np.eye(len(self._sums))
        for place in (-3, -1):
            mean = self._sums[place, -2] / count
            variance = self._sums[place, place] / count - mean**2
            deviation = np.sqrt(max(variance, 0.0))
            if deviation < SAME_REWARD * max(1.0, abs(mean)):
                if place == -1:
                    return None
                matrix[place, place] = 0.0  # a standing that never moved explains nothing
                continue
            matrix[place, [place, -2]] = 1.0 / deviation, -mean / deviation
        return matrix
