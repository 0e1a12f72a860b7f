"""Files as people have them: what cannot be read is named with file, row, column and cause, and is counted."""

import json
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atesd.config import ColumnsConfig, DataConfig
from atesd.data.sources import load_problems
from atesd.data.splits import ProblemSets
from atesd.errors import DataError
from atesd.records import Problem

COLUMNS = {"answer": "answer"}


def row(i: int, **changes: Any) -> dict[str, Any]:
    return {"problem": f"What is {i} + {i}?", "solution": f"Add.\n\nSo \\boxed{{{2 * i}}}.", **changes}


def plain(i: int, **changes: Any) -> dict[str, Any]:
    """A row whose answer stands in a column only."""
    return {"problem": f"Problem {i}", "solution": "Think.\n\nSay it.", "answer": str(i), **changes}


def jsonl(path: Path, lines: Iterable[Any]) -> str:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return str(path)


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def read(source: str, columns: dict[str, str] | None = None, **changes: Any) -> ProblemSets:
    """All usable problems of a source, as test problems."""
    shares = {"train": 0.5, "validation": 0, "probe": 0.5, "test": 0}
    config = {"source": source, "columns": columns or {}, "shares": shares, "on_few_rows": "shrink", **changes}
    return load_problems(DataConfig.model_validate({"train_size": None, "probe_size": 10**6, **config}))


def every(sets: ProblemSets) -> list[Problem]:
    return [*sets.train, *sets.probe]


def by_text(sets: ProblemSets) -> dict[str, Problem]:
    return {problem.text: problem for problem in every(sets)}


def refusal(source: str, columns: dict[str, str] | None = None, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(source, columns, **changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (b'{"problem": "p", "answer": "1", "answer": "2"}', "answer"),
        (b'{"problem": "p", "answer": "1", "answer": "1"}', "answer"),
        (b'{"problem": "p", "answer": "1", "meta": {"a": [{"b": 1, "b": 2}]}}', "b"),
        (b'{"problem": "p", "answer": "1", "\\u0061nswer": "2"}', "answer"),
        (b'{"problem": "p", "answer": "1", "": 1, "": 2}', ""),
    ],
)
@pytest.mark.parametrize("form", ["lines", "array", "folder"])
def test_a_key_given_twice_makes_a_bad_row(tmp_path, line, key, form):
    lines = [json.dumps(plain(i)).encode() for i in range(20)]
    lines[4] = line
    source = tmp_path / ("p.json" if form == "array" else "train.jsonl")
    source.write_bytes(b"[" + b",\n".join(lines) + b"]" if form == "array" else b"\n".join(lines))
    name = str(tmp_path if form == "folder" else source)
    assert f"row 5: the key '{key}' is given twice in one object; keep one" in refusal(name, COLUMNS)
    sets = read(name, COLUMNS, on_bad_row="skip")
    assert (len(every(sets)), len(sets.skipped)) == (19, 1)


def test_an_integer_of_400_digits_is_an_answer(tmp_path):
    sets = read(jsonl(tmp_path / "p.jsonl", [plain(i, answer=10**399 + i) for i in range(20)]), COLUMNS)
    assert by_text(sets)["Problem 3"].answer == "1" + "0" * 398 + "3"


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("answer", b"9" * 5000, "column 'answer' holds an integer of 5000 digits, more than can be read"),
        ("answer", b"-" + b"9" * 5000, "column 'answer' holds an integer of 5000 digits"),
        ("answer", b"[" + b"9" * 5000 + b"]", "column 'answer' holds an integer of 5000 digits"),
        ("answer", b"1e23", "column 'answer' holds 1e+23, a number that is not exact; write it as text"),
        ("answer", b"1e999", "column 'answer' holds no text but float inf"),
        ("answer", b"NaN", "column 'answer' holds no text but float nan"),
        ("id", b"9" * 5000, "column 'id' holds an integer of 5000 digits"),
        ("level", b"9" * 400, "column 'level' holds the level 9999"),
        ("level", b"9" * 5000, "column 'level' holds an integer of 5000 digits"),
        ("level", b'"' + b"9" * 5000 + b'"', "column 'level' holds the level 9999"),
        ("level", b"[" * 900 + b"]" * 900, "column 'level' holds no level but [["),
        ("level", b'"\\ud800\\n"', "column 'level' holds no level but \\ud800\\n"),
    ],
)
def test_a_value_that_cannot_be_held_makes_a_bad_row(tmp_path, column, value, reason):
    lines = [json.dumps(plain(i, id=i, level=1)).encode() for i in range(20)]
    lines[4] = json.dumps(plain(4, id=4, level=1) | {column: "HERE"}).encode().replace(b'"HERE"', value)
    source = jsonl(tmp_path / "p.jsonl", lines)
    columns = {"answer": "answer", "id": "id", "difficulty": "level"}
    assert f"1 of 20 rows cannot be used:\n  row 5: {reason}" in refusal(source, columns)
    assert len(every(read(source, columns, on_bad_row="skip"))) == 19


