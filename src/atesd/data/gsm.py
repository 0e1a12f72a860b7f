"""Word problems from reasoning-gym's `gsm_symbolic`: generated, with the reasoning step by step (extra `gsm`).

Some of its templates write reasoning that is wrong, `0.74*40 = 29`. Such a row is left out, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from atesd.config import ColumnsConfig
from atesd.data.numbers import plain_value
from atesd.data.rows import OTHER_ANSWER, BadRow, Row, require

COLUMNS = ColumnsConfig(answer="answer", difficulty="difficulty")
MOST_STEPS = 8  # ours; three templates have more lines, up to 18

_ANSWER_LINE = re.compile(r"\s*####[ \t]*(.*?)\s*$")
_NUMBER = r"[$£€¥]?\d[\d,]*(?:\.\d+)?%?"
_OPERATION = re.compile(rf"(?P<operator>[-+*/x])?\s*(?P<number>{_NUMBER})\s*")
_EQUATION = re.compile(
    rf"(?P<left>{_NUMBER}(?:\s*[-+*/x]\s*{_NUMBER})+)\s*=\s*(?P<right>-?{_NUMBER})(?!\s*[-+*/x÷×]\s*[\d$£€¥(])"
)
_UNITS = re.compile(r"[$£€¥%,]")
_ROUNDING = 0.011  # amounts are written with two decimals


def gsm_rows(seed: int, count: int) -> Iterator[Row | BadRow]:
    """`count` rows with the columns problem, solution, answer, difficulty (lines of reasoning, at most 8).

    The solution is the reasoning without the generator's answer line. Row n depends on (seed, n) alone. Raises
    `DataError` if reasoning-gym is not installed.
    """
    gym = require("reasoning_gym", "gsm", "data.source: gsm_symbolic")
    examples = gym.create_dataset("gsm_symbolic", seed=seed, size=count)
    return (gsm_row(number, examples[number - 1]) for number in range(1, count + 1))


def gsm_row(number: int, example: dict[str, Any]) -> Row | BadRow:
    """A generated example as a row; a bad one if its reasoning is wrong."""
    written, answer = example["metadata"]["answer_cot"], example["answer"]
    line = _ANSWER_LINE.search(written)
    solution = written[: line.start()] if line else written
    fault = _fault(solution, line[1] if line else None, answer)
    if fault is not None:
        return BadRow(number, fault)
    steps = sum(bool(text.strip()) for text in solution.splitlines())
    values = {
        "problem": example["question"],
        "solution": solution,
        "answer": answer,
        "difficulty": min(steps, MOST_STEPS),
    }
    return Row(number, values)


def _fault(solution: str, stated: str | None, answer: str) -> str | None:
    """What is wrong with generated reasoning; None if nothing is."""
    value = plain_value(answer)
    if value is None or value < 0:
        return f"the answer {answer} is no plain number from 0 on"
    if stated is None or plain_value(stated) != value:
        return f"{OTHER_ANSWER[1]} {stated} but the answer is {answer}"
    if float(value) not in (_amount(number.rstrip("%")) for number in re.findall(_NUMBER, solution)):
        return f"{OTHER_ANSWER[2]} the answer {answer}"
    wrong = next(_wrong_equations(solution), None)
    return None if wrong is None else f"its reasoning states {wrong}"


def _wrong_equations(text: str) -> Iterator[str]:
    """Equations between plain numbers whose sides differ by more than rounding; what cannot be read is not judged."""
    for match in _EQUATION.finditer(text):
        before = text[: match.start()].rstrip()[-1:]
        if before and (before in "+-*/x÷×(=.,%" or before.isdigit()):
            continue  # the end of a longer expression
        left = _value(match["left"])
        right = _amount(match["right"])
        if left is not None and abs(left - right) > _ROUNDING:
            yield match[0]


def _value(expression: str) -> float | None:
    """A sum of products and quotients; None for a division by zero."""
    terms: list[float] = []
    for operation in _OPERATION.finditer(expression):
        operator, number = operation["operator"], _amount(operation["number"])
        if operator in ("*", "x"):
            terms[-1] *= number
        elif operator == "/":
            if not number:
                return None
            terms[-1] /= number
        else:
            terms.append(-number if operator == "-" else number)
    return sum(terms)


def _amount(number: str) -> float:
    plain = float(_UNITS.sub("", number))
    return plain / 100 if number.endswith("%") else plain
