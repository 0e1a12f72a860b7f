"""What the student and the teacher read: problem, visible reference, transition, instruction.

A view of reveal ratio r shows the first floor(r * m) of the m segments and the final answer; r = 1 shows the whole
reference, byte for byte (the OPSD view). Texts around it are settings (`ViewsConfig`); empty ones are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from string import Formatter
from typing import Protocol

from atesd.config import ViewsConfig
from atesd.errors import ConfigError, DataError
from atesd.records import Problem, View

_GUARD = 1e-9  # so that 0.7 * 10 shows 7 segments and not 6
_GAP = "\n\n"  # between the parts of a message


def shown_segments(reveal_ratio: float, total: int) -> int:
    """floor(reveal_ratio * total), with a guard of 1e-9 against rounding. Raises `ValueError` outside of [0, 1]."""
    if not 0 <= reveal_ratio <= 1:  # also false for nan
        raise ValueError(f"reveal_ratio {reveal_ratio} is not in [0, 1]")
    if total < 0:
        raise ValueError(f"a reference cannot have {total} segments")
    return min(math.floor(reveal_ratio * total + _GUARD), total)


class Renderer(Protocol):
    """Writes the messages of a kind of problem."""

    def student(self, problem: Problem) -> str:
        """The problem alone, with what is asked for."""
        ...

    def teacher(self, problem: Problem, shown: int, whole: bool) -> str:
        """The problem with the first `shown` segments and the answer, or with the whole reference."""
        ...


class TextRenderer:
    """Messages in plain text, worded by `ViewsConfig`. Raises `ConfigError` for a wording without its placeholder."""

    def __init__(self, config: ViewsConfig) -> None:
        _require_only(config.problem_text, "problem_text", "problem")
        _require_only(config.answer_text, "answer_text", "answer")
        self._config = config

    def student(self, problem: Problem) -> str:
        """Problem and instruction."""
        return _joined(self._problem(problem), self._config.instruction)

    def teacher(self, problem: Problem, shown: int, whole: bool) -> str:
        """Problem, delimited visible reference, transition, instruction: the order of OPSD's parts.

        `whole` shows the reference byte for byte (under the answer policy `withhold`, without its closing).
        """
        config = self._config
        reference = config.reference_begin + self.visible(problem, shown, whole) + config.reference_end
        return _joined(self._problem(problem), reference, config.transition, config.instruction)

    def visible(self, problem: Problem, shown: int, whole: bool) -> str:
        """What stands between the delimiters: the visible part of the reference, a note if it is cut, the answer."""
        config = self._config
        answer = config.answer_text.format(answer=problem.answer)
        if config.answer == "only":
            return answer
        if whole:
            return problem.reference if config.answer == "keep" else "".join(problem.segments)
        note = config.partial_note if config.wording == "adaptive" else ""
        behind = [text for text in (note, answer if config.answer == "keep" else "") if text]
        return _on_new_line("".join(problem.segments[:shown]), "\n".join(behind))

    def _problem(self, problem: Problem) -> str:
        return self._config.problem_text.format(problem=problem.text)


def make_view(problem: Problem, reveal_ratio: float, renderer: Renderer, fits: Callable[[str], bool]) -> View:
    """The teacher's view at a reveal ratio, with as many of its segments as fit.

    `fits` says whether a message is short enough; where it is not, segments are dropped from the end, and a whole
    reference gives way to all but its last segment plus the answer. The problem and the answer are never cut: raises
    `DataError` if they do not fit by themselves, and `ValueError` for a ratio outside of [0, 1].
    """
    total = len(problem.segments)
    shown = shown_segments(reveal_ratio, total)
    whole = reveal_ratio >= 1 - _GUARD
    text = renderer.teacher(problem, shown, whole)
    if not fits(text):
        shown, text = _longest_that_fits(problem, max(shown - 1, 0), renderer, fits)
    if text == renderer.teacher(problem, 0, False):
        shown = 0  # nothing of the segments is in it, as under the answer policy `only`
    return View(text, shown, total)


def _longest_that_fits(problem: Problem, most: int, renderer: Renderer, fits: Callable[[str], bool]) -> tuple[int, str]:
    """The largest number of segments up to `most` whose view fits, and that view. Views grow with every segment."""
    best: tuple[int, str] | None = None
    low, high = 0, most
    while low <= high:
        middle = (low + high + 1) // 2
        text = renderer.teacher(problem, middle, False)
        if fits(text):
            best = middle, text
            low = middle + 1
        else:
            high = middle - 1
    if best is None:
        raise DataError(
            f"problem '{problem.id}': its teacher context is too long even without a reference segment, and problem "
            "and answer are never cut; raise model.max_context_tokens, or leave the problem out"
        )
    return best


def _joined(*parts: str) -> str:
    return _GAP.join(part for part in parts if part)


def _on_new_line(above: str, below: str) -> str:
    return above + ("\n" if above and below and not above.endswith("\n") else "") + below


def _require_only(template: str, setting: str, name: str) -> None:
    """The template must hold `{name}`, and no other braces but doubled ones."""
    example = f"views.{setting}: {template!r}"
    try:
        fields = {
            (field, spec, conversion) for _, field, spec, conversion in Formatter().parse(template) if field is not None
        }
    except ValueError as error:
        raise ConfigError(f"{example}: {error}; write a brace that is text twice, {{{{ or }}}}") from None
    if fields != {(name, "", None)}:
        raise ConfigError(f"{example} must hold {{{name}}} and no other field; write a brace that is text twice")
