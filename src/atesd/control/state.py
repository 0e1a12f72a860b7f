"""The training state: the seven numbers that the policy sees, and the difficulty-adjusted success of the rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict, cast, final

from atesd.errors import CheckpointError
from atesd.records import UpdateStats

STATE_NAMES = (
    "training_progress",
    "reveal_ratio",
    "log_kl",
    "top1_disagreement",
    "probe_nll",
    "student_confidence",
    "updates_since_policy_update",
)
"""Names from arXiv 2605.11458; definitions ours, in `TrainingState.features`."""
OPEN_ENDED = ("log_kl", "probe_nll", "updates_since_policy_update")
"""The features without a range of their own, which are standardised; the others lie in [0, 1] and stay as they are."""


class StandardiserState(TypedDict):
    """What a checkpoint holds of a standardiser."""

    count: int
    mean: list[float]
    squares: list[float]


class LevelsState(TypedDict):
    """What a checkpoint holds of the success by level: (level, rollouts, running mean)."""

    levels: list[tuple[int, int, float]]


class SavedTrainingState(TypedDict):
    """What a checkpoint holds of the training state."""

    averages: dict[str, float]
    first_probe_nll: float | None
    student_confidence: float
    last_policy_update: int
    standardiser: dict[str, object]
    ignored: dict[str, int]


@final
class TrainingState:
    """Follows the updates of a run and tells, at each decision, where the run stands.

    Averages are exponential, avg <- decay * avg + (1 - decay) * value, and start at their first value. A non-finite
    value is left out and counted in `ignored`.
    """

    def __init__(self, num_updates: int, decay: float) -> None:
        self._num_updates = num_updates
        self._decay = decay
        self._averages: dict[str, float] = {}
        self._first_probe_nll: float | None = None
        self._student_confidence = 0.0
        self._last_policy_update = 0
        self._standardiser = Standardiser(len(OPEN_ENDED))
        self.ignored: dict[str, int] = {}

    def observe(self, stats: UpdateStats) -> None:
        """Take in one student update."""
        self._average("reveal_ratio", stats.reveal_ratio)
        # Rounding can leave the KL of two equal distributions a little below 0.
        self._average("log_kl", math.log1p(1000 * max(stats.kl, 0.0)) if math.isfinite(stats.kl) else stats.kl)
        self._average("top1_disagreement", stats.top1_disagreement)
        if self._usable("student_confidence", stats.student_confidence):
            self._student_confidence = stats.student_confidence
        if stats.probe_nll is not None and self._usable("probe_nll", stats.probe_nll):
            if self._first_probe_nll is None and stats.probe_nll > 0:  # nothing is relative to 0
                self._first_probe_nll = stats.probe_nll
            if self._first_probe_nll is not None:
                self._average("probe_nll", stats.probe_nll / self._first_probe_nll - 1.0)

    def policy_updated(self, update: int) -> None:
        """The policy has just learned, at the end of student update `update`."""
        self._last_policy_update = update + 1

    def training_progress(self, update: int) -> float:
        """Share of the run that lies behind student update `update`, in [0, 1]."""
        return min(update / self._num_updates, 1.0)

    def features(self, update: int) -> tuple[float, ...]:
        """The state before student update `update`, unstandardised, in the order of `STATE_NAMES`; 0 where unknown.

        Training progress; averages of the ratio, of log(1 + 1000 KL), of the teacher-student top-1 disagreement, and of
        the relative change of the probe NLL since its first value; the mean probability that the student gave its own
        tokens in the last update; student updates since the last policy update.
        """
        return (
            self.training_progress(update),
            self._averages.get("reveal_ratio", 0.0),
            self._averages.get("log_kl", 0.0),
            self._averages.get("top1_disagreement", 0.0),
            self._averages.get("probe_nll", 0.0),
            self._student_confidence,
            float(update - self._last_policy_update),
        )

    def decision_state(self, update: int) -> tuple[float, ...]:
        """The state for the decision before `update`; seven zeros before anything was observed.

        `OPEN_ENDED` features are standardised over the decisions so far. The others keep their scale: standardised, a
        feature that only rises, as training progress does, would hardly move after its first fifth.
        To be called once per decision: the standardiser takes the features in.
        """
        if not self._averages:
            return (0.0,) * len(STATE_NAMES)
        features = dict(zip(STATE_NAMES, self.features(update), strict=True))
        open_ended = tuple(features[name] for name in OPEN_ENDED)
        self._standardiser.push(open_ended)
        standardised = zip(OPEN_ENDED, self._standardiser.standardise(open_ended), strict=True)
        return tuple((features | dict(standardised)).values())

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "averages": dict(self._averages),
            "first_probe_nll": self._first_probe_nll,
            "student_confidence": self._student_confidence,
            "last_policy_update": self._last_policy_update,
            "standardiser": self._standardiser.state_dict(),
            "ignored": dict(self.ignored),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave. Raises `CheckpointError` for a state of before `OPEN_ENDED`."""
        kept = cast(SavedTrainingState, state)
        if len(cast(StandardiserState, kept["standardiser"])["mean"]) != len(OPEN_ENDED):
            raise CheckpointError(
                "the checkpoint's policy has learned from a state whose features were all standardised; since then "
                f"only {', '.join(OPEN_ENDED)} are, so that it cannot go on here: start the run anew, or resume it "
                "with the version of atesd that began it"
            )
        self._averages = dict(kept["averages"])
        self._first_probe_nll = kept["first_probe_nll"]
        self._student_confidence = kept["student_confidence"]
        self._last_policy_update = kept["last_policy_update"]
        self._standardiser.load_state_dict(kept["standardiser"])
        self.ignored = dict(kept["ignored"])

    def _average(self, name: str, value: float) -> None:
        if self._usable(name, value):
            previous = self._averages.get(name, value)
            self._averages[name] = self._decay * previous + (1.0 - self._decay) * value

    def _usable(self, name: str, value: float) -> bool:
        if math.isfinite(value):
            return True
        self.ignored[name] = self.ignored.get(name, 0) + 1
        return False


