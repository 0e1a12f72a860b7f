"""What every bridge shares: a handle on an exposure, which says ratios, makes views and hears feedback.

A trainer asks the handle for the view of a problem at an update and tells it later what the update showed; both may
come from several threads, late, and in any order. Importing this module imports neither torch nor a trainer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, cast, final

from atesd.config import Config, config_from_mapping, dump_config, parse_yaml
from atesd.control.factory import make_exposure
from atesd.control.interface import Measurement
from atesd.control.settings import Granularity, group_of
from atesd.data.views import TextRenderer, make_view
from atesd.records import FinishedDecision, Problem, UpdateStats, View
from atesd.runs import recorded_ratios

_PROBES = ("probe_nll", "probe_success", "probe_gain", "probe_kl", "grounding")
_MEANS = ("top1_disagreement", "student_confidence")
_ALSO = ("teacher_entropy", "student_entropy", "completion_tokens", "truncated_share", "loop_share", "grad_norm")
MEASURED = (*_PROBES, *_MEANS, *_ALSO)
"""What a trainer may measure besides loss, kl and verdicts, by its name in a metrics row."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a trainer tells of one update, measured before its optimiser step.

    `loss` and `kl` are means per token; `kl` is the forward KL in nats, None where the trainer has another divergence:
    controllers then read the loss in its place. A loss that is not known is nan. `measured` holds probes and other
    means by their names in a metrics row; raises `ValueError` for others.
    """

    loss: float
    kl: float | None = None
    learning_rate: float = 0.0
    measured: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.measured) - {*MEASURED}):
            raise ValueError(f"measured: {', '.join(unknown)} is unknown; allowed are {', '.join(MEASURED)}")


@dataclass(frozen=True, slots=True)
class Told:
    """An update as the exposure was told of it, and the decisions it learned from; of a lost one nothing is known."""

    update: int
    feedback: Feedback | None
    stats: UpdateStats | None
    decisions: Sequence[FinishedDecision] = ()


class _Reference:
    """Renders the visible reference alone: the trainer's own template stands around it."""

    def __init__(self, config: Config) -> None:
        self._answered = TextRenderer(config.views)
        self._unanswered = TextRenderer(config.views.model_copy(update={"answer": "withhold"}))
        self._only_answer = config.views.answer == "only"

    def student(self, problem: Problem) -> str:
        return problem.text

    def teacher(self, problem: Problem, shown: int, whole: bool) -> str:
        if not problem.answer and self._only_answer:
            return ""
        return (self._answered if problem.answer else self._unanswered).visible(problem, shown, whole)


