"""Several sources as one: faults and copies are named with their file, the mixture is counted, files are hashed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from atesd.config import DataConfig, config_from_mapping, dump_config, load_config
from atesd.data.sources import load_problems
from atesd.errors import ConfigError, DataError, RunError
from quick import finished, quick
from test_sources import ROWS, every, jsonl, refusal, row, settings


def three(tmp_path: Path) -> list[str]:
    """The three hundred rows in three files, the second of them empty."""
    parts = {"a": ROWS[:100], "b": [], "c": ROWS[100:]}
    return [jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in parts.items()]


def test_several_files_give_the_problems_of_one(tmp_path):
    several = load_problems(settings(three(tmp_path), probe_size=5, test_size=5))
    one = load_problems(settings(jsonl(tmp_path / "all.jsonl", ROWS), probe_size=5, test_size=5))
    assert several.train == one.train
    assert several.fingerprint == one.fingerprint


def test_the_mixture_is_counted_by_file_and_split(tmp_path):
    sources = three(tmp_path)
    sets = load_problems(settings(sources, validation_size=9, probe_size=5, test_size=20))
    assert [note.split(":")[0] for note in sets.notes] == sources
    counts = [dict(part.rsplit(" ", 1) for part in note.rsplit(": ", 1)[1].split(", ")) for note in sets.notes]
    for split in ("train", "validation", "probe", "test"):
        assert sum(int(count[split]) for count in counts) == len(getattr(sets, split))
    assert counts[1] == {"train": "0", "validation": "0", "probe": "0", "test": "0"}
    assert f"{sources[2]}: 200 usable rows: " in sets.notes[2]


def test_a_bad_row_is_named_with_its_file_and_its_line_there(tmp_path):
    sources = three(tmp_path)
    jsonl(tmp_path / "c.jsonl", [row(100), b"", row(101, problem="")])
    assert f"2 sources: 1 of 102 rows cannot be used:\n  {sources[2]}: row 3: no problem" in refusal(sources[::2])


@pytest.mark.parametrize("place", [0, 1])
def test_a_copy_in_another_file_is_named_with_both_files(tmp_path, place):
    names = [jsonl(tmp_path / f"{i}.jsonl", [row(10 * i + j) for j in range(5)]) for i in range(4)]
    jsonl(tmp_path / "2.jsonl", [row(20), row(10 * place + 3)])
    assert f"{names[2]}: row 2: the same problem as {names[place]}: row 4" in refusal(names)


def test_a_column_that_one_file_lacks_is_named_with_that_file(tmp_path):
    sources = [three(tmp_path)[0], jsonl(tmp_path / "d.jsonl", [{"question": "q", "solution": "s"}])]
    assert f"{sources[1]}: no column 'problem', which data.columns.problem names" in refusal(sources)


def test_a_preset_holds_for_every_file(tmp_path):
    rows = [row(i, correct=i % 2 > 0) for i in range(300)]
    sources = [jsonl(tmp_path / "a.jsonl", rows[:150]), jsonl(tmp_path / "b.jsonl", rows[150:])]
    sets = load_problems(settings(sources, preset="openthoughts-114k"))
    assert all(int(problem.answer) % 4 for problem in every(sets))
    assert sets.skipped[0].startswith("2 sources: 150 rows left out")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ([], "data.source: [] is not allowed; expected a file or data set, or a list of them"),
        (["a.jsonl", 3], "data.source: ['a.jsonl', 3] is not allowed"),
        (["a.jsonl", ""], "data.source: ['a.jsonl', ''] is not allowed"),
        (["a.jsonl", "world"], "data.source: world makes its own problems and stands alone"),
        (["a.jsonl", "b.jsonl", "a.jsonl"], "data.source: a.jsonl stands twice in the list; keep one"),
        (None, "data.source: None is not allowed"),
    ],
)
def test_a_list_that_is_none_of_sources_is_refused(source, reason):
    with pytest.raises(ConfigError, match="data") as caught:
        config_from_mapping({"data": {"source": source}})
    assert reason in str(caught.value)


def test_a_list_is_recorded_as_it_is_and_one_of_one_as_its_only_source(tmp_path):
    config = config_from_mapping({"model": {"path": "x"}, "data": {"source": ["a.jsonl", "b.jsonl"]}})
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(config), "utf-8")
    assert load_config(str(path)) == config
    assert config.data.sources == ("a.jsonl", "b.jsonl")
    assert DataConfig.model_validate({"source": ["a.jsonl"]}).source == "a.jsonl"


def test_every_file_that_was_read_is_hashed_those_of_a_folder_too(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sources = three(tmp_path)
    sets = load_problems(settings(sources))
    assert sets.files == {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in sources}
    (tmp_path / "many" / "data").mkdir(parents=True)
    places = [str(tmp_path / "many" / "data" / f"{name}.jsonl") for name in ("train-0", "train-1", "test-0")]
    for place, rows in zip(places, (ROWS[:150], ROWS[150:], ROWS[:9]), strict=True):
        jsonl(Path(place), rows)
    assert set(load_problems(settings(str(tmp_path / "many"))).files) == set(places[:2])


def test_a_run_records_the_hash_of_each_file_and_names_the_one_that_changed(tmp_path):
    run = finished(quick(), tmp_path / "run")
    manifest: dict[str, Any] = {**run.manifest, "data_files": {"a.jsonl": "1", "b.jsonl": "2"}}
    (run.path / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(RunError, match=r"the problems have changed: .*; changed is b\.jsonl; restore the data"):
        run.check_data("other", {"a.jsonl": "1", "b.jsonl": "3"})


def test_a_file_named_in_two_ways_is_full_of_copies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", ROWS[:9])
    with pytest.raises(DataError, match=r"9 of 18 rows cannot be used:\n  a\.jsonl: row 1: the same problem as a\.j"):
        load_problems(settings(["a.jsonl", "./a.jsonl"]))
