"""Several training runs side by side: each the command that its log begins with, one thread each, none repeated."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from atesd.config import load_config
from atesd.errors import RunError
from atesd.report.text import duration
from atesd.runs import RunFolder

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a recipe, what differs from it, and where it goes."""

    recipe: str
    overrides: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """What its command printed, beside its folder."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def command(self) -> list[str]:
        """The words after `atesd`, as a user would type them."""
        settings = [word for override in self.overrides for word in ("--set", override)]
        return ["train", self.recipe, *settings, "--out", str(self.folder)]

    def is_finished(self) -> bool:
        """Whether the run is there and finished with these settings. Raises `RunError` for a run with others."""
        if not RunFolder.exists(self.folder):
            return False
        run = RunFolder.open(self.folder)
        run.check_config(load_config(self.recipe, self.overrides))
        return bool(run.manifest["status"] == "finished")

    def start(self) -> subprocess.Popen[bytes]:
        """A child in a session of its own: a Ctrl-C at the terminal reaches it through us alone."""
        with self.log.open("wb") as log:
            log.write(f"$ atesd {shlex.join(self.command)}\n".encode())
            log.flush()
            return subprocess.Popen(
                [sys.executable, "-m", "atesd.cli", *self.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def require_success(self, code: int) -> None:
        """Raise `RunError` with the end of the log unless the exit code is 0."""
        if code:
            end = "\n  ".join(self.log.read_text("utf-8", "replace").splitlines()[-5:])
            raise RunError(f"{self.name} ended with exit code {code}; its log {self.log} ends with\n  {end}")


def train_all(jobs: Sequence[Job], processes: int, say: Say) -> None:
    """Train what is not finished, so many at a time; finished runs are not repeated and cut ones go on.

    Raises `RunError` if one fails. Whatever ends this call early ends the children too, each with a checkpoint.
    """
    waiting = [job for job in jobs if not job.is_finished()]
    parents = ", ".join(sorted({str(job.folder.parent) for job in jobs}))
    say(f"{len(jobs)} runs under {parents}, {len(jobs) - len(waiting)} of them finished; {processes} at a time")
    running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
    with _stopping(running):
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                job.folder.parent.mkdir(parents=True, exist_ok=True)
                running[job.name] = job, job.start(), time.monotonic()
            time.sleep(0.1)
            for name, (job, process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    job.require_success(process.returncode)
                    say(f"{name}: done in {duration(time.monotonic() - began)}")


@contextmanager
def _stopping(running: Mapping[str, tuple[Job, subprocess.Popen[bytes], float]]) -> Iterator[None]:
    """Whatever ends us, an interrupt, SIGTERM or an error, first ends the children, each with its checkpoint."""

    def interrupt(*_: int | FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
