"""The decision ledger: which updates belong to which decision, and what each decision earned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, SupportsFloat, TypedDict, cast, final

from atesd.control.credit import CreditConfig
from atesd.control.interface import Measurement
from atesd.control.state import DifficultyAdjustment
from atesd.errors import ConfigError
from atesd.importing import cause, function_made_by
from atesd.maths import credit, keyed
from atesd.records import Decision, FinishedDecision, UpdateStats

SUCCESS_DECAY = 0.9  # of the running success per difficulty; ours


@dataclass(frozen=True, slots=True)
class _Row:
    """What one update showed: l and g measured before its step, and the ratio that acted in it."""

    progress_signal: float | None
    grounding: float | None
    reveal_ratio: float
    effective_ratio: float


class LedgerState(TypedDict):
    """What a checkpoint holds of a ledger; a row is its fields by name."""

    held: dict[str, object] | None
    open: list[dict[str, object]]
    rows: list[tuple[int, dict[str, Any]]]
    success: dict[str, object]
    dropped: dict[str, int]


@final
class DecisionLedger:
    """Opens, feeds and closes decisions; knows nothing of policies, models or files.

    A decision is held over `CreditConfig.hold`. Its window (`CreditConfig.window`) closes when the stats of the last
    update in it arrive. Windows may overlap. A decision that cannot be credited is dropped, and `dropped` counts the
    reasons.
    """

    def __init__(self, config: CreditConfig) -> None:
        self._config, self._reward = config, own_reward(config)
        self._held: Decision | None = None
        self._open: list[Decision] = []
        self._rows: dict[int, _Row] = {}
        self._success = DifficultyAdjustment(SUCCESS_DECAY)
        self.dropped: dict[str, int] = {}

    def measurements(self, update: int) -> frozenset[Measurement]:
        """What the reward needs before the step of this update."""
        signal = self._config.progress_signal
        wanted: set[Measurement] = set()
        if signal == "train_success":
            wanted.add("train_success")
        elif signal != "train_kl" and self._config.probe_is_due(update):
            wanted.add(signal)
        if self._config.grounding_weight > 0:
            wanted.add("grounding")
        return frozenset(wanted)

    def held(self, update: int, decide: Callable[[int], Decision]) -> Decision:
        """The decision that holds at this update; if the update is the first of its hold, it is taken now and opened.

        `decide` makes the decision before a given update. Raises `ValueError` for an update before the current hold.
        """
        start, _ = self._config.hold(update)
        if self._held is not None and start < self._held.update:
            raise ValueError(f"update {update} is before the current decision, taken before {self._held.update}")
        if self._held is None or self._held.update != start:
            self._held = decide(start)
            self.open(self._held)
        return self._held

    def open(self, decision: Decision) -> None:
        """Start to follow a decision."""
        self._open.append(replace(decision, samples=dict(decision.samples)))

    def add_draw(self, decision_update: int, group: str, draw: float) -> None:
        """Note the draw of a group that was first met during the hold; too late once the window has closed."""
        for decision in (*self._open, *([self._held] if self._held else [])):
            if decision.update == decision_update:
                decision.samples.setdefault(group, draw)

    def record(self, update: int, stats: UpdateStats) -> list[FinishedDecision]:
        """Take in one update. Returns the decisions whose window it closes, each once, with the raw reward."""
        self._rows[update] = self._row(update, stats)
        closing = [decision for decision in self._open if self._config.window(decision.update)[1] <= update]
        self._open = [decision for decision in self._open if decision not in closing]
        finished = [rewarded for decision in closing if (rewarded := self._rewarded_or_dropped(decision)) is not None]
        self._forget_rows()
        return finished

    def pending(self) -> list[FinishedDecision]:
        """The open decisions as far as they got: sums over the measurements so far, 0 where there is nothing to sum.

        A reward of the user's is asked once, when the window has closed; until then it is 0.
        """
        some = [self._finish(decision) for decision in self._open]
        return [replace(one, reward=0.0) for one in some] if self._reward else some

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "held": self._held and decision_to_json(self._held),
            "open": [decision_to_json(decision) for decision in self._open],
            "rows": [[update, asdict(row)] for update, row in self._rows.items()],
            "success": self._success.state_dict(),
            "dropped": dict(self.dropped),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(LedgerState, state)
        self._held = decision_from_json(kept["held"]) if kept["held"] else None
        self._open = [decision_from_json(decision) for decision in kept["open"]]
        self._rows = {update: _Row(**row) for update, row in kept["rows"]}
        self._success.load_state_dict(kept["success"])
        self.dropped = dict(kept["dropped"])

    def _row(self, update: int, stats: UpdateStats) -> _Row:
        """The row of an update. A non-finite signal drops every decision whose window it lies in, and is not kept."""
        signals = {"progress signal": self.progress_signal(stats), "grounding": stats.grounding}
        for name, value in signals.items():
            if value is not None and not math.isfinite(value):
                signals[name] = None
                self._drop_around(update, f"non-finite {name}")
        return _Row(signals["progress signal"], signals["grounding"], stats.reveal_ratio, stats.effective_ratio)

    def progress_signal(self, stats: UpdateStats) -> float | None:
        """l, which should fall, in nats per token or minus a share: the student's loss, a probe, or minus a success."""
        match self._config.progress_signal:
            case "train_kl":
                return stats.loss
            case "probe_nll":
                return stats.probe_nll
            case "probe_kl":
                return stats.probe_kl
            case "probe_success":
                return None if stats.probe_success is None else -stats.probe_success
            case "probe_gain":
                return None if stats.probe_gain is None else -stats.probe_gain
            case "train_success":
                success = self._success.success(stats.train_success)
                return None if success is None else -success

    def _drop_around(self, update: int, reason: str) -> None:
        kept = []
        for decision in self._open:
            start, close = self._config.window(decision.update)
            if start <= update <= close:
                self._count_dropped(reason)
            else:
                kept.append(decision)
        self._open = kept

    def _rewarded_or_dropped(self, decision: Decision) -> FinishedDecision | None:
        finished = self._finish(decision)
        progress, grounding = self._components(decision)
        measured = progress is not None and (grounding is not None or not self._config.grounding_weight > 0)
        if measured and self._reward is not None:
            finished = replace(finished, reward=self._reward(finished))
        if progress is None:
            self._count_dropped("progress signal not measured")
        elif not measured:
            self._count_dropped("grounding not measured")
        elif not math.isfinite(finished.reward):
            self._count_dropped("non-finite reward")
        else:
            return finished
        return None

    def _count_dropped(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def _components(self, decision: Decision) -> tuple[float | None, float | None]:
        """(progress, grounding); None where the window so far gives none."""
        progress_signal, grounding_signal = self._signals(decision)
        return (
            credit.discounted_progress(progress_signal, self._config.discount, self._config.drop),
            credit.discounted_grounding(grounding_signal, self._config.discount),
        )

    def _signals(self, decision: Decision) -> tuple[list[float | None], list[float | None]]:
        """l_s .. l_{s+L} and g_{s+1} .. g_{s+L}."""
        start, close = self._config.window(decision.update)
        rows = [self._rows.get(update) for update in range(start, close + 1)]
        progress_signal = [row.progress_signal if row else None for row in rows]
        grounding_signal = [row.grounding if row else None for row in rows[1:]]
        return progress_signal, grounding_signal

    def _finish(self, decision: Decision) -> FinishedDecision:
        """The decision with what its window gave so far; sums over nothing are 0.

        Its reward is raw: `rewarded` replaces it once the buffer is full.
        """
        start, close = self._config.window(decision.update)
        hold = self._seen(*self._config.hold(decision.update))
        progress_signal, grounding_signal = self._signals(decision)
        progress, grounding = (component or 0.0 for component in self._components(decision))
        return FinishedDecision(
            decision=decision,
            reveal_ratio=_mean([row.reveal_ratio for row in hold if row] or decision.samples.values()),
            effective_ratio=_mean([row.effective_ratio for row in hold] or decision.samples.values()),
            window=(start, close),
            progress_signal=tuple(progress_signal),
            grounding_signal=tuple(grounding_signal),
            ratios_in_window=tuple(row.reveal_ratio for row in self._seen(start, close)),
            progress=progress,
            grounding=grounding,
            reward=credit.rewards([progress], [grounding], self._config.grounding_weight, "raw")[0],
        )

    def _seen(self, first: int, last: int) -> list[_Row]:
        return [self._rows[update] for update in range(first, last + 1) if update in self._rows]

    def _forget_rows(self) -> None:
        """Keep the rows that an open decision still needs."""
        oldest = min((decision.update for decision in self._open), default=math.inf)
        self._rows = {update: row for update, row in self._rows.items() if update >= oldest}


def own_reward(config: CreditConfig) -> Callable[[FinishedDecision], float] | None:
    """What `credit.reward` makes of a closed window; None for the formula. Raises `ConfigError` where it makes none."""
    if config.reward == "formula":
        return None
    name = f"credit.reward: {config.reward}"
    function = function_made_by(config.reward, "credit.reward", config.reward_settings, "finished")

    def reward(finished: FinishedDecision) -> float:
        where = f"for the decision before update {finished.decision.update}"
        try:
            value = function(finished)
        except Exception as error:  # of whatever kind: the function is the user's
            raise ConfigError(f"{name} failed {where}: {cause(error)}") from error
        if isinstance(value, bool) or not isinstance(value, SupportsFloat):
            raise ConfigError(f"{name} gave {type(value).__name__} {value!r:.60} {where}; expected a number")
        return float(value)

    return reward


def rewarded(buffer: Sequence[FinishedDecision], config: CreditConfig, seed: int) -> list[FinishedDecision]:
    """The decisions of a buffer with the rewards that are used: mixed over it, permuted under `shuffle_rewards`."""
    rewards = [finished.reward for finished in buffer]
    if config.reward == "formula":
        progress, grounding = [one.progress for one in buffer], [one.grounding for one in buffer]
        rewards = credit.rewards(progress, grounding, config.grounding_weight, config.mixing)
    if config.shuffle_rewards:
        order = keyed.generator(seed, "shuffle_rewards", buffer[0].decision.update).permutation(len(rewards))
        rewards = [rewards[i] for i in order]
    return [replace(finished, reward=reward) for finished, reward in zip(buffer, rewards, strict=True)]


def decision_to_json(decision: Decision) -> dict[str, object]:
    """A decision as JSON values."""
    return {**asdict(decision), "state": list(decision.state)}


def decision_from_json(values: Mapping[str, object]) -> Decision:
    """The inverse of `decision_to_json`."""
    fields = cast("dict[str, Any]", values)
    return Decision(**{**fields, "state": tuple(fields["state"]), "samples": dict(fields["samples"])})


def finished_to_json(finished: FinishedDecision) -> dict[str, object]:
    """A finished decision as JSON values."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(finished).items()}
    return {**values, "decision": decision_to_json(finished.decision)}


def finished_from_json(values: Mapping[str, object]) -> FinishedDecision:
    """The inverse of `finished_to_json`."""
    fields = cast("dict[str, Any]", values)
    series = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return FinishedDecision(**{**fields, **series, "decision": decision_from_json(fields["decision"])})


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
