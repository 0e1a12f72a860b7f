"""How many decisions and policy updates a number of student updates affords, and whether they can teach the policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from atesd.control.credit import CreditConfig
from atesd.control.learned import PolicyConfig
from atesd.control.simulation import Stats, drive
from atesd.records import UpdateStats

REACH_SEEDS = 4
"""Controllers under a reward without noise: they hardly differ."""

ENOUGH_MOVE = 0.25
"""A budget suffices if a reward without noise could take the mean half of the way from 0.5 to either end (ours)."""

LONGER = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 6.0, 8.0)
MANY = (32, 64, 128)
"""How many times the budget, and how many decisions, are tried as a mend before something else is called the cause."""


def decisions(num_updates: int, credit: CreditConfig) -> int:
    """Exposure decisions taken: one per hold that begins."""
    return -(-num_updates // credit.hold_updates)


def affordable(num_updates: int, credit: CreditConfig, policy: PolicyConfig) -> tuple[int, int]:
    """(decisions whose window closes within the run, policy updates they give).

    The window of the decision taken before update t closes with update t + L, or t + H + L after the paper's prose.
    """
    lag = credit.lookahead_updates + (credit.hold_updates if credit.window_start == "hold_end" else 0)
    finished = max(0, -(-(num_updates - lag) // credit.hold_updates))
    return finished, finished // policy.decisions_per_policy_update


@dataclass(frozen=True, slots=True)
class Reach:
    """Where the mean ratio, at first 0.5, ends under a reward without any noise: the ratio itself, and minus it."""

    up: float
    down: float

    @property
    def enough(self) -> bool:
        """Whether so many updates could teach the policy something."""
        return self.up - 0.5 >= ENOUGH_MOVE and 0.5 - self.down >= ENOUGH_MOVE


@dataclass(frozen=True, slots=True)
class Learner:
    """The settings of a learned exposure that decide what a budget can teach it; `bounds` of the ratios that act."""

    credit: CreditConfig
    policy: PolicyConfig
    bounds: tuple[float, float] = (0.0, 1.0)

    def reach(self, taken: int, seeds: int | None = None) -> Reach:
        """How far `taken` decisions can move the policy, a mean over seeds; pure simulation."""
        credit, count = one_signal(self.credit), REACH_SEEDS if seeds is None else seeds

        def end(sign: float) -> float:
            runs = (drive(credit, self.policy, taken, seed, faultless(sign), self.bounds) for seed in range(count))
            return fmean(run.end_mean for run in runs)

        return Reach(end(1.0), end(-1.0))

    def updates_needed(self, num_updates: int) -> int | None:
        """So many updates, at least `num_updates`, as would suffice; None if none of `LONGER` and `MANY` would."""
        taken = decisions(num_updates, self.credit)
        tried = sorted({*(math.ceil(times * taken) for times in LONGER), *(many for many in MANY if many > taken)})
        if not self.reach(tried[-1], seeds=1).enough:
            return None
        found = next((count for count in tried if self.reach(count).enough), None)
        return None if found is None else max(num_updates, found * self.credit.hold_updates)


def one_signal(credit: CreditConfig) -> CreditConfig:
    """A reward that reads one signal, on the same clock and with the same shuffling."""
    clock = {"hold_updates", "lookahead_updates", "discount", "window_start", "shuffle_rewards"}
    return CreditConfig(**credit.model_dump(include=clock), progress_signal="probe_success")


def faultless(sign: float) -> Stats:
    """A student whose measured success changes by `sign` times the ratio in every update, with no noise at all."""
    reached = 0.0

    def stats(update: int, reveal_ratio: float) -> UpdateStats:  # noqa: ARG001
        nonlocal reached
        before, reached = reached, reached + sign * reveal_ratio
        return UpdateStats(reveal_ratio, reveal_ratio, 1.0, 1.0, 1.0, 1.0, probe_nll=1.0, probe_success=before)

    return stats
