"""What a run is made of, and what it expects of its probes, its evaluation and whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from atesd.config import Config
from atesd.control.interface import Exposure, Measurement
from atesd.data.answers import Checker
from atesd.data.splits import ProblemSets
from atesd.data.views import Renderer
from atesd.engine.interface import Engine
from atesd.models.load import LoadedModel
from atesd.models.prompts import PromptEncoder
from atesd.models.score import Scorer
from atesd.models.teacher import Teacher
from atesd.models.weights import Weights
from atesd.records import Graded, Split
from atesd.rows import EvaluationRow
from atesd.train.foresight import Foresight
from atesd.train.hinted import HintRatio
from atesd.train.optimiser import Optimiser
from atesd.train.rollouts import RolloutSampler
from atesd.train.update import BatchPlan, Method
from atesd.train.views import TeacherPrompts


class Probes(Protocol):
    """Measures what an exposure asks for, without touching the training batch."""

    def measure(self, wanted: frozenset[Measurement]) -> dict[str, float]:
        """Values by name, among `probe_nll`, `probe_success`, `probe_gain`, `probe_kl`."""
        ...

    def state_dict(self) -> Mapping[str, object]:
        """Stored rollouts."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore `state_dict`."""
        ...


class Grades(Protocol):
    """The grades of an evaluation that may be interrupted: what is known of it, and what is to be kept of it."""

    def known(self) -> dict[str, list[Graded]]:
        """The grades of every problem that is done, by its id; the same on all ranks."""
        ...

    def keep(self, graded: Sequence[Graded], done: int, total: int) -> None:
        """Grades of further problems, all of their samples; `done` of `total` problems are now known."""
        ...


class Evaluation(Protocol):
    """Scores the student on problems that it is not trained on."""

    def evaluate(self, split: Split, update: int, grades: Grades | None = None) -> EvaluationRow:
        """The row of evaluations.jsonl for a split, after `update` updates; with `grades` it may be interrupted."""
        ...

    def on(self, problems: ProblemSets) -> Evaluation:
        """The same on other problems."""
        ...


@dataclass(frozen=True)
class Components:
    """Everything one run is made of, wired in `atesd.build`.

    Behind the protocols stand by default: `weights` `ReplicatedWeights`, `engine` `BuiltinEngine`, `exposure`
    `LearnedExposure`, `probes` `ProbeSet`, `foresight` `NoForesight`, `method` `Distillation`, `evaluation`
    `SplitEvaluation`.
    """

    config: Config
    problems: ProblemSets
    loaded: LoadedModel
    weights: Weights
    engine: Engine
    encoder: PromptEncoder
    renderer: Renderer
    prompts: TeacherPrompts
    scorer: Scorer
    teacher: Teacher
    checker: Checker | None
    sampler: RolloutSampler
    hints: HintRatio
    exposure: Exposure
    probes: Probes
    foresight: Foresight
    method: Method
    plan: BatchPlan
    optimiser: Optimiser
    evaluation: Evaluation
