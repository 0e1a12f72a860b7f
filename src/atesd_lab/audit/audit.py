"""`atesd audit`: whether a reward can be trusted on this model and data, and whether the budget suffices to learn.

Nothing is trained. A frozen student's rollouts are scored at every ratio, its probes are read again and with fresh
draws, and the learned controller is driven over what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import correlation, fmean, pstdev
from typing import Any, Literal, get_args

from atesd.build import build, close
from atesd.config import Config, CreditConfig, PolicyConfig, ProgressSignal
from atesd.control.budget import ENOUGH_MOVE, Learner, affordable, decisions, one_signal
from atesd.control.simulation import Driven, Stats, drive
from atesd.errors import ConfigError
from atesd.maths.credit import SAME_REWARD
from atesd_lab.audit.measure import MeasuredStudent, Reading, measure_student
from atesd_lab.audit.null_measure import Say
from atesd_lab.audit.null_simulation import (
    SOUND_DRIFT,
    drift_verdict,
    frozen,
    noise,
    with_clock,
)

Verdict = Literal[
    "sound",
    "drifts up",
    "drifts down",
    "depends on the ratio",
    "silent",
    "too few decisions",
    "too noisy",
    "cannot learn",
]

NOISE_SEEDS = 30
"""Controllers under pure noise: what a drift is compared with."""

FIRST_DEVIATION = 0.239
"""Standard deviation of the ratio under Beta(1.69, 1.69), with which the policy begins."""

CERTAIN = 3.0
"""A drift counts beyond three standard errors of the difference from pure noise (ours)."""

BEYOND_CHANCE = 5.0
"""A reward depends on the ratio if their correlation is so many of its standard errors from 0 (ours)."""

POWER = 2.8
"""Standard errors at which a true difference is found at the 5 % level with 80 % power: 1.96 + 0.84."""


@dataclass(frozen=True, slots=True)
class RewardAudit:
    """How one reward behaves while nothing is learned.

    `ends`: the mean ratio over the last quarter of the decisions, per seed. Correlations are with the decision's own
    ratio, under a policy that never learns; None where a component never moves. `noise` is the standard deviation of
    the reward that the ratio does not explain, in its own unit.
    """

    reward: str
    verdict: Verdict
    ends: tuple[float, ...]
    policy_updates: float
    progress: float | None
    grounding: float | None
    total: float | None
    noise: float
    decisions: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What the run's own number of updates affords.

    `reach_up` and `reach_down`: where the mean ratio ends under a reward without any noise that is the ratio itself, or
    minus it. `noise_mean` and `noise_deviation`: where it ends under nothing but noise. `needed_updates`: how many
    updates would let it move far enough; None if none of `LONGER` and `MANY` would.
    """

    updates: int
    decisions: int
    rewarded: int
    policy_updates: int
    reach_up: float
    reach_down: float
    noise_mean: float
    noise_deviation: float
    needed_updates: int | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Effect:
    """What the budget can tell apart, in the unit of the progress signal and per decision.

    `smallest`: the difference between ratio 0 and ratio 1 that is found with 80 % power, if the effect is linear. None
    where the noise of a changed student is unknown. `expected` is the difference that the user expects, and
    `needed_decisions` are what finding that one takes.
    """

    noise: float | None
    smallest: float | None
    expected: float | None
    needed_decisions: int | None
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class Mend:
    """A setting, ready for `--set`, and what it mends."""

    setting: str
    why: str


@dataclass(frozen=True, slots=True)
class Audit:
    """Everything `atesd audit` has to say. The first of `rewards` is the recipe's own."""

    verdict: str
    mends: tuple[Mend, ...]
    rewards: tuple[RewardAudit, ...]
    noise_ends: tuple[float, ...]
    simulated_decisions: int
    simulated_seeds: int
    budget: Budget
    effect: Effect
    readings: tuple[Reading, ...]
    unmeasured: tuple[str, ...]
    rollouts: int
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)


