"""How the student of the word problems writes: the words of the reference, its arithmetic spelled out.

A reference is terse, `7 x 34 = 238 pens`; the student writes `7*34=7*30+7*4=210+28=238 pens`. A completion is a list of
pieces of text, each learned or not: what a reader of a wrong line should not learn is a piece of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from atesd.data.word_problems import MOST, Step, combined

Piece = tuple[str, bool]
"""A text, and whether it is a target of pretraining."""

_CURRENCIES = "$£€¥"


@dataclass(frozen=True, slots=True)
class Equation:
    """The equation of a line as it is written; `wrong_operands` and `wrong_operators` are places that are no targets.

    `misread` is the place of a state whose first number is `instead` and not what it should be; None: none is.
    """

    operands: tuple[int, ...]
    operators: tuple[str, ...]
    wrong_operands: frozenset[int] = frozenset()
    wrong_operators: frozenset[int] = frozenset()
    misread: int | None = None
    instead: int = 0


def parts(number: int) -> list[int]:
    """The summands of a number with one significant digit each, largest first; [0] of 0."""
    digits = str(number)
    found = [int(digit) * 10 ** (len(digits) - 1 - place) for place, digit in enumerate(digits) if digit != "0"]
    return found or [0]


@dataclass(frozen=True, slots=True)
class State:
    """An expression on the way to a result: numbers, and the operators between them."""

    numbers: tuple[int, ...]
    operators: tuple[str, ...]


def states(left: int, operator: str, right: int) -> list[State]:
    """The expressions that lead from `left operator right` to its value, each equal to the one before it.

    The second number of a sum or difference is taken apart if both have several digits, the longer factor of a product
    into one product for each significant digit. Raises `ValueError` for a value that is no whole number from 0 to 199.
    """
    found = [State((left, right), (operator,))]
    if operator in "+-" and left >= 10 and right >= 10 and len(parts(right)) > 1:
        summands = parts(right)
        found.append(State((left, *summands), (operator,) * len(summands)))
    if operator == "*":
        long, short = (left, right) if len(parts(left)) >= len(parts(right)) else (right, left)
        if len(parts(long)) > 1:
            factors = [number for part in parts(long) for number in (part, short)]
            found.append(State(tuple(factors), tuple("*+" * len(parts(long)))[:-1]))
            found.append(State(tuple(part * short for part in parts(long)), ("+",) * (len(parts(long)) - 1)))
    return found + _reductions(found[-1])


def _reductions(state: State) -> list[State]:
    """The states in which the two numbers on the left become one, until one is left."""
    found = []
    while state.operators:
        value = combined(state.numbers[:2], state.operators[:1])
        if value is None:
            raise ValueError(f"{state.numbers[0]} {state.operators[0]} {state.numbers[1]} has no value in 0 to {MOST}")
        state = State((value, *state.numbers[2:]), state.operators[1:])
        found.append(state)
    return found


def computed_places(equation: Equation) -> list[int]:
    """The states of an equation whose first number is computed, counted through all of its operations."""
    places, offset, value = [], 0, equation.operands[0]
    for operator, operand in zip(equation.operators, equation.operands[1:], strict=True):
        way = states(value, operator, operand)
        places += [
            offset + place
            for place, state in enumerate(way)
            if place and state.numbers[0] != way[place - 1].numbers[0] and "*" not in state.operators
        ]
        offset, value = offset + len(way), way[-1].numbers[0]
    return places


def written_out(equation: Equation) -> tuple[list[Piece], int]:
    """The pieces of an equation with its arithmetic spelled out, and its value as written.

    Operations are written one after the other: `3+11=14; 14+15=14+10+5=24+5=29`. Raises `ValueError` as `states` does.
    """
    pieces: list[Piece] = []
    value, offset = equation.operands[0], 0
    for number, (operator, operand) in enumerate(zip(equation.operators, equation.operands[1:], strict=True)):
        way = states(value, operator, operand)
        wrong = None if equation.misread is None else equation.misread - offset
        if wrong is not None and 0 <= wrong < len(way):
            state = replace(way[wrong], numbers=(equation.instead, *way[wrong].numbers[1:]))
            way = [*way[:wrong], state, *_reductions(state)]
        offset += len(way)
        pieces += [("; ", True)] if number else []
        left_learned = number > 0 or 0 not in equation.wrong_operands
        pieces += [(str(value), left_learned), (operator, number not in equation.wrong_operators)]
        pieces.append((str(operand), number + 1 not in equation.wrong_operands))
        for place, state in enumerate(way[1:], 1):
            pieces += [("=", True), *_expression(state, first_learned=place != wrong)]
        value = way[-1].numbers[0]
    return pieces, value


def _expression(state: State, first_learned: bool) -> list[Piece]:
    rest = "".join(op + str(number) for op, number in zip(state.operators, state.numbers[1:], strict=True))
    return [(str(state.numbers[0]), first_learned), *([(rest, True)] if rest else [])]


def own_line(step: Step, numbers: Sequence[int], equation: Equation) -> tuple[list[Piece], int]:
    """A line in the student's style and the result that it states; `numbers` stand in for those of the line."""
    before = _between(step.texts[: step.first + 1], numbers[: step.first]).rstrip(_CURRENCIES)
    pieces, value = written_out(equation)
    after = _after(step, numbers, value)
    return [(before, True), *pieces, (after, True)], value


def terse_line(step: Step, numbers: Sequence[int], stated: int, learned: bool) -> list[Piece]:
    """A line in the reference's style that states the result `stated`; `learned`: whether that is a target."""
    before = _between(step.texts[: step.place + 1], numbers[: step.place])
    return [(before, True), (str(stated), learned), (_after(step, numbers, stated), True)]


def _after(step: Step, numbers: Sequence[int], value: int) -> str:
    """What follows the result, in which a number that was the result is what is written in its place."""
    rest = [value if number == step.result else number for number in numbers[step.place + 1 :]]
    return _between(step.texts[step.place + 1 :], rest)


def _between(texts: Sequence[str], numbers: Sequence[int]) -> str:
    """Texts with the numbers between them."""
    return "".join(text + str(number) for text, number in zip(texts, numbers, strict=False)) + (
        texts[-1] if len(texts) > len(numbers) else ""
    )
