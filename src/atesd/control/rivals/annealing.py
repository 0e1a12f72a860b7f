"""Annealing by difficulty with dropout per problem, after Backward Hint Annealing (arXiv 2604.07747)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Annotated, Literal, TypedDict, cast, final

import numpy as np
from pydantic import Field, model_validator

from atesd.component import ActsWhen, Fraction
from atesd.control.controlled import ControlledExposure, as_exposure
from atesd.control.credit import CreditConfig
from atesd.control.settings import ControllerSettings, GranularSettings, Run, clipped
from atesd.records import FinishedDecision, UpdateStats

_MOMENTS = 100  # of a run, over which a mean is taken


class AnnealingSettings(GranularSettings, ControllerSettings):
    """Annealing with dropout."""

    kind: Literal["annealing"] = Field("annealing", description="down to 0, hard problems last, with dropout; BHA")
    granularity: Literal["per_problem_in_difficulty"] = Field(
        "per_problem_in_difficulty", description="a draw per problem, a ramp per difficulty; BHA"
    )
    start: Fraction = Field(1.0, description="ratio of the first update; ours")
    easiest_end: Annotated[float, ActsWhen(lambda c: c.data.has_difficulties, "data that names difficulties")] = Field(
        0.5, gt=0, le=1, description="share of the run after which the easiest is at 0; ours"
    )
    hardest_end: float = Field(1.0, gt=0, le=1, description="the same of the hardest; ours")
    dropout: float = Field(0.25, ge=0, lt=1, description="probability that a problem is taught at ratio 0; ours")

    @model_validator(mode="after")
    def _hard_ones_last(self) -> AnnealingSettings:
        if self.easiest_end > self.hardest_end:
            raise ValueError(f"easiest_end {self.easiest_end} is above hardest_end {self.hardest_end}; swap them")
        if self.dropout > 0 and self.ratio_min > 0:
            raise ValueError(
                f"ratio_min {self.ratio_min} would lift the dropout off 0; leave it out, or set dropout: 0"
            )
        return self

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With start and dropout."""
        return f"annealing from {self.start:g} per difficulty, dropout {self.dropout:g}"

    def budget(self, run: Run, rollouts: int) -> str:  # noqa: ARG002
        """That it hears nothing, and the ratio that it plans on average."""
        bounds = (self.ratio_min, self.ratio_max)
        moments = [(i + 0.5) / _MOMENTS for i in range(_MOMENTS)]
        means = {
            end: (1 - self.dropout) * fmean(clipped(self.start * max(0.0, 1 - done / end), bounds) for done in moments)
            for end in (self.easiest_end, self.hardest_end)
        }
        return (
            f"rule: a plan, which hears nothing of {run.num_updates} updates: a mean ratio of about "
            f"{fmean(means.values()):.2f}, or {means[self.hardest_end]:.2f} where all problems have one difficulty"
        )

    def make(self, run: Run) -> ControlledExposure:
        """The ramps over the run."""
        return as_exposure(Annealing(self, run.num_updates), self, run)


class AnnealingState(TypedDict):
    """What a checkpoint holds of the ramps."""

    updates: int
    levels: list[int]


@final
class Annealing:
    """ratio = start x max(0, 1 - progress / end) of the problem's difficulty, and 0 with probability `dropout`.

    progress is the share of the run that is done; `end` lies between easiest_end and hardest_end by the rank of the
    difficulty among those met in earlier updates (a new one, or the only one, counts as hardest). In the source the
    hint shrinks in the student's prompt until it answers without; here the student always does, and what shrinks is
    what its teacher reads.
    """

    def __init__(self, config: AnnealingSettings, num_updates: int) -> None:
        self._config = config
        self._num_updates = num_updates
        self._updates = 0
        self._levels: list[int] = []
        self._met: set[int] = set()

    def features(self) -> tuple[float, ...]:
        """The share of the run that is done."""
        return (self._updates / self._num_updates,)

    def propose(self, group: str, rng: np.random.Generator) -> float:
        """The ratio of a problem by its difficulty: `group` is the two, difficulty first."""
        difficulty = int(group.partition(" ")[0])
        self._met.add(difficulty)
        return 0.0 if rng.random() < self._config.dropout else self.ramp(difficulty)

    def ramp(self, difficulty: int) -> float:
        """The ratio of a difficulty without dropout."""
        rank = 1.0
        if difficulty in self._levels and len(self._levels) > 1:
            rank = self._levels.index(difficulty) / (len(self._levels) - 1)
        end = (1 - rank) * self._config.easiest_end + rank * self._config.hardest_end
        return self._config.start * max(0.0, 1.0 - self._updates / self._num_updates / end)

    def on_update(self, stats: UpdateStats) -> None:  # noqa: ARG002
        """Count the update, and the difficulties for which it asked."""
        self._updates += 1
        self._levels = sorted({*self._levels, *self._met})
        self._met = set()

    def on_reward(self, finished: FinishedDecision) -> None:
        """Rewards are only logged."""

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {"updates": self._updates, "levels": list(self._levels)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(AnnealingState, state)
        self._updates, self._levels = kept["updates"], list(kept["levels"])
