"""Sources: every row is used, refused or listed, splits never share a problem, and loading is deterministic."""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atesd.build import problem_sets
from atesd.config import ColumnsConfig, DataConfig
from atesd.data import entries
from atesd.data.sources import load_benchmark, load_problems
from atesd.data.splits import split_of
from atesd.errors import ConfigError, DataError
from atesd.records import Problem
from atesd.world.problems import world_problems


def row(i: int, **changes: Any) -> dict[str, Any]:
    return {"problem": f"What is {i} + {i}?", "solution": f"Add.\n\nSo \\boxed{{{2 * i}}}.", **changes}


ROWS = [row(i) for i in range(300)]
EIGHT = "What is 8 + 8?"  # the hash puts it into train


def jsonl(path: Path, rows: Iterable[Any]) -> str:
    """Write rows as JSON lines; bytes as they are."""
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in rows]
    path.write_bytes(b"\n".join(lines))
    return str(path)


def settings(source: str, **changes: Any) -> DataConfig:
    sizes = {"train_size": None, "validation_size": 0, "probe_size": 1, "test_size": 0}
    return DataConfig(source=source, **{**sizes, **changes})


def every(sets: Any) -> list[Problem]:
    return [*sets.train, *sets.validation, *sets.probe, *sets.test]


def loaded(source: str, **changes: Any) -> dict[str, Problem]:
    """Problems of a source, by text."""
    sizes = {"validation_size": 10, "probe_size": 2, "test_size": 15}  # of 200 rows: 14, 6, 20 expected
    return {problem.text: problem for problem in every(load_problems(settings(source, **{**sizes, **changes})))}


def refusal(source: str, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_problems(settings(source, **changes))
    return str(caught.value)


def reason(tmp_path: Path, bad: Any, **changes: Any) -> str:
    """Why row 3 of a file is refused; the others are fine."""
    message = refusal(jsonl(tmp_path / "p.jsonl", [row(0), row(1), bad, row(3)]), **changes)
    assert "1 of 4 rows cannot be used" in message
    return message.split("row 3: ")[1].split("\n")[0]


def test_a_jsonl_file_becomes_problems_with_segments(tmp_path):
    problem = loaded(jsonl(tmp_path / "p.jsonl", ROWS))[EIGHT]
    assert (problem.segments, problem.closing, problem.answer) == (("Add.\n\n",), "So \\boxed{16}.", "16")
    assert problem.reference == "Add.\n\nSo \\boxed{16}."
    assert len(problem.id) == 16


def test_each_problem_is_in_the_split_that_the_hash_of_its_text_says(tmp_path):
    sets = load_problems(settings(jsonl(tmp_path / "p.jsonl", ROWS), validation_size=5, probe_size=5, test_size=5))
    for name in ("train", "validation", "probe", "test"):
        assert {split_of(problem.text) for problem in getattr(sets, name)} == {name}
    assert len({problem.text for problem in every(sets)}) == len(every(sets))


def test_which_problems_are_taken_does_not_depend_on_the_order_of_the_file(tmp_path):
    there = load_problems(settings(jsonl(tmp_path / "a.jsonl", ROWS), train_size=50))
    back = load_problems(settings(jsonl(tmp_path / "b.jsonl", ROWS[::-1]), train_size=50))
    more = load_problems(settings(jsonl(tmp_path / "a.jsonl", ROWS), train_size=60))
    assert there.train == back.train == more.train[:50]
    assert there.fingerprint == back.fingerprint != more.fingerprint


def test_the_fingerprint_changes_with_one_character_of_a_reference(tmp_path):
    changed = [dict(item, solution=item["solution"].replace("Add.", "Sum.")) for item in ROWS]
    one, two = (load_problems(settings(jsonl(tmp_path / f"{i}.jsonl", rows))) for i, rows in enumerate([ROWS, changed]))
    assert len(one.fingerprint) == 64
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (row(2, problem=" \n"), "no problem: column 'problem' is empty"),
        ({"solution": "\\boxed{1}"}, "no problem: column 'problem' is empty"),
        (row(2, problem={"a": 1}), "column 'problem' holds no text but dict {'a': 1}"),
        (row(2, problem=["a", "b"]), "column 'problem' holds a list of 2, not one value: ['a', 'b']"),
        (row(2, solution="It is 4."), "no answer can be found: no closed \\boxed{} in the solution"),
        (row(2, solution="\\boxed{4"), "no answer can be found"),
        (row(2, solution=None), "no answer can be found"),
        (row(2, problem="a \ud800"), "column 'problem' is not valid Unicode at character 2"),
        (row(1), "the same problem as row 2"),
        (row(1, problem="What is  1 + 1?\n"), "the same problem as row 2"),
        (b'{"problem": "\xff"}', "not UTF-8 at byte 13 of the line"),
        (b"{'problem': 1}", "not JSON: Expecting property name"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b"[" * 100_000, "not JSON: maximum recursion depth"),
        (b'{"problem": ' + b"9" * 5000 + b"}", "column 'problem' holds an integer of 5000 digits"),
    ],
)
def test_a_bad_row_is_refused_with_its_number_and_reason(tmp_path, bad, expected):
    assert reason(tmp_path, bad).startswith(expected)