def test_what_stands_in_a_column_that_is_not_read_may_be_anything(tmp_path):
    lines = [json.dumps(plain(i, other=1)).encode() for i in range(20)]
    lines[4] = lines[4].replace(b'"other": 1', b'"other": ' + b"9" * 5000)
    assert len(every(read(jsonl(tmp_path / "p.jsonl", lines), COLUMNS))) == 20


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16(), pa.list_(pa.float32()), pa.float64()], ids=str)
def test_a_number_of_short_precision_is_the_decimal_that_was_written(tmp_path, kind):
    nested = isinstance(kind, pa.ListType)
    short = pa.array([0.1, 0.25, 3.0, 1.5e-3] * 5, kind.value_type if nested else kind)
    answers = pa.ListArray.from_arrays(range(21), short) if nested else short
    table = pa.table({"problem": [f"p{i}" for i in range(20)], "solution": ["Think."] * 20, "answer": answers})
    pq.write_table(table, tmp_path / "p.parquet")
    found = every(read(str(tmp_path / "p.parquet"), COLUMNS))
    assert sorted(problem.answer for problem in found) == sorted(["0.0015", "0.1", "0.25", "3"] * 5)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (pa.array([2**62] * 3, pa.timestamp("ms")), "column 'answer' cannot be read (timestamp[ms]): "),
        (pa.array([2**31 - 1] * 3, pa.date32()), "column 'answer' cannot be read (date32[day]): "),
        (pa.array([2**62] * 3, pa.duration("s")), "column 'answer' cannot be read (duration[s]): "),
        (pa.array([datetime(2020, 1, 1)] * 3), "column 'answer' holds no text but datetime 2020-01-01"),
        (pa.array([b"\xff"] * 3), "column 'answer' holds no text but bytes"),
        (pa.array([float("inf")] * 3), "column 'answer' holds no text but float inf"),
        (pa.array([[1, 2]] * 3), "column 'answer' holds a list of 2, not one value: [1, 2]"),
        (pa.array([None] * 3), "no answer can be found"),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_arrow_values_that_are_no_answer_make_bad_rows(tmp_path, values, reason, saved):
    good = [f"{i}" for i in range(20)]
    table = pa.table({"problem": [*good, "a", "b", "c"], "solution": ["\\boxed{1}"] * 20 + ["Think."] * 3})
    table = table.append_column("answer", pa.concat_arrays([pa.nulls(20, values.type), values]))
    if saved:
        datasets.Dataset(table).save_to_disk(tmp_path / "set")
        source = str(tmp_path / "set")
    else:
        pq.write_table(table, tmp_path / "p.parquet")
        source = str(tmp_path / "p.parquet")
    assert f"row 23: {reason}" in refusal(source, COLUMNS)


