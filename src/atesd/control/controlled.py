"""An exposure made of a controller: the part that is the same for all of them, so that a new one is a short file.

The controller says a ratio per decision and hears what came of it. Here its decisions are held, measured for, rewarded
(`credit` settings), logged and resumed. docs/controllers.md has a worked example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypedDict, cast, final

import numpy as np

from atesd.control.credit import CreditConfig
from atesd.control.interface import Measurement
from atesd.control.ledger import DecisionLedger, finished_from_json, finished_to_json, rewarded
from atesd.control.settings import ControllerSettings, Granularity, GranularSettings, Run, clipped
from atesd.errors import ConfigError
from atesd.maths import keyed
from atesd.records import Decision, FinishedDecision, UpdateStats


class Controller(Protocol):
    """Chooses reveal ratios and learns from their rewards. It draws from the generator it is given alone."""

    def features(self) -> tuple[float, ...]:
        """Finite numbers worth logging beside a decision: what the controller knew when it was taken. May be empty."""
        ...

    def propose(self, group: str, rng: np.random.Generator) -> float:
        """A ratio for a decision and group; asked once for both. Clipped to the bounds afterwards.

        `group` is empty for one ratio per update, else a difficulty or a problem id. `rng` belongs to the decision and
        group alone.
        """
        ...

    def on_update(self, stats: UpdateStats) -> None:
        """Take in an update, whether or not a reward comes of it."""
        ...

    def on_reward(self, finished: FinishedDecision) -> None:
        """Take in a rewarded decision: `finished.reward` for `finished.decision.samples`, the ratios as chosen."""
        ...

    def state_dict(self) -> dict[str, object]:
        """Everything that `propose` may depend on: tensors and JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        ...


class ControlledState(TypedDict):
    """What a checkpoint holds of a controlled exposure."""

    controller: dict[str, object]
    ledger: dict[str, object]
    finished: list[dict[str, object]]


@final
class ControlledExposure:
    """Decides every `credit.hold_updates` by asking its controller, and hands it each decision once it is rewarded.

    Rewards that need company (`shuffle_rewards`, `mixing: standardised`) are handed over in buffers of `buffer`
    decisions; all others one by one.
    """

    def __init__(
        self,
        controller: Controller,
        *,
        credit: CreditConfig | None = None,
        seed: int = 0,
        ratio_min: float = 0.0,
        ratio_max: float = 1.0,
        granularity: Granularity = "update",
        buffer: int = 4,
    ) -> None:
        if not 0.0 <= ratio_min <= ratio_max <= 1.0:
            raise ConfigError(f"ratio_min {ratio_min}, ratio_max {ratio_max}: allowed are 0 <= min <= max <= 1")
        self.controller = controller
        self._credit = credit or CreditConfig()
        self._seed = seed
        self._bounds = (ratio_min, ratio_max)
        self._granularity = granularity
        together = self._credit.shuffle_rewards or self._credit.mixing == "standardised"
        self._buffer = buffer if together else 1
        self._ledger = DecisionLedger(self._credit)
        self._finished: list[FinishedDecision] = []

    @property
    def dropped(self) -> dict[str, int]:
        """Decisions that no reward could be given to, by reason."""
        return dict(self._ledger.dropped)

    def measurements(self, update: int) -> frozenset[Measurement]:
        """What the reward needs."""
        return self._ledger.measurements(update)

    def reveal_ratio(self, update: int, group: str = "") -> float:
        """The controller's choice for this update and group, clipped; the first call of a hold takes the decision."""
        group = "" if self._granularity == "update" else group
        decision = self._ledger.held(update, self._decide)
        if group not in decision.samples:
            key = decision.update // self._credit.hold_updates
            choice = self.controller.propose(group, keyed.generator(self._seed, "exposure", key, group))
            self._ledger.add_draw(decision.update, group, float(choice))
        return clipped(decision.samples[group], self._bounds)

    def observe(self, update: int, stats: UpdateStats) -> list[FinishedDecision]:
        """Take in an update; the controller learns from the decisions that it has rewarded, which are returned."""
        self.controller.on_update(stats)
        self._finished += self._ledger.record(update, stats)
        consumed: list[FinishedDecision] = []
        while len(self._finished) >= self._buffer:
            buffer, self._finished = self._finished[: self._buffer], self._finished[self._buffer :]
            consumed += rewarded(buffer, self._credit, self._seed)
        for finished in consumed:
            self.controller.on_reward(finished)
        return consumed

    def pending(self) -> list[FinishedDecision]:
        """Rewarded decisions that wait for their buffer, then open ones with the sums so far."""
        return [*self._finished, *self._ledger.pending()]

    def state_dict(self) -> dict[str, object]:
        """The controller's state and that of its decisions."""
        return {
            "controller": self.controller.state_dict(),
            "ledger": self._ledger.state_dict(),
            "finished": [finished_to_json(finished) for finished in self._finished],
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(ControlledState, state)
        self.controller.load_state_dict(kept["controller"])
        self._ledger.load_state_dict(kept["ledger"])
        self._finished = [finished_from_json(finished) for finished in kept["finished"]]

    def _decide(self, update: int) -> Decision:
        return Decision(update, self.controller.features(), None, None, samples={})


def as_exposure(controller: Controller, settings: ControllerSettings, run: Run) -> ControlledExposure:
    """The exposure of a controller under its settings: its holds, rewards, bounds and granularity."""
    return ControlledExposure(
        controller,
        credit=run.credit,
        seed=run.seed,
        ratio_min=settings.ratio_min,
        ratio_max=settings.ratio_max,
        granularity=settings.granularity if isinstance(settings, GranularSettings) else "update",
        buffer=settings.reward_buffer,
    )
