"""Nothing is silently wrong: lost rows are said, links are never followed, a refused disk is told in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from atesd import cli
from atesd.config import ModelConfig, load_config
from atesd.errors import CheckpointError, ConfigError, RunError
from atesd.models.load import load_model
from atesd.runs import RunFolder, write_atomic
from atesd.session import train
from atesd.text import shown
from atesd.train.checkpoint import load_newest, save_checkpoint
from atesd_lab.report.page import write_report
from atesd_lab.report.rows import read_run
from fake_run import write_fake_run
from quick import Ears, fingerprint, finished, quick

FILES = ("metrics.jsonl", "decisions.jsonl", "evaluations.jsonl", "samples.jsonl")
CONFIG = quick(
    "train.num_updates=4", "train.checkpoint_every=2", "train.evaluate_every=2", "credit.lookahead_updates=1"
)
RUN = "run-1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of 4 updates: rows of every kind, checkpoints after 2 and 4."""
    return finished(CONFIG, tmp_path_factory.mktemp("faults") / "whole")


@pytest.fixture
def run(whole: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(whole.path, tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


def without_line(path: Path, number: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))


# Lost rows


def test_the_run_of_these_tests_has_rows_of_every_kind(whole: RunFolder):
    assert all((whole.path / name).stat().st_size for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_finished_run_whose_rows_are_gone_is_not_said_to_be_finished(run: RunFolder, name: str):
    (run.path / name).unlink()
    with pytest.raises(RunError, match=rf"{name}: holds 0 of the \d+ rows .*when update 4 was saved; restore the file"):
        train(CONFIG, run.path)


@pytest.mark.parametrize("name", FILES)
def test_one_lost_line_stops_the_resume_and_changes_nothing(run: RunFolder, name: str):
    without_line(run.path / name, 0)
    before = {path.name: path.read_bytes() for path in run.path.glob("*.json*")}
    with pytest.raises(RunError, match=f"{name}: (holds|its first)"):
        train(CONFIG, run.path)
    assert {path.name: path.read_bytes() for path in run.path.glob("*.json*")} == before


def test_a_changed_row_is_told_by_its_hash(run: RunFolder):
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"update": 1,', b'"update": 1, "extra": 1,'))
    with pytest.raises(RunError, match=r"metrics.jsonl: its first 4 rows are not those written .*SHA-256 \w{12}, "):
        train(CONFIG, run.path)


@pytest.mark.parametrize("name", FILES)
def test_rows_that_stand_twice_are_told(run: RunFolder, name: str):
    path = run.path / name
    finished_rows = [line for line in path.read_bytes().splitlines(keepends=True) if b'"pending"' not in line]
    path.write_bytes(b"".join(finished_rows * 2))
    with pytest.raises(RunError, match=rf"{name}: holds \d more rows of the first 4 updates than when they"):
        train(CONFIG, run.path)


def test_rows_lost_before_an_older_checkpoint_are_found_after_a_walk_back(run: RunFolder):
    shutil.rmtree(run.checkpoints / "update-000004")
    without_line(run.path / "metrics.jsonl", 1)
    with pytest.raises(RunError, match=r"metrics.jsonl: holds 1 of the 2 rows .* update 2 "):
        train(CONFIG, run.path)


def test_later_rows_are_no_fault_and_the_run_ends_as_it_was(run: RunFolder, whole: RunFolder):
    shutil.rmtree(run.checkpoints / "update-000004")
    train(CONFIG, run.path)
    assert fingerprint(run) == fingerprint(whole)


def test_an_evaluation_made_after_the_end_is_no_fault(run: RunFolder):
    run.append("evaluations", run.rows("evaluations")[-1] | {"samples": 9})
    assert train(CONFIG, run.path).status == "finished"
    assert run.rows("evaluations")[-1]["samples"] == 9


@pytest.mark.parametrize("changes", [{"split": "aime24"}, {"samples": 9}, {"split": "mine.jsonl", "update": 2}])
def test_an_older_update_evaluated_after_the_end_hinders_neither_more_updates_nor_a_walk_back(
    run: RunFolder, changes: dict[str, Any]
):
    # As `atesd evaluate --benchmark aime24 --update 0` does, and the log of a bridge.
    run.append("evaluations", run.rows("evaluations")[0] | {"update": 0} | changes)
    added = run.rows("evaluations")[-1]
    more = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"num_updates": 5})})
    assert train(more, run.path).status == "finished"
    assert run.rows("evaluations").count(added) == 1
    for newest in ("update-000005", "update-000004"):
        shutil.rmtree(run.checkpoints / newest)
    assert train(more, run.path).status == "finished"
    assert run.rows("evaluations").count(added) == 1


