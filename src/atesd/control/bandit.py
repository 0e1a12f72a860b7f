"""Thompson sampling over a few ratios (Thompson 1933), with a Gaussian belief that is smooth in the ratio. Ours."""

from __future__ import annotations

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from atesd.config import BanditConfig
from atesd.maths.credit import SAME_REWARD
from atesd.records import FinishedDecision, UpdateStats


@final
class Bandit:
    """Plays the arm whose mean reward is highest in one draw from its belief.

    Rewards are standardised by their own discounted mean and deviation, so no scale has to be known. In these units the
    belief before any reward is N(0, prior_deviation^2 K), K_ab = exp(-(ratio_a - ratio_b)^2 / (2 smoothness^2)), and a
    reward tells its arm's mean with noise of deviation 1. Each new reward makes all earlier ones count `discount` times
    as much: the belief follows an optimum that moves, and an arm that was not played for long becomes unknown again.
    """

    def __init__(self, config: BanditConfig, ratio_min: float = 0.0, ratio_max: float = 1.0) -> None:
        self.ratios = np.linspace(ratio_min, ratio_max, config.arms)
        self._discount = config.discount
        apart = (self.ratios[:, None] - self.ratios[None, :]) / config.smoothness
        self._prior: NDArray[np.float64] = config.prior_deviation**2 * np.exp(-0.5 * apart**2)
        self._counts = np.zeros(config.arms)
        self._sums = np.zeros(config.arms)
        self._squares = np.zeros(config.arms)

    def belief(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean [arms] and covariance [arms, arms] of the arms' mean rewards, in deviations of the reward."""
        root = np.sqrt(self._counts)
        total = self._counts.sum()
        mean = self._sums.sum() / total if total else 0.0
        deviation = np.sqrt(max(self._squares.sum() / total - mean**2, 0.0)) if total else 0.0
        if deviation < SAME_REWARD:  # nothing has been told apart
            return np.zeros_like(self.ratios), self._prior
        # With W = diag(counts) and z the sum of standardised rewards: covariance (K^-1 + W)^-1, mean covariance z.
        within = np.eye(len(root)) + root[:, None] * self._prior * root[None, :]
        covariance = self._prior - self._prior @ (root[:, None] * np.linalg.solve(within, root[:, None] * self._prior))
        return covariance @ ((self._sums - self._counts * mean) / deviation), (covariance + covariance.T) / 2

    def features(self) -> tuple[float, ...]:
        """The belief's mean for each arm, lowest ratio first."""
        return tuple(self.belief()[0].tolist())

    def choose(self, group: str, rng: np.random.Generator) -> float:  # noqa: ARG002
        """The ratio of the arm that is best in a draw from the belief."""
        mean, covariance = self.belief()
        values, vectors = np.linalg.eigh(covariance)
        draw = mean + vectors @ (np.sqrt(np.maximum(values, 0.0)) * rng.standard_normal(len(mean)))
        return float(self.ratios[int(np.argmax(draw))])

    def watch(self, stats: UpdateStats) -> None:
        """Only rewards count."""

    def learn(self, finished: FinishedDecision) -> None:
        """Take in the reward of the arm that was played."""
        (ratio,) = finished.decision.samples.values()
        arm = int(np.argmin(np.abs(self.ratios - ratio)))
        for sums, value in ((self._counts, 1.0), (self._sums, finished.reward), (self._squares, finished.reward**2)):
            sums *= self._discount
            sums[arm] += value

    def state_dict(self) -> dict[str, Any]:
        """JSON values only."""
        sums = {"counts": self._counts, "sums": self._sums, "squares": self._squares}
        return {name: values.tolist() for name, values in sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._counts, self._sums, self._squares = (np.array(state[name]) for name in ("counts", "sums", "squares"))
