r"""Sums in writing: chains of additions and subtractions, worked out a line at a time (`data.source: arithmetic`).

    Work out 47 + 5 - 8 + 6.            47 + 5 = 52
                                        52 - 8 = 44
                                        44 + 6 = 50
                                        \boxed{50}

For language models too small for word problems: a few dozen tokens to read and as many to write. How hard it is, is set
by the number of operations: each one can go wrong, and what goes wrong is carried along.
"""

from __future__ import annotations

from collections.abc import Iterator

from atesd.config import ColumnsConfig
from atesd.data.rows import Row
from atesd.maths.keyed import generator

COLUMNS = ColumnsConfig(answer="answer", difficulty="difficulty")
LEAST_OPERATIONS = 3  # ours: with fewer lines most reveal ratios show the same

_START = 10, 99
_STEP = 2, 9


def arithmetic_rows(seed: int, count: int, most_operations: int) -> Iterator[Row]:
    """`count` rows with the columns problem, solution, answer, difficulty (operations, from 3 to `most_operations`).

    Numbers begin with two digits, are changed by 2 to 9, and never fall below 0. Row n depends on (seed, n) and
    `most_operations` alone. The same sum may come twice.
    """
    return (_row(seed, number, most_operations) for number in range(1, count + 1))


def _row(seed: int, number: int, most_operations: int) -> Row:
    draws = generator(seed, "arithmetic", number)
    operations = int(draws.integers(LEAST_OPERATIONS, most_operations, endpoint=True))
    value = int(draws.integers(*_START, endpoint=True))
    expression, lines = str(value), []
    for _ in range(operations):
        step = int(draws.integers(*_STEP, endpoint=True))
        sign = "-" if draws.integers(2) and step <= value else "+"
        result = value - step if sign == "-" else value + step
        expression += f" {sign} {step}"
        lines.append(f"{value} {sign} {step} = {result}\n")
        value = result
    solution = "".join(lines) + f"\\boxed{{{value}}}"
    values = {"problem": f"Work out {expression}.", "solution": solution, "answer": str(value)}
    return Row(number, {**values, "difficulty": operations})
