"""What a run is made of, and what it expects of its probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
from atesd.records import Split
from atesd.train.lookahead import Lookahead
from atesd.train.step import Choose, Gate


class Probes(Protocol):
    """Measures what an exposure asks for, without touching the training batch."""

    def measure(self, wanted: frozenset[Measurement]) -> dict[str, float]:
        """Values by name, among `probe_nll`, `probe_success`, `probe_gain`, `probe_kl`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Stored rollouts."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        ...


@dataclass(frozen=True)
class Parts:
    """Everything one run is made of, wired in `atesd.build`."""

    config: Config
    loaded: LoadedModel
    weights: Weights
    engine: Engine
    scorer: Scorer
    teacher: Teacher
    encoder: PromptEncoder
    renderer: Renderer
    problems: ProblemSets
    exposure: Exposure
    checker: Checker | None
    probes: Probes
    evaluate: Callable[[Split, int], dict[str, Any]]
    looping: Callable[[Sequence[int]], bool]
    lookahead: Lookahead | None = None
    gate: Gate | None = None
    choose: Choose | None = None
