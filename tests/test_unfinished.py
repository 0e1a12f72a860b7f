"""An interrupted `atesd evaluate` goes on where it stopped, and ends with the row of an undisturbed one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from atesd.cli.scores import evaluate_target
from atesd.cli.unfinished import FOLDER
from atesd.errors import RunError
from atesd.rows import EvaluationRow
from atesd.runs import RunFolder
from quick import finished, heard_by_the_engine, quick

SETTINGS = ("data.test_size=12", "sampling.batch_size=6", "sampling.completion_tokens=12")
SAMPLES = ["evaluation.samples=4"]  # parts of lcm(4, 6) = 12 completions: three problems, two batches


class KillError(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    settings = ("train.num_updates=1", "train.evaluate_every=0", *SETTINGS)
    return finished(quick(*settings), tmp_path_factory.mktemp("run") / "run")


def copy_of(run: RunFolder, path: Path) -> RunFolder:
    return RunFolder.open(
        shutil.copytree(run.path, path, ignore=shutil.ignore_patterns(".lock", ".owner.json", FOLDER))
    )


def evaluated(run: RunFolder) -> EvaluationRow:
    scored = evaluate_target(str(run.path), None, "test", SAMPLES)
    assert scored is not None
    return scored.row


def interrupt_after(parts: int, monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    """Evaluate, and be killed after so many parts."""
    with monkeypatch.context() as patch:
        heard_by_the_engine(patch, parts, KillError)
        with pytest.raises(KillError):
            evaluated(run)


def left(run: RunFolder) -> list[Path]:
    return sorted((run.path / FOLDER).glob("*.jsonl"))


def test_what_was_done_before_an_interrupt_is_not_done_again_and_the_row_is_that_of_an_undisturbed_one(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = evaluated(copy_of(run, tmp_path / "undisturbed"))
    broken = copy_of(run, tmp_path / "broken")
    interrupt_after(2, monkeypatch, broken)
    [file] = left(broken)
    assert len(file.read_text().splitlines()) == 6
    # A kill in the middle of a line, and of a part: the part of three problems is done again, and adds what is missing.
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]) + '{"problem_id": "torn')
    asked = heard_by_the_engine(monkeypatch)
    assert evaluated(broken) == expected
    assert asked == [12, 12, 12]
    assert left(broken) == []
    assert broken.rows("evaluations") == [expected]


def test_the_row_is_the_one_that_training_would_have_written(run: RunFolder, tmp_path: Path):
    trained = finished(quick("train.num_updates=1", *SETTINGS, *SAMPLES), tmp_path / "run")
    [row] = [row for row in trained.rows("evaluations") if (row["split"], row["update"]) == ("test", 1)]
    assert evaluated(copy_of(run, tmp_path / "copy"))["correct_counts"] == row["correct_counts"]


def test_other_settings_do_not_go_on_with_these_grades(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = copy_of(run, tmp_path / "run")
    interrupt_after(2, monkeypatch, broken)
    asked = heard_by_the_engine(monkeypatch)
    evaluate_target(str(broken.path), None, "test", [*SAMPLES, "evaluation.temperature=0.5"])
    assert asked == [12, 12, 12, 12]
    assert len(left(broken)) == 1  # of the first, which may still go on


def test_a_damaged_file_and_a_second_process_are_told(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = copy_of(run, tmp_path / "run")
    interrupt_after(1, monkeypatch, broken)
    [file] = left(broken)
    with (
        FileLock(file.with_suffix(".lock")),
        pytest.raises(RunError, match="another process is at this very evaluation"),
    ):
        evaluated(broken)
    file.write_text("nonsense\n")
    with pytest.raises(RunError, match=r"is damaged .* delete it, and the evaluation begins anew"):
        evaluated(broken)


def test_how_far_it_is_and_how_long_it_takes_is_told(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    evaluated(copy_of(run, tmp_path / "run"))
    assert "12 of 12 problems, left 0.0 s" in capsys.readouterr().err


@pytest.mark.slow
def test_five_kills_and_the_evaluation_of_60_problems_still_ends_equal(tmp_path: Path):
    settings = ("train.num_updates=1", "train.evaluate_every=0", "data.test_size=60", "sampling.batch_size=4")
    whole = finished(quick(*settings), tmp_path / "whole")
    killed, dice = copy_of(whole, tmp_path / "killed"), random.Random(0)
    expected = evaluated(whole)
    command = [sys.executable, "-m", "atesd.cli", "evaluate", str(killed.path), "--samples", "4"]

    def lines() -> int:
        return sum(file.read_bytes().count(b"\n") for file in left(killed))

    for _ in range(5):
        target = lines() + dice.randint(1, 10)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while lines() < target and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert 5 <= lines() < 60
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert json.dumps(killed.rows("evaluations")) == json.dumps([expected])
    assert left(killed) == []
