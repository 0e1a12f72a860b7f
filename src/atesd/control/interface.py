"""What every exposure offers. A trainer needs nothing else, and an exposure needs neither trainer nor model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from atesd.records import FinishedDecision, UpdateStats

Measurement = Literal["probe_nll", "probe_success", "probe_gain", "probe_kl", "grounding", "train_success", "alignment"]


class Exposure(Protocol):
    """Decides how much of the reference the teacher sees, and learns from what followed.

    A controller of your own is easier to write as a `Controller` (`atesd.control.controlled`): its decisions are then
    held, rewarded, logged and resumed for it.
    """

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many decisions could not be rewarded, by reason; said at the end of a run."""
        ...

    def measurements(self, update: int) -> frozenset[Measurement]:
        """What the trainer should measure at this update (before its optimiser step) and put into `UpdateStats`."""
        ...

    def reveal_ratio(self, update: int, group: str = "") -> float:
        """The ratio in [0, 1] for this update; `group` is a difficulty or a problem id under finer granularity.

        An exposure that decides takes its decision when it is asked for the first update of a hold. Asking twice for
        the same update and group gives the same ratio.
        """
        ...

    def observe(self, update: int, stats: UpdateStats) -> list[FinishedDecision]:
        """Take in what update `update` showed, and learn where that completes a buffer of rewarded decisions.

        Returns the decisions of that buffer.
        """
        ...

    def pending(self) -> list[FinishedDecision]:
        """Decisions taken but not yet learned from, as far as they got; for the log at the end of a run."""
        ...

    def state_dict(self) -> dict[str, object]:
        """Everything that a resumed run needs: nested dicts of tensors and JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        ...
