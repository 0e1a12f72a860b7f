"""ATESD's exposure: a Beta policy that learns the reveal ratio from what followed (arXiv 2605.11458).

Usable alone, in anybody's training loop:

    exposure = LearnedExposure(num_updates=400)
    for update in range(400):
        wanted = exposure.measurements(update)  # for example {"probe_success"}: measure it now
        stats = train_one_update(exposure.reveal_ratio(update), wanted)  # an UpdateStats
        exposure.observe(update, stats)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, TypedDict, cast, final

from pydantic import Field

from atesd.component import Component
from atesd.control.credit import CreditConfig
from atesd.control.interface import Measurement
from atesd.control.ledger import DecisionLedger, finished_from_json, finished_to_json, rewarded
from atesd.control.settings import BoundedSettings, Granularity, GranularSettings, Run, clipped
from atesd.control.state import STATE_NAMES, TrainingState
from atesd.errors import ConfigError
from atesd.maths import credit, keyed
from atesd.records import Decision, FinishedDecision, UpdateStats


class PolicyConfig(Component):
    """The Beta policy of the learned exposure and its REINFORCE update."""

    hidden: int = Field(32, ge=1, description="tanh units of the one hidden layer; ours")
    learning_rate: float = Field(2e-2, ge=0, description="Adam; ours. 0 is the untrained-policy control")
    beta1: float = Field(0.0, ge=0, lt=1, description="Adam; ours: with 0.9 it keeps climbing past a moved optimum")
    decisions_per_policy_update: int = Field(4, ge=2, description="paper B; value ours")
    entropy_ceiling: float = Field(-0.27, description="nats; that of Beta(3, 3); form paper, value ours")
    entropy_cost: float = Field(1.0, ge=0, description="reached linearly from 0 over the run; form paper, value ours")
    importance_cap: float | None = Field(
        2.0, ge=1, description="largest weight of a decision older than the policy; None: no weights; ours"
    )
    ema_decay: float = Field(0.9, ge=0, lt=1, description="of the training-state averages; ours")


class LearnedSettings(GranularSettings, BoundedSettings):
    """ATESD's exposure."""

    kind: Literal["learned"] = Field("learned", description="paper: a Beta policy, learned during the run")
    granularity: Literal["update", "per_difficulty", "per_problem"] = Field(
        "update", description="paper: one ratio per update; the others draw several from one Beta, ours"
    )
    policy: PolicyConfig = PolicyConfig()

    decides: ClassVar[bool] = True
    learns_from_rewards: ClassVar[bool] = True

    def label(self, credit: CreditConfig) -> str:
        """ATESD, with the reward."""
        return f"ATESD ({credit.label})"

    def make(self, run: Run) -> LearnedExposure:
        """A policy without an opinion."""
        return LearnedExposure(
            num_updates=run.num_updates,
            credit=run.credit,
            policy=self.policy,
            seed=run.seed,
            ratio_min=self.ratio_min,
            ratio_max=self.ratio_max,
            granularity=self.granularity,
        )


class LearnedState(TypedDict):
    """What a checkpoint holds of a learned exposure."""

    training_state: dict[str, object]
    policy: dict[str, object]
    ledger: dict[str, object]
    finished: list[dict[str, object]]
    policy_updates: int
    skipped_policy_updates: int


