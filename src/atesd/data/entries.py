"""Rows checked one by one: each becomes an entry, or a bad row with its reason.

A row is bad without a problem or an answer that can be found, with an id or a text seen before, with text that is not
valid Unicode, with an answer that no checker can read, or with a solution that comes to another answer than the column
says. A solution that ends in a line `#### N`, as GSM8K has it, states the answer N there; the line is not shown.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from atesd.config import ColumnsConfig
from atesd.data.answers import ExactChecker, MathChecker, last_boxed, marked_answer, without_mark
from atesd.data.equivalence import plainly_equal
from atesd.data.golds import unreadable
from atesd.data.rows import (
    NO_ANSWER,
    OTHER_ANSWER,
    SAME_PROBLEM,
    BadRow,
    Row,
    Unreadable,
    cell,
    only_part,
    row_place,
    shown,
)
from atesd.importing import is_named

_LEVEL = re.compile(r"(?:level\s*)?(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_FARTHEST = 2**53  # from here on a floating-point number may stand for a neighbour of the one that was written
_MOST_DIGITS = 4000  # Python writes out integers of up to 4300
_MOST_ZEROS = 12
_WRAPPED = re.compile(r"\$([^$]+)\$|\\\((.+)\\\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Entry:
    """A checked row, its reference not yet cut; `boxed` is what it boxes, where a column states the answer as well."""

    row: int
    id: str
    text: str
    solution: str
    answer: str
    boxed: str | None
    difficulty: int


@dataclass(frozen=True)
class Reading:
    """What a source gave: usable entries, bad rows, a line on each row that is left out on purpose, and notes.

    `place` is what messages call a row by its number; `part` says from which of several sources it is; `filtered` rows
    are not of those that a preset keeps; `files` were read.
    """

    name: str
    entries: tuple[Entry, ...]
    bad: tuple[BadRow, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    place: Callable[[int], str] = row_place
    part: Callable[[int], int] = only_part
    filtered: int = 0
    files: tuple[str, ...] = ()

    @property
    def skipped(self) -> tuple[str, ...]:
        """A line for each bad row, in order, and what was left out on purpose."""
        return (*(f"{self.name}: {line}" for line in self.faults), *self.left_out)

    @property
    def faults(self) -> tuple[str, ...]:
        """Place and reason of each bad row, in order."""
        return tuple(f"{self.place(bad.number)}: {bad.reason}" for bad in sorted(self.bad, key=lambda bad: bad.number))


class _BadValueError(Exception):
    """Why a row is bad; never leaves this module."""


def checked(
    name: str,
    rows: Iterable[Row | BadRow],
    columns: ColumnsConfig,
    checker: str,
    place: Callable[[int], str] = row_place,
    *,
    solutions: bool = True,
    complete: bool = False,
) -> Reading:
    """Sort the rows of `name` into entries and bad rows. `checker` exact compares boxed answers as strings only.

    A checker of the user's is not asked here: any text is an answer, and no solution is compared with it.
    `solutions` False: the answers alone count, whatever the solutions come to. Of the copies of a problem the first is
    used whose solution does not come to another answer; `complete`: the first that has a solution, if any has.
    """
    entries: list[Entry] = []
    bad: list[BadRow] = []
    own = is_named(checker)
    for row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            entries.append(_entry(row, columns, own))
        except _BadValueError as error:
            bad.append(BadRow(row.number, str(error)))
    contradicted, late = _contradicted(entries, checker) if solutions and not own else ({}, 0)
    sound = (entry for entry in entries if entry.row not in contradicted)
    copies = _copies(sorted(sound, key=lambda e: complete and not e.solution), columns.id is not None, place)
    bad += [
        BadRow(entry.row, f"{OTHER_ANSWER[0]} '{shown(entry.boxed)}' but its answer is '{shown(entry.answer)}'")
        for entry in contradicted.values()
    ]
    bad += [BadRow(row, reason) for row, reason in copies.items()]
    usable = tuple(entry for entry in entries if entry.row not in contradicted and entry.row not in copies)
    note = f"{name}: {late} rows are used although comparing their boxed answer with the stated one took too long"
    return Reading(name, usable, tuple(bad), notes=(note,) if late else (), place=place)


def _copies(entries: Iterable[Entry], named: bool, place: Callable[[int], str]) -> dict[int, str]:
    """Why entries are copies of an earlier one, by row: the same text, and where a column names them the same id."""
    texts: dict[str, int] = {}
    names: dict[str, int] = {}
    reasons = {}
    for entry in entries:
        text = text_hash(entry.text) if named else entry.id
        if entry.id in names:
            same = f"its id '{shown(entry.id)}' is that of" if named else SAME_PROBLEM
            reasons[entry.row] = f"{same} {place(names[entry.id])}"
        elif text in texts:
            reasons[entry.row] = f"{SAME_PROBLEM} {place(texts[text])}"
        else:
            names[entry.id] = texts[text] = entry.row
    return reasons


def _entry(row: Row, columns: ColumnsConfig, own: bool) -> Entry:
    """`own`: the user's checker decides what an answer is."""
    values = row.values
    text = _text(values, columns.problem)
    if not text.strip():
        raise _BadValueError(f"no problem: column '{columns.problem}' is empty")
    solution = _text(values, columns.solution) if columns.solution is not None else ""
    solution = solution if solution.strip() else ""
    boxed = last_boxed(solution) or marked_answer(solution)
    solution = without_mark(solution)
    stated = _stated_answer(values, columns.answer) if columns.answer is not None else None
    answer = stated or boxed
    if answer is None:
        stated_nowhere = "data.columns.answer is not set" if columns.answer is None else f"'{columns.answer}' is empty"
        raise _BadValueError(f"{NO_ANSWER}: no closed \\boxed{{}} in the solution, and {stated_nowhere}")
    if last_boxed(f"\\boxed{{{answer}}}") != answer:
        raise _BadValueError(f"the answer '{shown(answer)}' cannot stand inside \\boxed{{}}: its braces do not match")
    if not own and (fault := unreadable(answer)) is not None:
        raise _BadValueError(f"the answer '{shown(' '.join(answer.split()))}' {fault}")
    return Entry(
        row.number,
        text_hash(text) if columns.id is None else _id(values, columns.id),
        text,
        solution,
        answer,
        boxed if stated else None,
        0 if columns.difficulty is None else _difficulty(values, columns.difficulty),
    )