def test_one_value_out_of_range_spoils_its_row_alone(tmp_path):
    stamps = pa.array([None] * 1500 + [2**60] + [None] * 999, pa.timestamp("ms"))
    columns = {"problem": [f"{i}" for i in range(2500)], "solution": ["\\boxed{1}"] * 2500, "when": stamps}
    source = parquet(tmp_path / "p.parquet", columns)
    assert "1 of 2500 rows cannot be used:\n  row 1501: column 'when' cannot be read (timestamp[ms])" in refusal(
        source, {"answer": "when"}
    )
    assert len(every(read(source, {"answer": "when"}, on_bad_row="skip"))) == 2499


def test_decimals_are_answers(tmp_path):
    answers = pa.array([Decimal("2.50")] * 10 + [Decimal("3.00")] * 10)
    source = parquet(
        tmp_path / "p.parquet", {"problem": [f"{i}" for i in range(20)], "solution": ["x"] * 20, "answer": answers}
    )
    problems = by_text(read(source, COLUMNS))
    assert (problems["1"].answer, problems["11"].answer) == ("2.50", "3")


def damaged(path: Path, group: int, column: int, **options: Any) -> str:
    """A Parquet file of 5 groups of 100 rows; some bytes of a page are flipped."""
    columns = {"problem": [f"p{i}" for i in range(500)], "solution": [f"s{i} \\boxed{{{i}}}" for i in range(500)]}
    pq.write_table(pa.table(columns), path, row_group_size=100, use_dictionary=False, **options)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(group).column(column).data_page_offset
    for place in range(start + 200, start + 260):
        content[place] ^= 0xFF
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("options", [{"compression": "snappy"}, {"compression": "none", "write_page_checksum": True}])
def test_a_damaged_page_spoils_the_rows_of_its_group(tmp_path, options):
    source = damaged(tmp_path / "p.parquet", 2, 1, **options)
    message = refusal(source)
    assert (
        "p.parquet: 100 of 500 rows cannot be used:\n  row 201: column 'solution': row group 2 of the file" in message
    )
    sets = read(source, on_bad_row="skip")
    assert (len(every(sets)), len(sets.skipped)) == (400, 100)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays(
        [pa.array(["p"]), pa.array(["s"]), pa.array(["t"])], ["problem", "solution", "solution"]
    )
    pq.write_table(table, tmp_path / "p.parquet")
    assert "2 columns are called 'solution', which data.columns.solution names" in refusal(str(tmp_path / "p.parquet"))


def test_a_folder_whose_first_chunk_is_null_is_read(tmp_path):
    # huggingface/datasets#7222: its reader takes the type of a column from the first 10 MB.
    rows = [plain(i, problem=f"{i}" + "x" * 9000, answer=None if i < 1300 else str(i)) for i in range(1400)]
    jsonl(tmp_path / "train.jsonl", rows)
    sets = read(str(tmp_path), COLUMNS, on_bad_row="skip")
    assert (len(every(sets)), len(sets.skipped)) == (100, 1300)


def test_rows_of_a_folder_of_several_files_are_named_with_their_file(tmp_path):
    jsonl(tmp_path / "train-0.jsonl", [plain(i) for i in range(10)])
    jsonl(tmp_path / "train-1.jsonl", [plain(10), b"{", plain(3)])
    jsonl(tmp_path / "test.jsonl", [plain(99)])
    message = refusal(str(tmp_path), COLUMNS)
    assert f"2 of 13 rows cannot be used:\n  {tmp_path / 'train-1.jsonl'}: row 2: not JSON" in message
    assert f"train-1.jsonl: row 3: the same problem as {tmp_path / 'train-0.jsonl'}: row 4" in message


def test_a_damaged_folder_of_datasets_is_refused_with_the_cause(tmp_path):
    datasets.Dataset.from_list([plain(i) for i in range(500)]).save_to_disk(tmp_path / "set")
    file = next((tmp_path / "set").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:9000])
    assert f"data.source: {tmp_path / 'set'}: cannot be loaded (OSError: Expected to be able" in refusal(
        str(tmp_path / "set")
    )


