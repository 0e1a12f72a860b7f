"""How many exposure decisions and policy updates a number of student updates affords."""

from __future__ import annotations

from atesd.control.credit import CreditConfig
from atesd.control.learned import PolicyConfig


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
