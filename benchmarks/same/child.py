"""Trains cases with the atesd on its PYTHONPATH, one after the other in one process.

Each line of stdin is a job: {"name", "recipe", "settings", "recorded", "out", "cut"}. Each line of stdout is its end:
{"name", "seconds", "error"}. What training prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOMES = ("atesd.session", "atesd.build")
"""The module that `train` is in: the first of these that there is."""

Train = Callable[[dict[str, Any]], None]


def train_here(job: dict[str, Any]) -> None:
    """Train in this process by the functions that a notebook calls.

    Where the job names a `recorded` run, with the config that it recorded, in whatever layout that is.
    """
    from atesd import RunFolder, load_config

    home = next(name for name in HOMES if importlib.util.find_spec(name))
    recorded = job["recorded"]
    config = RunFolder.open(Path(recorded)).config if recorded else load_config(job["recipe"], job["settings"])
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module(home).train(config, Path(job["out"]))


def run_job(job: dict[str, Any], train: Train) -> None:
    """Train a case in a new folder; where `cut` is a number, cut it back to so many updates and train on."""
    out = Path(job["out"])
    shutil.rmtree(out, ignore_errors=True)
    train(job)
    if job["cut"] is not None:
        cut_back(out, job["cut"])
        train(job)


def cut_back(run: Path, updates: int) -> None:
    """Leave a finished run as a kill after its checkpoint of `updates` would have, later rows included."""
    for folder in sorted((run / "checkpoints").glob("update-*")):
        if int(folder.name.removeprefix("update-")) > updates:
            shutil.rmtree(folder)
    if not (run / "checkpoints" / f"update-{updates:06d}").is_dir():
        raise RuntimeError(f"{run}: no checkpoint after {updates} updates to resume from")
    for name in ("model", "adapter"):
        shutil.rmtree(run / name, ignore_errors=True)


def main() -> None:
    """Run every job; an error ends its job alone."""
    for line in sys.stdin:
        job, begun, error = json.loads(line), time.perf_counter(), None
        try:
            run_job(job, train_here)
        except Exception as problem:
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}"
        print(json.dumps({"name": job["name"], "seconds": time.perf_counter() - begun, "error": error}), flush=True)


if __name__ == "__main__":
    expected = Path(sys.argv[1]).resolve()
    import atesd

    if expected not in Path(atesd.__file__).resolve().parents:
        sys.exit(f"atesd was imported from {atesd.__file__}, expected from {expected}")
    main()
