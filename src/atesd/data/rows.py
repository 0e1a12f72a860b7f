"""Rows of a file or data set, one at a time, with what is wrong with those that cannot be read."""

from __future__ import annotations

import difflib
import importlib
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atesd.errors import DataError

NO_ANSWER = "no answer can be found"
OTHER_ANSWER = ("its solution boxes", "its reasoning ends with", "its reasoning never states")
SAME_PROBLEM = "the same problem as"
"""How the reasons of bad rows begin: no gold answer; a reference that comes to another one; a copy."""
_MOST_NAMES = 40  # columns that an error message lists
_LONGEST_NAME = 60
_LONGEST_CAUSE = 300


@dataclass(frozen=True, slots=True)
class Row:
    """A row with its number, from 1; of a JSONL file the number of its line."""

    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a value that could not be read. `reason` goes on from "column 'x'"."""

    reason: str


def row_place(number: int) -> str:
    """How messages name a row of a single file."""
    return f"row {number}"


def only_part(number: int) -> int:  # noqa: ARG001
    """Every row of a single file is from its only part."""
    return 0


@dataclass(frozen=True)
class Table:
    """Named columns, a way to read the rows with only some of them, and what messages call a row by its number.

    `part` says which of the tables it was made of a row is from, by its place among them; `split` is the one that was
    opened of a source with named splits, `files` what is read here and not by `datasets`.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterable[Row | BadRow]]
    place: Callable[[int], str] = row_place
    part: Callable[[int], int] = only_part
    split: str = ""
    files: tuple[str, ...] = ()


def cell(values: Mapping[str, Any], column: str) -> Any:
    """The value in a column, or at a path into one, such as `reward_model.ground_truth`; None if it is not there."""
    if column in values or "." not in column:
        return values.get(column)
    head, _, rest = column.partition(".")
    inner = values.get(head)
    return cell(inner, rest) if isinstance(inner, Mapping) else inner if isinstance(inner, Unreadable) else None


def column_of(table: Table, column: str) -> str:
    """The column of a table that holds what `column` names: itself, or the first word of a path into one."""
    return column if column in table.columns else column.partition(".")[0]


def require_columns(table: Table, settings: Mapping[str, str]) -> None:
    """Raise `DataError` if a column that the settings name is missing, or if two columns have its name."""
    for setting, name in settings.items():
        column = name if column_of(table, name) not in table.columns else column_of(table, name)
        if table.columns and column not in table.columns:
            hint = _similar(column, table.columns)
            raise DataError(
                f"{table.name}: no column '{column}', which {setting} names{hint}; it has: {_listed(table.columns)}"
            )
        if table.columns.count(column) > 1:
            raise DataError(
                f"{table.name}: {table.columns.count(column)} columns are called '{column}', which "
                f"{setting} names; rename all but one"
            )


def read_columns(table: Table, settings: Mapping[str, str]) -> Iterable[Row | BadRow]:
    """The rows of a table with the columns that the settings name. Raises `DataError` as `require_columns` does."""
    require_columns(table, settings)
    return table.read(list(dict.fromkeys(column_of(table, name) for name in settings.values())))


def require(module: str, extra: str, reason: str) -> Any:
    """Import an optional package, or raise a `DataError` that names the extra to install.

    What Python has to say about the package's own syntax, when it compiles it for the first time, is not for our user.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise DataError(f'{reason} needs the package {name}; install it with: pip install "atesd[{extra}]"') from None


def shown(value: object) -> str:
    """A value as a message shows it: on one line, short, with escapes for what cannot be printed."""
    text = value if isinstance(value, str) else _written(value)
    text = text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def cause_of(error: BaseException) -> str:
    """The first line of the innermost error: libraries wrap it into others that do not say the cause."""
    seen = {id(error)}
    while (cause := error.__cause__ or error.__context__) is not None and id(cause) not in seen:
        seen.add(id(cause))
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:_LONGEST_CAUSE])


def _written(value: object) -> str:
    """`str`, but of deep or long lists and groups only the beginning, so that their size and depth cost nothing."""
    return reprlib.repr(value) if isinstance(value, (list, dict, tuple, set)) else str(value)


def _similar(column: str, columns: Sequence[str]) -> str:
    close = difflib.get_close_matches(column.lower(), [name.lower() for name in columns], 1, 0.7)
    near = [name for name in columns if name.lower() in close]
    return f"; did you mean '{shown(near[0])}'?" if near else ""


def _listed(columns: Sequence[str]) -> str:
    more = len(columns) - _MOST_NAMES
    return ", ".join(map(shown, columns[:_MOST_NAMES])) + (f" and {more} more" if more > 0 else "")
