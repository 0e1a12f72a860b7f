"""A table of text, and how a terminal shows it."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from atesd.text import visible

HEADING_WIDTH = 10  # characters; a longer heading over narrow cells is wrapped


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text: the first column names the row, the others hold what was measured."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def render_text(table: Table) -> str:
    """The table for a terminal: columns aligned, names to the left, figures to the right, long headings wrapped."""
    rows = [tuple(map(_one_line, row)) for row in table.rows]
    widths = [max([HEADING_WIDTH, *(len(row[place]) for row in rows)]) for place in range(len(table.columns))]
    headings = [textwrap.wrap(column, width) for column, width in zip(table.columns, widths, strict=True)]
    widths = [max([0, *(len(row[place]) for row in rows), *map(len, lines)]) for place, lines in enumerate(headings)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [_aligned(line, widths) for line in itertools.zip_longest(*headings, fillvalue="")]
    body = [_aligned(row, widths) for row in rows]
    return visible("\n".join([table.title, rule, *lines, rule, *body, rule, *table.notes])) + "\n"


def _one_line(cell: str) -> str:
    return visible(cell).replace("\n", " ").replace("\t", " ")


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *padded])