@final
class Standardiser:
    """Running mean and variance per feature (Welford 1962), over everything pushed so far."""

    def __init__(self, size: int) -> None:
        self._count = 0
        self._mean = [0.0] * size
        self._squares = [0.0] * size

    def push(self, features: tuple[float, ...]) -> None:
        """Take in one vector."""
        self._count += 1
        for i, value in enumerate(features):
            before = value - self._mean[i]
            self._mean[i] += before / self._count
            self._squares[i] += before * (value - self._mean[i])

    def standardise(self, features: tuple[float, ...]) -> tuple[float, ...]:
        """(feature - mean) / std with divisor n; 0 for a feature that has not varied by 1e-8 yet."""
        deviations = [math.sqrt(squares / max(self._count, 1)) for squares in self._squares]
        return tuple(
            (value - mean) / deviation if deviation > 1e-8 else 0.0
            for value, mean, deviation in zip(features, self._mean, deviations, strict=True)
        )

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {"count": self._count, "mean": list(self._mean), "squares": list(self._squares)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        kept = cast(StandardiserState, state)
        self._count, self._mean, self._squares = kept["count"], list(kept["mean"]), list(kept["squares"])


@final
class DifficultyAdjustment:
    """Post-stratified success: what a batch's success would be if it held every difficulty in the usual shares (ours).

    sum over levels d of share_d * success_d, with share_d the share of d among all rollouts so far, and success_d the
    mean over the batch's rollouts of that level; a level that the batch lacks counts with its running mean, exponential
    over the batches that had it. So a batch of easy problems does not pass for progress.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._counts: dict[int, int] = {}
        self._means: dict[int, float] = {}

    def success(self, graded: tuple[tuple[int, float], ...]) -> float | None:
        """Adjusted success of a batch of (difficulty, 1.0 or 0.0), in [0, 1]; None for an empty one."""
        if not graded:
            return None
        levels: dict[int, list[float]] = {}
        for difficulty, correct in graded:
            levels.setdefault(difficulty, []).append(correct)
        batch = {difficulty: sum(values) / len(values) for difficulty, values in levels.items()}
        for difficulty, mean in batch.items():
            self._counts[difficulty] = self._counts.get(difficulty, 0) + len(levels[difficulty])
            previous = self._means.get(difficulty, mean)
            self._means[difficulty] = self._decay * previous + (1.0 - self._decay) * mean
        total = sum(self._counts.values())
        return sum(count / total * batch.get(level, self._means[level]) for level, count in self._counts.items())

    def state_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {"levels": [[level, count, self._means[level]] for level, count in self._counts.items()]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        levels = cast(LevelsState, state)["levels"]
        self._counts = {level: count for level, count, _ in levels}
        self._means = {level: mean for level, _, mean in levels}