def test_a_copy_with_an_id_of_its_own_is_a_copy_all_the_same(tmp_path):
    rows = [
        row(0, key="a"),
        row(1, key="b"),
        row(0, key="c"),
        row(1, key="b"),
        row(2, problem="What is  1 + 1?", key="c"),
    ]
    message = refusal(jsonl(tmp_path / "p.jsonl", rows), columns=ColumnsConfig(id="key"))
    assert message.splitlines()[1:4] == [
        "  row 3: the same problem as row 1",
        "  row 4: its id 'b' is that of row 2",
        "  row 5: the same problem as row 2",
    ]


def test_a_bad_copy_does_not_take_the_good_one_with_it(tmp_path):
    rows = [row(i, gold="5" if i == 8 else 2 * i) for i in range(200)]
    source = jsonl(tmp_path / "p.jsonl", [*rows, row(8, gold=16), row(8, gold=16)])
    sets = load_problems(settings(source, columns=ColumnsConfig(answer="gold"), on_bad_row="skip"))
    assert EIGHT in {problem.text for problem in every(sets)}
    assert [line.split("p.jsonl: ")[1] for line in sets.skipped] == [
        "row 9: its solution boxes '16' but its answer is '5'",
        "row 202: the same problem as row 201",
    ]


def test_a_comparison_that_takes_too_long_contradicts_nothing_and_is_counted(tmp_path, monkeypatch):
    verdicts = {"8+8+0": "timeout", "9+9+0": "wrong", "1+1+0": "unparseable"}
    monkeypatch.setattr(entries.MathChecker, "check", lambda _, pairs: [verdicts[gold] for _, gold in pairs])
    rows = [row(i, gold=f"{i}+{i}+0" if i in (1, 8, 9) else 2 * i) for i in range(200)]
    sets = load_problems(
        settings(jsonl(tmp_path / "p.jsonl", rows), columns=ColumnsConfig(answer="gold"), on_bad_row="skip")
    )
    assert EIGHT in {problem.text for problem in every(sets)}
    assert [line.split("p.jsonl: ")[1].split(":")[0] for line in sets.skipped] == ["row 2", "row 10"]
    assert any("1 rows are used although comparing their boxed answer" in note for note in sets.notes)


def test_a_copy_without_a_reference_does_not_take_the_one_with_it_where_references_are_wanted(tmp_path):
    rows = [row(i, gold=2 * i, **({"solution": None} if i == 8 else {})) for i in range(200)]
    source = jsonl(tmp_path / "p.jsonl", [*rows, row(8, gold=16)])
    wanted = {"columns": ColumnsConfig(answer="gold"), "on_bad_row": "skip"}
    for choice, reference in (("skip", "Add."), ("keep", "Final")):
        sets = load_problems(settings(source, on_missing_reference=choice, **wanted))
        problem = {problem.text: problem for problem in every(sets)}[EIGHT]
        assert problem.reference.startswith(reference)


