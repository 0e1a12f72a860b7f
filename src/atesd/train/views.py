"""The teacher's contexts: what it reads of a problem at a reveal ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

from atesd.config import Config
from atesd.data.ablations import ablated
from atesd.data.views import Renderer, make_view
from atesd.models.prompts import PromptEncoder
from atesd.records import Problem, View
from atesd.train.update import Example


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """What the teacher reads of a problem: the view, and its context ids."""

    view: View
    context: tuple[int, ...]


@final
class TeacherPrompts:
    """Writes the teacher's contexts, under the reference ablation and the length policy.

    `others` are the problems from which a shuffled reference may come.
    """

    def __init__(self, config: Config, encoder: PromptEncoder, renderer: Renderer, others: Sequence[Problem]) -> None:
        self._config, self._encoder, self._renderer, self._others = config, encoder, renderer, others

    def view(self, problem: Problem, reveal_ratio: float) -> TeacherPrompt:
        """The first floor(reveal_ratio m) segments and the answer, as the teacher reads them (paper, section 4).

        Of a view that is too long, segments are dropped from the end: its effective ratio says what is left. The
        baselines (SFT, GRPO) have no teacher: their views are empty. Raises `DataError` if not even the answer fits.
        """
        config = self._config
        if not config.distils:
            return TeacherPrompt(View("", 0, len(problem.segments)), ())
        if config.exposure.reference_ablation == "none":
            message = self._renderer.student(problem)
            return TeacherPrompt(View(message, 0, len(problem.segments)), self._encoder.teacher(message))
        shown = problem
        if config.exposure.reference_ablation != "off":
            shown = ablated(problem, config.exposure.reference_ablation, self._others, config.train.seed)
        return self._fitted(shown, reveal_ratio, self._encoder.teacher)

    def hint(self, problem: Problem, reveal_ratio: float) -> TeacherPrompt:
        """The view of a ratio in the student's template: what the writer of a hinted rollout reads."""
        return self._fitted(problem, reveal_ratio, self._encoder.student)

    def with_answer(self, example: Example, problem: Problem, view: View) -> Example:
        """The example with what g_t is measured on under the teacher's view: the answer (paper) or what is withheld."""
        withheld = "".join(problem.segments[view.shown_segments :]) + problem.closing
        text = f"\\boxed{{{problem.answer}}}" if self._config.credit.grounding == "answer" else withheld
        return replace(example, answer=self._encoder.completion(text)[:-1])  # the end token is no answer

    def _fitted(self, problem: Problem, ratio: float, encode: Callable[[str], tuple[int, ...]]) -> TeacherPrompt:
        fitting = _Fitting(encode, self._config.model.max_context_tokens - self._config.sampling.completion_tokens)
        view = make_view(problem, ratio, self._renderer, fitting.fits)
        return TeacherPrompt(view, fitting.read[view.text])


@final
class _Fitting:
    """Says whether a message leaves room for a completion, and keeps the ids of every message asked for."""

    def __init__(self, encode: Callable[[str], tuple[int, ...]], room: int) -> None:
        self._encode, self._room = encode, room
        self.read: dict[str, tuple[int, ...]] = {}

    def fits(self, message: str) -> bool:
        self.read[message] = self._encode(message)
        return len(self.read[message]) <= self._room
