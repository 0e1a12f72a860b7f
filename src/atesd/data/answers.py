"""Whether a completion's final answer is right.

A pair is (completion, gold): the text that a model wrote, and the answer it should box. Verdicts are counted apart
and never folded: correct, wrong, unparseable (no boxed answer, one that math-verify cannot read, or one longer than
`equivalence.LONGEST`), timeout (the comparison ran out of its processor time or memory). What is equal is decided in
docs/answers.md.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
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
from atesd.data.equivalence import Judgement, Pairs, judge
from atesd.data.spelling import normalise
from atesd.errors import DataError
from atesd.records import Verdict

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[-+]?\d+(?:\.\d+)?|[A-Za-z]")
_BARE_STYLE = re.compile(r"\\(?:text|math)[a-z]*\s*(?=\{)")
_MARK = "####"

_WORKER = Path(__file__).with_name("answer_worker.py")
_START_SECONDS = 120.0  # for importing sympy on a crowded machine
_STARTS = 3  # of processes in a row that die before they are ready
_PATIENCE_SECONDS, _PATIENCE_FACTOR = 60.0, 30.0  # wall clock of a pair, by itself and for each second of its limit
_FAILED = "failed"


def last_boxed(text: str) -> str | None:
    r"""The content of the box that opens last in `text`: `\boxed{...}` or `\fbox{...}`, stripped of outer spaces.

    Braces are matched; escaped ones (`\{`, `\}`) do not count. Without braces a number, one letter (`\boxed 7`) or a
    style (`\boxed\textbf{C}`) is taken. None if there is no box, if the last one is empty, or if it never closes: a
    truncated answer is not replaced by an earlier one.
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
    if style := _BARE_STYLE.match(text, start):
        end = _closing_brace(text, style.end())
        return None if end is None else (start, end + 1)
    bare = _BARE.match(text, start)
    return None if bare is None else bare.span()


def marked_answer(text: str) -> str | None:
    """What stands behind `####` on the last line that is not blank, as in GSM8K; None if that line has no such mark."""
    _, _, line = text.rstrip().rpartition("\n")
    mark, answer = line.strip()[:4], line.strip()[4:].strip()
    return answer or None if mark == _MARK and not answer.startswith("#") else None


def without_mark(text: str) -> str:
    """The text without its line of the marked answer (see `marked_answer`), if it has one."""
    return text if marked_answer(text) is None else text.rstrip().rpartition("\n")[0].rstrip()


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
        answers = [(last_boxed(completion), gold) for completion, gold in pairs]
        return [
            "unparseable" if answer is None else "correct" if normalise(answer) == normalise(gold) else "wrong"
            for answer, gold in answers
        ]

    def close(self) -> None:
        """Nothing runs in the background."""


class MathChecker:
    """Compares the last boxed answer with the gold as mathematics: math-verify in processes of its own.

    What `equivalence.judge` can decide is decided without asking a process. `seconds` is the processor time of one
    pair, `memory_mb` the address space of a process, `workers` the number of processes. One that outgrows its memory,
    dies or stands still is replaced, and its pair tried again in a process of its own. Failing there, or using up its
    processor time, is a timeout. A gold that math-verify cannot read is compared as a string.
    Raises `DataError` if the processes cannot start.
    """

    def __init__(self, workers: int = 2, seconds: float = 2.0, memory_mb: int = 1024) -> None:
        self._count = workers
        self._seconds = seconds
        self._memory_mb = memory_mb
        self._workers: list[_Worker] = []
        self._false_starts = 0
        weakref.finalize(self, _end_all, self._workers)  # also when the interpreter exits

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """The verdict on each (completion, gold), in order."""
        quick = [_judged(last_boxed(completion), gold) for completion, gold in pairs]
        jobs = {i: judged for i, judged in enumerate(quick) if not isinstance(judged, str)}
        try:
            compared = self._compare(jobs, alone=False)
            failed = {i: jobs[i] for i, reply in compared.items() if reply == _FAILED}
            compared |= self._compare(failed, alone=True)
        except BaseException:
            self.close()  # a verdict still on its way must not be taken for that of a later pair
            raise
        compared = {i: "timeout" if reply == _FAILED else reply for i, reply in compared.items()}
        return [cast(Verdict, judged if isinstance(judged, str) else compared[i]) for i, judged in enumerate(quick)]

    def close(self) -> None:
        """End the processes. The next check starts new ones."""
        _end_all(self._workers)

    def _compare(self, jobs: dict[int, Pairs], alone: bool) -> dict[int, str]:
        """A reply for each job. `alone`: each in a process that did nothing before."""
        replies: dict[int, str] = {}
        waiting = deque(jobs)
        while len(replies) < len(jobs):
            self._staff(len(jobs) - len(replies), alone)
            for worker in [worker for worker in self._workers if worker.idle][: len(waiting)]:
                index = waiting.popleft()
                worker.take(index, jobs[index])
            for worker in self._speaking():
                job, reply = worker.job, self._heard(worker)
                if job is not None:
                    replies[job] = reply
        return replies

    def _heard(self, worker: _Worker) -> str:
        """What a worker says; one that died or is done for leaves. Those that cannot start are counted."""
        reply = worker.hear()
        if worker.started:
            self._false_starts = 0
        elif self._false_starts + 1 >= _STARTS:
            raise _not_started("it died without a word")
        else:
            self._false_starts += 1
        if worker.spent:
            self._dismiss(worker)
        return reply

    def _staff(self, open_jobs: int, alone: bool) -> None:
        """Replace processes that died while idle, and start new ones as many as are of use."""
        idle = [worker for worker in self._workers if worker.idle]
        for worker in [worker for worker in idle if not worker.alive or (alone and worker.used)]:
            self._dismiss(worker)
        while len(self._workers) < min(self._count, open_jobs):
            self._workers.append(_Worker(self._seconds, self._memory_mb))

    def _dismiss(self, worker: _Worker) -> None:
        worker.end()
        self._workers.remove(worker)

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
        self._patience = _PATIENCE_SECONDS + _PATIENCE_FACTOR * seconds
        self.started = self.used = self.spent = False
        self.job: int | None = None
        self.deadline = time.monotonic() + _START_SECONDS

    @property
    def idle(self) -> bool:
        return self.started and self.job is None

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def take(self, job: int, pairs: Pairs) -> None:
        """Hand over the pairs of a job. If the process has just died, `hear` tells."""
        self.job = job
        self.used = True
        self.deadline = time.monotonic() + self._patience
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(pairs).encode() + b"\n")
            self._requests.flush()

    def hear(self) -> str:
        """Read a reply and become idle, or `spent`: dead, or about to leave. A death over a job has a reply as well."""
        line = self.replies.readline()
        if not line:
            self.spent = True
            return "timeout" if self.process.wait() == -signal.SIGPROF else _FAILED
        reply, last = json.loads(line)
        if not self.started and reply != READY:
            raise _not_started(reply)
        self.started, self.spent = True, bool(last)
        self.job = None
        return str(reply)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()


def _not_started(reason: str) -> DataError:
    return DataError(
        f"data.checker: math cannot run, its process did not start ({reason}); "
        "check that math-verify is installed, or set data.checker: exact"
    )


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()
    workers.clear()


def make_checker(kind: Literal["exact", "math", "none"], workers: int = 2) -> Checker | None:
    """The checker of that name, `math` with so many processes; None for `none`, where nothing can be verified."""
    if kind == "none":
        return None
    return ExactChecker() if kind == "exact" else MathChecker(workers)


def _judged(answer: str | None, gold: str) -> Judgement | Pairs:
    return "unparseable" if answer is None else judge(gold, answer)
