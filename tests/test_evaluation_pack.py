"""`atesd evaluate --benchmark`: the registry, what a content is recognised by, and the rows that are kept in a run."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from atesd import cli
from atesd.cli import together
from atesd.cli.pack import evaluate_benchmarks, pack_table
from atesd.cli.scores import Scored, evaluate_target
from atesd.cli.unfinished import FOLDER
from atesd.config import Config, DataConfig, EvaluationConfig, ModelConfig, dump_config, with_overrides
from atesd.data import tables
from atesd.data.benchmarks import Asked, asked_for, content_hash, family_of, load_content, registry
from atesd.errors import AtesdError, ConfigError, DataError, RunError
from atesd.forecast.arithmetic import Lengths, Work, decoding
from atesd.forecast.devices import RESERVED_ON_CPU, DeviceKind
from atesd.maths.statistics import detectable_difference
from atesd.models.ranks import SINGLE_PROCESS
from atesd.models.shape import described_shape
from atesd.records import Problem
from atesd.runs import RunFolder
from atesd_lab.report.groups import group_of
from atesd_lab.report.honest import compare_groups
from atesd_lab.report.page import write_report
from pack import thinking_config, three_problems, words_of
from quick import finished, heard_by_the_engine

QWEN3 = datetime.date(2025, 4, 28)


def problem(text: str, answer: str) -> Problem:
    return Problem(text, text, (), "", answer, 0)


# The registry


def test_the_registry_has_the_benchmarks_of_the_field_with_their_sizes():
    sizes = {name: one.problems for name, one in registry().benchmarks.items()}
    contests = {"aime24": 30, "aime25": 30, "aime26": 30, "hmmt-feb25": 30, "hmmt-nov25": 30, "hmmt-feb26": 33}
    assert sizes == {**contests, "math500": 500, "gsm8k": 1319}


def test_a_pinned_content_names_the_copies_it_is_the_hash_of():
    assert {name: bool(one.sha256) == bool(one.copies) for name, one in registry().benchmarks.items()} == dict.fromkeys(
        registry().benchmarks, True
    )
    assert registry().benchmarks["hmmt-feb26"].sha256 is None  # no copy was at hand


def test_93_problems_are_clean_by_date_for_qwen3():
    family = family_of("Qwen/Qwen3-1.7B")
    assert family is not None
    assert (family.name, family.released, family.thinking) == ("Qwen3", QWEN3, "enable_thinking")
    clean = {name: one.problems for name, one in registry().benchmarks.items() if one.is_clean(family.released)}
    assert clean == {"aime26": 30, "hmmt-nov25": 30, "hmmt-feb26": 33}


def test_the_month_of_the_release_is_not_clean_and_an_unknown_release_is_not_known():
    held = registry().benchmarks["aime25"]
    days = [datetime.date(2025, 1, 31), datetime.date(2025, 2, 1), datetime.date(2025, 3, 1), None]
    assert [held.is_clean(day) for day in days] == [True, False, False, None]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3-2507"),
        ("runs/models/Qwen3-8B", "Qwen3"),
        ("Qwen/Qwen2.5-Math-7B", "Qwen2.5"),
        ("smollm2", "SmolLM2"),
        ("someone/another", None),
        ("runs/qwen3-1.7b/model", None),
    ],
)
def test_a_family_is_known_by_the_last_part_of_a_name(path: str, name: str | None):
    family = family_of(path)
    assert (family and family.name) == name


@pytest.mark.parametrize(
    ("names", "hashes", "error"),
    [
        ("aime2", [], "no such benchmark; did you mean aime26"),
        ("aime24,aime24=x.jsonl", [], "aime24 is named twice"),
        ("aime24=", [], "no file after the =; write aime24 for the hub"),
        ("aime24", ["aime24=beef"], "expected NAME=SHA256, 64 hexadecimal digits"),
        ("aime24", [f"aime25={'0' * 64}"], "aime25 is not evaluated; --benchmark names aime24"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(names: str, hashes: list[str], error: str):
    with pytest.raises(ConfigError, match=error.replace("?", r"\?")):
        asked_for(names, hashes)


# Contents


def test_the_hash_is_of_problems_and_answers_alone():
    two = [problem("What is\n 1 + 1?", " 002"), problem("b", "1,234")]
    expected = hashlib.sha256(b"What is 1 + 1?\t2\nb\t1234").hexdigest()
    assert content_hash(two) == content_hash(reversed(two)) == expected
    assert content_hash([problem("What is 1 + 1?", "3"), two[1]]) != expected
    assert content_hash([problem("What is 1+1?", "2"), two[1]]) != expected


def test_separators_are_those_of_thousands_and_tuples_stay():
    assert content_hash([problem("a", "1, 2, 3")]) != content_hash([problem("a", "123")])


def test_a_part_of_a_benchmark_is_refused_unless_its_hash_is_expected(tmp_path: Path):
    asked = three_problems("aime24", tmp_path)
    with pytest.raises(DataError, match=rf"3 problems, but aime24 \(AIME 2024\) has 30.*aime24={asked.expected}"):
        load_content(Asked(asked.name, asked.file), DataConfig())
    content = load_content(asked, DataConfig())
    assert (len(content.problems.test), content.sha256, content.pinned) == (3, asked.expected, "expected")


def thirty(tmp_path: Path) -> Path:
    path = tmp_path / "thirty.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}", "answer": n, "problem": f"{n}"}) + "\n" for n in range(30)))
    return path


def test_another_content_than_the_pinned_one_is_refused_and_says_how_to_accept_it(tmp_path: Path):
    asked = Asked("aime24", str(thirty(tmp_path)))
    with pytest.raises(DataError, match=r"not to 17a4.*that of aime24 in QwenLM/.*--expect-hash aime24=[0-9a-f]{64}"):
        load_content(asked, DataConfig())
    with pytest.raises(DataError, match=r"not to 0000.* \(--expect-hash\); another version"):
        load_content(Asked("aime24", asked.file, "0" * 64), DataConfig())


def test_a_hub_id_is_loaded_with_its_subset_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked_of_datasets: list[Any] = []

    class Datasets:
        def load_dataset(self, *words: str) -> dict[str, Any]:
            asked_of_datasets.append(words)
            return {"train": None, "test": tables.open_table(str(thirty(tmp_path)))}

    monkeypatch.setattr(tables, "require", lambda *_: Datasets())
    monkeypatch.setattr(tables, "dataset_table", lambda _, split: split)
    with pytest.raises(DataError, match=r"openai/gsm8k: 30 problems, but gsm8k \(GSM8K test\) has 1319"):
        load_content(Asked("gsm8k"), DataConfig())
    assert asked_of_datasets == [("openai/gsm8k", "main")]


def test_without_hub_and_cache_the_way_by_a_file_is_named(monkeypatch: pytest.MonkeyPatch):
    class Datasets:
        def load_dataset(self, *_: str) -> None:
            raise ConnectionError

    monkeypatch.setattr(tables, "require", lambda *_: Datasets())
    with pytest.raises(DataError, match=r"aime24: .*hub cannot be reached(.|\n)*--benchmark aime24=FILE\.jsonl"):
        load_content(Asked("aime24"), DataConfig())


# Power


def test_the_difference_that_is_told_apart_is_that_of_the_samples_noise():
    # By hand: p = 1/2 at both problems, k = 4: V = (1/4) / 3 / 2 = 1/24; 2.802 sqrt(2 / 24) = 0.80887
    assert detectable_difference([2, 2], 4) == pytest.approx(2.802 * math.sqrt(1 / 12))
    assert detectable_difference([1, 0], 1) == pytest.approx(2.802 * math.sqrt(2 * 0.25 / 2))  # at most this
    assert detectable_difference([4, 0], 4) is None


# Evaluations


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("pack")
    return finished(thinking_config(folder), folder / "run")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Asked]:
    folder = tmp_path_factory.mktemp("files")
    return [three_problems(name, folder) for name in ("aime24", "hmmt-feb25")]


@pytest.fixture
def copy(run: RunFolder, tmp_path: Path) -> RunFolder:
    ignored = shutil.ignore_patterns(".lock", ".owner.json", FOLDER, "evaluations.jsonl")
    shutil.copytree(run.path, tmp_path / "run", ignore=ignored)
    return RunFolder.open(tmp_path / "run")


def evaluated(target: RunFolder | Path, asked: list[Asked], *settings: str, **options: Any) -> list[Scored]:
    found = evaluate_benchmarks(
        str(target.path if isinstance(target, RunFolder) else target), asked, settings, **options
    )
    assert found is not None
    return found


def test_a_row_per_benchmark_says_what_was_scored_and_what_really_acted(copy: RunFolder, two: list[Asked]):
    found = evaluated(copy, two)
    rows = copy.rows("evaluations")
    assert rows == [one.row for one in found]
    assert [(row["split"], row["update"], row["problems"], row["samples"]) for row in rows] == [
        ("aime24", 2, 3, 4),
        ("hmmt-feb25", 2, 3, 4),
    ]
    about = rows[0]["benchmark"]
    assert (about["source"], about["sha256"], about["pinned"]) == ("aime24.jsonl", two[0].expected, "expected")
    assert (about["family"], about["clean"], about["engine"]) == ("Qwen3", False, "builtin")
    assert about["thinking"] is rows[0]["sampler"]["student_template.enable_thinking"] is True  # trained without
    assert rows[0]["sampler"]["completion_tokens"] == 8
    assert list(about["pass_at"]) == ["1", "2", "4"]
    assert about["pass_at"]["1"] == pytest.approx(rows[0]["average"]["value"])
    assert about["pass_at"]["4"] == pytest.approx(rows[0]["pass_at_k"]["value"])


def test_what_a_run_holds_is_not_done_again_and_other_settings_are_another_evaluation(
    copy: RunFolder, two: list[Asked], monkeypatch: pytest.MonkeyPatch
):
    first = evaluated(copy, two)
    asked = heard_by_the_engine(monkeypatch)
    assert [(one.row, one.where) for one in evaluated(copy, two)] == [(one.row, "held already") for one in first]
    assert asked == []
    evaluated(copy, two[:1], "model.student_template.enable_thinking=false")
    assert asked == [12]
    row = copy.rows("evaluations")[-1]
    assert row["sampler"]["student_template.enable_thinking"] is row["benchmark"]["thinking"] is False


OWN = "def make(verdict=False, **_):\n    return lambda completion, answer: verdict\n"


def test_a_checker_of_ones_own_keeps_its_settings_and_is_asked_again_when_it_has_changed(
    tmp_path: Path, two: list[Asked], capsys: pytest.CaptureFixture[str]
):
    mine = tmp_path / "mine.py"
    mine.write_text(OWN, "utf-8")
    own = [f"data.checker={mine}:make", "data.checker_settings={verdict: true}", "data.checker_seconds=3.0"]
    run = finished(with_overrides(thinking_config(tmp_path), own), tmp_path / "run")
    [first] = evaluated(run, two[:1])
    assert first.row["average"]["value"] == 1.0
    assert load_content(two[0], run.config.data).data.checker_seconds == 3.0
    assert [one.where for one in evaluated(run, two[:1])] == ["held already"]
    [other] = evaluated(run, two[:1], "data.checker_settings={verdict: false}")
    assert other.row["average"]["value"] == 0.0
    capsys.readouterr()
    mine.write_text(OWN.replace("verdict\n", "False\n"), "utf-8")
    [mended] = evaluated(run, two[:1])
    assert (mended.row["average"]["value"], mended.where) == (0.0, f"written to {run.path / 'evaluations.jsonl'}")
    assert "data.checker: the file of " in capsys.readouterr().err


def test_each_benchmark_goes_on_where_it_was_interrupted(
    copy: RunFolder, two: list[Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = ("sampling.batch_size=4",)  # a part is a problem: lcm(4, 4) completions
    whole = shutil.copytree(copy.path, tmp_path / "whole", ignore=shutil.ignore_patterns(".lock", ".owner.json"))
    expected = [one.row for one in evaluated(whole, two, *settings)]
    with monkeypatch.context() as patch:
        heard_by_the_engine(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            evaluated(copy, two, *settings)
    assert [row["split"] for row in copy.rows("evaluations")] == ["aime24"]
    [left] = (copy.path / FOLDER).glob("*.jsonl")
    assert len(left.read_text().splitlines()) == 1
    asked = heard_by_the_engine(monkeypatch)
    assert [one.row for one in evaluated(copy, two, *settings)] == expected
    assert asked == [4, 4]
    assert copy.rows("evaluations") == expected


def test_update_0_is_the_model_before_training_and_a_checkpoint_that_after_its_updates(
    copy: RunFolder, two: list[Asked], tmp_path: Path
):
    many = "evaluation.samples=12"
    [before], [middle], [last] = (evaluated(copy, two[:1], many, update=update) for update in (0, 1, None))
    assert [one.row["update"] for one in (before, middle, last)] == [0, 1, 2]
    assert len({one.row["mean_tokens"] for one in (before, middle, last)}) == 3
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(copy.config))
    [bare] = evaluated(Path(copy.config.model.path), two[:1], many, recipe=str(recipe))
    assert bare.where == "nothing was written: not a run folder"
    assert outcome(bare) == outcome(before)
    [short] = evaluated(finished(thinking_config(tmp_path, updates=1), tmp_path / "short"), two[:1], many)
    assert outcome(short) == outcome(middle)


def outcome(scored: Scored) -> tuple[object, ...]:
    return scored.row["correct_counts"], scored.row["mean_tokens"], scored.row["verdicts"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"update": 7}, "has no checkpoint after 7 updates; there are 0, 1, 2 and 2"),
        ({"recipe": "micro"}, "is a run and has prompts of its own"),
    ],
)
def test_what_a_run_cannot_give_is_refused(copy: RunFolder, two: list[Asked], words: dict[str, Any], error: str):
    with pytest.raises(AtesdError, match=error):
        evaluated(copy, two, **words)


def test_settings_of_the_problems_are_refused_beside_a_benchmark(copy: RunFolder, two: list[Asked]):
    with pytest.raises(ConfigError, match=r"--set data\.test_size=3: the benchmark says what is read"):
        evaluated(copy, two, "data.test_size=3")
    with pytest.raises(ConfigError, match="is no run folder, so that nobody knows its updates"):
        evaluated(Path("some-model"), two, update=0)


def test_the_table_has_a_row_per_benchmark_their_mean_and_the_clean_ones_together(copy: RunFolder, two: list[Asked]):
    found = evaluated(copy, two, released=datetime.date(2024, 6, 1))
    assert [row[0] for row in pack_table(found).rows] == [
        "aime24", "hmmt-feb25", "mean of the benchmarks", "clean by date, together"
    ]  # fmt: skip
    assert [row[2] for row in pack_table(found).rows] == ["no", "yes", "", "yes"]
    assert "thinking mode on" in " ".join(pack_table(found).notes)


def test_compare_and_report_read_the_benchmarks_of_runs(copy: RunFolder, two: list[Asked], tmp_path: Path):
    other = finished(thinking_config(tmp_path, ratio=1.0), tmp_path / "other")
    for one in (copy, other):
        evaluated(one, two, "evaluation.samples=24")
    report = compare_groups(group_of("half", [copy.path]), group_of("full", [other.path]))
    assert [one.short for one in report.comparisons] == ["last (aime24)", "last (hmmt-feb25)"]
    assert any(note.startswith("Tells apart: aime24 ") for note in report.notes)
    page = write_report([copy.path], tmp_path / "page.html").read_text("utf-8")
    assert "tells apart differences of" in page
    assert "aime24.jsonl (as expected, " in page


def test_contents_that_differ_are_not_compared(copy: RunFolder, two: list[Asked], tmp_path: Path):
    evaluated(copy, two[:1])
    other = RunFolder.open(
        shutil.copytree(copy.path, tmp_path / "other", ignore=shutil.ignore_patterns(".lock", ".owner.json"))
    )
    path = other.path / "evaluations.jsonl"
    path.write_text(path.read_text().replace(str(two[0].expected), "0" * 64))
    manifest = other.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(other.run_id, "0" * len(other.run_id)))
    with pytest.raises(RunError, match="were scored on other contents of aime24"):
        compare_groups(group_of("a", [copy.path]), group_of("b", [other.path]))


def test_the_command_line_evaluates_benchmarks(
    copy: RunFolder, two: list[Asked], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["atesd", "evaluate", str(copy.path), *words_of(two), "--samples", "2"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr()
    assert not end.value.code, told.err
    assert "run on benchmarks, after 2 updates" in told.out
    assert "hmmt-feb25: 3 of 3 problems, left" in told.err
    assert f"aime24: written to {copy.path / 'evaluations.jsonl'}" in told.out


def small_machine(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """A machine in which so many of the tiny model's rows fit together, and not twice as many."""
    real = together.this_machine

    def shrunk(config: Config, ranks: int) -> DeviceKind:
        lengths = Lengths(20, 20, 20, 20, 0, 0)
        work = Work(config, described_shape(config.model), lengths, real(config, ranks), ranks)
        needed = decoding(work, rows, config.evaluation_tokens).total
        return DeviceKind("cpu", 1.0001 * needed / (1 - RESERVED_ON_CPU))

    monkeypatch.setattr(together, "this_machine", shrunk)


