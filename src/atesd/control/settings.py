"""What the settings of every exposure share. A controller's own settings stand beside its class, in one file.

A kind of exposure is a subclass of `ExposureSettings` with a literal `kind`, a `label` and a `make`, in a file of this
folder; `atesd.control.kinds` finds it, and with it `exposure.kind` knows one word more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from atesd.component import ActsWhen, Component, Fraction
from atesd.control.credit import CreditConfig

if TYPE_CHECKING:
    from atesd.control.interface import Exposure

Granularity = Literal["update", "per_difficulty", "per_problem", "per_problem_in_difficulty", "per_token"]


def group_of(granularity: Granularity, problem_id: str, difficulty: int) -> str:
    """Which rollouts share a ratio of the exposure: all, those of a difficulty, or those of a problem.

    `per_problem_in_difficulty` is a ratio per problem for an exposure that has to know its difficulty: "3 problem-7".
    """
    names = {
        "per_difficulty": str(difficulty),
        "per_problem": problem_id,
        "per_problem_in_difficulty": f"{difficulty} {problem_id}",
    }
    return names.get(granularity, "")


@dataclass(frozen=True, slots=True)
class Run:
    """What an exposure is made of besides its own settings.

    `replay` holds the ratio of every update of `exposure.replay_run`, each held for `replay_hold` updates there, and
    `config` the whole config of the run, which only a factory of your own may read.
    """

    credit: CreditConfig
    num_updates: int
    seed: int
    replay: Sequence[float] = ()
    replay_hold: int = 1
    config: Any = None


class RatioSettings(Component):
    """Something that says a ratio: `kind`, and what the kind reads."""

    kind: str

    decides: ClassVar[bool] = False
    """Whether ratios are decided during the run from what it shows, and decisions are rewarded and logged."""
    learns_from_rewards: ClassVar[bool] = False
    """Whether the rewards are more than logged."""
    follows_verdicts: ClassVar[bool] = False
    """Whether it cannot decide without verified rollouts of the updates."""

    @property
    def holds(self) -> bool:
        """Whether a ratio is held for `credit.hold_updates`."""
        return self.decides

    def label(self, credit: CreditConfig) -> str:
        """The exposure in words, the same in every table and card."""
        raise NotImplementedError(f"{type(self).__name__} has no label")

    def budget(self, run: Run, rollouts: int) -> str:  # noqa: ARG002
        """What so many updates of so many rollouts can tell it, in a line; empty where nothing is to be said."""
        return ""

    def make(self, run: Run) -> Exposure:
        """The exposure. Raises `ConfigError` where the settings and the run do not fit."""
        raise NotImplementedError(f"{type(self).__name__} makes no exposure")


class ExposureSettings(RatioSettings):
    """How much of the reference the teacher sees, and whether it is the true one."""

    reference_ablation: Literal["off", "none", "shuffled", "wrong_answer", "filler"] = Field(
        "off", description="what stands in place of the true reference; none: the teacher sees no reference"
    )


class BoundedSettings(RatioSettings):
    """An exposure that draws or searches a ratio between two bounds."""

    ratio_min: Fraction = Field(0.0, description="lowest ratio that is drawn; paper has bounds, value ours")
    ratio_max: Fraction = Field(1.0, description="highest ratio that is drawn; paper has bounds, value ours")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> BoundedSettings:
        if self.ratio_min > self.ratio_max:
            raise ValueError(f"ratio_min {self.ratio_min} is above ratio_max {self.ratio_max}; swap them")
        return self


def clipped(ratio: float, bounds: tuple[float, float]) -> float:
    """The ratio, or the bound that it is beyond."""
    return min(max(ratio, bounds[0]), bounds[1])


class GranularSettings(ExposureSettings):
    """An exposure that can have a ratio of its own for each difficulty or problem."""

    granularity: Granularity = Field("update", description="paper: one ratio per update; the others are ours")


class ControllerSettings(BoundedSettings, ExposureSettings):
    """An exposure made of a `Controller`: held, rewarded, logged and resumed by `atesd.control.controlled`."""

    reward_buffer: Annotated[
        int,
        ActsWhen(
            lambda c: c.credit.shuffle_rewards or c.credit.mixing == "standardised",
            "credit.shuffle_rewards: true or credit.mixing: standardised",
        ),
    ] = Field(4, ge=2, description="decisions whose rewards are shuffled or standardised together; ours")

    decides: ClassVar[bool] = True