@pytest.mark.parametrize("name", ["", "model.safetensors", "tokenizer.json", "config.json", "README.md"])
@pytest.mark.parametrize("kind", ["link to itself", "link to a folder", "link to a file", "folder", "file"])
def test_whatever_stands_in_the_trained_model_s_place_is_replaced_and_nothing_beyond_a_link(
    run: RunFolder, tmp_path: Path, name: str, kind: str
):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    place = run.final / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    targets = {"link to itself": place, "link to a folder": precious, "link to a file": precious / "file"}
    if kind in targets:
        place.symlink_to(targets[kind])
    elif kind == "folder":
        place.mkdir()
    else:
        place.write_text("mine")
    shutil.rmtree(run.checkpoints / "update-000004")  # so that it trains, and ends again
    assert train(CONFIG, run.path).status == "finished"
    assert (precious / "file").read_text() == "kept"
    assert sorted(path.name for path in precious.iterdir()) == ["file"]
    assert load_model(ModelConfig(path=str(run.final))).model.num_parameters() > 0


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device"), Exception("os error 28")])
def test_a_disk_that_refuses_the_trained_model_is_told(run: RunFolder, monkeypatch: pytest.MonkeyPatch, error):
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    shutil.rmtree(run.checkpoints / "update-000004")
    with pytest.raises(RunError, match=r"model: cannot be written: .*(No space left|os error 28)"):
        train(CONFIG, run.path)
    assert not list(run.path.glob(".*-part"))


def forget_rows(checkpoint: Path) -> None:
    """The checkpoint as an earlier version wrote it: its manifest says nothing of rows."""
    from atesd.train.checkpoint import _manifest_bytes, _read_manifest

    content = _read_manifest(checkpoint / "manifest.json")
    del content["rows"]
    (checkpoint / "manifest.json").write_bytes(_manifest_bytes(content))


def test_a_checkpoint_of_an_earlier_version_still_resumes(run: RunFolder):
    forget_rows(run.checkpoints / "update-000004")
    assert train(CONFIG, run.path).status == "finished"


def test_with_an_earlier_checkpoint_every_update_must_have_its_row(run: RunFolder):
    forget_rows(run.checkpoints / "update-000004")
    without_line(run.path / "metrics.jsonl", 2)
    with pytest.raises(RunError, match="holds 3 of the 4 rows"):
        train(CONFIG, run.path)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again_over_its_rows(run: RunFolder):
    shutil.rmtree(run.checkpoints)
    with pytest.raises(RunError, match="holds no checkpoint, although the run is finished with 4 rows"):
        train(CONFIG, run.path)
    assert len(run.rows("metrics")) == 4


@pytest.mark.parametrize("name", FILES)
def test_a_report_on_a_finished_run_says_what_it_has_lost(tmp_path: Path, name: str):
    run = write_fake_run(tmp_path / "run")
    without_line(run.path / name, 0)
    with pytest.raises(RunError, match=f"{name}: (holds|its first).*the end of the run"):
        read_run(run.path)


# Links, files and folders among the checkpoints


def save(folder: Path, updates_done: int, keep: int = 1) -> Path:
    return save_checkpoint(folder, updates_done, {"n": updates_done}, keep, run_id=RUN)


