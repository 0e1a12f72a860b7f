"""`python -m atesd_lab.cli.worker`: train (and evaluate) the runs that come in on stdin; see `sweep.workers`."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import atesd.build  # noqa: F401 (loaded while nobody waits for it)
from atesd.cli import main
from atesd.data.benchmarks import Asked
from atesd.errors import RunError
from atesd_lab.sweep.jobs import Job, Scoring


def serve() -> None:
    """Answer each run with how it ended. After a failure, or a model that is not small, the process ends: the next
    run begins in a fresh one.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    threads = torch.get_num_threads()
    for line in sys.stdin:
        torch.set_num_threads(threads)
        ending = _ending(_job(*json.loads(line)))
        try:
            print(json.dumps(ending), file=answers)
        except BrokenPipeError:  # whoever asked is gone
            break
        if not ending["goes_on"]:
            break
        gc.collect()


def _job(recipe: str, overrides: list[str], folder: str, scoring: dict[str, Any] | None) -> Job:
    job = Job(recipe, tuple(overrides), Path(folder))
    if scoring is None:
        return job
    asked = tuple(Asked(**one) for one in scoring["asked"])
    return replace(job, scoring=Scoring(asked, tuple(scoring["settings"]), scoring["base"]))


def _ending(job: Job) -> dict[str, Any]:
    """The fields of `atesd_lab.sweep.workers.Ending`."""
    with job.claim() as ours:
        if not ours:
            return {"code": 1, "held": True, "goes_on": True}
        code = 0 if job.was_finished() else _run(job)
        held = code != 0 and _is_in_use(job)
    return {"code": code, "held": held, "goes_on": code == 0 and job.config.model.path.startswith("world:")}


def _is_in_use(job: Job) -> bool:
    """Whether another process has the run; not where the disk allows no lock: that is why the run failed."""
    try:
        return job.is_in_use()
    except RunError:
        return False


def _run(job: Job) -> int:
    """The job's commands in this process with their output in its log; returns the first exit code that is not 0."""
    with job.log.open("wb", buffering=0) as log:
        log.write(f"$ {job.command_line}\n".encode())
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    for words in job.commands:
        code = _command(words)
        if code:
            return code
        gc.collect()  # the next command loads a model of its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def _command(words: list[str]) -> int:
    """One `atesd` command; its exit code."""
    sys.argv = [sys.argv[0], *words]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve()
