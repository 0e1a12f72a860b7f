"""When and how an exposure decision is rewarded: the settings `credit`, and the updates of a decision's window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from atesd.component import ActsWhen, Component, Fraction, OwnSettings, word_or_named

ProgressSignal = Literal["train_kl", "probe_nll", "probe_success", "probe_gain", "probe_kl", "train_success"]

CREDIT_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"progress_signal": "train_kl", "drop": "positive", "grounding_weight": 0.1},
    "sound": {"progress_signal": "probe_success", "drop": "signed", "grounding_weight": 0.0},
}

_DECIDES = ActsWhen(lambda c: c.decides, "an exposure that decides, such as exposure.kind: learned or bandit")
_HOLDS = ActsWhen(
    lambda c: c.distils and (c.exposure.holds or c.looks_ahead),
    "an exposure that holds its ratio (exposure.kind: learned, bandit, random ...) or loss.gate: aligned or soft",
)
_LEARNS = ActsWhen(lambda c: c.exposure.learns_from_rewards, "exposure.kind: learned, bandit, control_share or custom")
_MIXED = ActsWhen(
    lambda c: c.credit.grounding_weight > 0 or (c.exposure.learns_from_rewards and c.exposure.kind != "learned"),
    "credit.grounding_weight above 0, or exposure.kind: bandit, control_share or custom",
)
_FORMULA = ActsWhen(lambda c: c.credit.reward == "formula", "credit.reward: formula")
_GROUNDED = ActsWhen(lambda c: c.credit.grounding_weight > 0, "credit.grounding_weight above 0")


class CreditConfig(Component):
    """When and how an exposure decision is rewarded. `preset` fills the settings that are not written out."""

    preset: Annotated[Literal["sound", "paper"], _DECIDES] = Field(
        "sound", description="ours: sound; the literal reading is not (docs)"
    )
    hold_updates: Annotated[int, _HOLDS] = Field(4, ge=1, description="paper H, student updates; value ours")
    lookahead_updates: Annotated[int, _DECIDES] = Field(4, ge=1, description="paper L, student updates; value ours")
    probe_every: Annotated[
        int | None,
        _DECIDES,
        ActsWhen(lambda c: c.credit.probes, "a credit.progress_signal that is probed, such as probe_success"),
        ActsWhen(
            lambda c: c.credit.probe_every is None or c.credit.probe_every < c.credit.lookahead_updates,
            "fewer updates than credit.lookahead_updates",
        ),
    ] = Field(None, ge=1, description="updates between the probes of a window; None: where one starts or closes; ours")
    discount: Annotated[
        float,
        _DECIDES,
        ActsWhen(
            lambda c: c.credit.discounts,
            "several measurements in a window: credit.probe_every below credit.lookahead_updates, or a "
            "credit.progress_signal of every update with credit.lookahead_updates above 1",
        ),
    ] = Field(0.9, gt=0, le=1, description="paper gamma, per student update; value ours")
    window_start: Annotated[Literal["decision", "hold_end"], _DECIDES] = Field(
        "decision", description="the formula; hold_end: the prose"
    )
    progress_signal: Annotated[ProgressSignal, _DECIDES] = Field(
        "probe_success", description="what should fall; set by preset"
    )
    drop: Annotated[Literal["signed", "positive"], _DECIDES] = Field(
        "signed", description="positive: max(0, drop), paper; set by preset"
    )
    probe_ratio: Annotated[
        Fraction,
        _DECIDES,
        ActsWhen(lambda c: c.credit.progress_signal == "probe_kl", "credit.progress_signal: probe_kl"),
    ] = Field(1.0, description="the teacher's fixed ratio in probe_kl; ours")
    grounding: Annotated[Literal["answer", "withheld"], _DECIDES, _GROUNDED] = Field(
        "answer", description="paper: answer; withheld: hidden segments"
    )
    grounding_weight: Annotated[float, _DECIDES] = Field(0.0, ge=0, description="paper lambda_gt; set by preset")
    reward: Annotated[str, word_or_named("formula"), _DECIDES] = Field(
        "formula",
        description="of a window: progress and grounding_weight times grounding; or yours, module:function (docs)",
    )
    reward_settings: Annotated[
        OwnSettings, _DECIDES, ActsWhen(lambda c: c.credit.reward != "formula", "credit.reward: module:function")
    ] = Field(default_factory=dict, description="whatever the maker of your reward reads; kept with the run")
    mixing: Annotated[Literal["raw", "standardised"], _DECIDES, _FORMULA, _MIXED] = Field(
        "raw", description="raw: the formula; standardised: z-scores"
    )
    shuffle_rewards: Annotated[bool, _DECIDES, _LEARNS] = Field(
        False, description="null control: permute the rewards of each buffer"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        preset = values.get("preset", "sound")
        return {**CREDIT_PRESETS.get(preset if isinstance(preset, str) else "", {}), **values}

    @property
    def probes(self) -> bool:
        """Whether the progress signal is measured on the probe problems, at some updates only."""
        return self.progress_signal.startswith("probe_")

    @property
    def discounts(self) -> bool:
        """Whether `discount` weighs one measurement of a window against another."""
        if self.grounding_weight > 0 or not self.probes:
            return self.lookahead_updates > 1
        settled = self.hold_updates * (self.lookahead_updates + self.hold_updates)
        start, close = self.window(settled)
        return sum(self.probe_is_due(update) for update in range(start, close + 1)) > 2

    @property
    def discount_note(self) -> str:
        """That the paper's gamma has nothing to weigh here, and what would give it something; empty where it acts."""
        if self.discounts:
            return ""
        longer = "credit.lookahead_updates above 1" if self.lookahead_updates == 1 else ""
        oftener = "credit.probe_every below credit.lookahead_updates" if self.probes else ""
        mend = " and ".join(filter(None, (longer, oftener)))
        why = "as each window holds one fall of the progress signal"
        return f"credit.discount (gamma): no effect, {why}; it acts with {mend}"

    def hold(self, update: int) -> tuple[int, int]:
        """First and last update (inclusive) of the hold in which `update` lies: one decision, one reveal ratio.

        t .. t+H-1, with t a multiple of H = `hold_updates`; the decision is taken before update t.
        """
        start = update - update % self.hold_updates
        return start, start + self.hold_updates - 1

    def window(self, decision_update: int) -> tuple[int, int]:
        """First and last update (inclusive) whose signals reward the decision taken before `decision_update`.

        s .. s+L, with s = t (`window_start: decision`, the paper's formula) or s = t+H (`hold_end`, its prose). l_{s+L}
        is measured before update s+L, so it shows what the updates s .. s+L-1 did.
        """
        start = decision_update + (self.hold_updates if self.window_start == "hold_end" else 0)
        return start, start + self.lookahead_updates

    def probe_is_due(self, update: int) -> bool:
        """Whether a window starts or closes at this update, or `probe_every` updates of one have passed.

        With H = L and no `probe_every`: once per decision.
        """
        hold, every = self.hold_updates, self.probe_every
        start, close = self.window(0)
        offsets = {0, close - start} | (set(range(0, close - start, every)) if every else set())
        return any(update >= start + offset and (update - start - offset) % hold == 0 for offset in offsets)

    @property
    def label(self) -> str:
        """The preset of the reward, with the progress signal where it is another, and a reward of the user's."""
        own = self.progress_signal == CREDIT_PRESETS[self.preset]["progress_signal"]
        said = f"{self.preset} credit" if own else f"{self.preset} credit, {self.progress_signal}"
        return said if self.reward == "formula" else f"{said}, rewarded by {self.reward}"
