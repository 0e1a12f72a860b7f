"""Column maps and row filters of known data sets of problems."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from atesd.config import ColumnsConfig
from atesd.data.answers import last_boxed, marked_answer, without_mark
from atesd.data.equivalence import plainly_equal

_CALCULATION = re.compile(r"<<[^<>\n]*>>")

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """How the rows of a data set become rows with `columns`.

    `reads` are the columns it needs; `adapt` returns the row to use, or None for one that the preset leaves out because
    it is not `kept`.
    """

    columns: ColumnsConfig
    reads: tuple[str, ...]
    adapt: Callable[[Values], Values | None] = lambda values: values
    kept: str = "every row"


def _if_correct(values: Values) -> Values | None:
    return values if values.get("correct") is True else None


def _solution_that_boxes_the_answer(values: Values) -> Values:
    """The first of three solutions that plainly boxes the final answer, else the first that boxes anything."""
    solutions = [text for n in (1, 2, 3) if isinstance(text := values.get(f"r1_solution_{n}"), str)]
    boxes = [last_boxed(solution) for solution in solutions]
    answer = str(values.get("final_answer"))
    same = (i for i, box in enumerate(boxes) if box is not None and plainly_equal(answer, box))
    boxed = (i for i, box in enumerate(boxes) if box is not None)
    chosen = next(same, next(boxed, None))
    return {**values, "solution": None if chosen is None else solutions[chosen]}


def _verified_complete_generation(values: Values) -> Values | None:
    """The first generation that math-verify found right and that was not cut off."""
    marks = (values.get("generations"), values.get("correctness_math_verify"), values.get("is_reasoning_complete"))
    for text, verified, complete in zip(*(mark or () for mark in marks), strict=False):
        if verified is True and complete is True:
            return {**values, "solution": text}
    return None


def _marked_solution(values: Values) -> Values:
    """The solution without the calculator's notes `<<48/2=24>>` and the line `#### N`; N is the answer.

    The notes are for a program that computes them. They are not what a person writes, and they state results twice.
    """
    solution = values.get("answer")
    if not isinstance(solution, str):
        return {**values, "solution": solution, "answer": None}
    return {**values, "solution": _CALCULATION.sub("", without_mark(solution)), "answer": marked_answer(solution)}


PRESETS: dict[str, Preset] = {
    # siyanzhao/Openthoughts_math_30k_opsd
    "openthoughts-opsd": Preset(ColumnsConfig(), ("problem", "solution")),
    # open-r1/OpenThoughts-114k-math
    "openthoughts-114k": Preset(
        ColumnsConfig(), ("problem", "solution", "correct"), _if_correct, "those whose `correct` is true"
    ),
    # zwhe99/DeepMath-103K
    "deepmath": Preset(
        ColumnsConfig(problem="question", answer="final_answer", difficulty="difficulty"),
        ("question", "final_answer", "difficulty", "r1_solution_1", "r1_solution_2", "r1_solution_3"),
        _solution_that_boxes_the_answer,
    ),
    # openai/gsm8k
    "gsm8k": Preset(ColumnsConfig(problem="question", answer="answer"), ("question", "answer"), _marked_solution),
    # EleutherAI/hendrycks_math, DigitalLearningGmbH/MATH-lighteval: the answer is what the solution boxes last
    "math": Preset(ColumnsConfig(), ("problem", "solution")),
    # open-r1/OpenR1-Math-220k
    "openr1": Preset(
        ColumnsConfig(answer="answer"),
        ("problem", "answer", "generations", "correctness_math_verify", "is_reasoning_complete"),
        _verified_complete_generation,
        "those with a verified, complete generation",
    ),
}