@final
class LearnedExposure:
    """Decides every `hold_updates`, is rewarded `lookahead_updates` later, learns from every B rewarded decisions.

    Each draw is a function of (seed, decision, group) and of the policy alone. Under `per_difficulty` and `per_problem`
    a decision is one Beta, from which each group draws its own ratio; `update` ignores the group. `policy_updates` and
    `skipped_policy_updates` (all rewards equal) count the buffers consumed.
    """

    def __init__(
        self,
        *,
        num_updates: int,
        credit: CreditConfig | None = None,
        policy: PolicyConfig | None = None,
        seed: int = 0,
        ratio_min: float = 0.0,
        ratio_max: float = 1.0,
        granularity: Granularity = "update",
    ) -> None:
        from atesd.control.policy import BetaPolicy

        if not 0.0 <= ratio_min <= ratio_max <= 1.0:
            raise ConfigError(f"ratio_min {ratio_min}, ratio_max {ratio_max}: allowed are 0 <= min <= max <= 1")
        self._credit = credit or CreditConfig()
        self._policy_config = policy or PolicyConfig()
        self._seed = seed
        self._bounds = (ratio_min, ratio_max)
        self._granularity = granularity
        self._training_state = TrainingState(num_updates, self._policy_config.ema_decay)
        self._policy = BetaPolicy(self._policy_config, len(STATE_NAMES), seed)
        self._ledger = DecisionLedger(self._credit)
        self._finished: list[FinishedDecision] = []
        self.policy_updates = 0
        self.skipped_policy_updates = 0

    @property
    def dropped(self) -> dict[str, int]:
        """Decisions that no reward could be given to, by reason."""
        return dict(self._ledger.dropped)

    @property
    def ignored(self) -> dict[str, int]:
        """Non-finite numbers that were kept out of the training state, by name."""
        return dict(self._training_state.ignored)

    def measurements(self, update: int) -> frozenset[Measurement]:
        """What to measure before the step of this update."""
        wanted = self._ledger.measurements(update)
        # The probe NLL is a state feature, whatever the progress signal is; once per policy update keeps its cost down.
        buffer = self._credit.hold_updates * self._policy_config.decisions_per_policy_update
        return wanted | {"probe_nll"} if update % buffer == 0 else wanted

    def reveal_ratio(self, update: int, group: str = "") -> float:
        """The ratio for this update and group, clipped to the bounds; the first call of a hold takes the decision."""
        decision = self._ledger.held(update, self._decide)
        group = "" if self._granularity == "update" else group
        if group not in decision.samples:
            key = decision.update // self._credit.hold_updates
            uniform = float(keyed.uniforms(1, self._seed, "exposure", key, group)[0])
            self._ledger.add_draw(decision.update, group, self._policy.draw(uniform, decision))
        return clipped(decision.samples[group], self._bounds)

    def observe(self, update: int, stats: UpdateStats) -> list[FinishedDecision]:
        """Take in an update; with the B-th rewarded decision, improve the policy and return the decisions it consumed.

        Their `reward` is the one that was used: mixed over the buffer, permuted under `shuffle_rewards`. Where all
        rewards were the same there was no policy update, and `advantage` stays None.
        """
        self._training_state.observe(stats)
        self._finished += self._ledger.record(update, stats)
        consumed: list[FinishedDecision] = []
        size = self._policy_config.decisions_per_policy_update
        while len(self._finished) >= size:
            buffer, self._finished = self._finished[:size], self._finished[size:]
            consumed += self._improve(update, buffer)
        return consumed

    def pending(self) -> list[FinishedDecision]:
        """Rewarded decisions that wait for their policy update, then open ones with the sums so far."""
        return [*self._finished, *self._ledger.pending()]

    def state_dict(self) -> dict[str, object]:
        """Everything that lives: JSON values and tensors, copied."""
        return {
            "training_state": self._training_state.state_dict(),
            "policy": self._policy.state_dict(),
            "ledger": self._ledger.state_dict(),
            "finished": [finished_to_json(finished) for finished in self._finished],
            "policy_updates": self.policy_updates,
            "skipped_policy_updates": self.skipped_policy_updates,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave, also after a way through JSON with tensors as nested lists."""
        kept = cast(LearnedState, state)
        self._training_state.load_state_dict(kept["training_state"])
        self._policy.load_state_dict(kept["policy"])
        self._ledger.load_state_dict(kept["ledger"])
        self._finished = [finished_from_json(finished) for finished in kept["finished"]]
        self.policy_updates = kept["policy_updates"]
        self.skipped_policy_updates = kept["skipped_policy_updates"]

    def _decide(self, update: int) -> Decision:
        state = self._training_state.decision_state(update)
        concentration1, concentration0 = self._policy.concentrations([state])
        return Decision(update, state, concentration1.item(), concentration0.item(), samples={})

    def _improve(self, update: int, buffer: list[FinishedDecision]) -> list[FinishedDecision]:
        """Reward, normalise, and take one policy update, at the end of student update `update`."""
        buffer = rewarded(buffer, self._credit, self._seed)
        advantages = credit.advantages([finished.reward for finished in buffer])
        if advantages is None:
            self.skipped_policy_updates += 1
            return buffer
        self._policy.update(
            states=[finished.decision.state for finished in buffer],
            draws=[list(finished.decision.samples.values()) for finished in buffer],
            drawn_from=[finished.decision.concentrations for finished in buffer],
            advantages=advantages,
            training_progress=self._training_state.training_progress(update),
        )
        self.policy_updates += 1
        self._training_state.policy_updated(update)
        return [replace(finished, advantage=advantage) for finished, advantage in zip(buffer, advantages, strict=True)]