def test_as_many_rows_as_fit_are_decoded_together_which_is_said_and_changes_no_draw(
    copy: RunFolder, two: list[Asked], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    [usual] = evaluated(copy, two[:1])
    (copy.path / "evaluations.jsonl").unlink()
    assert "rows together" not in capsys.readouterr().err
    small_machine(monkeypatch, 2)
    asked = heard_by_the_engine(monkeypatch)
    [small] = evaluated(copy, two[:1])
    assert outcome(small) == outcome(usual)
    assert asked == [4, 4, 4]  # parts of lcm(4 samples, 2 rows)
    assert "rows together: 2, for prompts of up to" in (said := capsys.readouterr().err)
    assert "completions of up to 8 tokens: 64 would need" in said
    assert "--set sampling.batch_size=N decides otherwise" in said


def test_a_batch_that_is_asked_for_is_kept_and_what_is_expected_of_it_said(
    copy: RunFolder, two: list[Asked], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    small_machine(monkeypatch, 3)
    asked = heard_by_the_engine(monkeypatch)
    evaluated(copy, two[:1], "sampling.batch_size=12")
    assert asked == [12]
    said = capsys.readouterr().err
    assert "rows together: 12, as set, though prompts of up to" in said
    assert "3 should fit" in said  # 12, 6, 3


def test_the_time_of_a_servers_answer_is_said_by_the_requests_that_wait_together(
    copy: RunFolder, capsys: pytest.CaptureFixture[str]
):
    together.say_time(copy.config, 30, SINGLE_PROCESS)
    assert capsys.readouterr().err == ""
    served = with_overrides(copy.config, ["sampling.engine=server", "evaluation.completion_tokens=100"])
    long = served.model_copy(
        update={"evaluation": EvaluationConfig(samples=12, completion_tokens=38_912), "model": ModelConfig()}
    )
    together.say_time(long, 30, SINGLE_PROCESS)
    # By hand: of 360 requests lcm(12 samples, 64 rows) = 192 at once; 192 x 38,912 / 500 tokens a second = 14,942 s.
    assert capsys.readouterr().err == "a server may take 4 h 09 min for an answer (sampling.server.timeout)\n"


def test_the_rows_of_a_run_evaluated_by_evaluate_are_those_that_fit_too(
    copy: RunFolder, two: list[Asked], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    small_machine(monkeypatch, 2)
    evaluate_target(str(copy.path), str(two[0].file), "test", ["data.checker=exact"])
    assert "rows together: 2, for prompts of up to" in capsys.readouterr().err