def run_audit(
    config: Config, *, rollouts: int, repeats: int, decisions: int, seeds: int, effect: float | None, say: Say
) -> Audit:
    """Measure the recipe's frozen student and audit its reward. `ConfigError` without a teacher or a policy update."""
    require_teacher(config, "audit")
    rewarded, policy_updates = affordable(decisions * config.credit.hold_updates, config.credit, config.policy)
    if not policy_updates:
        raise ConfigError(
            f"audit: of {decisions} decisions {rewarded} are rewarded, and the policy waits for "
            f"{config.policy.decisions_per_policy_update} (policy.decisions_per_policy_update); raise --decisions"
        )
    parts = build(config)
    try:
        student = measure_student(parts, rollouts, repeats, say)
    finally:
        close(parts)
    say(f"driving the controller over {decisions} decisions, {seeds} seeds per reward")
    return audit_student(config, student, decisions=decisions, seeds=seeds, effect=effect)


def require_teacher(config: Config, command: str) -> None:
    """Raise `ConfigError` where there is no teacher."""
    if not config.distils:
        raise ConfigError(f"{command}: train.method: {config.train.method} has no teacher to expose; set it to distill")


def audit_student(
    config: Config, student: MeasuredStudent, *, decisions: int, seeds: int, effect: float | None = None
) -> Audit:
    """The audit of a measured student; pure simulation."""
    if not measurable(config.credit, student):
        raise ConfigError(
            f"credit.progress_signal: {config.credit.progress_signal} cannot be measured on this recipe; set "
            "data.checker, or credit.progress_signal: probe_nll"
        )
    noise_ends = tuple(end_means(config, one_signal(config.credit), noise, decisions, NOISE_SEEDS))
    bench = Bench(config, student, decisions, seeds, noise_ends)
    own = bench.audit("this recipe", config.credit)
    rewards = [own]
    sampled = config.credit.progress_signal == "probe_success" and student.verified
    if sampled:
        rewards.append(bench.audit("this recipe, fresh draws", config.credit, fresh=True))
    unmeasured = []
    for name, credit in other_rewards(config, student).items():
        if measurable(credit, student):
            rewards.append(bench.audit(name, credit))
        else:
            unmeasured.append(name)
    budget = budget_of(config)
    known = sampled or config.credit.progress_signal in ("train_kl", "train_success")
    told = effect_of(budget, rewards[1] if sampled else own, known, effect)
    reward_verdict = own.verdict if own.verdict != "sound" or not sampled else rewards[1].verdict
    words = [reward_verdict, *[v for v in (budget.verdict, told.verdict) if v not in (None, "sound")]]
    mends = (*reward_mends(bench, reward_verdict), *budget_mends(config, budget), *effect_mends(config, told))
    return Audit(
        ", ".join(str(word) for word in words),
        mends,
        tuple(rewards),
        noise_ends,
        decisions,
        seeds,
        budget,
        told,
        student.readings,
        tuple(unmeasured),
        student.rollouts,
        tuple(notes_of(config)),
    )