@pytest.mark.parametrize(
    ("columns", "bad", "expected"),
    [
        ({"answer": "gold"}, row(2, gold="5"), "its solution boxes '4' but its answer is '5'"),
        ({"answer": "gold"}, row(2, gold="4", solution="\\boxed{)(}"), "its solution boxes ')(' but its answer is '4'"),
        ({"answer": "gold"}, row(2, gold=True), "column 'gold' holds no text but bool True"),
        (
            {"answer": "gold"},
            row(2, gold="\\boxed{3} \\text{ or } \\boxed{5}"),
            "column 'gold' holds two boxed answers, '3' and '5'",
        ),
        ({"answer": "gold"}, row(2, gold="\\}{"), "the answer '\\}{' cannot stand inside \\boxed{}"),
        ({"answer": "gold"}, row(2, gold="", solution="four"), "no answer can be found"),
        ({"id": "gold"}, row(2, gold="1"), "its id '1' is that of row 2"),
        ({"id": "gold"}, row(2), "no id: column 'gold' is empty"),
        ({"difficulty": "gold"}, row(2, gold="hard"), "column 'gold' holds no level but hard"),
    ],
)
def test_a_bad_value_is_refused_with_its_column(tmp_path, columns, bad, expected):
    good = [row(i, gold=gold) for i, gold in ((0, "0"), (1, "1"), (3, "3"))]
    if "answer" in columns:
        good = [dict(item, gold=str(2 * int(item["gold"]))) for item in good]
    source = jsonl(tmp_path / "p.jsonl", [good[0], good[1], bad, good[2]])
    message = refusal(source, columns=ColumnsConfig(**columns))
    assert f"row 3: {expected}" in message
    assert "1 of 4 rows" in message


def test_all_bad_rows_are_counted_and_the_first_twenty_listed(tmp_path):
    rows = [row(i) if i % 2 else row(i, problem="") for i in range(60)]
    message = refusal(jsonl(tmp_path / "p.jsonl", rows))
    assert "p.jsonl: 30 of 60 rows cannot be used:\n  row 1: " in message
    assert message.count("\n  row ") == 20
    assert message.endswith("  and 10 more\nCorrect them, or leave them out with data.on_bad_row: skip")


def test_skipped_rows_are_listed_in_order_and_the_rest_is_as_without_them(tmp_path):
    worse = [*ROWS[:10], row(0), b"\xff", *ROWS[10:], row(5, problem="")]
    sets = load_problems(settings(jsonl(tmp_path / "p.jsonl", worse), on_bad_row="skip"))
    numbers = [line.split(": ")[1] for line in sets.skipped]
    assert numbers == ["row 11", "row 12", "row 303"]
    clean = load_problems(settings(jsonl(tmp_path / "q.jsonl", ROWS)))
    assert sets.train == clean.train
    assert clean.skipped == ()


def test_empty_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(item).encode() for item in ROWS) + b"\n\n")
    assert loaded(str(path)) == loaded(jsonl(tmp_path / "q.jsonl", ROWS))


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (16, "16"),
        (16.0, "16"),
        ("$16$", "16"),
        ("\\boxed{16}", "16"),
        (" 16 ", "16"),
        ("\\(16\\)", "16"),
        ("16.0", "16.0"),
        ("32/2", "32/2"),
        ("8+8", "8+8"),
        (None, "16"),
    ],
)
def test_an_answer_that_agrees_with_the_box_is_taken_as_it_is_stated(tmp_path, gold, answer):
    rows = [row(i, gold=2 * i) for i in range(300)]
    rows[8]["gold"] = gold
    source = jsonl(tmp_path / "p.jsonl", rows)
    problem = loaded(source, columns=ColumnsConfig(answer="gold"))[EIGHT]
    assert (problem.answer, problem.closing) == (answer, "So \\boxed{16}.")


def test_equality_as_mathematics_is_not_asked_of_an_exact_checker(tmp_path):
    rows = [row(i, gold="8+8" if i == 8 else 2 * i) for i in range(300)]
    source = jsonl(tmp_path / "p.jsonl", rows)
    message = refusal(source, columns=ColumnsConfig(answer="gold"), checker="exact")
    assert "row 9: its solution boxes '16' but its answer is '8+8'" in message


