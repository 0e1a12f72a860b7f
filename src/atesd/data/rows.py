"""Rows of a file or data set, one at a time, with what is wrong with those that cannot be read."""

from __future__ import annotations

import difflib
import importlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atesd.errors import DataError

_FORMATS = "a .jsonl or .parquet file, a folder or hub id that `datasets` loads, world, arithmetic, or gsm_symbolic"
_OTHER_FORMATS = {".json", ".csv", ".tsv", ".txt", ".yaml", ".yml", ".arrow", ".gz", ".zst", ".zip"}
NO_ANSWER = "no answer can be found"
OTHER_ANSWER = ("its solution boxes", "its reasoning ends with", "its reasoning never states")
"""How the reasons of bad rows begin: no gold answer; a reference that comes to another one."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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


@dataclass(frozen=True)
class Table:
    """Named columns, and a way to read the rows with only some of them."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterable[Row | BadRow]]


def open_table(source: str, *split_names: str) -> Table:
    """Open FILE.jsonl, FILE.parquet, or a folder or hub id of `datasets`, of that the first of `split_names` it has.

    Raises `DataError` for what does not exist, is of another format, or needs a package that is not installed.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".parquet") and not path.is_file():
        raise DataError(f"{source}: no such file{_similar_file(path)}")
    if path.suffix == ".jsonl":
        return _jsonl_table(path)
    if path.suffix == ".parquet":
        return _parquet_table(path)
    if path.is_file() or (path.suffix in _OTHER_FORMATS and not path.is_dir()):
        raise DataError(f"{source}: cannot read a '{path.suffix}' file; a source is {_FORMATS}")
    return _datasets_table(source, split_names)


def read_columns(table: Table, settings: Mapping[str, str]) -> Iterable[Row | BadRow]:
    """The rows of a table with the columns that the settings name. Raises `DataError` if one is missing."""
    for setting, column in settings.items():
        if table.columns and column not in table.columns:
            close = difflib.get_close_matches(column.lower(), [name.lower() for name in table.columns], 1, 0.7)
            near = [name for name in table.columns if name.lower() in close]
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise DataError(
                f"{table.name}: no column '{column}', which {setting} names{hint}; it has: {', '.join(table.columns)}"
            )
    return table.read(list(dict.fromkeys(settings.values())))


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


def _jsonl_table(path: Path) -> Table:
    rows = list(_jsonl_rows(path))
    if _is_array(path, rows):
        raise DataError(f"{path}: one JSON array, not JSON Lines; write each of its objects on a line of its own")
    columns = dict.fromkeys(name for row in rows if isinstance(row, Row) for name in row.values)
    return Table(str(path), tuple(columns), lambda _: rows)


def _is_array(path: Path, rows: Sequence[Row | BadRow]) -> bool:
    """Whether the file is one JSON array, on one or several lines: of them at most the last element is an object."""
    with path.open("rb") as file:
        opening = file.read(1024).removeprefix(_BYTE_ORDER_MARK).split()
    bracket = bool(opening) and opening[0].startswith(b"[")
    return bracket and (len(rows) == 1 or (len(rows) > 2 and sum(isinstance(row, Row) for row in rows) <= 1))


def _jsonl_rows(path: Path) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _jsonl_row(number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line)


def _jsonl_row(number: int, line: bytes) -> Row | BadRow:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(number, f"not UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return BadRow(number, f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos}")
    except (ValueError, RecursionError) as error:
        return BadRow(number, f"not JSON: {error}")
    if not isinstance(values, dict):
        return BadRow(number, f"a JSON {type(values).__name__}, not an object")
    return Row(number, values)


def _parquet_table(path: Path) -> Table:
    parquet = require("pyarrow.parquet", "datasets", f"data.source: {path}")
    try:
        columns = tuple(parquet.ParquetFile(path).schema_arrow.names)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    return Table(
        str(path), columns, lambda names: _arrow_rows(parquet.ParquetFile(path).iter_batches(columns=list(names)))
    )


def _datasets_table(source: str, split_names: Sequence[str]) -> Table:
    datasets = require("datasets", "datasets", f"data.source: {source}")
    saved = any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except Exception as error:  # of many kinds: missing, gated, offline, malformed
        if isinstance(error, ConnectionError):
            raise DataError(
                f"data.source: {source}: neither a local folder nor in the hub cache, and the hub cannot be reached; "
                "check the name and the network, or set data.source to a .jsonl or .parquet file (HF_HUB_OFFLINE=1 in "
                "the environment skips the retries)"
            ) from None
        raise DataError(
            f"data.source: {source}: cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}); "
            f"a source is {_FORMATS}"
        ) from None
    if isinstance(loaded, dict):
        present = [name for name in split_names if name in loaded]
        if not present:
            raise DataError(f"data.split_name: '{source}' has no split '{split_names[-1]}'; it has {', '.join(loaded)}")
        loaded = loaded[present[0]]
    return Table(
        source,
        tuple(loaded.column_names),
        lambda names: _arrow_rows(loaded.select_columns(list(names)).with_format("arrow").iter(1000)),
    )


def _arrow_rows(batches: Iterable[Any]) -> Iterator[Row | BadRow]:
    """Rows of Arrow batches; a row with text that is not UTF-8 is a bad row."""
    number = 0
    for batch in batches:
        for values in _decoded(batch):
            number += 1
            yield BadRow(number, "holds text that is not UTF-8") if values is None else Row(number, values)


def _decoded(batch: Any) -> list[dict[str, Any] | None]:
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        half = batch.num_rows // 2
        return _decoded(batch.slice(0, half)) + _decoded(batch.slice(half))


def _similar_file(path: Path) -> str:
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