@dataclass(frozen=True, slots=True)
class Bench:
    """A measured student and a controller, on which rewards are tried."""

    config: Config
    student: MeasuredStudent
    decisions: int
    seeds: int
    noise_ends: tuple[float, ...]

    def audit(self, name: str, credit: CreditConfig, *, fresh: bool = False) -> RewardAudit:
        """Drive the controller with this reward; `fresh`: probes get the noise of fresh draws."""
        found = self.student.reading("probe_success")
        deviations = {"probe_success": found.noise} if fresh and found and found.noise else {}
        seeds = range(self.seeds if self.moves(credit) or fresh else 1)
        runs = [self._run(credit, self.config.policy, seed, deviations) for seed in seeds]
        still = self.config.policy.model_copy(update={"learning_rate": 0.0})
        untrained = [self._run(credit, still, seed, deviations) for seed in seeds]
        taken = [finished for run in untrained for finished in run.learned_from]
        ratios = [finished.decision.samples[""] for finished in taken]
        rewards = [finished.reward for finished in taken]
        total = related(rewards, ratios)
        ends = tuple(run.end_mean for run in runs)
        silent = not fresh and self._cannot_move(credit)
        spread = max(pstdev(ends), pstdev(self.noise_ends))  # few seeds may lie together by chance
        error = spread * math.sqrt(1.0 / len(ends) + 1.0 / len(self.noise_ends))
        updates = fmean(run.policy_updates for run in runs)
        depends = abs(total or 0.0) * math.sqrt(len(taken)) > BEYOND_CHANCE
        moved: Verdict = drift_verdict(ends)
        if depends and moved != ("drifts up" if (total or 0.0) > 0 else "drifts down"):
            moved = "depends on the ratio"
        elif moved != "sound" and not depends:
            moved = drift_verdict(ends, fmean(self.noise_ends), max(CERTAIN * error, SOUND_DRIFT))
        return RewardAudit(
            name,
            "silent" if silent else moved,
            ends,
            updates,
            related([finished.progress for finished in taken], ratios),
            related([finished.grounding for finished in taken], ratios) if credit.grounding_weight else None,
            total,
            pstdev(rewards) * math.sqrt(1.0 - (total or 0.0) ** 2),
            len(taken),
        )

    def _run(self, credit: CreditConfig, policy: PolicyConfig, seed: int, deviations: dict[str, float]) -> Driven:
        stats = frozen(self.student.ratios, seed, deviations)
        return drive(credit, policy, self.decisions, seed, stats, self.config.bounds)

    def moves(self, credit: CreditConfig) -> bool:
        """Whether anything that is rewarded differs between updates of a frozen student; else all seeds are alike."""
        return bool(credit.grounding_weight) or credit.progress_signal in ("train_kl", "train_success")

    def _cannot_move(self, credit: CreditConfig) -> bool:
        """Whether the only thing rewarded is a success that never, or always, comes."""
        if credit.grounding_weight or credit.progress_signal not in ("probe_success", "probe_gain", "train_success"):
            return False
        graded = "train_success" if credit.progress_signal == "train_success" else "probe_success"
        found = self.student.reading(graded)
        return found is not None and found.level in (0.0, 1.0)


def related(values: Sequence[float], ratios: Sequence[float]) -> float | None:
    """Pearson's correlation with the ratios; None where the values do not move."""
    if len(values) < 2 or pstdev(values) < SAME_REWARD:
        return None
    return correlation(values, ratios)


def measurable(credit: CreditConfig, student: MeasuredStudent) -> bool:
    """Whether everything that this reward reads was measured."""
    needed = [credit.progress_signal, *(["grounding"] if credit.grounding_weight else [])]
    return all(student.reading(name) is not None for name in needed)


def other_rewards(config: Config, student: MeasuredStudent) -> dict[str, CreditConfig]:
    """Both presets, every progress signal and the grounding by themselves, on the recipe's own clock."""
    clock = config.credit
    probe = "probe_success" if student.verified else "probe_nll"
    presets = {
        "paper": with_clock(clock, preset="paper", grounding=clock.grounding),
        f"sound, {probe}": with_clock(clock, preset="sound", progress_signal=probe),
    }
    alone = {f"{name} alone": with_clock(clock, progress_signal=name) for name in get_args(ProgressSignal)}
    grounding = with_clock(clock, progress_signal="probe_nll", grounding_weight=1.0, grounding=clock.grounding)
    return {**presets, **alone, "grounding alone": grounding}


def end_means(
    config: Config, credit: CreditConfig, stats_of: Callable[[int], Stats], count: int, seeds: int
) -> list[float]:
    """Where the mean ratio of each seed's controller ends after `count` decisions."""
    return [drive(credit, config.policy, count, seed, stats_of(seed), config.bounds).end_mean for seed in range(seeds)]


def budget_of(config: Config) -> Budget:
    """How far the policy can move in the run's own number of updates."""
    updates, credit = config.train.num_updates, config.credit
    taken, learner = decisions(updates, credit), Learner(credit, config.policy, config.bounds)
    rewarded, policy_updates = affordable(updates, credit, config.policy)
    reach, needed = learner.reach(taken), learner.updates_needed(updates)
    by_noise = end_means(config, one_signal(credit), noise, taken, NOISE_SEEDS)
    verdict: Verdict = "cannot learn" if needed is None else "sound" if reach.enough else "too few decisions"
    return Budget(
        updates,
        taken,
        rewarded,
        policy_updates,
        reach.up,
        reach.down,
        fmean(by_noise),
        pstdev(by_noise),
        needed,
        verdict,
    )