def test_a_solution_that_boxes_nothing_is_closed_with_the_answer_of_its_column(tmp_path):
    rows = [{"problem": f"p{i}", "solution": "a\nb", "answer": i} for i in range(200)]
    problems = loaded(jsonl(tmp_path / "p.jsonl", rows), columns=ColumnsConfig(answer="answer"))
    assert problems["p7"].reference == "a\nb\n\nFinal answer: \\boxed{7}"
    assert problems["p7"].segments == ("a\n", "b")


def test_a_reference_may_be_absent(tmp_path):
    rows = [{"problem": f"p{i}", "answer": i} for i in range(200)]
    columns = ColumnsConfig(solution=None, answer="answer")
    assert loaded(jsonl(tmp_path / "p.jsonl", rows), columns=columns)["p7"].reference == "Final answer: \\boxed{7}"


@pytest.mark.parametrize(("level", "difficulty"), [(3, 3), ("4", 4), ("Level 5", 5), (5.4, 5), (-1, -1)])
def test_levels_are_read_to_the_nearest_integer(tmp_path, level, difficulty):
    rows = [row(i, level=level) for i in range(200)]
    problems = loaded(jsonl(tmp_path / "p.jsonl", rows), columns=ColumnsConfig(difficulty="level"))
    assert {problem.difficulty for problem in problems.values()} == {difficulty}


def test_a_missing_column_is_named_with_the_nearest_and_all_there_are(tmp_path):
    message = refusal(jsonl(tmp_path / "p.jsonl", [{"Problem": "p", "text": "s"}]))
    assert "no column 'problem', which data.columns.problem names; did you mean 'Problem'?" in message
    assert message.endswith("it has: Problem, text")


