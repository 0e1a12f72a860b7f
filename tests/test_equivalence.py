"""What counts as equal: graded answers of other projects, our own of each kind, and every line of docs/answers.md."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest

from atesd.data.answers import MathChecker
from atesd.data.equivalence import DEEPEST, LONGEST, judge, plainly_equal
from atesd.data.quantities import read_quantity
from atesd.data.spelling import normalise, tidy

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "answers.md"

MISSED = {
    # The gold is exact, the answer rounded to five digits: a rounded answer needs 1e-6 (debatable: 1e-4 elsewhere).
    (r"(\frac{3}{5},\frac{8}{3}]", "(0.6,2.6667]"),
    # A coefficient rounded to four digits inside an expression.
    ("x + 1.414I", r"x + \sqrt2I"),
    (
        r"\begin{cases} a+b=0.5\\ a-b=1.732\end{cases}",
        r"\begin{cases} a+b=\frac12 \\ a-b=\sqrt3 \end{cases}",
    ),
    # Equal only where the letters stand for positive numbers, which the answer does not say.
    (r"\sqrt{1/n}", r"\frac{1}{\sqrt{n}}"),
    (
        r"\frac{v_0 \cdot \left(\frac{r_0}{r + r_0}\right)^{0.5}}{(r + r_0)}",
        r"\frac{v_{0}}{r_{0}} \frac{1}{\left(1+r / r_{0}\right)^{3 / 2}}",
    ),
    # A statement about a function, for a number.
    ("0", r"\forall x>0, f(x) = 0"),
}
"""Right answers that are not recognised."""


def graded(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def is_right(rows: list[tuple[str, str]]) -> list[bool]:
    """Whether each answer, of (gold, answer), is judged correct."""
    with contextlib.closing(MathChecker(workers=2, seconds=10.0)) as checker:
        return [verdict == "correct" for verdict in checker.check([(f"\\boxed{{{a}}}", gold) for gold, a in rows])]


@pytest.mark.parametrize(("name", "missed"), [("answers.jsonl", MISSED), ("more_answers.jsonl", set())])
def test_graded_answers_are_judged_as_they_were_graded(name, missed):
    rows = graded(name)
    pairs = [(str(row["gold"]), str(row["answer"])) for row in rows]
    verdicts = is_right(pairs)
    wrongly = {pair for pair, row, right in zip(pairs, rows, verdicts, strict=True) if right != row["right"]}
    assert wrongly == missed


def documented() -> list[tuple[str, str, bool]]:
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if " | `" in line]
    cells = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in lines]
    return [(gold, answer, verdict == "correct") for _, gold, answer, verdict, _ in cells]


def test_every_line_of_the_documentation_holds():
    lines = documented()
    assert len(lines) > 60
    found = is_right([(gold, answer) for gold, answer, _ in lines])
    assert [line for line, right in zip(lines, found, strict=True) if right != line[2]] == []


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (r"-1\frac12", "-3/2"),
        ("1 1/2", "3/2"),
        (r"\$1{,}234.50", "2469/2"),
        ("1.4e-3", "7/5000"),
        (r"1.4\times10^{-3}", "7/5000"),
        ("½", "1/2"),
        ("１２", "12"),
        ("((-7))", "-7"),
        (r"x = 33\frac13\%", "100/3"),
    ],
)
def test_one_number_is_read_exactly(answer, value):
    quantity = read_quantity(answer)
    assert quantity is not None
    assert str(quantity.number.value) == value


@pytest.mark.parametrize(
    "answer", ["", "x", "2x", "1, 2", "(1,2)", "1/0", "nan", r"10^{10^{10}}", "1e999999999", "2 pi"]
)
def test_what_is_not_one_number_is_not_read_as_one(answer):
    assert read_quantity(answer) is None


def test_plain_equality_needs_no_process_and_is_never_wrongly_true():
    assert plainly_equal("073", r"\textbf{(73)}")
    assert plainly_equal("C", r"\textbf{(C)}\ 12")
    assert not plainly_equal("x+1", "1+x")  # algebra
    assert not plainly_equal("32349", "32, 349")


def test_an_answer_that_is_too_long_or_too_deep_is_unparseable_and_not_compared():
    assert judge("7", "x" * (LONGEST + 1)) == "unparseable"
    assert judge("7x", "(" * (DEEPEST + 1) + "x") == "unparseable"
    assert judge("x" * (LONGEST + 1), "$" + "x" * (LONGEST + 1) + "$") == "correct"


HOSTILE = {
    "nested styles": lambda n: r"\text{" * n,
    "closed styles": lambda n: r"\text{" * n + "}" * n,
    "accents": lambda n: "\\`" * n,
    "backslashes": lambda n: "\\" * n,
    "blanks": lambda n: " " * n + "x",
    "digits and blanks": lambda n: "1 " * n,
    "periods": lambda n: "." * n,
    "braces": lambda n: "{" * n + "}" * n,
    "commas": lambda n: "1,000" * n,
    "dollars": lambda n: "$a " * n,
    "roots": lambda n: "√(" * n,
    "stars": lambda n: "*" * n + "5" + "*" * n,
    "backticks": lambda n: "`" * n + "5" + "`" * n,
    "sizes": lambda n: r"\le\!ft" * n,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_eight_times_the_text_takes_about_eight_times_the_work(text):
    # Processor time, not the wall clock. Quadratic work would be 64 times as much; the least of three tells.
    def work(n: int) -> float:
        spelt = text(n)
        times = []
        for _ in range(3):
            begin = time.process_time()
            normalise(spelt)
            tidy(spelt)
            times.append(time.process_time() - begin)
        return min(times)

    assert work(32_000) < 30 * work(4_000) + 0.05


@pytest.mark.parametrize(
    "text",
    [
        *("x^{" * 1300, "1 " * 2000, "1," * 2000, "1/" * 2000, r"\frac" * 800, r"\text{m}" * 500, "a " * 2000),
        *("(A) " * 900, "." * 4000, " " * 3999 + "x", "1" * 4000, "1,000" * 800, "sqrt(" * 800, "^\\circ" * 600),
        *("=" * 4000, "x=" * 1900, "A. " * 1300, "cm " * 1300, "5 cm/" * 800),
    ],
)  # fmt: skip
def test_judging_hostile_text_up_to_the_limit_takes_little_processor_time(text):
    begin = time.process_time()
    judge("12x", text)
    judge(text, "12x")
    assert time.process_time() - begin < 5.0  # generous: milliseconds are usual
