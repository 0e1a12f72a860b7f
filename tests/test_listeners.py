"""Who watches a run: what listeners are told and when, that none can stop or change it; the command line's."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

import atesd.train.loop as loop
from atesd.cli.watching import NamedListeners
from atesd.errors import ConfigError, TrainingError
from atesd.runs import RunFolder
from atesd.session import train
from atesd.train.listeners import Listeners
from quick import Ears, cut_after, fingerprint, finished, quick
from test_cli import Shell, atesd  # noqa: F401  (a fixture)

DOCS = Path(__file__).parents[1] / "docs" / "listeners.md"
SHORT = ("train.num_updates=4", "train.checkpoint_every=2")


class Failing(Ears):
    """Raises whenever it is told of a row."""

    def row(self, kind: str, row: dict[str, Any]) -> None:  # noqa: ARG002
        raise OSError("the network is gone")


class Meddling(Ears):
    """Changes what it is told."""

    def row(self, kind: str, row: dict[str, Any]) -> None:  # noqa: ARG002
        row["skipped"] = "by me"
        row.get("seconds", {}).clear()
        row["loss"] = None


def rows_told(ears: Ears, kind: str) -> list[dict[str, Any]]:
    return [event[2] for event in ears.events if event[:2] == ("row", kind)]


def test_a_listener_is_told_every_row_of_the_run_folder_between_begin_and_end(tmp_path: Path):
    ears = Ears()
    run = train(quick(*SHORT), tmp_path / "run", listeners=[ears]).run
    assert [ears.events[0][0], ears.events[-1]] == ["begin", ("end", "finished")]
    _, config, info = ears.events[0]
    assert (config, info.path, info.run_id, info.resumed) == (run.config, run.path, run.run_id, False)
    assert info.manifest["data_fingerprint"] == run.manifest["data_fingerprint"]
    for kind in ("metrics", "decisions", "evaluations", "samples"):
        assert rows_told(ears, kind) == run.rows(kind)
        assert run.rows(kind)


def test_a_resumed_session_begins_anew_and_tells_only_what_it_does(tmp_path: Path):
    whole = finished(quick(*SHORT), tmp_path / "whole")
    ears = Ears()
    run = train(quick(*SHORT), cut_after(whole, 2, tmp_path / "cut"), listeners=[ears]).run
    assert ears.events[0][2].resumed
    assert rows_told(ears, "metrics") == run.rows("metrics")[2:]


def test_several_listeners_hear_the_same_and_none_hears_what_another_made_of_it(tmp_path: Path):
    first, last = Ears(), Ears()
    run = train(quick(*SHORT), tmp_path / "run", listeners=[first, Meddling(), last]).run
    assert first.events == last.events
    assert first.heard == last.heard
    alone = finished(quick(*SHORT), tmp_path / "alone")
    assert fingerprint(run) == fingerprint(alone)


def test_a_listener_that_fails_is_reported_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ears, failing = Ears(), Failing()
    run = train(quick(*SHORT), tmp_path / "run", listeners=[failing, ears]).run
    assert len(run.rows("metrics")) == 4
    reports = [text for text in ears.heard if "Failing" in text]
    failures = len([event for event in ears.events if event[0] == "row"])
    assert reports == [
        "listener Failing failed at `row` (OSError: the network is gone); the run goes on",
        f"listener Failing failed {failures} times; the run folder holds what it has missed",
    ]
    assert failing.events[-1] == ("end", "finished")
    assert capsys.readouterr().err == ""


def test_where_nobody_else_listens_a_failure_is_written_to_stderr(capsys: pytest.CaptureFixture[str]):
    class Deaf(Failing):
        def message(self, text: str) -> None:
            raise ValueError(text)

    for listeners in ([Failing()], [Failing(), Deaf()]):
        Listeners(listeners).row("metrics", {})
        assert "listener Failing failed at `row` (OSError: the network is gone)" in capsys.readouterr().err


def test_ctrl_c_inside_a_listener_is_no_failure_of_it():
    class Interrupted(Ears):
        def message(self, text: str) -> None:  # noqa: ARG002
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Listeners([Interrupted()]).message("x")


def test_a_run_that_fails_ends_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> Any:
        raise TrainingError("broken")

    monkeypatch.setattr(loop.Trainer, "update", broken)
    ears = Ears()
    with pytest.raises(TrainingError, match="broken"):
        train(quick(*SHORT), tmp_path / "run", listeners=[ears])
    assert ears.events[-1] == ("end", "failed")


@pytest.fixture
def csv_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example of the documentation, importable."""
    (source,) = re.findall(r"```python\n# csv_log\.py\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    (tmp_path / "csv_log.py").write_text(source, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "csv_log:CsvLog"


def test_the_worked_example_writes_a_line_per_update(csv_log: str, atesd: Shell):  # noqa: F811
    overrides = [
        word for setting in (*SHORT, "data.train_size=24", "train.batch_size=4") for word in ("--set", setting)
    ]
    small = [word for s in ("data.validation_size=2", "data.test_size=2", "data.probe_size=2") for word in ("--set", s)]
    assert atesd("train", "micro", *overrides, *small, "--out", "run", "--listener", csv_log) == 0
    run = RunFolder.open(Path("run"))
    with (run.path / "loss.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["update"]) for line in lines] == [0, 1, 2, 3]
    assert [float(line["loss"]) for line in lines] == [row["loss"] for row in run.rows("metrics")]
    assert "finished: 4 of 4 updates" in atesd.out  # the display is a listener beside it


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("csv_log", "--listener: 'csv_log' is not allowed; expected module:function"),
        ("no_such_module:make", "--listener: no_such_module:make cannot be imported (No module named"),
        ("json:absent", "--listener: json:absent cannot be imported"),
    ],
)
def test_a_name_that_cannot_be_imported_is_refused_before_anything_is_loaded(
    name: str,
    message: str,
    atesd: Shell,  # noqa: F811
):
    assert atesd("train", "micro", "--out", "run", "--listener", name) == 2
    assert message in atesd.err
    assert not Path("run").exists()


def test_what_is_no_listener_is_refused_by_what_it_lacks():
    with pytest.raises(ConfigError, match=r"--listener: builtins:str made a str without begin, row, message, end; "):
        NamedListeners(["builtins:str"]).made(Path("run"))


def test_a_listener_that_is_named_twice_is_made_twice(csv_log: str):
    assert len(NamedListeners([csv_log, csv_log]).made(Path("run"))) == 2