def test_too_few_problems_are_named_with_numbers_and_the_setting_to_lower(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", ROWS[:40])
    message = refusal(source, train_size=100, probe_size=64)
    train = sum(split_of(item["problem"]) == "train" for item in ROWS[:40])
    assert f"train {train} of 100 (data.train_size), probe" in message
    assert "of 64 (data.probe_size)" in message
    assert "40 usable problems" in message


def test_a_test_file_takes_the_place_of_the_test_share(tmp_path):
    main = jsonl(tmp_path / "p.jsonl", ROWS)
    test = jsonl(tmp_path / "t.jsonl", [{"problem": f"T{i}", "answer": i, "n": i} for i in range(30)])
    sets = load_problems(settings(main, test_source=test, test_size=300))
    assert sorted(problem.text for problem in sets.test) == sorted(f"T{i}" for i in range(30))
    assert {split_of(problem.text) for problem in sets.train} == {"train", "test"}
    assert len(load_problems(settings(main, test_source=test, test_size=7)).test) == 7


def test_what_is_cut_or_left_out_of_a_test_file_is_said(tmp_path):
    chats = [
        {
            "messages": [
                {"role": r, "content": c}
                for r, c in (("system", "Go."), ("user", f"t{i}"), ("assistant", "\\boxed{1}"))
            ]
        }
        for i in range(30)
    ]
    source = jsonl(tmp_path / "t.jsonl", chats)
    tests = {"columns": ColumnsConfig(messages="messages"), "system_message": "drop", "test_source": source}
    sets = load_problems(settings(jsonl(tmp_path / "p.jsonl", ROWS), preset="openthoughts-opsd", test_size=12, **tests))
    assert len(sets.test) == 12
    assert [note.removeprefix(source).partition(":")[2] for note in sets.notes if "t.jsonl" in note] == [
        " 30 rows have a system message in column 'messages', which is not read (data.system_message: drop)",
        " test 12 of 30 problems (data.test_size)",
    ]


def test_of_a_test_source_with_splits_the_one_that_is_named_is_read(tmp_path):
    for name, first in (("train", 0), ("validation", 100), ("test", 200)):
        jsonl_rows = [{"problem": f"{name} {i}", "answer": i} for i in range(first, first + 20)]
        (tmp_path / "many").mkdir(exist_ok=True)
        jsonl(tmp_path / "many" / f"{name}.jsonl", jsonl_rows)
    many = str(tmp_path / "many")
    for named, read in ((None, "test"), ("validation", "validation"), ("nowhere", "test")):
        sets = load_benchmark(settings(many, test_source=many, **({} if named is None else {"split_name": named})))
        assert {problem.text.split()[0] for problem in sets.test} == {read}
        assert sets.notes == (f"{many}: its split '{read}' is the test file",)
    columns = ColumnsConfig(solution=None, answer="answer")
    shares = {"train": 0.5, "validation": 0.0, "probe": 0.5, "test": 0.0}
    both = settings(many, test_source=many, split_name="validation", columns=columns, shares=shares, test_size=5)
    assert {problem.text.split()[0] for problem in load_problems(both).test} == {"test"}


def test_a_training_problem_of_the_test_file_is_a_bad_row(tmp_path):
    main = jsonl(tmp_path / "p.jsonl", ROWS)
    test = jsonl(tmp_path / "t.jsonl", [row(400), row(8, problem=" What is 8  + 8?")])
    assert "row 9: the same problem as row 2 of " in refusal(main, test_source=test, test_size=2)
    sets = load_problems(settings(main, test_source=test, test_size=2, on_bad_row="skip"))
    assert EIGHT not in {problem.text for problem in (*sets.train, *sets.validation, *sets.probe)}
    assert len(sets.skipped) == 1


def test_ids_of_a_test_file_cannot_be_those_of_the_training_file(tmp_path):
    main = jsonl(tmp_path / "p.jsonl", [row(i, n=i) for i in range(200)])
    test = jsonl(tmp_path / "t.jsonl", [row(i + 500, n=i) for i in range(5)])
    sets = load_problems(settings(main, test_source=test, test_size=5, columns=ColumnsConfig(id="n")))
    assert {problem.id for problem in sets.test} == {f"test:{i}" for i in range(5)}


def test_parquet_gives_the_problems_of_the_same_jsonl(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet", row_group_size=37)
    assert loaded(str(tmp_path / "p.parquet")) == loaded(jsonl(tmp_path / "p.jsonl", ROWS))


def test_text_in_parquet_that_is_not_utf8_is_a_bad_row(tmp_path):
    raw = pa.array([b"p0", b"\xff\xfe", b"p2"], pa.binary()).view(pa.string())
    table = pa.table({"problem": raw, "solution": ["\\boxed{1}"] * 3})
    pq.write_table(table, tmp_path / "p.parquet")
    assert "1 of 3 rows cannot be used:\n  row 2: column 'problem' holds text that is not UTF-8" in refusal(
        str(tmp_path / "p.parquet")
    )


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 no")
    assert "p.parquet: not a readable Parquet file" in refusal(str(tmp_path / "p.parquet"))


def test_a_folder_saved_by_datasets_gives_the_problems_of_the_same_jsonl(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "other": table.select(range(3))}).save_to_disk(tmp_path / "two")
    expected = loaded(jsonl(tmp_path / "p.jsonl", ROWS))
    assert loaded(str(tmp_path / "one")) == loaded(str(tmp_path / "two")) == expected
    message = refusal(str(tmp_path / "two"), split_name="validation")
    assert "no split 'validation'; it has train, other" in message


def test_a_folder_of_parquet_files_is_loaded_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "set" / "train.parquet")
    assert loaded(str(tmp_path / "set")) == loaded(jsonl(tmp_path / "p.jsonl", ROWS))


