"""Who watches a run: a terminal, a notebook, a tracker; several at once, none of which can stop it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

from atesd.config import Config
from atesd.rows import Row, RowKind
from atesd.runs import EndStatus
from atesd.text import visible


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Which run begins: its folder, its id, what manifest.json says, and whether an earlier session is gone on with."""

    path: Path
    run_id: str
    manifest: Mapping[str, object]
    resumed: bool


class Listener(Protocol):
    """Watches one session of a run. `begin` is called first, `end` last, in the process that writes the folder."""

    def begin(self, config: Config, info: RunInfo) -> None:
        """The folder exists and is locked; nothing is loaded or trained yet."""
        ...

    def row(self, kind: RowKind, row: Row) -> None:
        """A row of metrics, decisions, evaluations or samples, as it has just been written.

        After a resume rows come again from the update of the checkpoint on: those of later updates were cut off.
        """
        ...

    def message(self, text: str) -> None:
        """Something a user should know."""
        ...

    def end(self, status: EndStatus) -> None:
        """The session is over; `failed` where an error ended it."""
        ...


@final
class Listeners:
    """Tells every listener everything, each its own copy of a row. One that fails is reported and still told the rest.

    Its first failure is told to the others, or written to stderr if there is none; the number of all comes at the end.
    """

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._listeners = list(listeners)
        self._failures = [0] * len(self._listeners)

    def begin(self, config: Config, info: RunInfo) -> None:
        """See `Listener`."""
        self._tell("begin", config, info)

    def row(self, kind: RowKind, row: Row) -> None:
        """See `Listener`."""
        self._tell("row", kind, row)

    def message(self, text: str) -> None:
        """See `Listener`."""
        self._tell("message", text)

    def end(self, status: EndStatus) -> None:
        """See `Listener`."""
        for place, failures in enumerate(self._failures):
            if failures > 1:
                self._report(place, f"failed {failures} times; the run folder holds what it has missed")
        self._tell("end", status)

    def _tell(self, what: str, *arguments: object) -> None:
        for place, listener in enumerate(self._listeners):
            own = [copy.deepcopy(argument) if isinstance(argument, dict) else argument for argument in arguments]
            try:
                getattr(listener, what)(*own)
            except Exception as error:
                self._failures[place] += 1
                if self._failures[place] == 1:
                    self._report(place, f"failed at `{what}` ({type(error).__name__}: {error}); the run goes on")

    def _report(self, failed: int, text: str) -> None:
        report, told = f"listener {type(self._listeners[failed]).__qualname__} {text}", False
        for place, listener in enumerate(self._listeners):
            if place != failed:
                with suppress(Exception):
                    listener.message(report)
                    told = True
        if not told:
            with suppress(OSError):
                print(visible(report), file=sys.stderr, flush=True)
