"""Ctrl-C and SIGTERM ask for a checkpoint after the running update; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

STOPPING = "stopping after this update, with a checkpoint; Ctrl-C again stops at once"


@final
class StopRequest:
    """Remembers whether a signal asked for an end. Handles signals while it is listening, in the main thread alone."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._asked = threading.Event()

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self._asked.is_set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the two signals ask; afterwards they do what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked.set()
        self._say(STOPPING)