def test_what_cannot_be_loaded_is_refused_with_what_can(tmp_path, monkeypatch):
    def gated(_: str) -> None:
        raise ValueError("ask for access\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    message = refusal("gsm-symbolic")
    assert "cannot be loaded (ValueError: ask for access)" in message
    assert message.endswith("world, arithmetic, or gsm_symbolic")
    assert "cannot read a '.csv' file" in refusal(str(tmp_path / "p.csv"))
    jsonl(tmp_path / "train.jsonl", ROWS)
    assert f"no such file; did you mean {tmp_path / 'train.jsonl'}?" in refusal(str(tmp_path / "trian.jsonl"))


def test_of_several_configurations_the_one_that_is_named_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "two"
    names = {"main": range(200), "other": range(300, 500)}
    folder.mkdir()
    listed = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in names]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(listed)}---\n", "utf-8")
    for name, numbers in names.items():
        jsonl(folder / f"{name}.jsonl", map(row, numbers))
    for subset in (None, "third"):
        assert "data.subset: the configurations of " in (said := refusal(str(folder), subset=subset))
        assert said.endswith("are 'main', 'other'; set it to one")
    assert loaded(str(folder), subset="main") == loaded(str(folder / "main.jsonl"))
    sets = load_benchmark(settings(str(folder / "main.jsonl"), test_source=str(folder), subset="other"))
    assert {problem.text for problem in sets.test} == {row(i)["problem"] for i in names["other"]}
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert "a folder that save_to_disk wrote, which has none" in refusal(str(tmp_path / "saved"), subset="main")