def _value(values: Mapping[str, Any], column: str) -> Any:
    """The value in a column; of a list with one element that element, and None of an empty list."""
    value = cell(values, column)
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise _BadValueError(f"column '{column}' holds a list of {len(value)}, not one value: {shown(value)}")
        value = value[0] if value else None
    if isinstance(value, Unreadable):
        raise _BadValueError(f"column '{column}' {value.reason}")
    return value


def _text(values: Mapping[str, Any], column: str) -> str:
    """The text in a column; empty if there is none."""
    value = _value(values, column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _BadValueError(f"column '{column}' holds no text but {type(value).__name__} {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadValueError(f"column '{column}' is not valid Unicode at character {error.start}") from None
    return value


def _stated_answer(values: Mapping[str, Any], column: str) -> str | None:
    """The answer that a column states, a number or text, freed of a box or dollars around it; None if it is empty."""
    value = _value(values, column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (float, Decimal)) and math.isfinite(value):
        if isinstance(value, Decimal) and value.adjusted() >= _MOST_DIGITS:
            raise _BadValueError(
                f"column '{column}' holds {shown(value)}; numbers have fewer than {_MOST_DIGITS} digits"
            )
        if isinstance(value, float) and abs(value) >= _FARTHEST:
            raise _BadValueError(f"column '{column}' holds {value}, a number that is not exact; write it as text")
        return _written(value)
    answer = _text(values, column).strip()
    answer = marked_answer(answer) or answer
    if wrapped := _WRAPPED.fullmatch(answer):
        answer = (wrapped[1] or wrapped[2]).strip()
    box = last_boxed(answer)
    if box is not None and (other := last_boxed(answer[: answer.rfind(box)].rpartition("\\")[0])) not in (None, box):
        raise _BadValueError(f"column '{column}' holds two boxed answers, '{shown(other)}' and '{shown(box)}'")
    return box or answer or None


def _written(value: int | float | Decimal) -> str:
    """A number without an exponent, as a person would write it, where that takes few digits."""
    if value == int(value):
        return str(int(value))
    number = Decimal(str(value))
    return f"{number:f}" if number.adjusted() > -_MOST_ZEROS else str(value)


def _id(values: Mapping[str, Any], column: str) -> str:
    value = _value(values, column)
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(values, column)
    if not name.strip():
        raise _BadValueError(f"no id: column '{column}' is empty")
    return name


def _difficulty(values: Mapping[str, Any], column: str) -> int:
    """A level, to the nearest integer; `Level 5` is 5."""
    value = _value(values, column)
    written = str(value).strip() if isinstance(value, (str, int, float, Decimal)) else ""
    level = _LEVEL.fullmatch(written)
    if level is None:
        raise _BadValueError(f"column '{column}' holds no level but {shown(value)}")
    number = float(level[1])
    if abs(number) >= _FARTHEST:
        raise _BadValueError(f"column '{column}' holds the level {shown(value)}; levels are below 2^53")
    return round(number)


def _contradicted(entries: Iterable[Entry], kind: str) -> tuple[dict[int, Entry], int]:
    """Entries, by row, whose solution boxes another answer than the stated one; how many comparisons took too long.

    Equal without algebra is agreement; the rest is for math-verify, unless `kind` is exact. A comparison that was not
    finished shows no contradiction.
    """
    doubtful = [(entry, entry.boxed) for entry in entries if entry.boxed is not None]
    doubtful = [(entry, boxed) for entry, boxed in doubtful if not plainly_equal(entry.answer, boxed)]
    if not doubtful:
        return {}, 0
    checker = ExactChecker() if kind == "exact" else MathChecker()
    try:
        verdicts = checker.check([(f"\\boxed{{{boxed}}}", entry.answer) for entry, boxed in doubtful])
    finally:
        checker.close()
    pairs = zip(doubtful, verdicts, strict=True)
    others = {entry.row: entry for (entry, _), verdict in pairs if verdict in ("wrong", "unparseable")}
    return others, verdicts.count("timeout")


def text_hash(text: str) -> str:
    """16 hexadecimal digits that name a problem by its text; a run of white space is one blank, as in `split_of`."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).hexdigest()
