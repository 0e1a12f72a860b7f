"""Whether a completion's final answer is right.

A pair is (completion, gold): the text that a model wrote, and the answer it should box. Verdicts are counted apart
and never folded: correct, wrong, unparseable (no boxed answer, or one that math-verify cannot read), timeout (the
comparison ran out of its wall clock or memory).
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Literal, Protocol, cast

from atesd.data.answer_worker import READY
from atesd.errors import DataError
from atesd.records import Verdict

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[-+]?\d+(?:\.\d+)?|[A-Za-z]")
_NOTHING = re.compile(r"\\!|\\?\$|\\(?:left|right|displaystyle)(?![A-Za-z])")
_SPACE = re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\s+")
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_LOOSE_SPACE = re.compile(r"(?<!\d) +| +(?!\d)")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")

_WORKER = Path(__file__).with_name("answer_worker.py")
_START_SECONDS = 120.0  # for importing sympy on a crowded machine
_GRACE_SECONDS = 5.0  # a worker ends itself in time; this is for one that cannot


def last_boxed(text: str) -> str | None:
    r"""The content of the box that opens last in `text`: `\boxed{...}` or `\fbox{...}`, stripped of outer spaces.

    Braces are matched; escaped ones (`\{`, `\}`) do not count. Without braces a number or one letter is taken
    (`\boxed 7`). None if there is no box, if the last one is empty, or if it never closes: a truncated answer is not
    replaced by an earlier one.
    """
    span = last_box(text)
    return None if span is None else text[span[0] : span[1]].strip() or None


def last_box(text: str) -> tuple[int, int] | None:
    """Where the content of the last box starts and ends in `text` (see `last_boxed`), without its braces."""
    start = max((match.end() for match in _BOX.finditer(text)), default=-1)
    if start < 0:
        return None
    if text[start : start + 1] == "{":
        end = _closing_brace(text, start)
        return None if end is None else (start + 1, end)
    bare = _BARE.match(text, start)
    return None if bare is None else bare.span()


def _closing_brace(text: str, opening: int) -> int | None:
    depth, position = 0, opening
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
        position += 1
    return None


def normalise(answer: str) -> str:
    r"""A canonical spelling, for equality as strings. Equal results mean the same answer; unequal ones mean nothing.

    Drops `$`, sizes (`\left`), spaces (except between digits), a trailing period, commas between thousands; writes
    `\dfrac` as `\frac` and `\text{m}` as `m`. Applied until nothing changes: normalising twice is normalising once.
    """
    while (spelling := _normalise_once(answer)) != answer:
        answer = spelling
    return answer


def _normalise_once(answer: str) -> str:
    answer = _SPACE.sub(" ", _NOTHING.sub("", answer)).strip()
    answer = _TEXT.sub(r"\1", _FRACTION.sub(r"\\frac", answer))
    answer = _LOOSE_SPACE.sub("", answer).rstrip(".")
    return re.sub(r"[{},]", "", answer) if _THOUSANDS.fullmatch(answer) else answer


class Checker(Protocol):
    """Judges completions against gold answers."""

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """The verdict on each (completion, gold), in order."""
        ...

    def close(self) -> None:
        """End whatever runs in the background. The checker can be used again."""
        ...


class ExactChecker:
    """Compares the last boxed answer with the gold as normalised strings."""

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Correct, wrong, or unparseable where nothing is boxed."""
        return [_quick_verdict(last_boxed(completion), gold) or "wrong" for completion, gold in pairs]

    def close(self) -> None:
        """Nothing runs in the background."""