@final
class Handle:
    """An exposure for a trainer that we do not drive: picklable, safe to call from several threads.

    Feedback is taken in the order of updates. One that comes early waits for those before it, until it is more than
    `max_delay` updates ahead: what is missing then counts as lost (`lost`), and its decisions are dropped by the ledger
    if they needed it. 0, for a trainer that is not asynchronous, waits for nothing.
    """

    def __init__(self, config: Config, *, max_delay: int = 0) -> None:
        self.config, self.lost = config, 0
        self.exposure = make_exposure(config, config.train.num_updates, config.train.seed, *recorded_ratios(config))
        self._reference, self._max_delay, self._lock = _Reference(config), max_delay, threading.RLock()
        self._next = 0
        self._asked: dict[int, dict[str, float]] = {}
        self._seen: dict[int, list[tuple[float, float]]] = {}  # ratio and effective ratio of each view of an update
        self._graded: dict[int, list[tuple[str, int, float]]] = {}
        self._waiting: dict[int, Feedback] = {}

    def measurements(self, update: int) -> frozenset[Measurement]:
        """What the exposure would like to have measured before the step of this update."""
        with self._lock:
            return self.exposure.measurements(update)

    def due(self, update: int) -> frozenset[str]:
        """What the exposure must be told of this update besides its means: `measurements`, and verdicts it follows."""
        verdicts = {"train_success"} if self.config.exposure.follows_verdicts else set[str]()
        return frozenset(self.measurements(update) | verdicts)

    def ratio(self, update: int, group: str = "") -> float:
        """The reveal ratio of an update and group. Raises `ValueError` for an update that was already observed."""
        with self._lock:
            if update < self._next:
                raise ValueError(
                    f"update {update} was observed; ask for the ratio of update {self._next} or a later one"
                )
            asked = self._asked.setdefault(update, {})
            if group not in asked:
                asked[group] = self.exposure.reveal_ratio(update, group)
            return asked[group]

    def view(self, problem: Problem, ratio: float) -> View:
        """The visible reference at a ratio: its first floor(ratio m) segments and the answer; at 1 byte for byte."""
        return make_view(problem, ratio, self._reference, lambda _: True)

    def show(self, update: int, problem: Problem, updates: int = 1) -> View:
        """The view of a problem at the ratio of an update, noted for what the exposure is told of the update.

        `updates`: for how many updates, from this one on, the trainer keeps the teacher's context.
        """
        ratio, view = self.look(update, problem)
        self.note(update, [(ratio, view.effective_ratio)], updates)
        return view

    def look(self, update: int, problem: Problem) -> tuple[float, View]:
        """The ratio of an update for a problem, and the view at it; nothing is noted."""
        ratio = self.ratio(update, group_of(self.config.granularity, problem.id, problem.difficulty))
        return ratio, self.view(problem, ratio)

    def note(self, update: int, shown: Iterable[tuple[float, float]], updates: int = 1) -> None:
        """Note views by ratio and effective ratio: what `show` does, for a trainer that trains on a view later."""
        with self._lock:
            listed = list(shown)
            for served in range(update, update + updates):
                self._seen.setdefault(served, []).extend(listed)

    def grade(self, update: int, verdicts: Iterable[tuple[str, int, float]], updates: int = 1) -> None:
        """Note graded rollouts of an update, or of several: (problem id, difficulty, 1.0 or 0.0). May come in parts."""
        with self._lock:
            listed = list(verdicts)
            for served in range(update, update + updates):
                self._graded.setdefault(served, []).extend(listed)

    def observe(self, update: int, feedback: Feedback) -> list[Told]:
        """Take in what an update showed. Returns the updates whose turn has come, in order; none if one is awaited.

        Raises `ValueError` for an update that was observed before.
        """
        with self._lock:
            if update < self._next or update in self._waiting:
                raise ValueError(f"update {update} was observed before; awaited is update {self._next}")
            self._waiting[update] = feedback
            told = []
            while self._waiting and (self._next in self._waiting or max(self._waiting) - self._next > self._max_delay):
                told.append(self._tell(self._next))
            return told

    def lose(self, update: int) -> list[Told]:
        """Give up the feedback of all updates before this one that has not come."""
        with self._lock:
            return [self._tell(lost) for lost in range(self._next, update)]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: the exposure's state, and what is between asking and telling."""
        with self._lock:
            return {
                "exposure": self.exposure.state_dict(),
                "next": self._next,
                "lost": self.lost,
                "asked": {str(update): dict(ratios) for update, ratios in self._asked.items()},
                "seen": {str(update): [list(pair) for pair in pairs] for update, pairs in self._seen.items()},
                "graded": {str(update): [list(one) for one in graded] for update, graded in self._graded.items()},
                "waiting": {str(update): asdict(feedback) for update, feedback in self._waiting.items()},
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        with self._lock:
            self.exposure.load_state_dict(state["exposure"])
            self._next, self.lost = state["next"], state["lost"]
            self._asked = {int(update): dict(ratios) for update, ratios in state["asked"].items()}
            self._seen = {int(update): [(r, e) for r, e in pairs] for update, pairs in state["seen"].items()}
            graded = {int(update): [(n, d, right) for n, d, right in some] for update, some in state["graded"].items()}
            self._graded = graded
            self._waiting = {int(update): Feedback(**values) for update, values in state["waiting"].items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made anew from the config's text and the state: both may hold what cannot be pickled."""
        return _copied, (dump_config(self.config), self._max_delay, self.state_dict())

    def _tell(self, update: int) -> Told:
        feedback, self._next = self._waiting.pop(update, None), update + 1
        asked, seen = self._asked.pop(update, {}), self._seen.pop(update, [])
        graded = tuple(self._graded.pop(update, ()))
        if feedback is None:
            self.lost += 1
            return Told(update, None, None)
        asked = asked or {"": self.exposure.reveal_ratio(update)}
        ratios, effective = zip(*(seen or [(ratio, ratio) for ratio in asked.values()]), strict=True)
        stats = _stats(feedback, graded, fmean(ratios), fmean(effective), self.config.granularity)
        return Told(update, feedback, stats, self.exposure.observe(update, stats))


def _stats(
    feedback: Feedback,
    graded: tuple[tuple[str, int, float], ...],
    reveal_ratio: float,
    effective_ratio: float,
    granularity: Granularity,
) -> UpdateStats:
    """What the exposure is told; means that are not known are 0, as `UpdateStats` has no word for that."""
    return UpdateStats(
        reveal_ratio,
        effective_ratio,
        loss=feedback.loss,
        kl=feedback.loss if feedback.kl is None else feedback.kl,
        train_success=tuple((level, right) for _, level, right in graded),
        group_success=tuple((group_of(granularity, name, level), right) for name, level, right in graded),
        top1_disagreement=feedback.measured.get("top1_disagreement", 0.0),
        student_confidence=feedback.measured.get("student_confidence", 0.0),
        **{name: feedback.measured.get(name) for name in _PROBES},
    )


def config_from_text(text: str) -> Config:
    """The config that `dump_config` wrote: how one travels to another process."""
    return config_from_mapping(cast("dict[str, Any]", parse_yaml(text, "config")))


def _copied(config: str, max_delay: int, state: Mapping[str, Any]) -> Handle:
    handle = Handle(config_from_text(config), max_delay=max_delay)
    handle.load_state_dict(state)
    return handle
