"""An evaluation that goes on where it was interrupted: its grades, a line per problem, until its row is written."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, final

from filelock import FileLock, Timeout

from atesd.cli.options import say
from atesd.errors import RunError
from atesd.models.ranks import Ranks
from atesd.records import Graded
from atesd.refusals import refusals_told
from atesd.text import duration

FOLDER = ".unfinished-evaluations"
SECONDS_BETWEEN_LINES = 5.0


@final
class Unfinished:
    """The grades of an evaluation so far, in a file that its key names; rank 0 alone reads and writes it.

    The key says everything that the grades depend on, so that no other evaluation goes on with them.
    """

    def __init__(self, path: Path | None, ranks: Ranks, name: str = "") -> None:
        """`path`: None keeps nothing, and only tells how far it is; `name`: of what, where there are several."""
        self._path, self._ranks, self._name = path, ranks, f"{name}: " if name else ""
        self._began, self._before, self._told = time.monotonic(), 0, 0.0

    def known(self) -> dict[str, list[Graded]]:
        """The grades of every problem that is done. A line torn by a kill is none."""
        rows = self._ranks.broadcast(self._read)
        found = {str(row["problem_id"]): [Graded(**one) for one in row["graded"]] for row in rows}
        self._before = len(found)
        return found

    def keep(self, graded: Sequence[Graded], done: int, total: int) -> None:
        """Append the problems of these grades; `done` of `total` problems are now known."""
        self._ranks.broadcast(partial(self._write, graded))
        now = time.monotonic()
        if self._ranks.first and (now - self._told >= SECONDS_BETWEEN_LINES or done == total):
            self._told = now
            left = (now - self._began) / max(1, done - self._before) * (total - done)
            say(f"{self._name}{done} of {total} problems, left {duration(left)}", err=True)

    def forget(self) -> None:
        """The row is written: the grades are needed no longer."""
        if self._path is not None and self._ranks.first:
            self._path.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, Any]]:
        if self._path is None or not self._path.is_file():
            return []
        with refusals_told(self._path, "read"):
            content = self._path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1]
        if lines != content:
            with refusals_told(self._path, "written"):
                self._path.write_bytes(lines)
        try:
            return [json.loads(line) for line in lines.splitlines()]
        except ValueError as error:
            raise RunError(f"{self._path} is damaged ({error}); delete it, and the evaluation begins anew") from None

    def _write(self, graded: Sequence[Graded]) -> None:
        if self._path is None:
            return
        of: dict[str, list[dict[str, object]]] = {}
        for one in graded:
            of.setdefault(one.problem_id, []).append(asdict(one))
        lines = [json.dumps({"problem_id": name, "graded": some}) + "\n" for name, some in of.items()]
        with refusals_told(self._path, "written"), self._path.open("a", encoding="utf-8") as file:
            for line in lines:
                file.write(line)
                file.flush()


@contextmanager
def unfinished(run: Path | None, key: Sequence[str], ranks: Ranks, name: str = "") -> Iterator[Unfinished]:
    """The grades of the evaluation that `key` describes, in the folder of its run; without a run none are kept.

    Raises `RunError` where another process is at the same evaluation.
    """
    if run is None:
        yield Unfinished(None, ranks, name)
        return
    path = run / FOLDER / f"{hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:16]}.jsonl"
    lock = FileLock(path.with_suffix(".lock"))
    ranks.broadcast(partial(_take, lock, path))
    try:
        yield Unfinished(path, ranks, name)
    finally:
        lock.release()


def _take(lock: FileLock, path: Path) -> None:
    with refusals_told(path.parent, "written"):
        path.parent.mkdir(exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{path.parent.parent}: another process is at this very evaluation; let it finish") from None
