"""A table as a terminal shows it."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table as RichTable
from rich.text import Text

from atesd.table import Table
from atesd.text import visible


def rich_table(table: Table, colours: Mapping[str, str]) -> RichTable:
    """Columns in place, and the cells that say one of the words of `colours` in its colour."""
    shown = RichTable(title=Text(visible(table.title)), title_justify="left")
    for place, column in enumerate(table.columns):
        shown.add_column(Text(visible(column)), justify="left" if place in (0, len(table.columns) - 1) else "right")
    for row in table.rows:
        shown.add_row(*(Text(visible(cell), style=colours.get(cell, "")) for cell in row))
    return shown
