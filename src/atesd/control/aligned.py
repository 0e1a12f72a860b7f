"""The aligned exposure: instead of trying a ratio and waiting, compute to first order what every ratio would do.

Before an update the trainer measures, for each of a few ratios, how far one small step on that ratio's loss would raise
the student's success (`Alignment`; maths in `atesd.maths.alignment`). The exposure takes the ratio with the largest,
smoothed over holds. Ours; the paper tries and waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypedDict, cast, final, runtime_checkable

from pydantic import Field, Strict

from atesd.component import ActsWhen, Fraction, tagged
from atesd.control.credit import CreditConfig
from atesd.control.fixed import FixedPlan, FullPlan, RandomPlan, SchedulePlan
from atesd.control.interface import Exposure, Measurement
from atesd.control.settings import Granularity, GranularSettings, RatioSettings, Run
from atesd.records import Alignment, FinishedDecision, UpdateStats

FALLBACKS = (FullPlan, FixedPlan, RandomPlan, SchedulePlan)
_SMOOTHED = ActsWhen(
    lambda c: c.granularity in ("update", "per_difficulty"), "exposure.granularity: update or per_difficulty"
)


class AlignedSettings(GranularSettings):
    """The exposure that computes the best ratio; `alignment` says what success is."""

    kind: Literal["aligned"] = Field("aligned", description="a first-order look-ahead; ours")
    granularity: Granularity = Field("update", description="what has a ratio of its own; per_token: every token")
    ratios: Annotated[tuple[Fraction, ...], Strict(False), Field(min_length=2)] = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0), description="the ratios among which it chooses"
    )
    smoothing: Annotated[float, _SMOOTHED] = Field(
        0.5, ge=0, lt=1, description="weight of past holds in the alignment per ratio; ours"
    )
    if TYPE_CHECKING:
        fallback: RatioSettings = FullPlan()
    else:
        fallback: tagged(FALLBACKS, "kind", "full") = Field(
            FullPlan(), description="the exposure that decides while there is no direction"
        )

    @property
    def holds(self) -> bool:
        """A direction holds, and with it the ratio."""
        return True

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With the granularity."""
        return "aligned ratio per " + self.granularity.removeprefix("per_")

    def make(self, run: Run) -> Exposure:
        """The exposure over its fallback."""
        return AlignedExposure(
            self.smoothing,
            hold_updates=run.credit.hold_updates,
            granularity=self.granularity,
            fallback=self.fallback.make(run),
        )


@runtime_checkable
class LooksAhead(Protocol):
    """An exposure that is told the alignments before it is asked for a ratio, at updates where it wants `alignment`."""

    def look_ahead(self, update: int, alignments: Mapping[str, Alignment]) -> None:
        """The alignment of each group of this update's rollouts; empty if success gave no direction."""
        ...


class AlignedState(TypedDict):
    """What a checkpoint holds of an aligned exposure."""

    smoothed: dict[str, list[float]]
    chosen: dict[str, float]
    fallback: dict[str, object]


@final
class AlignedExposure:
    """Takes the ratio with the largest alignment: one for each hold, difficulty or problem.

    Per token the step itself chooses (`atesd.aligned.selectors.AlignedChoice`); all that is left here is the fallback.

    Per update and per difficulty the alignments are averaged over holds with weight `smoothing` on the past, each hold
    counted at its own scale, since the length of the direction changes while the student learns. A problem is met too
    seldom for that: it takes the best ratio of the moment. Where nothing is known `fallback` decides.
    """

    def __init__(
        self,
        smoothing: float = 0.5,
        *,
        hold_updates: int,
        granularity: Granularity,
        fallback: Exposure,
    ) -> None:
        self._smoothing = smoothing
        self._hold = hold_updates
        self._granularity = granularity
        self._fallback = fallback
        self._smoothed: dict[str, list[float]] = {}
        self._chosen: dict[str, float] = {}

    @property
    def dropped(self) -> dict[str, int]:
        """No decision waits for a reward."""
        return {}

    def measurements(self, update: int) -> frozenset[Measurement]:
        """`alignment`, at the first update of a hold; per problem at every update; per token never."""
        if self._granularity == "per_token":
            return frozenset()
        if self._granularity == "per_problem" or update % self._hold == 0:
            return frozenset({"alignment"})
        return frozenset()

    def look_ahead(self, update: int, alignments: Mapping[str, Alignment]) -> None:  # noqa: ARG002
        """Choose the ratios that hold from this update on; groups that are not in `alignments` keep theirs."""
        if self._granularity == "per_problem":
            self._chosen = {}
        elif not alignments:
            self._chosen = {}
            return
        for group, alignment in alignments.items():
            values = _at_unit_scale(alignment.values)
            if self._granularity != "per_problem":
                past = self._smoothed.get(group)
                weight = self._smoothing if past else 0.0
                values = [weight * old + (1 - weight) * new for old, new in zip(past or values, values, strict=True)]
                self._smoothed[group] = values
            best = max(range(len(values)), key=values.__getitem__)
            self._chosen[group] = alignment.ratios[best]

    def reveal_ratio(self, update: int, group: str = "") -> float:
        """The chosen ratio of the group, else what the fallback says."""
        group = "" if self._granularity == "update" else group
        chosen = self._chosen.get(group)
        return self._fallback.reveal_ratio(update, group) if chosen is None else chosen

    def observe(self, update: int, stats: UpdateStats) -> list[FinishedDecision]:
        """Nothing is learned from what followed; the fallback watches."""
        return self._fallback.observe(update, stats)

    def pending(self) -> list[FinishedDecision]:
        """No decision waits for a reward."""
        return []

    def state_dict(self) -> dict[str, object]:
        """Smoothed alignments and the ratios in force."""
        return {
            "smoothed": {group: list(values) for group, values in self._smoothed.items()},
            "chosen": dict(self._chosen),
            "fallback": self._fallback.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore `state_dict`."""
        kept = cast(AlignedState, state)
        self._smoothed = {group: list(values) for group, values in kept["smoothed"].items()}
        self._chosen = dict(kept["chosen"])
        self._fallback.load_state_dict(kept["fallback"])


def _at_unit_scale(values: tuple[float, ...]) -> list[float]:
    """The values divided by the largest magnitude among them; all zeros stay zeros."""
    largest = max(abs(value) for value in values)
    return [value / largest if largest else 0.0 for value in values]