class MathChecker:
    """Compares the last boxed answer with the gold as mathematics: math-verify in processes of its own.

    Equal normalised strings are correct without asking a process. `seconds` is the wall clock of one pair, counted
    from when a process takes it up; `memory_mb` is the address space of a process. One that outgrows either is
    replaced, and its pair is a timeout. A gold that math-verify cannot read is compared as a normalised string.
    Raises `DataError` if the processes cannot start.
    """

    def __init__(self, workers: int = 2, seconds: float = 2.0, memory_mb: int = 1024) -> None:
        self._count = workers
        self._seconds = seconds
        self._memory_mb = memory_mb
        self._workers: list[_Worker] = []
        weakref.finalize(self, _end_all, self._workers)  # also when the interpreter exits

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """The verdict on each (completion, gold), in order."""
        answers = [last_boxed(completion) for completion, _ in pairs]
        quick = [_quick_verdict(answer, gold) for answer, (_, gold) in zip(answers, pairs, strict=True)]
        jobs = {i: (pairs[i][1], answers[i] or "") for i, verdict in enumerate(quick) if verdict is None}
        try:
            compared = self._compare(jobs)
        except BaseException:
            self.close()  # a verdict still on its way must not be taken for that of a later pair
            raise
        return [verdict or compared[i] for i, verdict in enumerate(quick)]

    def close(self) -> None:
        """End the processes. The next check starts new ones."""
        _end_all(self._workers)

    def _compare(self, jobs: dict[int, tuple[str, str]]) -> dict[int, Verdict]:
        verdicts: dict[int, Verdict] = {}
        waiting = deque(jobs)
        while len(verdicts) < len(jobs):
            self._staff(len(jobs) - len(verdicts))
            for worker in [worker for worker in self._workers if worker.idle][: len(waiting)]:
                index = waiting.popleft()
                worker.take(index, *jobs[index])
            for worker in self._speaking():
                job, reply = worker.job, worker.hear()
                if job is not None:
                    verdicts[job] = cast(Verdict, reply or "timeout")
                if reply is None:
                    worker.end()
                    self._workers.remove(worker)
        return verdicts

    def _staff(self, open_jobs: int) -> None:
        """Replace processes that died while idle, and start new ones as many as are of use."""
        for worker in [worker for worker in self._workers if worker.idle and not worker.alive]:
            worker.end()
            self._workers.remove(worker)
        while len(self._workers) < min(self._count, open_jobs):
            self._workers.append(_Worker(self._seconds, self._memory_mb))

    def _speaking(self) -> list[_Worker]:
        """Wait for the next reply, death or deadline; an overdue process is killed and speaks by its death."""
        awaited = [worker for worker in self._workers if not worker.idle]
        deadline = min(worker.deadline for worker in awaited)
        ready = wait([worker.replies.fileno() for worker in awaited], max(0.0, deadline - time.monotonic()))
        speaking = [worker for worker in awaited if worker.replies.fileno() in ready]
        for worker in awaited:
            if worker not in speaking and worker.deadline <= time.monotonic():
                worker.process.kill()
        return speaking


class _Worker:
    """One process of `MathChecker`: starting, then idle (`job` is None), or busy; `deadline` in monotonic seconds."""

    def __init__(self, seconds: float, memory_mb: int) -> None:
        command = [sys.executable, "-P", str(_WORKER), str(seconds), str(memory_mb)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._requests, self.replies = _pipes(self.process)
        self._seconds = seconds
        self._started = False
        self.job: int | None = None
        self.deadline = time.monotonic() + _START_SECONDS

    @property
    def idle(self) -> bool:
        return self._started and self.job is None

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def take(self, job: int, gold: str, answer: str) -> None:
        """Hand over a pair. If the process has just died, `hear` tells."""
        self.job = job
        self.deadline = time.monotonic() + self._seconds + _GRACE_SECONDS
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps([gold, answer]).encode() + b"\n")
            self._requests.flush()

    def hear(self) -> str | None:
        """Read a reply and become idle; None if the process died over its pair."""
        line = self.replies.readline()
        reply = str(json.loads(line)) if line else None
        if not self._started and reply != READY:
            raise DataError(
                f"data.checker: math cannot run, its process did not start ({reply or 'it died without a word'}); "
                "check that math-verify is installed, or set data.checker: exact"
            )
        self._started = True
        self.job = None
        return reply

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()
    workers.clear()


def make_checker(kind: Literal["exact", "math", "none"]) -> Checker | None:
    """The checker of that name; None for `none`, where nothing can be verified."""
    if kind == "none":
        return None
    return ExactChecker() if kind == "exact" else MathChecker()


def _quick_verdict(answer: str | None, gold: str) -> Verdict | None:
    """What needs no mathematics: no answer, or the same string. None: undecided."""
    if answer is None:
        return "unparseable"
    return "correct" if normalise(answer) == normalise(gold) else None
