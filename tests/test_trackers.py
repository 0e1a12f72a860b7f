"""`--track`: which calls a tracker gets of a run, in fakes; what the real packages have kept, read back, by
`make test-trackers`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atesd.cli.watching import trackers
from atesd.errors import ConfigError, RunError
from atesd.runs import RunFolder
from atesd.session import train
from atesd.trackers.interface import TRACKERS, tracker_named
from atesd.trackers.listener import Tracked, figures_of, report_page, step_of
from quick import cut_after, finished, quick

SHORT = ("train.num_updates=4", "train.evaluate_every=2")
Calls = list[tuple[Any, ...]]


class Recorder:
    """Stands for whatever a package offers: keeps every call, with the names that led to it."""

    def __init__(self, calls: Calls, name: str = "") -> None:
        self._calls, self._name = calls, name
        self.summary: dict[str, object] = {}

    def __getattr__(self, name: str) -> Recorder:
        if name.startswith("__"):
            raise AttributeError(name)
        return Recorder(self._calls, f"{self._name}.{name}".lstrip("."))

    def __call__(self, *arguments: object, **options: object) -> Recorder:
        self._calls.append((self._name, arguments, options))
        return Recorder(self._calls, self._name)


PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
OFFERED = {"tensorboard": ("SummaryWriter",), "wandb": ("init", "Settings", "Artifact")}
OFFERED["trackio"] = ("init", "log", "log_artifact", "finish")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Calls]:
    """Puts a fake package in place of a tracker's, and returns the list of its calls."""

    def put(name: str) -> Calls:
        calls: Calls = []
        package = types.ModuleType(PACKAGES[name])
        for part in OFFERED[name]:
            setattr(package, part, Recorder(calls, part))
        monkeypatch.setitem(sys.modules, PACKAGES[name], package)
        monkeypatch.delitem(sys.modules, TRACKERS[name].partition(":")[0], raising=False)
        return calls

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return put


@pytest.fixture(autouse=True)
def forget_fakes() -> Iterator[None]:
    yield
    for module in (name.partition(":")[0] for name in TRACKERS.values()):
        sys.modules.pop(module, None)


def page_of(folder: Path) -> Path:
    (folder / "report.html").write_text("<!doctype html>")
    return folder / "report.html"


def tracked(name: str, out: Path) -> RunFolder:
    return train(quick(*SHORT), out, listeners=[Tracked(tracker_named(name), page_of)]).run


def named(calls: Calls, end: str) -> Calls:
    return [call for call in calls if call[0].endswith(end)]


def test_wandb_is_offline_and_gets_settings_metrics_decisions_evaluations_and_the_page(fake, tmp_path: Path):
    calls = fake("wandb")
    run = tracked("wandb", tmp_path / "run")
    [(_, _, began)] = named(calls, "init")
    assert (began["id"], began["mode"], began["resume"]) == (run.run_id, "offline", None)
    assert began["config"]["train"]["num_updates"] == 4
    logged = [call[1][0] for call in named(calls, "init.log")]
    losses = {row["updates"]: row["train/loss"] for row in logged if "train/loss" in row}
    assert losses == {row["update"] + 1: row["loss"] for row in run.rows("metrics")}
    assert {row["updates"] for row in logged if "evaluation/validation/average" in row} == {0, 2, 4}
    finished_rows = [row for row in run.rows("decisions") if row["status"] == "finished"]
    assert [row["decision/reward"] for row in logged if "decision/reward" in row] == [
        r["reward"] for r in finished_rows
    ]
    assert named(calls, "Artifact.add_file")[0][1] == (str(run.report),)
    assert calls[-1][0] == "init.finish"
    assert calls[-1][2] == {"exit_code": 0}


def test_trackio_is_local_and_finds_its_run_again_by_a_name_that_holds_the_id(fake, tmp_path: Path):
    calls = fake("trackio")
    run = tracked("trackio", tmp_path / "run")
    (name, _, began), *_ = calls
    assert name == "init"
    assert (began["name"], began["resume"]) == (f"run-{run.run_id[:8]}", "allow")
    assert not {"space_id", "server_url", "bucket_id"} & began.keys()
    losses = {call[2]["step"]: call[1][0]["train/loss"] for call in named(calls, "log") if "train/loss" in call[1][0]}
    assert losses == {row["update"] + 1: row["loss"] for row in run.rows("metrics")}
    assert [call[0] for call in calls[-2:]] == ["log_artifact", "finish"]


def test_tensorboard_writes_into_the_run_and_hides_what_a_resume_does_again(fake, tmp_path: Path):
    calls = fake("tensorboard")
    run = tracked("tensorboard", tmp_path / "run")
    (name, folder, options), *_ = calls
    assert (name, folder, options) == ("SummaryWriter", (str(run.path / "tensorboard"),), {"purge_step": None})
    scalars = [call[1] for call in named(calls, "add_scalar")]
    assert [(value, step) for tag, value, step in scalars if tag == "train/loss"] == [
        (row["loss"], row["update"] + 1) for row in run.rows("metrics")
    ]
    (run.path / "tensorboard").mkdir()  # which the fake has not made
    calls.clear()
    tracked("tensorboard", cut_after(run, 2, tmp_path / "cut"))
    assert calls[0][2] == {"purge_step": 3}  # the row of update 2 is the first that comes again


