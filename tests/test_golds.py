"""Which golds are answers: what no checker could compare anything with is refused by its row, with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atesd.config import ColumnsConfig
from atesd.data.entries import checked
from atesd.data.equivalence import LONGEST
from atesd.data.golds import unreadable
from atesd.data.rows import Row

SENTENCE = "a sentence around the answer"
PROSE = {
    "English statement": ("The answer is 18.", SENTENCE),
    "formula in a statement": (r"The probability is $\frac{3}{7}$", SENTENCE),
    "statement in text style": (r"\text{The area is } 12\pi", SENTENCE),
    "statement of a variable": ("x equals 5", SENTENCE),
    "count in a statement": ("There are 5 solutions", SENTENCE),
    "Spanish statement": ("La respuesta es 18", SENTENCE),
    "German statement": ("Die Antwort ist 18", SENTENCE),
    "Chinese statement": ("答案是18", SENTENCE),
    "Russian label": ("Ответ: 18", SENTENCE),
    "label": (r"Final answer: $\frac{1}{2}$", SENTENCE),
    "label of words": ("Answer: even", SENTENCE),
    "narration": ("So she makes $18 every day.", SENTENCE),
    "derivation": ("Let $x=5$. Then $y=6$.", SENTENCE),
    "end of a derivation": ("We get $x = 5$", SENTENCE),
    "reason behind a number": (r"2+2=4 because $2 \cdot 2=4$", SENTENCE),
    "reason in text style": (r"x > 5 \text{ since } x - 5 > 0", SENTENCE),
    "verdict with its reason": ("Yes, it converges.", SENTENCE),
    "two sentences": ("Energy stays constant. It is conserved.", SENTENCE),
    "explanation": ("The energy is conserved because no force acts on the body.", "a text of 11 words"),
    "explanation in text style": (
        r"\text{The star is hotter than the sun, so its light is bluer}",
        "a text of 12 words",
    ),
    "explanation with a formula": (
        "It follows that $x = 5$, as the other root of the equation is negative",
        "12 words",
    ),
    "Chinese explanation": ("能量守恒，因为没有外力作用在物体上，所以它保持不变", "a text of 12 words"),
    "solution as published": ("Natalia sold 48/2 = 24 clips in May and 72 of them altogether", "a text of 9 words"),
    "solution of lines": ("She sells 9.\n18 dollars", "2 lines"),
    "lines around a formula": ("First\n\\begin{align}x&=5\\end{align}\nso 5", "3 lines"),
    "marked solution": ("#### 18", "####"),
    "proof": ("proof", "an answer that is not there"),
    "no answer found": ("notfound", "an answer that is not there"),
    "not available": ("N/A", "an answer that is not there"),
    "exercise": ("Left as an exercise", "an answer that is not there"),
    "pointer to a figure": ("See Figure 3", "an answer that is not there"),
    "open question": (r"\text{Answers may vary.}", "an answer that is not there"),
    "picture": ("![](graph.png)", "markup"),
    "page": ("<p>18</p>", "markup"),
}
OTHERS = {
    "marks": ("???", "neither a number nor a word"),
    "empty formula": ("$ $", "neither a number nor a word"),
    "long number": ("1" * (LONGEST + 1), "4001 characters"),
    "deep brackets": ("(" * 16 + "1" + ")" * 16, "15 brackets"),
}


@pytest.mark.parametrize(("gold", "words"), [*PROSE.values(), *OTHERS.values()], ids=[*PROSE, *OTHERS])
def test_a_gold_that_no_checker_can_read_has_a_reason(gold: str, words: str):
    assert words in (unreadable(gold) or "readable")


@pytest.mark.parametrize(
    "gold",
    [
        "18",
        "∞",
        r"\emptyset",
        "Proofreading",
        r"\text{Even}",
        r"\text{No solution}",
        "The limit does not exist",
        "They are equal",
        "St. Louis",
        "Yes",
        "No such integers exist",
        r"\text{The midpoints form a regular hexagon}",
        "18 dollars per day",
        r"18 \text{ dollars, as he sells nine}",
        "10:30 in the morning",
        "3:2",
        r"f: \mathbb{R} \to \mathbb{R}",
        r"\{x : x > 3\}",
        r"x = \frac{\pi}{2} + k\pi \text{ for every integer } k",
        r"2 \text{ if } n \text{ is even}",
        r"x=5 \text{ or } x=6",
        "v_{is}=5",
        "B. The train arrives at noon",
        "\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}",
    ],
)
def test_words_and_mathematics_with_a_remark_are_answers(gold: str):
    assert unreadable(gold) is None


@pytest.mark.parametrize("name", ["answers.jsonl", "more_answers.jsonl"])
def test_no_gold_of_the_graded_answers_is_refused(name: str):
    rows = map(json.loads, (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines())
    assert {gold: reason for row in rows if (reason := unreadable(gold := str(row["gold"])))} == {}


def test_every_row_with_such_a_gold_is_a_bad_one_with_its_number_and_the_others_stay():
    golds = [gold for kind, (gold, _) in PROSE.items() if kind != "marked solution"]  # which a column may hold
    rows = [Row(n, {"problem": f"Problem {n}", "final": gold}) for n, gold in enumerate([*golds, "18"], 1)]
    reading = checked("p.jsonl", rows, ColumnsConfig(solution=None, answer="final"), "math")
    assert [(entry.row, entry.answer) for entry in reading.entries] == [(len(rows), "18")]
    assert [line.split(" '")[0] for line in reading.faults] == [f"row {n}: the answer" for n in range(1, len(rows))]