def effect_of(budget: Budget, own: RewardAudit, known: bool, expected: float | None) -> Effect:
    """What the budget's rewarded decisions can tell apart, given the noise of the recipe's own reward.

    The slope of rewards over ratios has a standard error of noise / (deviation of the ratios * sqrt(decisions)).
    """
    if not known or own.noise == 0.0 or budget.rewarded == 0:
        return Effect(None, None, expected, None, None)
    reach = POWER * own.noise / FIRST_DEVIATION
    needed = math.ceil((reach / expected) ** 2) if expected else None
    verdict: Verdict | None = None if needed is None else "too noisy" if needed > budget.rewarded else "sound"
    return Effect(own.noise, reach / math.sqrt(budget.rewarded), expected, needed, verdict)


def reward_mends(bench: Bench, verdict: Verdict) -> Iterator[Mend]:
    """The settings that leave nothing in the reward which moves while nothing is learned; tried on the measurements."""
    credit, probe = bench.config.credit, "probe_success" if bench.student.verified else "probe_nll"
    if verdict == "silent":
        yield Mend(f"credit.progress_signal={probe}", "the student solves none or all of the problems, before training")
        return
    if verdict not in ("drifts up", "drifts down", "depends on the ratio"):
        return
    mended = credit.model_copy(update={"grounding_weight": 0.0})
    if bench.moves(mended):
        mended = mended.model_copy(update={"progress_signal": probe})
    found = bench.audit("mended", mended)
    why = f"then the mean ratio ends at {fmean(found.ends):.2f}: {found.verdict}"
    if mended.progress_signal != credit.progress_signal:
        yield Mend(f"credit.progress_signal={probe}", why)
    if credit.grounding_weight:
        yield Mend("credit.grounding_weight=0", why)


def budget_mends(config: Config, budget: Budget) -> Iterator[Mend]:
    """More updates, or the setting that keeps any number of them from teaching anything."""
    if budget.verdict == "too few decisions":
        yield Mend(
            f"train.num_updates={budget.needed_updates}",
            f"instead of {budget.updates}: enough for a reward without noise to move the mean ratio by {ENOUGH_MOVE}; "
            "a noisy one needs more",
        )
    if budget.verdict != "cannot learn":
        return
    why, policy, default = "else not even a reward without noise moves the policy", config.policy, PolicyConfig()
    if config.credit.shuffle_rewards:
        yield Mend("credit.shuffle_rewards=false", why)
    elif config.credit.window_start == "hold_end":
        yield Mend("credit.window_start=decision", why)
    elif policy.learning_rate < default.learning_rate:
        yield Mend(f"exposure.policy.learning_rate={default.learning_rate:g}", why)
    elif policy.decisions_per_policy_update > default.decisions_per_policy_update:
        yield Mend(f"exposure.policy.decisions_per_policy_update={default.decisions_per_policy_update}", why)


def effect_mends(config: Config, effect: Effect) -> Iterator[Mend]:
    """As many decisions as finding the expected effect takes."""
    if effect.verdict == "too noisy" and effect.needed_decisions is not None:
        updates = effect.needed_decisions * config.credit.hold_updates + config.credit.lookahead_updates
        yield Mend(f"train.num_updates={updates}", f"{effect.needed_decisions:,} rewarded decisions")


def notes_of(config: Config) -> Iterator[str]:
    """What of the recipe the audit does not follow, and a discount that does nothing."""
    if config.credit.discount_note:
        yield f"{config.credit.discount_note}."
    if config.exposure.kind != "learned":
        yield f"exposure.kind is {config.exposure.kind}: audited is the reward, as the learned policy would follow it."
    if config.rule_note:
        yield f"{config.rule_note[0].upper()}{config.rule_note[1:]}."
    if config.granularity != "update":
        yield f"exposure.granularity is {config.granularity}: audited with one ratio per update."
    if config.loss.gate.kind != "none":
        yield f"loss.gate is {config.loss.gate.kind}: the losses here are those of all tokens."
