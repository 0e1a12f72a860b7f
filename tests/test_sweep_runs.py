"""Sweeps of real runs in real processes: what a worker trains, and what kills cost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from atesd.config import parse_yaml
from atesd.runs import RunFolder
from atesd_lab.sweep import jobs
from atesd_lab.sweep.grid import sweep_tables
from atesd_lab.sweep.plan import cells_of, load_plan
from quick import SMALL_LEARNED as SMALL
from quick import SWEPT_ARMS, fingerprint, finished


def write_plan(path: Path, *settings: str, **changes: Any) -> Path:
    common = {}
    for setting in (*SMALL, *settings):
        name, _, text = setting.partition("=")
        common[name] = parse_yaml(text, setting)
    path.write_text(yaml.safe_dump({"recipe": "micro", "set": common, "axes": {"arm": SWEPT_ARMS}, **changes}), "utf-8")
    return path


def words(plan: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "atesd.cli", "sweep", str(plan), "--out", str(out), *more]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished sweep of three cells, all trained by one worker; what it printed."""
    folder = tmp_path_factory.mktemp("swept")
    plan = write_plan(folder / "plan.yaml", seeds=[3])
    done = subprocess.run(words(plan, folder / "out", "--jobs", "1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_cell_of_a_worker_that_has_trained_others_is_bit_for_bit_that_of_a_process_of_its_own(
    swept: tuple[Path, str], tmp_path: Path
):
    out = swept[0] / "out"
    sessions = [RunFolder.open(out / f"{arm}-seed-3").manifest["sessions"] for arm in SWEPT_ARMS]
    assert len({session[-1]["pid"] for session in sessions}) == 1
    for arm in ("replay", "full"):  # the last to be trained, and the first
        swept_run = RunFolder.open(out / f"{arm}-seed-3")
        assert fingerprint(swept_run) == fingerprint(finished(swept_run.config, tmp_path / arm))


def test_cells_of_one_seed_draw_the_same_rollouts_and_the_same_evaluations_before_they_part(swept: tuple[Path, str]):
    runs = [RunFolder.open(swept[0] / "out" / f"{arm}-seed-3") for arm in SWEPT_ARMS]
    first = [[(r["problem_id"], r["completion"]) for r in run.rows("samples") if r["update"] == 0] for run in runs]
    assert first[0]
    assert first[0] == first[1] == first[2]
    evaluated = [[row for row in run.rows("evaluations") if row["update"] == 0] for run in runs]
    assert {row["split"] for row in evaluated[0]} == {"validation", "test"}
    assert evaluated[0] == evaluated[1] == evaluated[2]
    ends = [[row["sampler"] for row in run.rows("evaluations") if row["update"] == 8] for run in runs]
    assert ends[0] == ends[1] == ends[2]


def test_the_replayed_ratios_are_those_of_the_learned_cell_shuffled(swept: tuple[Path, str]):
    learned, replay = (
        [row["reveal_ratio"] for row in RunFolder.open(swept[0] / "out" / f"{arm}-seed-3").rows("metrics")]
        for arm in ("sound", "replay")
    )
    assert sorted(learned) == sorted(replay)


def test_the_sweep_says_what_came_out_and_where(swept: tuple[Path, str]):
    out, text = swept[0] / "out", swept[1]
    assert (out / "table.txt").read_text() in text
    assert f"run folders: {out}" in text
    assert f"one page about all of them: atesd report {out}" in text
    listed = json.loads((out / "cells.json").read_text())
    assert listed[0] == {"folder": "full-seed-3", "group": "full", "points": {"arm": "full"}, "seed": 3}
    log = (out / "sound-seed-3.log").read_text()
    assert log.startswith("$ atesd train micro --set")
    assert "update 8/8" in log
    assert "finished: 8 of 8 updates" in log


def test_a_second_sweep_finds_everything_finished_and_starts_no_process(
    swept: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jobs.Worker, "__init__", lambda *_: pytest.fail("a process was started"))
    found = cells_of(load_plan(str(swept[0] / "plan.yaml")), swept[0] / "out")
    assert [cell.job.is_finished() for cell in found] == [True] * 3
    jobs.train_all([cell.job for cell in found], 1, print)
    text = sweep_tables(found)
    assert text == (swept[0] / "out" / "table.txt").read_text()
    assert "Average@k in %, against full\n" in text


# Kills


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def finished_manifests(out: Path) -> dict[str, Any]:
    """The whole manifest of each finished cell: a repeat would add a session."""
    found = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/manifest.json")}
    return {name: manifest for name, manifest in found.items() if manifest["status"] == "finished"}


@pytest.mark.slow
def test_kills_of_runner_and_workers_lose_no_finished_cell_and_repeat_none(tmp_path: Path):
    plan = write_plan(tmp_path / "plan.yaml", "train.num_updates=12", seeds=3)
    out, dice = tmp_path / "out", random.Random(0)
    kept: dict[str, Any] = {}
    killed = {"runner": 0, "worker": 0, "both": 0}
    orphans: list[int] = []
    for victim in ("runner", "worker", "both", "worker", "runner", "both"):
        before = len(finished_manifests(out))
        with (tmp_path / "printed").open("w") as printed:
            process = subprocess.Popen(words(plan, out, "--jobs", "2"), stdout=printed, stderr=printed)
        while process.poll() is None and len(finished_manifests(out)) <= before:
            time.sleep(0.05)
        time.sleep(dice.uniform(0.0, 1.5))
        some = children(process.pid)
        orphans += some
        if victim != "worker":
            kill(process.pid)
        for worker in some if victim == "both" else some[:1] if victim == "worker" else []:
            kill(worker)
        killed[victim] += 1
        if victim == "worker":  # the runner goes on, and says at the end what it lost
            process.wait()
            assert "was killed by signal 9" in (tmp_path / "printed").read_text() or process.returncode == 0
        process.wait()
        now = finished_manifests(out)
        assert kept.items() <= now.items()
        kept = now
    last = subprocess.run(words(plan, out, "--jobs", "2"), capture_output=True, text=True)
    assert last.returncode == 0, last.stdout
    assert kept.items() <= finished_manifests(out).items()
    assert not any(Path(f"/proc/{pid}").exists() for pid in orphans)
    for cell in cells_of(load_plan(str(plan)), out):
        run = RunFolder.open(cell.job.folder)
        assert fingerprint(run) == fingerprint(finished(run.config, tmp_path / "whole" / cell.job.name))


@pytest.mark.slow
def test_two_runners_on_one_folder_share_the_cells(tmp_path: Path):
    plan, out = write_plan(tmp_path / "plan.yaml", seeds=3), tmp_path / "out"
    runners = [
        subprocess.Popen(words(plan, out, "--jobs", "1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    printed = [runner.communicate()[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], "\n".join(printed)
    cells = cells_of(load_plan(str(plan)), out)
    sessions = [RunFolder.open(cell.job.folder).manifest["sessions"] for cell in cells]
    assert [len(some) for some in sessions] == [1] * 9
    assert len({some[0]["pid"] for some in sessions}) == 2
    assert sweep_tables(cells) in printed[0]
    assert sweep_tables(cells) in printed[1]


@pytest.mark.slow
def test_a_stopped_sweep_saves_every_running_cell_ends_with_code_3_and_leaves_no_process(tmp_path: Path):
    plan, out = write_plan(tmp_path / "plan.yaml", "train.num_updates=2000"), tmp_path / "out"
    with subprocess.Popen(words(plan, out, "--jobs", "2"), stdout=subprocess.PIPE, text=True) as process:
        while len(list(out.glob("*/metrics.jsonl"))) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        workers = children(process.pid)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "stopped, with a checkpoint of every run that was going" in printed
    assert {RunFolder.open(path.parent).manifest["status"] for path in out.glob("*/manifest.json")} == {"stopped"}
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
def test_a_printed_command_leaves_a_cell_that_the_sweep_finds_finished(tmp_path: Path):
    plan, out = write_plan(tmp_path / "plan.yaml"), tmp_path / "out"
    cells = cells_of(load_plan(str(plan)), out)
    full = next(cell.job for cell in cells if cell.group == "full")
    subprocess.run([sys.executable, "-m", "atesd.cli", *full.command], check=True, capture_output=True)
    assert full.is_finished()
    printed = subprocess.run(words(plan, out, "--print-commands"), capture_output=True, text=True, check=True).stdout
    assert printed.startswith("# 1 of 3 cells are finished and not listed\n")