def make_link(path: Path, treasure: Path) -> None:
    path.symlink_to(treasure, target_is_directory=True)


MAKERS: dict[str, Callable[[Path, Path], Any]] = {
    "link": make_link,
    "dangling link": lambda path, _: path.symlink_to("nowhere"),
    "link to itself": lambda path, _: path.symlink_to(path.name),
    "file": lambda path, _: path.write_text("x"),
    "folder": lambda path, _: path.mkdir(),
}
NAMES = (".trash-x", ".temporary-x", ".replaced-x", "update-000001", ".trash-update-000005", ".temporary-update-000006")
NAMES += (".replaced-update-000005", "update-000009", "beyond-update-000009")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", NAMES)
def test_whatever_bears_a_checkpoints_name_stops_neither_loading_nor_saving(tmp_path: Path, kind: str, name: str):
    folder, treasure = tmp_path / "checkpoints", tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "mine.txt").write_text("mine")
    save(folder, 5)
    MAKERS[kind](folder / name, treasure)
    for updates_done in (5, 6, 7):
        found = load_newest(folder, RUN)
        assert found is not None
        assert found.state == {"n": found.updates_done}
        save(folder, updates_done)
    assert (treasure / "mine.txt").read_text() == "mine"
    found = load_newest(folder, RUN)
    assert found is not None
    assert (found.updates_done, found.skipped) == (7, ())


def test_a_checkpoint_that_was_moved_away_and_linked_loads_and_is_retired_without_its_target(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    save(folder, 5)
    shutil.move(folder / "update-000005", tmp_path / "elsewhere")
    make_link(folder / "update-000005", tmp_path / "elsewhere")
    found = load_newest(folder, RUN)
    assert found is not None
    assert found.updates_done == 5
    save(folder, 6)
    assert [path.name for path in folder.iterdir()] == ["update-000006"]
    assert len(list((tmp_path / "elsewhere").iterdir())) == 3


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_checkpoints_that_are_no_folder_are_named(tmp_path: Path, kind: str):
    MAKERS[kind](tmp_path / "checkpoints", tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot be read"):
        load_newest(tmp_path / "checkpoints", RUN)


def test_what_cannot_be_cleared_away_stops_no_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 5)
    (tmp_path / ".trash-x").mkdir()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert load_newest(tmp_path, RUN) is not None


# A refused disk


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("call", "file"),
    [
        (lambda run: run.end_session("failed"), "manifest.json"),
        (lambda run: run.begin_session(CONFIG, command=[], updates_done=4), "config.yaml"),
        (lambda run: run.dump_skipped(3, {"loss": 1.0}), "update-000003.json"),
        (lambda run: run.truncate_after(2), "manifest.json"),
        (lambda run: run.sync(), "metrics.jsonl"),
        (lambda run: write_report([run.path], run.report), "report.html"),
    ],
)
def test_a_full_disk_is_told_with_file_cause_and_fix(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, call: Callable[[RunFolder], object], file: str
):
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match=rf"{file}: cannot be written: No space left on device; free some space"):
        call(run)
    assert not list(run.path.rglob("*.tmp"))


@pytest.mark.parametrize("kind", ["metrics", "decisions", "evaluations", "samples"])
def test_a_row_that_finds_a_folder_in_place_of_its_file_is_told(run: RunFolder, kind: Any):
    row = run.rows(kind)[0]
    (run.path / f"{kind}.jsonl").unlink()
    (run.path / f"{kind}.jsonl").mkdir()
    for call in (lambda: run.append(kind, row), lambda: run.rows(kind), lambda: run.last_row(kind)):
        with pytest.raises(RunError, match=f"{kind}.jsonl: cannot be (read|written): Is a directory"):
            call()


def test_a_folder_that_goes_away_midway_is_told(run: RunFolder):
    row = run.rows("metrics")[0]
    with run.lock():
        shutil.rmtree(run.path)
        for call in (lambda: run.append("metrics", row), lambda: run.end_session("failed"), run.sync):
            with pytest.raises(RunError, match="No such file or directory; restore"):
                call()


