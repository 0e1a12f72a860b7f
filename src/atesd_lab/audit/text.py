"""What `atesd audit` says: two tables and some sentences."""

from __future__ import annotations

import math
from statistics import fmean, pstdev

from atesd.table import Table
from atesd.text import MISSING
from atesd_lab.audit.audit import Audit, Budget, Effect, RewardAudit
from atesd_lab.audit.measure import Reading

UNITS = {
    "train_kl": "train_kl, nats per token",
    "train_success": "train_success, share",
    "probe_success": "probe_success, share",
    "probe_nll": "probe_nll, nats per token",
    "probe_kl": "probe_kl, nats per token",
    "probe_gain": "probe_gain, share",
    "grounding": "grounding, nats per token",
}


def rewards_table(audit: Audit) -> Table:
    """Every reward: where it takes the mean ratio, what it correlates with, its verdict."""
    title = (
        f"Rewards of a student that never learns: {audit.simulated_decisions} decisions, {audit.simulated_seeds} seeds"
    )
    columns = (
        "reward",
        "mean ratio at the end",
        "over seeds",
        "r, progress",
        "r, grounding",
        "r, reward",
        "noise",
        "policy updates",
        "verdict",
    )
    ends = audit.noise_ends
    rows = [_reward_row(reward) for reward in audit.rewards]
    noise = f"{fmean(ends) - pstdev(ends):.2f} to {fmean(ends) + pstdev(ends):.2f} (± sd)"
    rows.append(("pure noise", f"{fmean(ends):.2f}", noise, *[""] * 6))
    notes = [
        "Nothing that a controller does can help this student: what moves the mean ratio from 0.50 is an artefact.",
        f"r: correlation with the decision's own ratio; beyond ±{_chance(audit):.2f} it is hardly chance. "
        "Noise: standard deviation of a decision's reward that its ratio does not explain.",
        *(f"Not measured: {name}, which needs a checker (data.checker)." for name in audit.unmeasured),
    ]
    return Table(title, columns, tuple(rows), tuple(notes))


def readings_table(audit: Audit) -> Table:
    """Every signal: level, second reading, noise."""
    rows = tuple(_reading_row(reading) for reading in audit.readings)
    title = f"Signals of the frozen student, from {audit.rollouts} rollouts and the probe problems"
    columns = ("signal", "level", "at ratio 1", "read again", "noise, sd", "noise of what")
    return Table(title, columns, rows)


def verdict_lines(audit: Audit) -> list[str]:
    """What is to be read first: the verdict, and what mends it."""
    mends = (f"  mend: --set {mend.setting}  ({mend.why})" for mend in audit.mends)
    return [f"Verdict on this recipe: {audit.verdict}.", *mends]


def sentences(audit: Audit) -> list[str]:
    """Budget, effect and notes."""
    return [_budget(audit.budget), _effect(audit.effect, audit.budget), *audit.notes]


def _budget(budget: Budget) -> str:
    farthest = max(budget.reach_up - 0.5, 0.5 - budget.reach_down)
    return (
        f"Budget: {budget.updates} updates are {budget.decisions} decisions, {budget.rewarded} of them rewarded in "
        f"time, and {budget.policy_updates} policy updates. They cannot move the mean ratio by more than "
        f"{farthest:.2f}: a reward without any noise that grows with the ratio takes it from 0.50 to "
        f"{budget.reach_up:.2f}, one that falls to {budget.reach_down:.2f}, noise alone to {budget.noise_mean:.2f} ± "
        f"{budget.noise_deviation:.2f} (means over the last quarter of the decisions)."
    )


def _effect(effect: Effect, budget: Budget) -> str:
    if effect.smallest is None:
        return (
            "The progress signal draws nothing, or does not move: its noise under a student that changes is unknown "
            "before training, and so is what these decisions can tell apart."
        )
    found = (
        f"These {budget.rewarded} rewarded decisions find a difference of {effect.smallest:.2g} between what a hold "
        f"earns at ratio 0 and at ratio 1 (80 % power; noise {effect.noise:.2g}, which is an upper bound where a "
        "changed student meets the same draws). "
    )
    if effect.expected is None:
        return found + "What a hold really earns is not known before training; --effect says what you expect."
    return found + f"The expected {effect.expected:g} takes {effect.needed_decisions:,} rewarded decisions."


def _reward_row(reward: RewardAudit) -> tuple[str, ...]:
    return (
        reward.reward,
        f"{fmean(reward.ends):.2f}",
        f"{min(reward.ends):.2f} to {max(reward.ends):.2f}",
        *(MISSING if r is None else f"{r:+.2f}" for r in (reward.progress, reward.grounding, reward.total)),
        f"{reward.noise:.2g}",
        f"{reward.policy_updates:.0f}",
        reward.verdict,
    )


def _reading_row(reading: Reading) -> tuple[str, ...]:
    again = MISSING if reading.again is None else "the same" if reading.again == 0.0 else f"{reading.again:+.2g}"
    return (
        UNITS[reading.signal],
        MISSING if reading.level is None else f"{reading.level:.3g}",
        MISSING if reading.top is None else f"{reading.top:.3g}",
        again,
        MISSING if reading.noise is None else f"{reading.noise:.2g}",
        reading.source,
    )


def _chance(audit: Audit) -> float:
    """Twice the standard error of a correlation of nothing."""
    fewest = min(reward.decisions for reward in audit.rewards if reward.total is not None)
    return 2.0 / math.sqrt(fewest)
