"""Reference ablations: what the teacher sees in place of the true reference, to test that it is what helps.

Only the teacher's message is made from an ablated problem. Completions are always graded against the true one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from atesd.data.answers import last_box
from atesd.data.numbers import another_number, plain_value
from atesd.data.spelling import normalise
from atesd.errors import DataError
from atesd.maths.keyed import generator
from atesd.records import Problem

_WORD = re.compile(r"\S+")


def ablated(problem: Problem, ablation: str, others: Sequence[Problem], seed: int, filler: str = "...") -> Problem:
    """The problem as the teacher is to see it under `exposure.reference_ablation`.

    A function of (seed, problem id) and `others`.

    - shuffled: the reference and the answer of another problem, of the same difficulty if there is one.
    - wrong_answer: the true segments, with a wrong answer and that answer boxed in the closing: a number near the true
      one, or else another problem's answer. What the segments say of the true answer stays.
    - filler: every word of the reference and of the answer replaced by `filler`: as long, but neither reasoning nor
      answer.

    Raises `DataError` if `others` holds nothing to take, and `ValueError` for another ablation.
    """
    rng = generator(seed, "controls", ablation, problem.id)
    if ablation == "shuffled":
        return _shuffled(problem, others, rng)
    if ablation == "wrong_answer":
        return _wrong_answer(problem, others, rng)
    if ablation == "filler":
        return _filled(problem, filler)
    raise ValueError(f"unknown reference ablation {ablation!r}; allowed: shuffled, wrong_answer, filler")


def _shuffled(problem: Problem, others: Sequence[Problem], rng: np.random.Generator) -> Problem:
    def foreign(other: Problem) -> bool:
        return other.id != problem.id and other.text != problem.text

    donor = _first(others, rng, lambda other: foreign(other) and other.difficulty == problem.difficulty)
    donor = donor or _first(others, rng, foreign)
    if donor is None:
        raise DataError(
            f"exposure.reference_ablation: shuffled needs a problem besides '{problem.id}', and there is none"
        )
    return replace(problem, segments=donor.segments, closing=donor.closing, answer=donor.answer)


def _wrong_answer(problem: Problem, others: Sequence[Problem], rng: np.random.Generator) -> Problem:
    wrong = another_number(problem.answer, rng)
    if wrong is None:
        donor = _first(others, rng, lambda other: _differ(other.answer, problem.answer))
        if donor is None:
            raise DataError(
                f"exposure.reference_ablation: wrong_answer needs an answer besides '{problem.answer}' of "
                f"problem '{problem.id}', which is no number, and no other problem has one"
            )
        wrong = donor.answer
    return replace(problem, closing=_reboxed(problem.closing, wrong), answer=wrong)


def _filled(problem: Problem, filler: str) -> Problem:
    if not _WORD.fullmatch(filler):
        raise ValueError(f"filler {filler!r} must be one word")
    segments = tuple(_fill(segment, filler) for segment in problem.segments)
    return replace(
        problem, segments=segments, closing=_fill(problem.closing, filler), answer=_fill(problem.answer, filler)
    )


def _fill(text: str, filler: str) -> str:
    return _WORD.sub(lambda _: filler, text)


def _first(problems: Sequence[Problem], rng: np.random.Generator, wanted: Callable[[Problem], bool]) -> Problem | None:
    """The first wanted problem in a random order, without looking at more of them than needed."""
    return next((problems[place] for place in rng.permutation(len(problems)) if wanted(problems[place])), None)


def _differ(answer: str, other: str) -> bool:
    value = plain_value(answer)
    same_value = value is not None and value == plain_value(other)
    return not same_value and normalise(answer) != normalise(other)


def _reboxed(closing: str, answer: str) -> str:
    """The closing with another answer in its last box."""
    span = last_box(closing)
    if span is None:
        return closing
    start, end = span
    boxed = answer if closing[start - 1] == "{" else f"{{{answer}}}"
    return closing[:start] + boxed + closing[end:]
