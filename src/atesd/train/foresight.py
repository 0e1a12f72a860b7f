"""What may be known of an update before its step: nothing, or what a first-order look-ahead foresees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, final

from atesd.control.interface import Exposure
from atesd.records import Alignment, Problem
from atesd.train.rollouts import GradedRollout
from atesd.train.update import Candidate


class Foresight(Protocol):
    """Told of every update in four places; what it foresees reaches the exposure, the log and the tokens."""

    def before(self, update: int) -> None:
        """An update begins; the gradients are clear, and must be clear again afterwards."""
        ...

    def look(self, update: int, rollouts: Sequence[GradedRollout], exposure: Exposure) -> Alignment | None:
        """Tell the exposure what each ratio would do, if it asks; returns the alignment of all rollouts together."""
        ...

    def candidates(self, problem: Problem) -> tuple[Candidate, ...]:
        """The teacher's contexts among which every token of a rollout has its choice; empty if it has none."""
        ...

    def after(self, rollouts: Sequence[GradedRollout]) -> None:
        """The step on these rollouts was taken."""
        ...

    def state_dict(self) -> dict[str, object]:
        """Everything that a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore `state_dict`."""
        ...


@final
class NoForesight:
    """Foresees nothing: every exposure and method but the aligned ones."""

    def before(self, update: int) -> None:
        """Nothing."""

    def look(
        self,
        update: int,  # noqa: ARG002
        rollouts: Sequence[GradedRollout],  # noqa: ARG002
        exposure: Exposure,  # noqa: ARG002
    ) -> Alignment | None:
        """Nothing is foreseen."""
        return None

    def candidates(self, problem: Problem) -> tuple[Candidate, ...]:  # noqa: ARG002
        """No choice."""
        return ()

    def after(self, rollouts: Sequence[GradedRollout]) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, object]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Nothing."""