def test_a_session_without_rows_leaves_no_record(fake, tmp_path: Path):
    run = finished(quick(*SHORT), tmp_path / "run")
    calls = fake("wandb")
    tracked("wandb", run.path)
    assert calls == []


def test_what_was_not_measured_is_no_figure_and_a_row_is_known_after_its_update():
    row = {"update": 4, "loss": 0.5, "accuracy": None, "skipped": None, "seconds": {"sample": 1.5}, "alignment": None}
    assert dict(figures_of("metrics", row)) == {"train/loss": 0.5, "seconds/sample": 1.5}
    assert step_of("metrics", row) == 5
    assert step_of("evaluations", {"update": 4}) == 4
    assert dict(figures_of("samples", row)) == dict(figures_of("decisions", {"status": "pending"})) == {}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ConfigError, match=rf'--track {name} needs the extra `{name}`: pip install "atesd\[{name}\]"'):
        trackers([name])


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match="--track mlflow: expected one of tensorboard, trackio, wandb"):
        trackers(["mlflow"])


def test_the_page_is_that_of_the_report(tmp_path: Path):
    run = finished(quick(*SHORT), tmp_path / "run")
    assert report_page(run.path) == run.report
    assert run.report.read_text("utf-8").startswith("<!doctype html>")
    with pytest.raises(RunError, match=r"no page for the tracker: error: .* is not a run folder"):
        report_page(tmp_path)


# The real packages, in a process of their own without a network


def trained_twice(name: str, tmp_path: Path) -> RunFolder:
    """Four updates tracked, cut back to two, and gone on with: the record is that of one run. Returns the run."""
    whole = tmp_path / "whole"
    settings = [word for setting in (*SHORT, "train.checkpoint_every=1", *SMALLER) for word in ("--set", setting)]
    environment = {
        **os.environ,
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "https_proxy": "http://127.0.0.1:9",
    }

    def run(out: Path) -> None:
        command = [sys.executable, "-m", "atesd.cli", "train", "micro", *settings, "--track", name, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "listener" not in done.stdout + done.stderr, done.stdout + done.stderr

    run(whole)
    cut = cut_after(RunFolder.open(whole), 2, tmp_path / "cut" / "whole")
    run(cut)
    return RunFolder.open(cut)


SMALLER = (
    *("data.train_size=8", "data.validation_size=2", "data.test_size=2", "data.probe_size=2", "train.batch_size=2"),
    *("train.micro_batch_size=2", "train.keep_checkpoints=100", "credit.hold_updates=1", "credit.lookahead_updates=1"),
)


@pytest.mark.trackers
def test_the_event_files_of_tensorboard_hold_the_resumed_run_once(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained_twice("tensorboard", tmp_path)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(row["update"] + 1, pytest.approx(row["loss"])) for row in run.rows("metrics")]
    assert [event.step for event in events.Scalars("evaluation/validation/average")] == [0, 2, 4]
    assert {"config/text_summary", "report/text_summary"} <= set(events.Tags()["tensors"])


def stored(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    data, at, parts = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


@pytest.mark.trackers
def test_the_offline_folders_of_wandb_hold_both_sessions_under_the_run_s_id(tmp_path: Path):
    from wandb.proto.wandb_internal_pb2 import Record

    run = trained_twice("wandb", tmp_path)
    files = sorted((run.path / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.stem for file in files] == [f"run-{run.run_id}"] * 2
    steps, pages = [], 0
    for record in (Record.FromString(data) for file in files for data in stored(file)):
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "train/loss" in items:
            steps.append((json.loads(items["updates"]), json.loads(items["train/loss"])))
        pages += record.request.log_artifact.artifact.type == "report" or record.artifact.type == "report"
    assert pages == 2
    losses = [row["loss"] for row in run.rows("metrics")]
    assert steps == [(n + 1, pytest.approx(losses[n])) for n in (0, 1, 2, 3, 2, 3)]


@pytest.mark.trackers
def test_the_local_store_of_trackio_holds_one_run(tmp_path: Path):
    run = trained_twice("trackio", tmp_path)
    code = (
        "import json, trackio\n"
        "runs = list(trackio.Api().runs('atesd'))\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "print(json.dumps({r.name: SQLiteStorage.get_logs('atesd', r.name) for r in runs}))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    [(name, logs)] = json.loads(done.stdout.splitlines()[-1]).items()
    assert name == f"whole-{run.run_id[:8]}"
    losses = {log["step"]: log["train/loss"] for log in logs if "train/loss" in log}
    assert losses == {row["update"] + 1: pytest.approx(row["loss"]) for row in run.rows("metrics")}
