"""Fifty SIGKILLs of the real trainer, at moments it cannot choose: the run resumes each time and ends the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atesd.config import dump_config
from atesd.runs import RunFolder
from quick import fingerprint, finished, quick

KILLS = 50
SETTINGS = ("train.num_updates=400", "train.evaluate_every=7", "train.keep_checkpoints=3", "teacher.weights=ema")


def start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "atesd.cli", "train", str(config), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def updates_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_somewhere(process: subprocess.Popen[bytes], out: Path, dice: random.Random) -> None:
    """Mostly a few updates after the resume, at any point of one; sometimes while the process still starts."""
    if dice.random() < 0.15:
        time.sleep(dice.uniform(0.0, 4.0))
    else:
        target = updates_logged(out) + dice.randint(1, 6)
        while updates_logged(out) < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(dice.uniform(0.0, 0.15))
    process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_fifty_kills_and_the_run_still_ends_equal(tmp_path: Path) -> None:
    config = quick(*SETTINGS)
    expected = fingerprint(finished(config, tmp_path / "whole"))
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "killed"
    recipe.write_text(dump_config(config), "utf-8")
    dice = random.Random(0)
    died = 0
    while died < KILLS:
        process = start(recipe, out)
        kill_somewhere(process, out, dice)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"after {died} kills: {errors.decode()[-2000:]}"
        died += 1
    process = start(recipe, out)
    _, errors = process.communicate()
    assert process.returncode == os.EX_OK, errors.decode()[-2000:]
    assert fingerprint(RunFolder.open(out)) == expected
