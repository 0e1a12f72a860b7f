"""Rows of Parquet files and of what `datasets` loads. What cannot be read is a bad row, or an error with its cause."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atesd.data.rows import BadRow, Row, Table, Unreadable, cause_of, require, row_place, shown
from atesd.errors import DataError

_BATCH = 1000  # rows
_SHORT_FLOAT = re.compile(r"\b(?:half)?float\b")  # in the name of an Arrow type; one of 64 bits is a double
_MOST_UNREADABLE = 1_000_000  # rows that are listed one by one; a damaged file may claim any number


def parquet_table(path: Path) -> Table:
    """A Parquet file. Raises `DataError` if its footer cannot be read; damaged pages are bad rows.

    Pages with a check sum are compared with it, so that no flipped bit in them goes unseen.
    """
    parquet = require("pyarrow.parquet", "datasets", f"data.source: {path}")
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        columns = tuple(file.schema_arrow.names)
        groups = [int(file.metadata.row_group(place).num_rows) for place in range(file.metadata.num_row_groups)]
    except Exception as error:  # of many kinds: what a footer says may be anything
        raise DataError(f"{path}: not a readable Parquet file: {cause_of(error)}") from None
    return Table(str(path), columns, lambda names: _parquet_rows(path, file, groups, list(names)))


def dataset_table(source: str, data: Any) -> Table:
    """A split of a data set that `datasets` has loaded. What cannot be read of it is a bad row."""
    return Table(source, tuple(data.column_names), lambda names: _dataset_rows(data.select_columns(list(names))))


def _parquet_rows(path: Path, file: Any, groups: Sequence[int], names: list[str]) -> Iterator[Row | BadRow]:
    number = 0
    for group, rows in enumerate(groups):
        end = number + rows
        fault = "ends before the last row that the file says it has"
        try:
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=names):
                yield from _batch_rows(batch, number)
                number += batch.num_rows
        except Exception as error:  # of many kinds: what stands in a damaged page may be anything
            fault = cause_of(error)
        if number < end:
            reason = _group_fault(file, group, names, fault)
            yield from _unread(str(path), range(number + 1, end + 1), reason)
            number = end


def _group_fault(file: Any, group: int, names: Sequence[str], fault: str) -> str:
    """Why a row group cannot be read, with the columns that cannot be read alone."""

    def readable(name: str) -> bool:
        try:
            for _ in file.iter_batches(_BATCH, row_groups=[group], columns=[name]):
                pass
        except Exception:  # of many kinds
            return False
        return True

    broken = [f"'{shown(name)}'" for name in names if not readable(name)]
    where = f"column {', '.join(broken)}: " if broken else ""
    return f"{where}row group {group} of the file cannot be read: {fault}"


def _unread(name: str, numbers: range, reason: str) -> Iterator[BadRow]:
    if len(numbers) > _MOST_UNREADABLE:
        raise DataError(f"{name}: rows {numbers.start} to {numbers.stop - 1}: {reason}")
    return (BadRow(number, reason) for number in numbers)


def _dataset_rows(data: Any) -> Iterator[Row | BadRow]:
    arrow = data.with_format("arrow")
    for start in range(0, len(arrow), _BATCH):
        stop = min(start + _BATCH, len(arrow))
        try:
            yield from _batch_rows(arrow[start:stop], start)
        except Exception:  # of many kinds: each row is read alone, so that only those with a fault are bad
            for place in range(start, stop):
                yield from _single_row(lambda place=place: arrow[place : place + 1], place)  # type: ignore[misc]


def _single_row(read: Callable[[], Any], place: int) -> Iterable[Row | BadRow]:
    try:
        return _batch_rows(read(), place)
    except Exception as error:  # of many kinds
        return [BadRow(place + 1, f"cannot be read: {cause_of(error)}")]


def _batch_rows(batch: Any, before: int) -> list[Row | BadRow]:
    """Rows of an Arrow batch or table; where a value cannot be made one of Python's, it alone is unreadable."""
    try:
        rows = batch.to_pylist()
    except Exception:  # of many kinds: text that is not UTF-8, a time stamp out of range, a struct with a name twice
        columns = {name: batch.column(place) for place, name in enumerate(batch.schema.names)}
        rows = [{name: _cell(column, i) for name, column in columns.items()} for i in range(batch.num_rows)]
    for name, kind in [(one.name, one.type) for one in batch.schema if _SHORT_FLOAT.search(str(one.type))]:
        for row in rows:
            row[name] = _as_written(row[name], kind)
    return [Row(before + i, values) for i, values in enumerate(rows, 1)]


def _as_written(value: Any, kind: Any) -> Any:
    """A number of single or half precision as the shortest decimal that it stands for: 0.1, not 0.10000000149011612."""
    if isinstance(value, float):
        return float(str(kind.to_pandas_dtype()(value)))
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_as_written(one, kind.value_type) for one in value]
    if isinstance(value, dict) and hasattr(kind, "fields"):
        return {one.name: _as_written(value[one.name], one.type) for one in kind.fields}
    return value


def _cell(column: Any, place: int) -> Any:
    try:
        return column[place].as_py()
    except UnicodeDecodeError:
        return Unreadable("holds text that is not UTF-8")
    except Exception as error:  # of many kinds
        return Unreadable(f"cannot be read ({column.type}): {cause_of(error)}")


def chained(name: str, tables: Sequence[Table]) -> Table:
    """Tables with the same columns as one, in order; rows are numbered on, and messages name the file too."""
    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    columns += [column for table in tables for column in set(table.columns) if table.columns.count(column) > 1]
    starts: list[int] = []  # of the tables that are read by now, as a row is named while others are still to come

    def read(names: Sequence[str]) -> Iterator[Row | BadRow]:
        starts.clear()
        last = 0
        for table in tables:
            start = last
            starts.append(start)
            for row in table.read([name for name in names if name in table.columns or not table.columns]):
                last = start + row.number
                yield replace(row, number=last)

    def part(number: int) -> int:
        return bisect_left(starts, number) - 1

    def place(number: int) -> str:
        index = part(number)
        table, local = tables[index], tables[index].place(number - starts[index])
        return f"{table.name}: {local}" if table.place is row_place else local

    return Table(name, tuple(columns), read, place, part, files=tuple(file for table in tables for file in table.files))
