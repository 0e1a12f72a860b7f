"""Short word problems: those templates of `gsm_symbolic` whose references a small model can follow, line by line.

A drawn problem is *plain* if its reference passes the checks of `gsm.py`, has 2 to 4 lines, each with one readable
equation between whole numbers from 0 to 199, `8 * £10 = £80` or `7 girls x 3 boys/girl = 21`, whose products and
quotients have a factor of one significant digit, if the last result is the answer, and if no line but for its equation
states its result beforehand. A template is *short* if of 100 draws at least 75 are plain and their problems have at
most 40 words in the mean. (The rule was written before training. Its first form, numbers to 999 and 90 plain draws, was
narrowed when a prototype learned its sums too slowly.) Every fifth short template, in the order
of their numbers, is held out: never used for pretraining, a test of its own (`data.templates: short-held-out`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from atesd.data.gsm import gsm_row
from atesd.data.rows import BadRow, Row, require
from atesd.maths.keyed import generator

MOST = 199
LINES = 2, 4
MOST_WORDS = 40
DRAWS, PLAIN = 100, 75
HELD_OUT_EVERY = 5

SHORT = (6, 10, 16, 31, 34, 39, 43, 48, 57, 62, 72, 78)
"""What the rule gives for reasoning-gym 0.1.25; a test asks it again."""
HELD_OUT = SHORT[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
TEMPLATES = {"short": tuple(t for t in SHORT if t not in HELD_OUT), "short-held-out": HELD_OUT}
"""Template numbers by the word of `data.templates`."""

_DIGITS = re.compile(r"\d+")
_UNIT = r"(?:/[a-z]+)?(?: ?[A-Za-z][A-Za-z'-]*(?:/[a-z]+)?){0,4}"
_OPERAND = rf"[$£€¥]?\d+{_UNIT}"
_SIGN = r"\s*([-+*x/÷×])\s*"
_EQUATION = re.compile(rf"(?<![\d.,]){_OPERAND}(?:\s*[-+*x/÷×]\s*{_OPERAND})+\s*=\s*[$£€¥]?\d+")
_NOT_WHOLE = re.compile(r"\d[.,]\d|%")
_OPERATOR = re.compile(rf"{_UNIT}{_SIGN}[$£€¥]?(?=\d)")
_OURS = {"x": "*", "×": "*", "÷": "/"}


@dataclass(frozen=True, slots=True)
class Step:
    """A line of a reference: the texts around its whole numbers, these numbers, and which of them are its equation's.

    The operands are `numbers[first : first + len(operators) + 1]`, the result is the number behind them.
    """

    texts: tuple[str, ...]
    numbers: tuple[int, ...]
    first: int
    operators: tuple[str, ...]  # + - * /

    @property
    def place(self) -> int:
        """Where the result stands among the numbers."""
        return self.first + len(self.operators) + 1

    @property
    def operands(self) -> tuple[int, ...]:
        """The numbers on the left of the equation."""
        return self.numbers[self.first : self.place]

    @property
    def result(self) -> int:
        """The number on the right of the equation."""
        return self.numbers[self.place]


def combined(operands: tuple[int, ...], operators: tuple[str, ...]) -> int | None:
    """The value of an expression, from left to right; None where a value on the way is no whole number in 0 to 199.

    None also where neither factor of a product, or neither divisor nor quotient, has a single significant digit.
    """
    value = operands[0]
    for operator, operand in zip(operators, operands[1:], strict=True):
        if operator == "/" and (operand == 0 or value % operand):
            return None
        pair = (operand, value // operand) if operator == "/" else (value, operand)
        if operator in "*/" and not any(len(str(number).rstrip("0")) <= 1 for number in pair):
            return None
        results = {"+": value + operand, "-": value - operand, "*": value * operand, "/": pair[1]}
        value = results[operator]
        if not 0 <= value <= MOST:
            return None
    return value


def steps_of(solution: str) -> tuple[Step, ...] | None:
    """The lines of a reference as steps; None unless each has one readable equation, and it is right."""
    steps = [_step(line) for line in solution.splitlines() if line.strip()]
    read = tuple(step for step in steps if step is not None)
    return read if len(read) == len(steps) else None


def _step(line: str) -> Step | None:
    equation = _EQUATION.search(line)
    if equation is None or line.count("=") != 1 or _NOT_WHOLE.search(line):
        return None
    operators = tuple(_OURS.get(sign[1], sign[1]) for sign in _OPERATOR.finditer(equation[0].partition("=")[0]))
    numbers = tuple(int(number) for number in _DIGITS.findall(line))
    first = len(_DIGITS.findall(line[: equation.start()]))
    step = Step(tuple(_DIGITS.split(line)), numbers, first, operators)
    if len(_DIGITS.findall(equation[0])) != len(operators) + 2 or max(numbers) > MOST:
        return None
    mixed = len(set(operators) & {"+", "-"}) > 0 and len(set(operators) & {"*", "/"}) > 0 and operators[0] in "+-"
    right = not mixed and combined(step.operands, operators) == step.result
    return step if right else None


def plain_steps(row: Row | BadRow) -> tuple[Step, ...] | None:
    """The steps of a plain problem; None of another."""
    if isinstance(row, BadRow):
        return None
    steps = steps_of(row.values["solution"])
    if steps is None or not LINES[0] <= len(steps) <= LINES[1] or str(steps[-1].result) != row.values["answer"]:
        return None
    return steps


def template_row(template: int, seed: int, number: int) -> Row | BadRow:
    """A problem of one template as `gsm_rows` has them, without the sentence that reasoning-gym adds to each.

    A function of its arguments alone. Raises `DataError` if reasoning-gym is not installed.
    """
    draws = Random(int(generator(seed, "template", template, number).integers(2**62)))
    return gsm_row(number, _generators()[template](draws, 1.0))


def short_rows(seed: int, count: int, templates: tuple[int, ...]) -> Iterator[Row | BadRow]:
    """`count` rows of these templates, drawn uniformly; a problem that is not plain is bad.

    Row n depends on (seed, n) and the templates alone.
    """
    for number in range(1, count + 1):
        place = int(generator(seed, "which template", number).integers(len(templates)))
        row = template_row(templates[place], seed, number)
        if isinstance(row, Row) and plain_steps(row) is None:
            row = BadRow(number, f"a draw of template {templates[place]} with an equation that is not plain")
        yield row


def short_templates() -> tuple[int, ...]:
    """The templates that the rule takes."""
    return tuple(template for template in sorted(_generators()) if _is_short(template))


def _is_short(template: int) -> bool:
    plain: list[tuple[Row, tuple[Step, ...]]] = []
    for number in range(1, DRAWS + 1):
        row = template_row(template, 0, number)
        steps = plain_steps(row)
        if isinstance(row, Row) and steps is not None:
            plain.append((row, steps))
        if number - len(plain) > DRAWS - PLAIN:
            return False
    words = sum(len(row.values["problem"].split()) for row, _ in plain) / len(plain)
    return words <= MOST_WORDS and not any(_tells(steps) for steps in zip(*(some for _, some in plain), strict=False))


def _tells(lines: tuple[Step, ...]) -> bool:
    """Whether one line, in most of its draws, states its result before its equation."""
    return sum(step.result in step.numbers[: step.first] for step in lines) > len(lines) / 2


@cache
def _generators() -> dict[int, Any]:
    gym = require("reasoning_gym", "gsm", "data.source: gsm_symbolic")
    made = gym.create_dataset("gsm_symbolic", seed=0, size=1)
    allowed = require("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic", "gsm", "data.templates").tasks_ok
    return {number: made.generators[number] for number in allowed}
