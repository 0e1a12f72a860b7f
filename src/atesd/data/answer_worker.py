"""A process that compares two answers at a time: JSON lines in, one verdict per line out.

`answers.MathChecker` runs this file by its path, so it imports nothing of the package (a torch in every worker would
cost seconds and memory). It ends itself when a comparison outlives its wall clock: the kernel delivers the alarm,
whatever the computation is busy with, and also when the parent is gone.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

READY = "ready"
SUSPECT_SHARE = 0.25  # of the memory that a comparison may take; an unequal one that took more gives no verdict


def main(seconds: float, memory_mb: int) -> None:
    """Serve until standard input closes. Says `ready` once everything is imported, or else why it is not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group: the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = _take_stdout()
    try:
        compare = _load()
        _limit_memory(memory_mb)
        if compare("x^2-1", "(x-1)(x+1)") != "correct":
            raise MemoryError(f"math-verify does not run in {memory_mb} MB")
    except Exception as error:
        _reply(replies, f"{type(error).__name__}: {error}")
        return
    usual = _peak_mb()
    _reply(replies, READY)
    for line in sys.stdin.buffer:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = compare(gold, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # sympy swallows failed allocations and goes on to "not equal": the parent sees a death instead.
        if verdict != "correct" and _peak_mb() - usual > SUSPECT_SHARE * (memory_mb - usual):
            return
        _reply(replies, verdict)


def _load() -> Callable[[str, str], str]:
    """Import math-verify and run it once, so that no import is left for the first pair."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # math-verify warns that its own time-outs are off
    targets = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(answer: str) -> list[Any]:
        try:
            # Its time-outs raise inside whatever sympy is doing and are swallowed there: off.
            return parse(  # type: ignore[no-any-return]
                rf"\boxed{{{answer}}}",
                extraction_config=targets,
                fallback_mode="no_fallback",
                extraction_mode="first_match",
                parsing_timeout=None,
                raise_on_error=True,
            )
        except Exception:
            return []

    def compare(gold: str, answer: str) -> str:
        expected = read(gold)
        if not expected:
            return "wrong"  # the strings differ, and there is nothing else to go by
        found = read(answer)
        if not found:
            return "unparseable"
        try:
            equal = verify(expected, found, timeout_seconds=None, raise_on_error=True)
        except Exception:
            equal = False  # incomparable kinds: not shown to be equal
        return "correct" if equal else "wrong"

    for gold, answer in (("x^2+2x+1", "(x+1)^2"), ("(1,2)", "[1,2]"), (r"\sqrt{2}", "1.5"), ("x=5", "5")):
        compare(gold, answer)
    return compare


def _limit_memory(memory_mb: int) -> None:
    """Cap the address space; on Linux only, other systems do not enforce it."""
    if sys.platform.startswith("linux"):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = memory_mb * 2**20
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak_mb() -> float:
    """The most memory this program ever held, MB; 0 where no limit is enforced.

    From the kernel's account of the address space: that of getrusage begins with the peak of whoever started the
    process, so that under a parent larger than the limit every comparison would look too large.
    """
    if not sys.platform.startswith("linux"):
        return 0.0
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        peak = next(line for line in status if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 2**10


def _take_stdout() -> BinaryIO:
    """A private copy of standard output; what a library prints goes to standard error instead."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def _reply(replies: BinaryIO, word: str) -> None:
    replies.write(json.dumps(word).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
