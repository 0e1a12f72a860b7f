"""Whether a completion's final answer is right.

A pair is (completion, gold), the text that a model wrote and the answer it should box, with the problem's id where it
is known. Verdicts are counted apart and never folded: correct, wrong, unparseable (no boxed answer, one that
math-verify cannot read, or one longer than `equivalence.LONGEST`), timeout (the comparison ran out of its processor
time or memory). What is equal is decided in docs/answers.md.
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
from collections.abc import Mapping, Sequence
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Protocol, cast

from atesd.data.answer_worker import READY
from atesd.data.equivalence import Judgement, Pairs, judge
from atesd.data.spelling import normalise
from atesd.errors import DataError
from atesd.records import Verdict

_BRACE = re.compile(r"\{?\s*")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[-+]?\d+(?:\.\d+)?|[A-Za-z]")
_BARE_STYLE = re.compile(r"\\(?:text|math)[a-z]*\s*(?=\{)")
_MARK = "####"

_WORKER = Path(__file__).with_name("answer_worker.py")
_START_SECONDS = 120.0  # for importing sympy on a crowded machine
_STARTS = 3  # of processes in a row that die before they are ready
_PATIENCE_SECONDS, _PATIENCE_FACTOR = 60.0, 30.0  # wall clock of a pair, by itself and for each second of its limit
_FAILED = "failed"
_MOST_BOXES = 200  # that are looked at in one text: each may be read to the text's end


def last_boxed(text: str) -> str | None:
    r"""The content of the box that opens last in `text`: `\boxed{...}` or `\fbox{...}`, stripped of outer spaces.

    Braces are matched; escaped ones (`\{`, `\}`) do not count. Without braces a number, one letter (`\boxed 7`) or a
    style (`\boxed\textbf{C}`) is taken. None if there is no box, if the last one is empty, or if it never closes: a
    truncated answer is not replaced by an earlier one.
    """
    span = last_box(text)
    return None if span is None else text[span[0] : span[1]].strip() or None


def boxes(text: str, answer: str) -> bool:
    """Whether a box of `text` holds this answer (see `last_boxed`)."""
    starts = (match.end() for match in _BOX.finditer(text))
    likely = (start for start in starts if text.startswith(answer, _content_from(text, start)))
    spans = (_box_from(text, start) for start in islice(likely, _MOST_BOXES))
    return any(span is not None and text[span[0] : span[1]].strip() == answer for span in spans)


def _content_from(text: str, start: int) -> int:
    """Where the content of a box begins, its brace and blanks apart."""
    brace = _BRACE.match(text, start)
    return brace.end() if brace else start


def last_box(text: str) -> tuple[int, int] | None:
    """Where the content of the last box starts and ends in `text` (see `last_boxed`), without its braces."""
    start = max((match.end() for match in _BOX.finditer(text)), default=-1)
    return None if start < 0 else _box_from(text, start)


def _box_from(text: str, start: int) -> tuple[int, int] | None:
    """Where the content begins and ends of the box whose command ends at `start`."""
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


Pair = tuple[str, str] | tuple[str, str, str]
"""(completion, gold), or (completion, gold, the problem's id), by which a fault is named."""


class Checker(Protocol):
    """Judges completions against gold answers."""

    def check(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """The verdict on each pair, in order."""
        ...

    def close(self) -> None:
        """End whatever runs in the background. The checker can be used again."""
        ...


class ExactChecker:
    """Compares the last boxed answer with the gold as normalised strings."""

    def check(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Correct, wrong, or unparseable where nothing is boxed."""
        answers = [(last_boxed(pair[0]), pair[1]) for pair in pairs]
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
        advice = "check that math-verify is installed, or set data.checker: exact"
        self._pool = Workers(_WORKER, (str(seconds), str(memory_mb)), workers, seconds, "math", advice)

    def check(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """The verdict on each pair, in order."""
        quick = [_judged(last_boxed(pair[0]), pair[1]) for pair in pairs]
        compared = self._pool.replies({i: judged for i, judged in enumerate(quick) if not isinstance(judged, str)})
        return [cast(Verdict, judged if isinstance(judged, str) else compared[i]) for i, judged in enumerate(quick)]

    def close(self) -> None:
        """End the processes. The next check starts new ones."""
        self._pool.close()


class Workers:
    """Processes of a checker, each of which runs `program` and answers one job at a time; `words` are its arguments.

    `seconds` is the processor time of one job, which the program limits itself; `name` and `advice` are for the message
    where none can start.
    """

    def __init__(self, program: Path, words: Sequence[str], count: int, seconds: float, name: str, advice: str) -> None:
        self._command, self._seconds = [sys.executable, "-P", str(program), *words], seconds
        self._count, self._name, self._advice = count, name, advice
        self._workers: list[_Worker] = []
        self._false_starts = 0
        weakref.finalize(self, _end_all, self._workers)  # also when the interpreter exits

    def replies(self, jobs: Mapping[int, object]) -> dict[int, str]:
        """A reply for each job, which is JSON values; `timeout` for one that fails twice.

        Raises `DataError` if the processes cannot start.
        """
        try:
            found = self._compare(jobs, alone=False)
            failed = {i: jobs[i] for i, reply in found.items() if reply == _FAILED}
            found |= self._compare(failed, alone=True)
        except BaseException:
            self.close()  # a verdict still on its way must not be taken for that of a later pair
            raise
        return {i: "timeout" if reply == _FAILED else reply for i, reply in found.items()}

    def close(self) -> None:
        """End the processes. The next jobs start new ones."""
        _end_all(self._workers)

    def _compare(self, jobs: Mapping[int, object], alone: bool) -> dict[int, str]:
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
        if worker.refused is not None:
            raise self._not_started(worker.refused)
        if worker.started:
            self._false_starts = 0
        elif self._false_starts + 1 >= _STARTS:
            raise self._not_started("it died without a word")
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
            self._workers.append(_Worker(self._command, self._seconds))

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

    def _not_started(self, reason: str) -> DataError:
        return DataError(f"data.checker: {self._name} cannot run, its process did not start ({reason}); {self._advice}")


class _Worker:
    """One process of `Workers`: starting, then idle (`job` is None), or busy; `deadline` in monotonic seconds.

    `refused` is why it cannot start.
    """

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.refused: str | None = None
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

    def take(self, job: int, content: object) -> None:
        """Hand over the content of a job. If the process has just died, `hear` tells."""
        self.job = job
        self.used = True
        self.deadline = time.monotonic() + self._patience
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(content).encode() + b"\n")
            self._requests.flush()

    def hear(self) -> str:
        """Read a reply and become idle, or `spent`: dead, or about to leave. A death over a job has a reply as well."""
        line = self.replies.readline()
        if not line:
            self.spent = True
            return "timeout" if self.process.wait() == -signal.SIGPROF else _FAILED
        reply, last = json.loads(line)
        if not self.started and reply != READY:
            self.refused = str(reply)
        self.started, self.spent = True, bool(last)
        self.job = None
        return str(reply)

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


def _judged(answer: str | None, gold: str) -> Judgement | Pairs:
    return "unparseable" if answer is None else judge(gold, answer)
