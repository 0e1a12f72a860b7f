"""A process that runs a checker of the user's: JSON lines in, one verdict, or what is wrong with it, per line out.

`own_checker.OwnChecker` runs this file by its path. The module is imported here, by name or from its file, so nothing
of it is pickled: a class, a lambda and a partial will do. What it prints is thrown away.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

FAULT = "fault: "
"""How a reply begins that is no verdict but what went wrong."""
_VERDICTS = ("correct", "wrong", "unparseable", "timeout")


def main(seconds: float, name: str, settings: dict[str, Any]) -> None:
    """Serve until standard input closes. A comparison that outlives its processor time ends the process."""
    from atesd.data.answer_worker import READY, reply_with, take_stdout
    from atesd.importing import cause, function_made_by

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in `answer_worker`: the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies = take_stdout()
    try:
        check = function_made_by(name, "data.checker", settings, "completion, answer")
    except Exception as error:
        reply_with(replies, str(error), leaves=True)
        return
    reply_with(replies, READY)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply = verdict_of(check(*json.loads(line)))
        except Exception as error:
            reply = f"{FAULT}it raised {cause(error)}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply_with(replies, reply)


def verdict_of(value: Any) -> str:
    """The verdict that a checker's return value stands for, or a fault."""
    plain = value.item() if hasattr(value, "item") else value  # a number or truth value of numpy or torch
    if isinstance(plain, str) and plain in _VERDICTS:
        return plain
    if isinstance(plain, (bool, int, float)) and plain in (0, 1):
        return "correct" if plain else "wrong"
    allowed = f"true or false, 1 or 0, or one of {', '.join(_VERDICTS)}"
    return f"{FAULT}it gave {type(value).__name__} {value!r:.60}, not {allowed}"


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[4])
    main(float(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
