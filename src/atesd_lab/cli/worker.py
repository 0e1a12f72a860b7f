"""`python -m atesd_lab.cli.worker`: train the runs that come in on stdin, one after another; see `sweep.workers`."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

import atesd.build  # noqa: F401 (loaded while nobody waits for it)
from atesd.cli import main
from atesd_lab.sweep.jobs import Job


def serve() -> None:
    """Answer each run with how it ended. After a failure, or a model that is not small, the process ends: the next
    run begins in a fresh one.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    threads = torch.get_num_threads()
    for line in sys.stdin:
        recipe, overrides, folder = json.loads(line)
        torch.set_num_threads(threads)
        ending = _ending(Job(recipe, tuple(overrides), Path(folder)))
        try:
            print(json.dumps(ending), file=answers)
        except BrokenPipeError:  # whoever asked is gone
            break
        if not ending["goes_on"]:
            break
        gc.collect()


def _ending(job: Job) -> dict[str, Any]:
    """The fields of `atesd_lab.sweep.workers.Ending`."""
    with job.claim() as ours:
        if not ours:
            return {"code": 1, "held": True, "goes_on": True}
        code = 0 if job.was_finished() else _train(job)
        held = code != 0 and job.is_in_use()
    return {"code": code, "held": held, "goes_on": code == 0 and job.config.model.path.startswith("world:")}


def _train(job: Job) -> int:
    """`atesd train` in this process with its output in the job's log; returns its exit code."""
    sys.argv = [sys.argv[0], *job.command]
    with job.log.open("wb", buffering=0) as log:
        log.write(f"$ {job.command_line}\n".encode())
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
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