def test_an_unreachable_hub_is_told_from_a_bad_data_set(monkeypatch):
    def offline(_: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert "gsm-symbolic: neither a local folder nor in the hub cache, and the hub cannot" in refusal("gsm-symbolic")


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_named_and_not_listed_line_by_line(tmp_path, indent):
    (tmp_path / "p.jsonl").write_text(json.dumps(ROWS, indent=indent), "utf-8")
    (tmp_path / "q.jsonl").write_text("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", "utf-8")
    for name in ("p.jsonl", "q.jsonl"):
        assert refusal(str(tmp_path / name)).endswith("write each of its objects on a line of its own")


@pytest.mark.parametrize(
    ("module", "source", "extra"),
    [
        ("pyarrow.parquet", "p.parquet", "datasets"),
        ("datasets", "a/b", "datasets"),
        ("reasoning_gym", "gsm_symbolic", "gsm"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, module, source, extra):
    (tmp_path / "p.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    message = refusal(source, train_size=5)
    assert f"needs the package {module.partition('.')[0]}" in message
    assert f'pip install "atesd[{extra}]"' in message


def test_the_preset_of_openthoughts_114k_keeps_correct_rows_and_counts_the_rest(tmp_path):
    rows = [row(i, correct=i % 3 > 0, conversations=[], source="x") for i in range(300)]
    sets = load_problems(settings(jsonl(tmp_path / "p.jsonl", rows), preset="openthoughts-114k"))
    assert all(int(problem.answer) % 3 for problem in every(sets))
    assert [line.split(": ", 1)[1] for line in sets.skipped] == [
        "100 rows left out: data.preset: openthoughts-114k keeps those whose `correct` is true"
    ]


def test_the_preset_of_openthoughts_opsd_reads_problem_and_solution(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", ROWS)
    assert loaded(source, preset="openthoughts-opsd") == loaded(source)


def test_the_preset_of_deepmath_takes_the_first_solution_that_boxes_the_answer(tmp_path):
    three = {
        "r1_solution_1": "I give up.",
        "r1_solution_2": "No: \\boxed{3}",
        "r1_solution_3": "Yes.\n\n\\boxed{\\dfrac{1}{2}}",
    }
    rows = [
        {"question": f"q{i}", "final_answer": "\\frac{1}{2}", "difficulty": 6.0, "topic": "t", **three}
        for i in range(200)
    ]
    problem = loaded(jsonl(tmp_path / "p.jsonl", rows), preset="deepmath")["q8"]
    assert (problem.reference, problem.answer, problem.difficulty) == (three["r1_solution_3"], "\\frac{1}{2}", 6)
    rows[1]["r1_solution_3"] = None
    assert "row 2: its solution boxes '3' but its answer is" in refusal(
        jsonl(tmp_path / "p.jsonl", rows), preset="deepmath"
    )


def test_the_preset_of_openr1_takes_the_first_verified_and_complete_generation(tmp_path):
    def generated(i: int, verified: list[bool] | None, complete: list[bool]) -> dict[str, Any]:
        generations = [f"<think>{name}</think>\n\n\\boxed{{{i}}}" for name in "abc"]
        marks = {"correctness_math_verify": verified, "is_reasoning_complete": complete}
        return {"problem": f"p{i}", "answer": str(i), "solution": "short", "generations": generations, **marks}

    rows = [generated(i, [True, False, True], [False, True, True]) for i in range(200)]
    rows += [generated(200, [False] * 3, [True] * 3), generated(201, None, [True] * 3), generated(202, [True], [False])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    sets = load_problems(settings(str(tmp_path / "p.parquet"), preset="openr1"))
    assert {problem.reference.split("\n")[0] for problem in every(sets)} == {"<think>c</think>"}
    assert "3 rows left out" in sets.skipped[0]


def grade_school(n: int) -> dict[str, str]:
    """A problem in the layout of GSM8K."""
    two = 2 * n
    steps = f"Twice {n} is 2*{n}=<<2*{n}={two}>>{two} pens.\nOne more is {two}+1=<<{two}+1={two + 1}>>{two + 1}."
    return {"question": f"q{n}", "answer": f"{steps}\n#### {two + 1:,}"}


def test_the_preset_of_gsm8k_reads_the_marked_answer_and_shows_neither_mark_nor_calculator(tmp_path):
    problem = loaded(jsonl(tmp_path / "p.jsonl", map(grade_school, range(600, 800))), preset="gsm8k")["q700"]
    assert problem.answer == "1,401"
    assert problem.reference == (
        "Twice 700 is 2*700=1400 pens.\nOne more is 1400+1=1401.\n\nFinal answer: \\boxed{1,401}"
    )


def test_the_preset_of_gsm8k_refuses_a_row_without_a_marked_answer(tmp_path):
    rows = [*map(grade_school, range(20)), {"question": "q", "answer": "Then 7."}]
    assert "row 21: no answer can be found" in refusal(jsonl(tmp_path / "p.jsonl", rows), preset="gsm8k")


def test_the_preset_of_math_takes_what_the_solution_boxes_last(tmp_path):
    rows = [
        row(i, level="Level ?", type="Algebra", solution=f"\\boxed{{0}}\n\nSo \\boxed{{{2 * i}}}.") for i in range(200)
    ]
    assert loaded(jsonl(tmp_path / "p.jsonl", rows), preset="math")[EIGHT].answer == "16"


@pytest.mark.parametrize("answer", ["answer", None])
def test_a_column_that_holds_a_whole_solution_states_what_it_marks(tmp_path, answer):
    columns = ColumnsConfig(problem="question", solution="answer", answer=answer)
    problem = loaded(jsonl(tmp_path / "p.jsonl", map(grade_school, range(200))), columns=columns)["q20"]
    assert problem.answer == "41"
    assert "####" not in problem.reference
    assert problem.closing == "\n\nFinal answer: \\boxed{41}"


def test_a_marked_answer_that_contradicts_the_column_is_refused(tmp_path):
    rows = [dict(grade_school(i), gold=str(2 * i + 1 + (i == 5))) for i in range(20)]
    columns = ColumnsConfig(problem="question", solution="answer", answer="gold")
    message = refusal(jsonl(tmp_path / "p.jsonl", rows), columns=columns)
    assert "row 6: its solution boxes '11' but its answer is '12'" in message


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ("Add.\nSo 4.", "the answer 'Add. So 4.' has 2 lines"),
        ("???", "the answer '???' holds neither a number nor a word"),
        ("4" * 5000, "has 5000 characters"),
    ],
)
def test_a_gold_that_no_checker_can_read_is_refused_by_its_row(tmp_path, gold, expected):
    assert expected in reason(tmp_path, row(2, solution="Add.", gold=gold), columns=ColumnsConfig(answer="gold"))


@pytest.mark.parametrize(
    ("value", "gold"),
    [(3e-7, "0.0000003"), (1.4e9, "1400000000"), (0.1, "0.1"), (3e-30, "3e-30"), (1e15, "1" + "0" * 15)],
)
def test_a_number_in_a_column_becomes_a_gold_that_a_person_would_write(tmp_path, value, gold):
    rows = [row(i, solution="", answer=value) for i in range(200)]
    assert loaded_one(tmp_path, rows) == {gold}


def loaded_one(tmp_path: Path, rows: list[dict[str, Any]]) -> set[str]:
    sets = load_problems(settings(jsonl(tmp_path / "p.jsonl", rows), columns=ColumnsConfig(answer="answer")))
    return {problem.answer for problem in every(sets)}


@pytest.mark.parametrize("boxed", ["\\textbf{(0%d)}", "\\mathbf{%d}", "\\text{(%d)}", "\\fbox{%d}", "(%d)"])
def test_a_styled_box_is_the_number_in_it(tmp_path, boxed):
    rows = [row(i, solution=f"So \\boxed{{{boxed % (2 * i)}}}.", answer=f"{2 * i:03}") for i in range(200)]
    source = jsonl(tmp_path / "p.jsonl", rows)
    assert load_problems(settings(source, columns=ColumnsConfig(answer="answer"), checker="exact")).skipped == ()


def test_the_solutions_of_a_test_file_are_not_compared_with_its_answers(tmp_path):
    tests = [dict(row(i), problem=f"t{i}", answer=str(2 * i + 1)) for i in range(30)]
    sets = load_problems(
        settings(jsonl(tmp_path / "p.jsonl", ROWS), test_source=jsonl(tmp_path / "t.jsonl", tests), test_size=30)
    )
    assert sorted(int(problem.answer) for problem in sets.test) == [2 * i + 1 for i in range(30)]


def test_a_preset_names_the_column_that_a_file_lacks(tmp_path):
    message = refusal(jsonl(tmp_path / "p.jsonl", ROWS), preset="deepmath")
    assert "no column 'question', which data.preset: deepmath (question) names; it has: problem, solution" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"source": "world", "preset": "deepmath"}, "data.preset: deepmath"),
        ({"source": "world", "test_source": "t.jsonl"}, "data.test_source"),
        ({"source": "gsm_symbolic", "train_size": None}, "data.train_size"),
        ({"source": "p.jsonl", "preset": "openr1", "columns": ColumnsConfig(problem="q")}, "data.columns"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        load_problems(DataConfig(**changes))


def test_the_world_is_a_source():
    config = DataConfig(train_size=20, validation_size=5, probe_size=5, test_size=5)
    assert problem_sets(config) == world_problems(config)


GSM = DataConfig(source="gsm_symbolic", train_size=60, validation_size=10, probe_size=8, test_size=10, seed=3)


def test_gsm_problems_carry_their_reasoning_line_by_line():
    sets = load_problems(GSM)
    assert [len(split) for split in (sets.train, sets.validation, sets.probe, sets.test)] == [60, 10, 8, 10]
    for problem in every(sets):
        assert "####" not in problem.reference
        assert problem.closing == f"\n\nFinal answer: \\boxed{{{problem.answer}}}"
        assert len(problem.segments) >= 2
        lines = [line for segment in problem.segments for line in segment.splitlines() if line.strip()]
        assert problem.difficulty == min(len(lines), 8)


def test_gsm_problems_are_a_function_of_the_seed():
    assert load_problems(GSM) == load_problems(GSM)
    assert load_problems(GSM).train != load_problems(GSM.model_copy(update={"seed": 4})).train


def test_gsm_rows_that_are_bad_are_left_out_and_listed_whatever_the_setting():
    sets = load_problems(GSM)
    assert GSM.on_bad_row == "refuse"
    assert any("its reasoning states" in line for line in sets.skipped)
    assert len(sets.skipped) < 0.1 * 3000


def test_thirty_thousand_rows_load_in_seconds(tmp_path):
    solution = "We know that $x^2 = 4$, so e.g. $x = 2$. Then \\(y = 3\\).\n\n" * 8
    source = jsonl(tmp_path / "p.jsonl", [row(i, solution=f"{solution}So \\boxed{{{i}}}.") for i in range(30_000)])
    started = time.process_time()
    load_problems(DataConfig(source=source, columns=ColumnsConfig(), validation_size=200, test_size=300))
    assert time.process_time() - started < 10  # seconds; about 3 on one core
