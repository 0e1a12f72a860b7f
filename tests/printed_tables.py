"""The tables that a program prints, read back cell by cell, and where two printings differ."""

from __future__ import annotations

import re
from collections.abc import Sequence

Cells = dict[tuple[str, str, str], str]
"""A cell's text by the title of its table, the first word of its row and the heading of its column."""

_PIECE = re.compile(r"\S+(?: \S+)*")


def read_cells(text: str) -> Cells:
    """Every cell of every table in the text: a title, a rule, headings (wrapped or not), a rule, rows, a rule."""
    lines = text.splitlines()
    rules = [i for i, line in enumerate(lines) if line and set(line) == {"-"}]
    if len(rules) % 3:
        raise ValueError(f"{len(rules)} rules do not make tables of three each")
    cells: Cells = {}
    for top, middle, bottom in zip(rules[0::3], rules[1::3], rules[2::3], strict=True):
        rows = [list(_PIECE.finditer(line)) for line in lines[middle + 1 : bottom]]
        names = _headings(lines[top + 1 : middle], [cell.end() for cell in rows[0]])
        for row in rows:
            for name, cell in zip(names[1:], row[1:], strict=True):
                cells[lines[top - 1], row[0][0], name] = cell[0]
    return cells


def _headings(lines: Sequence[str], ends: Sequence[int]) -> list[str]:
    """The heading of each column; all but the first end where the cells below them do."""
    names: list[list[str]] = [[] for _ in ends]
    for line in lines:
        for piece in _PIECE.finditer(line):
            names[0 if piece.start() == 0 else ends.index(piece.end())].append(piece[0])
    return [" ".join(words) for words in names]


def differences(expected: str, found: str) -> list[str]:
    """A line for each cell that is not the same in both: table, row, column, and its text in either."""
    theirs, ours = read_cells(expected), read_cells(found)
    return [
        f"{title}: {row}, {column}: {theirs.get(key, 'absent')} in the README, {ours.get(key, 'absent')} here"
        for key in dict.fromkeys([*theirs, *ours])
        if theirs.get(key) != ours.get(key)
        for title, row, column in [key]
    ]
