"""Generated files: whatever stands in them, every row is accepted, skipped or refused, and no error is a traceback."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atesd.config import DataConfig
from atesd.data.sources import load_benchmark, load_problems
from atesd.errors import AtesdError

FILES = 10_000
SECONDS = 20  # of a processor, for one file; a hang takes for ever
WHOLE_FILE = ("one JSON array", "UTF-16", "no column", "no usable problem")
TEXTS = [
    "",
    " ",
    "p",
    "What is 1 + 1?",
    "\\boxed{2}",
    "\\boxed{",
    "a\n\nb \\boxed{2}",
    "é🙂",
    "\x00",
    "\u2028",
    "$$",
    "[asy]",
]
TEXTS += [
    "Final: \\boxed{\\frac12}",
    "\ud800",
    "x" * 3000,
    "\\begin{a}",
    "1,000",
    "2/0",
    "}{",
    "\\",
    "\ufeff",
    "Level 3",
    "1e999",
]
NUMBERS = [
    "0",
    "-1",
    "2.5",
    "1e23",
    "1e999",
    "-0",
    "9" * 400,
    "-" + "9" * 5000,
    "1" + "0" * 308,
    "NaN",
    "Infinity",
    "0.1e-400",
]
OTHERS = [
    "null",
    "true",
    "[]",
    "{}",
    '["p"]',
    '["a", "b"]',
    "[[1]]",
    "[null]",
    '{"a": {"a": 1, "a": 2}}',
    "01",
    "'p'",
    "[",
    '{"a"',
]
CHATS = [
    '[{"role": "user", "content": "p"}, {"role": "assistant", "content": "\\\\boxed{1}"}]',
    '[{"role": "user", "content": null}]',
    '[{"role": "user"}, 3]',
]
NAMES = ["problem", "solution", "answer", "id", "level", "chat", "extra", "", "\ud800", "a\nb", "PROBLEM"]


def value(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return json.dumps(rng.choice(TEXTS) + rng.choice(["", str(rng.randrange(50))]), ensure_ascii=rng.random() < 0.7)
    if kind < 0.7:
        return rng.choice(NUMBERS)
    if kind < 0.9:
        return rng.choice(OTHERS)
    depth = rng.choice([5, 500, 990, 3000])
    return rng.choice([rng.choice(CHATS), "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth])


def line(rng: random.Random) -> bytes:
    """An object as people and programs write them, mostly."""
    if rng.random() < 0.5:
        good = {
            "problem": f"p{rng.randrange(99)}",
            "solution": "a\n\nb \\boxed{2}",
            "answer": "2",
            "id": rng.randrange(99),
        }
        return json.dumps({**good, "level": 2, "chat": json.loads(CHATS[0])}).encode()
    names = rng.sample(NAMES, rng.randrange(len(NAMES))) + rng.choices(NAMES, k=rng.choice([0, 0, 0, 1, 3]))
    text = "{" + ", ".join(f"{json.dumps(name)}: {value(rng)}" for name in names) + "}"
    change = rng.random()
    if change < 0.05:
        return text.encode("utf-16", "surrogatepass")
    if change < 0.1:
        return text.encode("latin-1", "replace")
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if change < 0.2:
        content[rng.randrange(len(content))] = rng.choice([0, 0xFF, 0x80, ord('"'), ord("{"), 9, 13])
    return bytes(content) if change < 0.95 else bytes(content[: rng.randrange(len(content) + 1)])


def lines_of_file(rng: random.Random) -> bytes:
    lines = [line(rng) for _ in range(rng.choice([0, 1, 2, 4, 8]))]
    for _ in range(rng.choice([0, 0, 1, 3])):
        lines.insert(
            rng.randrange(len(lines) + 1), rng.choice([b"", b" ", b"\t\r", b"[", b"]", b"\x00" * 9, b"null", b"\x0c"])
        )
    content = rng.choice([b"\n", b"\n", b"\r\n"]).join(lines) + rng.choice([b"", b"\n", b"\r\n\r\n"])
    content = rng.choice([b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"["]) + content
    return content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content


def columns(rng: random.Random) -> dict[str, Any]:
    chosen = {name: column for name, column in (("id", "id"), ("difficulty", "level")) if rng.random() < 0.2}
    if rng.random() < 0.7:
        chosen["answer"] = "answer"
    return {**chosen, "messages": "chat"} if rng.random() < 0.1 else chosen


def rows_in(content: bytes) -> int:
    """Lines that are not blank, counted without any of the program's code."""
    return sum(bool(some.strip()) for some in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


def outcome(read: Callable[[DataConfig], Any], config: dict[str, Any]) -> tuple[Any, str]:
    """(problem sets, message): one of the two. Anything but an error of ours ends the test."""
    started = time.process_time()
    try:
        return read(DataConfig.model_validate(config)), ""
    except AtesdError as error:
        str(error).encode()  # can be printed
        return None, str(error)
    finally:
        assert time.process_time() - started < SECONDS


def counted(path: Path, rng: random.Random, rows: int | None, figures: Counter[str]) -> None:
    """Read a file to evaluate on and to train with, both ways, and compare the counts with its rows."""
    config = {"columns": columns(rng), "checker": "math" if rng.random() < 0.005 else "exact"}
    sets, message = outcome(load_benchmark, {**config, "test_source": str(path), "on_bad_row": "skip"})
    accepted, skipped = (len(sets.test), len(sets.skipped)) if sets else (0, 0)
    figures["rows accepted"] += accepted
    figures["rows skipped"] += skipped
    if sets is None:
        assert rows is None or rows == 0 or any(words in message for words in WHOLE_FILE), message
        if rows and (stated := re.search(r"of (\d+) rows none can be used", message)):
            assert int(stated[1]) == rows
        figures["rows refused with their file"] += rows or 0
        figures["files refused"] += 1
    elif rows is not None:
        assert accepted + skipped == rows
    _, message = outcome(load_benchmark, {**config, "test_source": str(path), "on_bad_row": "refuse"})
    if stated := re.search(r": (\d+) of (\d+) rows cannot be used", message):
        assert rows is None or int(stated[2]) == rows
        assert sets is None or int(stated[1]) == skipped
    missing = rng.choice(["refuse", "skip", "keep"])
    outcome(load_problems, {**config, "source": str(path), "on_bad_row": "skip", "on_missing_reference": missing})


@pytest.mark.fuzz
def test_ten_thousand_files_end_in_counted_rows(tmp_path):
    figures: Counter[str] = Counter()
    for number in range(FILES):
        rng = random.Random(number)
        content = lines_of_file(rng)
        path = tmp_path / "p.jsonl"
        path.write_bytes(content)
        figures["files"] += 1
        figures["rows"] += rows_in(content)
        counted(path, rng, rows_in(content), figures)
    print("\n", dict(figures))
    assert figures["rows"] == sum(count for name, count in figures.items() if name.startswith("rows "))
    assert min(figures.values()) > FILES // 10


@pytest.mark.fuzz
def test_arrays_of_the_same_objects_end_in_errors_of_ours(tmp_path):
    figures: Counter[str] = Counter()
    for number in range(FILES // 10):
        rng = random.Random(number)
        path = tmp_path / "p.json"
        path.write_bytes(b"[" + rng.choice([b",", b", \n"]).join(line(rng) for _ in range(rng.randrange(4))) + b"]")
        counted(path, rng, None, figures)
    print("\n", dict(figures))


@pytest.mark.fuzz
def test_parquet_files_with_flipped_bytes_end_in_errors_of_ours(tmp_path):
    figures: Counter[str] = Counter()
    rows = [
        {"problem": f"p{i}", "solution": f"a\n\nb \\boxed{{{i}}}", "answer": i, "id": i, "level": 2.0}
        for i in range(99)
    ]
    table = pa.Table.from_pylist(rows)
    for number in range(FILES // 20):
        rng = random.Random(number)
        path = tmp_path / "p.parquet"
        pq.write_table(table, path, row_group_size=33, compression=rng.choice(["none", "snappy", "zstd"]))
        content = bytearray(path.read_bytes())
        end = rng.choice([len(content), int.from_bytes(content[-8:-4], "little") and len(content) - 1500])
        for _ in range(rng.choice([1, 3, 20])):
            content[rng.randrange(4, max(5, end))] ^= 1 << rng.randrange(8)
        path.write_bytes(content[: rng.choice([len(content)] * 3 + [rng.randrange(len(content))])])
        counted(path, rng, None, figures)
    print("\n", dict(figures))