def test_a_lock_that_cannot_be_written_is_told(run: RunFolder):
    (run.path / ".lock").unlink(missing_ok=True)
    (run.path / ".lock").mkdir()
    with pytest.raises(RunError, match=r"\.lock: cannot be locked: Is a directory; choose another --out"), run.lock():
        pass


def test_an_owner_file_that_cannot_be_written_is_told_and_the_lock_is_free_again(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(RunError, match=r"\.owner.json: cannot be written: No space"), run.lock():
            pass
    with run.lock():
        pass


def test_a_disk_that_fills_while_training_is_told_and_the_run_goes_on_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunFolder
):
    def full(self: RunFolder, *_: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            write_atomic(self.path / "x", b"")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "dump_skipped", full)
        patch.setattr("atesd.train.snapshots.save_checkpoint", lambda *_, **__: refuse_saving())
        with pytest.raises(CheckpointError, match="No space left"):
            train(CONFIG, tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").manifest["status"] == "failed"
    train(CONFIG, tmp_path / "run")
    assert fingerprint(RunFolder.open(tmp_path / "run")) == fingerprint(whole)


def refuse_saving() -> None:
    raise CheckpointError("No space left")


def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str]:
    """Exit code and stderr of a command."""
    monkeypatch.setattr("sys.argv", ["atesd", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("train", "micro", "--out", "{file}/run"),
        ("train", "{file}/recipe.yaml"),
        ("config", "{folder}"),
        ("report", "{run}", "--out", "{file}/page.html"),
        ("report", "{run}", "--out", "{folder}"),
        ("report", "{file}/run"),
        ("evaluate", "{run}"),
        ("compare", "{run}", "--", "{file}/other"),
        ("sweep", "demo", "--out", "{file}/sweep"),
        ("train", "micro", "--out", "/proc/nowhere/run"),
        ("config", "x" * 5000),
        ("report", "x" * 5000),
    ],
)
def test_a_verb_that_the_disk_refuses_says_so_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]
):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    write_fake_run(tmp_path / "run", updates=4)
    places = {name: str(tmp_path / name) for name in ("file", "folder", "run")}
    code, err = run_cli(monkeypatch, capsys, *(word.format(**places) for word in words))
    assert code in (1, 2)
    assert "error:" in err.lower()
    assert "Traceback" not in err


# Folders with parts missing or of other types

WRONG = (None, True, -1, 10**30, 1e300, "x", [], {}, [[]], {"a": 1})


MANIFEST_KEYS = ("run_id", "status", "data_fingerprint", "seed", "sessions", "versions", "cpu", "commit")


@pytest.mark.parametrize("key", MANIFEST_KEYS)
def test_a_manifest_without_a_key_or_with_another_type_is_told(run: RunFolder, key: str):
    path = run.path / "manifest.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name != key}))
    with pytest.raises(RunError, match=f"manifest.json: {key} is missing; restore the file"):
        RunFolder.open(run.path)
    path.write_text(json.dumps({**manifest, key: 5.5}))
    with pytest.raises(RunError, match=rf"manifest.json: {key} is 5\.5, expected"):
        RunFolder.open(run.path)


def test_a_session_is_looked_into(run: RunFolder):
    path = run.path / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["sessions"][0]["versions"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"manifest.json: sessions\[0\].versions is missing"):
        RunFolder.open(run.path)


@pytest.mark.parametrize("kind", ["metrics", "decisions", "evaluations", "samples"])
def test_any_key_of_a_row_that_is_of_another_type_is_told(tmp_path: Path, kind: Any):
    run = write_fake_run(tmp_path / "run")
    good = dict(run.rows(kind)[0])
    path = run.path / f"{kind}.jsonl"
    for key in good:
        told = 0
        for value in WRONG:
            path.write_text(json.dumps({**good, key: value}) + "\n")
            message = message_of(run, kind)
            assert not message or re.search(rf"{kind}.jsonl: line 1 is damaged: {key}.* is .*;", message)
            told += bool(message)
        assert told >= 6, key


