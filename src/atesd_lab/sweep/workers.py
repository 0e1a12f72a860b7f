"""Processes that train one run after another, so that Python and torch are loaded once for many short runs."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, final


@dataclass(frozen=True, slots=True)
class Ending:
    """How a worker's run ended: its exit code, or minus the signal that killed the worker.

    `held`: another process has the run. `goes_on`: the worker takes another run.
    """

    code: int
    held: bool = False
    goes_on: bool = False


@final
class Worker:
    """A process of `atesd_lab.cli.worker`, in a session of its own: Ctrl-C reaches it through us alone.

    It gets a run as a line of JSON and answers with a line of JSON; the run's own output goes to its log. When we are
    gone, it ends the run that it has and then itself.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "atesd_lab.cli.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def give(self, run: Any) -> None:
        """Begin a run."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `ending` says how
            self._process.stdin.write(json.dumps(run).encode() + b"\n")
            self._process.stdin.flush()

    def ending(self) -> Ending:
        """How the run ended; blocks until it has."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith(b"\n"):
            return Ending(**json.loads(line))
        return Ending(self._process.wait() or 1)

    def fileno(self) -> int:
        """What becomes readable when the run has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def terminate(self) -> None:
        """Ask the run for a checkpoint and an end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """Let it end after the run that it has, and wait for that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def wait(workers: Iterable[Worker], seconds: float) -> Sequence[Worker]:
    """The workers whose run has ended, as soon as there is one, at the latest after `seconds`."""
    ready, _, _ = select.select(list(workers), [], [], seconds)
    return ready


def slots(processes: int | None = None, gpus: Sequence[str] = ()) -> list[dict[str, str]]:
    """What to set in the environment of each of so many processes: one thread each, or a GPU in turn.

    None: as many as there are GPUs, else cores.
    """
    if not gpus:
        return [{"OMP_NUM_THREADS": "1"} for _ in range(processes or cores())]
    return [{"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} for place in range(processes or len(gpus))]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """CUDA devices by the names that CUDA_VISIBLE_DEVICES takes, found without torch; none for a CPU build of it."""
    if "+cpu" in metadata.version("torch"):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    return [str(place) for place, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
