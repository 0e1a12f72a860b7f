"""Rows of JSON Lines and of JSON arrays. A key given twice in one object, which JSON readers pass over, is a fault."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atesd.data.rows import BadRow, Row, Table, Unreadable, shown
from atesd.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BLANK = re.compile(r"[ \t\r\n]*")
_ARRAY_SHAPE = 'an array: [{"problem": ...}, ...]'


def jsonl_table(path: Path) -> Table:
    """A file with an object on each line. Empty lines are no rows. Raises `DataError` for a file of another kind."""
    _require_utf8(path)
    rows = list(_lines(path))
    if _is_array(path, rows):
        raise DataError(
            f"{path}: one JSON array, not JSON Lines; call it .json, or write each of its objects on a line of its own"
        )
    return _table(path, rows)


def json_table(path: Path) -> Table:
    """A file with an array of objects, or else with an object on each line.

    Raises `DataError` where the array is damaged: no row behind that place can be told from another.
    """
    _require_utf8(path)
    if _first_character(path) == b"[":
        return _table(path, list(_elements(path)))
    rows = list(_lines(path))
    if rows and not any(isinstance(row, Row) for row in rows) and _first_character(path) == b"{":
        raise DataError(f"{path}: neither an object on each line nor {_ARRAY_SHAPE}; write it as one of them")
    return _table(path, rows)


def _table(path: Path, rows: Sequence[Row | BadRow]) -> Table:
    columns = dict.fromkeys(name for row in rows if isinstance(row, Row) for name in row.values)
    return Table(str(path), tuple(columns), lambda _: rows)


def _require_utf8(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(2) in _WIDE_MARKS:
            raise DataError(f"{path}: its byte order mark is that of UTF-16; save the file as UTF-8")


def _first_character(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1]


def _is_array(path: Path, rows: Sequence[Row | BadRow]) -> bool:
    """Whether the file is one JSON array, on one or several lines: of them at most the last element is an object."""
    objects = sum(isinstance(row, Row) for row in rows)
    return _first_character(path) == b"[" and (len(rows) == 1 or (len(rows) > 2 and objects <= 1))


def _lines(path: Path) -> Iterator[Row | BadRow]:
    decoder = _StrictDecoder()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if text.strip():
                yield _line(decoder, number, text)


def _line(decoder: _StrictDecoder, number: int, line: bytes) -> Row | BadRow:
    try:
        values = decoder.decode(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(number, f"not UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return BadRow(number, _not_json(error))
    return _row(number, values, decoder.fault)


def _elements(path: Path) -> Iterator[Row | BadRow]:
    """The elements of an array, one after another, so that a fault is that of one row."""
    try:
        text = path.read_bytes().removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    decoder = _StrictDecoder()
    number, place = 0, _skip_blank(text, _skip_blank(text, 0) + 1)
    after = text[place : place + 1] if text[place : place + 1] == "]" else ","
    while after == ",":
        number += 1
        try:
            values, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: row {number}: {_not_json(error)}; mend the file") from None
        yield _row(number, values, decoder.fault)
        place = _skip_blank(text, place)
        after = text[place : place + 1]
        place = _skip_blank(text, place + 1) if after == "," else place
    if after != "]":
        raise DataError(f"{path}: row {number}: neither a comma nor ']' behind it, at character {place}; mend the file")
    if _skip_blank(text, place + 1) < len(text):
        raise DataError(f"{path}: text behind the array, at character {place + 1}; remove it")


def _skip_blank(text: str, place: int) -> int:
    match = _BLANK.match(text, place)
    return match.end() if match else place


def _row(number: int, values: Any, fault: str | None) -> Row | BadRow:
    if fault is not None:
        return BadRow(number, fault)
    if not isinstance(values, dict):
        return BadRow(number, f"a JSON {type(values).__name__}, not an object")
    return Row(number, values)


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos}"
    return f"not JSON: {error}"


class _StrictDecoder(json.JSONDecoder):
    """Keeps in `fault` what is wrong with the text decoded last: a key twice in one object, however deep it lies."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._unique, parse_int=_integer)
        self.fault: str | None = None

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """As the standard one, which `decode` calls too."""
        self.fault = None
        return super().raw_decode(s, idx)

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs) and self.fault is None:
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            self.fault = f"the key '{shown(twice)}' is given twice in one object; keep one"
        return values


def _integer(digits: str) -> int | Unreadable:
    """Python refuses to read integers of more than 4300 digits, since that takes time quadratic in their number."""
    try:
        return int(digits)
    except ValueError:
        return Unreadable(
            f"holds an integer of {len(digits.lstrip('-'))} digits, more than can be read; write it as text"
        )
