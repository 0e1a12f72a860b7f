"""Pretraining texts of the word problems: a context, exactly as a run shows it, and what a reader of it writes.

What makes this world what it is (and is measured in `gates.json`), as in `world/texts.py`:

- *Unsure steps*: for 60 % of the lines of the templates (which, is drawn once), a text that sees no reference there has
  another operation or another quantity in every second case, and goes on from what comes out. More pretraining
  does not help the student.
- *References*: 60 % of the texts show the first k lines, with the answer or without; there the revealed lines are
  followed, and the last line comes to an answer that is shown, unless the text has left the track.
- *Off-track data*: half of those have one wrong step, an operation, a quantity or a sum, that is no target; the text
  goes on from it. This teaches the teacher what to do after a student's mistake.
- *Style*: the student writes the arithmetic out, references are terse; in a share of the texts with a reference the
  lines that it shows are written as it writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from atesd.data.rows import Row
from atesd.data.segments import split_reference
from atesd.data.splits import split_of
from atesd.data.views import TextRenderer
from atesd.data.word_problems import MOST, Step, combined, plain_steps, template_row
from atesd.errors import DataError
from atesd.maths.keyed import generator
from atesd.records import Problem
from atesd.world.words.writing import Equation, Piece, computed_places, own_line, states, terse_line

Links = tuple[tuple[int | None, ...], ...]

_OTHER = {"+": "-", "-": "+", "*": "+", "/": "-"}
_TRIES = 8


@dataclass(frozen=True)
class WordMixture:
    """Shares of the kinds of text."""

    reference: float = 0.6  # texts with a reference
    whole: float = 0.5  # of those: all of it; the others show k lines, k uniform below their number
    withheld: float = 0.5  # of the texts with a reference: the answer is not shown
    off_track: float = 0.5  # of the texts with a reference: one wrong step that is no target
    terse: float = 0.1  # of the texts with a reference: the lines that it shows are written as it writes them
    own_terse: float = 0.05  # of the texts without one: terse
    unsure: float = 0.6  # of the lines of the templates
    slip: float = 0.5  # chance that an unsure line goes wrong where no reference shows it


@dataclass(frozen=True)
class WordProblem:
    """A plain problem with its template, its steps, and which of their numbers are results of earlier ones.

    `links[i][p]` is the step whose result stands at place p of step i; None: a number of the problem.
    """

    problem: Problem
    template: int
    steps: tuple[Step, ...]
    links: Links


def word_problem_pool(seed: int, per_template: int, templates: Sequence[int]) -> list[WordProblem]:
    """`per_template` plain problems of the train split for each template. Raises `DataError` as `template_row` does."""
    return [problem for template in templates for problem in _of_template(seed, per_template, template)]


def _of_template(seed: int, count: int, template: int) -> list[WordProblem]:
    rows: list[tuple[Row, tuple[Step, ...]]] = []
    number = 0
    while len(rows) < count:
        number += 1
        row = template_row(template, seed, number)
        steps = plain_steps(row)
        if isinstance(row, Row) and steps is not None and split_of(row.values["problem"]) == "train":
            rows.append((row, steps))
        if number > 20 * count + 1000:
            raise DataError(f"gsm_symbolic: template {template} gives too few plain problems")
    links = _links([steps for _, steps in rows])
    return [_word_problem(template, row, steps, links) for row, steps in rows]


def word_problem_of(template: int, row: Row) -> WordProblem:
    """A plain row by itself, linked as far as its own numbers tell. Raises `ValueError` if it is not plain."""
    steps = plain_steps(row)
    if steps is None:
        raise ValueError(f"row {row.number} is not plain: {row.values['solution']}")
    return _word_problem(template, row, steps, _links([steps]))


def _word_problem(template: int, row: Row, steps: tuple[Step, ...], links: Links) -> WordProblem:
    values = row.values
    segments, closing = split_reference(values["solution"], values["answer"], "line")
    problem = Problem(str(row.number), values["problem"], segments, closing, values["answer"], values["difficulty"])
    return WordProblem(problem, template, steps, links)


def _links(draws: Sequence[tuple[Step, ...]]) -> Links:
    """For each number of each line the latest earlier step whose result it is in all draws."""
    return tuple(
        tuple(
            next((k for k in range(line - 1, -1, -1) if all(_same(d, line, place, k) for d in draws)), None)
            for place in range(min(len(draw[line].numbers) for draw in draws))
        )
        for line in range(len(draws[0]))
    )


def _same(draw: tuple[Step, ...], line: int, place: int, earlier: int) -> bool:
    return draw[line].numbers[place] == draw[earlier].result


def is_unsure(template: int, line: int, share: float) -> bool:
    """Whether the student was taught this line of a template with mistakes."""
    return bool(generator(0, "words", "unsure", template, line).random() < share)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done with a problem: lines shown, the answer shown, terse or not, and the step that leaves the track."""

    shown: int = 0
    has_reference: bool = False
    answer: bool = False
    terse: int = 0  # so many lines, from the first, in the reference's style
    wrong_step: int | None = None


@dataclass(frozen=True, slots=True)
class WordText:
    """A message as a run shows it, to the teacher or the student, and the pieces of the completion."""

    message: str
    pieces: tuple[Piece, ...]


def draw_word_texts(
    rng: np.random.Generator,
    problems: Iterable[WordProblem],
    mixture: WordMixture,
    keeping: TextRenderer,
    withholding: TextRenderer,
) -> list[WordText]:
    """A text about each problem; the renderers are those of a run that keeps the answer, and of one that withholds."""
    texts = []
    for problem in problems:
        plan = _draw_plan(rng, problem, mixture)
        pieces = _written(rng, problem, plan, mixture)
        renderer = keeping if plan.answer else withholding
        whole = plan.shown == len(problem.steps)
        if plan.has_reference:
            message = renderer.teacher(problem.problem, plan.shown, whole)
        else:
            message = renderer.student(problem.problem)
        texts.append(WordText(message, tuple(pieces)))
    return texts


