"""What a rule hears of the verified rollouts, the same for all rules that follow them, and its null control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypedDict, cast, final

import numpy as np
from pydantic import Field

from atesd.control.controlled import ControlledExposure, as_exposure
from atesd.control.settings import ControllerSettings, GranularSettings, Run, clipped
from atesd.control.simulation import late_ratio_of_a_frozen_student
from atesd.maths import keyed
from atesd.records import FinishedDecision, UpdateStats

LEVELS = {"a quarter": 0.25, "half": 0.5, "three quarters": 0.75}
"""Shares that a student who never learns might solve, for the budget of a rule."""


class RuleSettings(GranularSettings, ControllerSettings):
    """A rule that follows verified rollouts."""

    granularity: Literal["update", "per_difficulty", "per_problem"] = Field(
        "per_difficulty", description="what has a ratio of its own"
    )
    shuffle_verdicts: bool = Field(
        False, description="null control: each verdict that the rule hears is drawn from all so far; ours"
    )

    follows_verdicts: ClassVar[bool] = True

    @property
    def null(self) -> str:
        """For the label: that it is the control."""
        return ", shuffled verdicts" if self.shuffle_verdicts else ""

    def budget(self, run: Run, rollouts: int) -> str:
        """How many verdicts it hears, and where it goes by itself under a student who never learns."""
        ends = {
            words: late_ratio_of_a_frozen_student(self.make(run), self.granularity, run.num_updates, rollouts, level)
            for words, level in LEVELS.items()
        }
        shown = ", ".join(f"{ratio:.2f} if it solves {words}" for words, ratio in ends.items())
        return (
            f"rule: hears {run.num_updates * rollouts:,} verdicts and follows their level, whatever the ratio did: "
            f"late in the run a student that never learns would be shown {shown}"
        )


@dataclass(frozen=True, slots=True)
class Heard:
    """The rollouts of a group in one update: the share solved, their number, and the ratio that taught them.

    That is the one in force when the group was met before, on whose loss the student has stepped since; None for a
    group met for the first time.
    """

    success: float
    rollouts: int
    taught_at: float | None


class Rule(Protocol):
    """What varies between the rules."""

    def features(self) -> tuple[float, ...]:
        """Finite numbers worth logging beside a decision."""
        ...

    def ratio(self, group: str, rng: np.random.Generator) -> float:
        """The next ratio of a group, unclipped; asked once per hold."""
        ...

    def hear(self, heard: Mapping[str, Heard]) -> None:
        """Take in the verified rollouts of one update, by group."""
        ...

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        ...


class RuleState(TypedDict):
    """What a checkpoint holds of a rule and of what it was told."""

    rule: dict[str, object]
    updates: int
    right: float
    verdicts: int
    in_force: dict[str, float]
    taught: dict[str, float]


@final
class RuleController:
    """A rule as a `Controller`: it hears every update's verdicts, by group, before the next ratio is asked of it."""

    def __init__(self, rule: Rule, bounds: tuple[float, float], shuffled: bool, seed: int) -> None:
        self.rule = rule
        self._bounds = bounds
        self._shuffled = shuffled
        self._seed = seed
        self._updates, self._right, self._verdicts = 0, 0.0, 0
        self._in_force: dict[str, float] = {}
        self._taught: dict[str, float] = {}

    def features(self) -> tuple[float, ...]:
        """The rule's."""
        return self.rule.features()

    def propose(self, group: str, rng: np.random.Generator) -> float:
        """The rule's ratio, clipped to the bounds."""
        self._in_force[group] = clipped(self.rule.ratio(group, rng), self._bounds)
        return self._in_force[group]

    def on_update(self, stats: UpdateStats) -> None:
        """Tell the rule of the verified rollouts; none, and it hears nothing."""
        groups: dict[str, list[float]] = {}
        for (group, _), right in zip(stats.group_success, self._told(stats.group_success), strict=True):
            groups.setdefault(group, []).append(right)
        self._updates += 1
        if groups:
            self.rule.hear(
                {name: Heard(sum(some) / len(some), len(some), self._taught.get(name)) for name, some in groups.items()}
            )
        self._taught |= {name: self._in_force[name] for name in groups if name in self._in_force}

    def on_reward(self, finished: FinishedDecision) -> None:
        """Rewards are only logged."""

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "rule": self.rule.state_dict(),
            "updates": self._updates,
            "right": self._right,
            "verdicts": self._verdicts,
            "in_force": dict(self._in_force),
            "taught": dict(self._taught),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(RuleState, state)
        self.rule.load_state_dict(kept["rule"])
        self._updates, self._right, self._verdicts = kept["updates"], kept["right"], kept["verdicts"]
        self._in_force, self._taught = dict(kept["in_force"]), dict(kept["taught"])

    def _told(self, graded: Sequence[tuple[str, float]]) -> list[float]:
        """The verdicts, 1.0 or 0.0; shuffled: coins that fall right as often as all verdicts so far."""
        self._right += sum(right for _, right in graded)
        self._verdicts += len(graded)
        if not self._shuffled:
            return [right for _, right in graded]
        uniforms = keyed.uniforms(len(graded), self._seed, "shuffle_verdicts", self._updates)
        return [float(uniform * self._verdicts < self._right) for uniform in uniforms]


def ruled(rule: Rule, settings: RuleSettings, run: Run) -> ControlledExposure:
    """The exposure of a rule under its settings."""
    bounds = (settings.ratio_min, settings.ratio_max)
    return as_exposure(RuleController(rule, bounds, settings.shuffle_verdicts, run.seed), settings, run)