def message_of(run: RunFolder, kind: Any) -> str:
    try:
        run.rows(kind)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("content", ["[" * 100_000, '{"update": 1e999}', '{"update": ' + "9" * 5000 + "}", "{}"])
def test_a_row_that_json_cannot_hold_is_told(run: RunFolder, content: str):
    (run.path / "metrics.jsonl").write_text(content + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 1 is damaged"):
        run.rows("metrics")


# Settings

BOMB = "x1: &b [x, x, x, x, x, x, x, x]\n" + "".join(
    f"x{depth}: &{chr(97 + depth)} [{', '.join(['*' + chr(96 + depth)] * 9)}]\n" for depth in range(2, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 2000 + "]" * 2000,
        "\n".join(" " * depth + "a:" for depth in range(1000)),
        BOMB + "train: {seed: *l}",
        BOMB + "exposure: {kind: *l}",
        BOMB + "model: {student_template: {a: *l}}",
        "train: &a {seed: *a}",
        "exposure: &a [*a]",
        "train: {seed: !!bool x}",
        'train: {seed: !!int ""}',
        "train: !!map [a]",
        "train: {seed: !!timestamp x}",
        "train: {seed: " + "x" * 50_000 + "}",
        "train: {num_updates: 99999999999999999999}",
        "train: {num_updates: " + "9" * 5000 + "}",
        "train: {num_updates: 0x" + "f" * 5000 + "}",
        "train: {batch_size: 10000000}",
        "train: {learning_rate: 1" + "0" * 400 + "}",
        "model: {lora: {rank: 1000000000}}",
        "\n".join(f"k{number}: 1" for number in range(500)),
    ],
    ids=range(19),
)
def test_settings_that_nobody_means_are_refused_in_few_words(tmp_path: Path, text: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert len(str(caught.value)) < 8_000


def test_large_but_possible_settings_are_taken(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {num_updates: 1000000000, seed: 9223372036854775807}")
    assert load_config(str(path)).train.seed == 2**63 - 1


def test_a_quoted_value_is_short_whatever_it_holds():
    endless: list[Any] = []
    endless.append(endless)
    for value in (endless, "x" * 10_000, 10**10_000, [[0] * 100] * 100, {"a": {"b": {"c": {"d": 1}}}}):
        assert len(shown(value)) < 500


# Names that turn the terminal's text about


@pytest.mark.parametrize(
    "words",
    [
        ("train", "{name}.yaml"),
        ("train", "micro", "--out", "{file}/{name}"),
        ("report", "{name}"),
        ("evaluate", "{name}"),
        ("config", "{name}"),
        ("compare", "{name}", "--", "{name}"),
        ("sweep", "{name}"),
        ("train", "micro", "--listener", "{name}:f"),
        ("config", "micro", "--set", "{name}=1"),
    ],
)
def test_a_hidden_character_in_a_name_is_written_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    _, err = run_cli(monkeypatch, capsys, *(word.format(name="a\u202eb", file="file") for word in words))
    assert "\u202e" not in err
    assert "⟦U+202E⟧" in err


def test_the_line_that_names_a_report_writes_hidden_characters_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    run = write_fake_run(tmp_path / "a\u202eb", updates=4)
    monkeypatch.setattr("sys.argv", ["atesd", "report", str(run.path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.endswith("a⟦U+202E⟧b/report.html\n")


def test_a_state_that_does_not_fit_is_told(run: RunFolder):
    save_checkpoint(run.checkpoints, 4, {"epoch": 4}, 3, run_id=run.run_id)
    shutil.rmtree(run.final)  # so that something is left to do
    with pytest.raises(CheckpointError, match="its state does not fit this run"):
        train(CONFIG, run.path, listeners=[Ears()])
