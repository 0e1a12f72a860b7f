"""The examples run: a sweep as a Slurm array and as Ray tasks, a run on two nodes; stand-ins for what is not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMANDS = """# 1 of 5 cells are finished and not listed
atesd train micro --set 'exposure={kind: fixed}' --out runs/a
atesd train micro --out runs/b
# wait here: each of the following reads a run above
atesd train micro --out runs/c
"""
RAY = """
class Task:
    def __init__(self, work): self.work = work
    def options(self, **resources): print("resources", resources); return self
    def remote(self, line): return lambda: self.work(line)
def remote(**options): return Task
def init(**options): print("init", options)
def wait(left): return left[:1], left[1:]
def get(ready): return [one() for one in ready]
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder with commands that say what they were given, and a file of commands."""
    for name, body in {
        "atesd": 'echo "atesd got $# words: $*"; [[ $* != *runs/b* ]]',
        "scontrol": "printf 'node-7\\n'; printf 'node-8\\n%.0s' {1..20000}",  # more than a pipe holds
        "srun": 'exec "$@"',
        "torchrun": 'printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", "utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "commands.txt").write_text(COMMANDS, "utf-8")
    (tmp_path / "ray.py").write_text(RAY, "utf-8")
    return tmp_path


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    added = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(folder), **environment}
    return subprocess.run(words, cwd=folder, env={**plain, **added}, capture_output=True, text=True, check=False)


SLURM = str(EXAMPLES / "sweep_slurm.sh")


def test_a_task_of_the_slurm_array_runs_the_command_of_its_number(stand_ins: Path) -> None:
    first = run(stand_ins, SLURM, "commands.txt", SLURM_ARRAY_TASK_ID="0")
    assert "atesd got 6 words: train micro --set exposure={kind: fixed} --out runs/a" in first.stdout
    later = run(stand_ins, SLURM, "commands.txt", "1", SLURM_ARRAY_TASK_ID="0")
    assert "train micro --out runs/c" in later.stdout
    assert run(stand_ins, SLURM, "commands.txt", SLURM_ARRAY_TASK_ID="1").returncode == 1  # that run's own


def test_the_slurm_array_says_how_long_it_is_and_refuses_what_is_beyond(stand_ins: Path) -> None:
    assert run(stand_ins, SLURM, "commands.txt", "0", "count").stdout == "2\n"
    assert run(stand_ins, SLURM, "commands.txt", "1", "count").stdout == "1\n"
    beyond = run(stand_ins, SLURM, "commands.txt", SLURM_ARRAY_TASK_ID="2")
    assert (beyond.returncode, beyond.stderr) == (2, "task 2: stage 0 of commands.txt has 2 commands, 0 to 1\n")
    assert "start it with sbatch --array" in run(stand_ins, SLURM, "commands.txt").stderr


def test_the_arrays_of_the_page_are_as_long_as_the_plan(tmp_path: Path) -> None:
    sweep = [sys.executable, "-m", "atesd.cli", "sweep", "micro-exposure", "--out", str(tmp_path), "--print-commands"]
    (tmp_path / "commands.txt").write_text(subprocess.run(sweep, capture_output=True, text=True, check=True).stdout)
    page = (EXAMPLES.parent / "docs" / "scale.md").read_text("utf-8")
    last = [int(found) + 1 for found in re.findall(r"sbatch --array=0-(\d+)[^\n]*sweep_slurm", page)]
    assert last == [int(run(tmp_path, SLURM, "commands.txt", stage, "count").stdout) for stage in ("0", "1")]


def test_ray_runs_stage_after_stage_and_begins_none_that_would_read_a_run_that_failed(stand_ins: Path) -> None:
    program = [sys.executable, str(EXAMPLES / "sweep_ray.py"), "commands.txt", "--local", "2"]
    done = run(stand_ins, *program)
    assert "init {'num_cpus': 2, 'include_dashboard': False}" in done.stdout
    assert "exit 0: atesd train micro --set 'exposure={kind: fixed}' --out runs/a\n    atesd got 6 words" in done.stdout
    assert "exit 1: atesd train micro --out runs/b" in done.stdout
    assert (done.returncode, "runs/c" in done.stdout) == (1, False)
    (stand_ins / "commands.txt").write_text(COMMANDS.replace("runs/b", "runs/d"), "utf-8")
    done = run(stand_ins, *program, "--gpus", "1")
    assert (done.returncode, "runs/c" in done.stdout) == (0, True)
    assert "resources {'num_cpus': 1, 'num_gpus': 1.0}" in done.stdout


def test_two_nodes_start_torchrun_with_words_that_it_knows(stand_ins: Path) -> None:
    slurm = {"JOB_NODELIST": "node-[7-8]", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "8", "JOB_ID": "41"}
    words = [str(EXAMPLES / "train_slurm.sh"), "micro", "--out", "/shared/run"]
    done = run(stand_ins, *words, **{f"SLURM_{name}": value for name, value in slurm.items()})
    assert done.returncode == 0, done.stderr
    asked = get_args_parser().parse_args(done.stdout.splitlines())
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_id) == ("2", "8", "41")
    assert (asked.rdzv_backend, asked.rdzv_endpoint) == ("c10d", "node-7:29500")
    assert asked.module
    assert [asked.training_script, *asked.training_script_args] == ["atesd.cli", "train", *words[1:]]