def test_a_json_array_gives_the_problems_of_the_same_lines(tmp_path):
    rows = [row(i) for i in range(50)]
    (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, indent=2).encode())
    (tmp_path / "q.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    expected = by_text(read(jsonl(tmp_path / "p.jsonl", rows)))
    assert by_text(read(str(tmp_path / "p.json"))) == by_text(read(str(tmp_path / "q.json"))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"problem": "p"}, {"problem"', "row 2: not JSON: Expecting ':' delimiter at character 29; mend the file"),
        ('[{"problem": "p"} {}]', "row 1: neither a comma nor ']' behind it, at character 18"),
        ('[{"problem": "p"}', "row 1: neither a comma nor ']' behind it, at character 17"),
        ('[{"problem": "p"},]', "row 2: not JSON: Expecting value"),
        ('[{"problem": "p"}] x', "text behind the array, at character 18"),
        ('{\n "data": [\n  1\n ]\n}', "neither an object on each line nor an array"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["refuse", "skip"])
def test_a_damaged_json_array_is_refused_with_its_place(tmp_path, text, message, on_bad_row):
    (tmp_path / "p.json").write_text(text, "utf-8")
    assert message in refusal(str(tmp_path / "p.json"), on_bad_row=on_bad_row)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_a_file_in_utf16_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(json.dumps(row(1)).encode("utf-16"))
    assert f"{name}: its byte order mark is that of UTF-16; save the file as UTF-8" in refusal(str(tmp_path / name))


def test_a_path_that_the_system_refuses_is_an_error_of_ours(tmp_path):
    assert "cannot be read: File name too long" in refusal(str(tmp_path / ("x" * 300 + ".jsonl")))


def test_a_list_with_one_element_is_that_element(tmp_path):
    rows = [{name: [value] for name, value in plain(i, id=i, level=3).items()} for i in range(20)]
    columns = {"answer": "answer", "id": "id", "difficulty": "level"}
    lists = read(jsonl(tmp_path / "p.jsonl", rows), columns)
    values = read(jsonl(tmp_path / "q.jsonl", [plain(i, id=i, level=3) for i in range(20)]), columns)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert every(lists) == every(values) == every(read(str(tmp_path / "p.parquet"), columns))


def test_an_empty_list_is_an_empty_value(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", [plain(i, answer=[] if i == 3 else str(i)) for i in range(20)])
    assert "row 4: no answer can be found: no closed \\boxed{} in the solution, and 'answer' is empty" in refusal(
        source, COLUMNS
    )


MISSING = [plain(i, solution=None if i % 4 == 0 else "Think.\n\nSay it.") for i in range(20)]


def test_rows_without_a_reference_are_kept_and_counted(tmp_path):
    sets = read(jsonl(tmp_path / "p.jsonl", MISSING), COLUMNS)
    assert len(every(sets)) == 20
    assert sets.skipped == ()
    assert sets.notes[0].endswith(
        "p.jsonl: 5 of 20 usable rows have no reference solution; their teacher reads the answer alone "
        "(data.on_missing_reference: keep; or: skip, refuse)"
    )


def test_rows_without_a_reference_are_skipped_or_refused_on_request(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", MISSING)
    sets = read(source, COLUMNS, on_missing_reference="skip")
    assert (len(every(sets)), len(sets.skipped)) == (15, 5)
    assert sets.skipped[1].endswith(
        "p.jsonl: row 5: no reference solution (data.on_missing_reference: keep uses the row)"
    )
    assert "5 of 20 usable rows have no reference solution; they are left out" in sets.notes[0]
    assert "5 of 20 rows cannot be used:\n  row 1: no reference solution" in refusal(
        source, COLUMNS, on_missing_reference="refuse"
    )


def test_where_no_reference_is_expected_none_is_missed(tmp_path):
    config = DataConfig(
        source=jsonl(tmp_path / "p.jsonl", MISSING),
        columns=ColumnsConfig(solution=None, answer="answer"),
        on_missing_reference="refuse",
        train_size=None,
        validation_size=0,
        probe_size=1,
        test_size=0,
        shares={"train": 0.5, "validation": 0, "probe": 0.5, "test": 0},
    )
    sets = load_problems(config)
    assert sets.notes == sets.skipped == ()