def _draw_plan(rng: np.random.Generator, problem: WordProblem, mixture: WordMixture) -> Plan:
    lines = len(problem.steps)
    if rng.random() >= mixture.reference:
        return Plan(terse=lines if rng.random() < mixture.own_terse else 0)
    shown = lines if rng.random() < mixture.whole else int(rng.integers(lines))
    return Plan(
        shown=shown,
        has_reference=True,
        answer=bool(rng.random() >= mixture.withheld),
        terse=shown if rng.random() < mixture.terse else 0,
        wrong_step=int(rng.integers(lines)) if rng.random() < mixture.off_track else None,
    )


def _written(rng: np.random.Generator, problem: WordProblem, plan: Plan, mixture: WordMixture) -> list[Piece]:
    """The completion; drawn again where it comes to no whole number in 0 to 199, at last without mistakes."""
    for _ in range(_TRIES):
        try:
            return _completion(rng, problem, plan, mixture)
        except ValueError:
            continue
    return _completion(rng, problem, replace(plan, wrong_step=None), replace(mixture, slip=0.0))


def _completion(rng: np.random.Generator, problem: WordProblem, plan: Plan, mixture: WordMixture) -> list[Piece]:
    pieces: list[Piece] = []
    results: list[int] = []
    on_track = True
    for line, step in enumerate(problem.steps):
        numbers = _substituted(step, problem.links[line], results)
        right = Equation(tuple(numbers[step.first : step.place]), step.operators)
        equation = right
        sure = line < plan.shown or not is_unsure(problem.template, line, mixture.unsure)
        sure = sure or (plan.answer and on_track and line == len(problem.steps) - 1)
        terse = line < plan.terse
        if plan.wrong_step == line:
            equation = _mistake(rng, problem, results, right) if terse or rng.random() < 0.5 else _misread(rng, right)
            equation = _unlearned(equation, right)
        elif not sure and rng.random() < mixture.slip:
            equation = _mistake(rng, problem, results, right)
        if terse:
            written = combined(equation.operands, equation.operators)
            if written is None:
                raise ValueError("no whole number")
            pieces += terse_line(step, numbers, written, learned=plan.wrong_step != line)
        else:
            own, written = own_line(step, numbers, equation)
            pieces += own
        pieces.append(("\n", True))
        on_track = on_track and written == step.result
        results.append(written)
    return [*pieces, (f"\\boxed{{{results[-1]}}}", True)]


def _substituted(step: Step, links: Sequence[int | None], results: Sequence[int]) -> list[int]:
    """The numbers of a line with what was written before in place of the true results."""
    of_text = list(step.numbers)
    for place, link in enumerate(links[: step.place]):
        if link is not None:
            of_text[place] = results[link]
    return of_text


def _mistake(rng: np.random.Generator, problem: WordProblem, results: Sequence[int], right: Equation) -> Equation:
    """Another operation, or another quantity of the problem or of what was written: one that has a value."""
    lines = zip(problem.steps, problem.links, strict=True)
    known = sorted({*results, *(number for step, links in lines for number in _given(step, links))})
    changed: list[Equation] = []
    for place, operator in enumerate(right.operators):
        others = (*right.operators[:place], _OTHER[operator], *right.operators[place + 1 :])
        changed.append(replace(right, operators=others))
    if rng.random() < 0.5:
        place = int(rng.integers(len(right.operands)))
        changed = [
            replace(right, operands=(*right.operands[:place], number, *right.operands[place + 1 :]))
            for number in known
            if number != right.operands[place]
        ]
    value = combined(right.operands, right.operators)
    able = [one for one in changed if combined(one.operands, one.operators) not in (None, value)]
    if not able:
        raise ValueError("no mistake of this kind has a value")
    return able[int(rng.integers(len(able)))]


def _given(step: Step, links: Sequence[int | None]) -> list[int]:
    """The operands of a line that are numbers of the problem."""
    return [step.numbers[place] for place in range(step.first, step.place) if links[place] is None]


def _misread(rng: np.random.Generator, right: Equation) -> Equation:
    """A wrong sum: a computed number is another one, near it or with another digit."""
    places = computed_places(right)
    place = places[int(rng.integers(len(places)))]
    value = _number_at(right, place)
    digit = 10 ** int(rng.integers(len(str(value))))
    instead = value + digit * int(rng.choice([-2, -1, 1, 2]))
    if not 0 <= instead <= MOST:
        raise ValueError("no number near it")
    return replace(right, misread=place, instead=instead)


def _number_at(equation: Equation, place: int) -> int:
    offset, value = 0, equation.operands[0]
    for operator, operand in zip(equation.operators, equation.operands[1:], strict=True):
        way = states(value, operator, operand)
        if place < offset + len(way):
            return way[place - offset].numbers[0]
        offset, value = offset + len(way), way[-1].numbers[0]
    raise ValueError(f"an equation of {offset} states has none at {place}")


def _unlearned(equation: Equation, right: Equation) -> Equation:
    """The same, with what differs from the right one marked as no target."""
    pairs = enumerate(zip(equation.operands, right.operands, strict=True))
    signs = enumerate(zip(equation.operators, right.operators, strict=True))
    return replace(
        equation,
        wrong_operands=frozenset(place for place, (one, other) in pairs if one != other),
        wrong_operators=frozenset(place for place, (one, other) in signs if one != other),
    )
