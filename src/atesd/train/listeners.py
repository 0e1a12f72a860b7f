"""Who watches a run: a terminal, a tracker, a notebook, nobody."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, final

from atesd.config import Config
from atesd.rows import Row, RowKind


class Listener(Protocol):
    """Is told what happens, on rank 0."""

    def begin(self, config: Config, folder: Path) -> None:
        """A session begins."""
        ...

    def row(self, kind: RowKind, row: Row) -> None:
        """A row was written."""
        ...

    def message(self, text: str) -> None:
        """Something a user should know."""
        ...

    def end(self, status: Literal["finished", "stopped", "failed"]) -> None:
        """The session has ended."""
        ...


@final
class Listeners:
    """Tells several listeners, in order."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = list(listeners)

    def begin(self, config: Config, folder: Path) -> None:
        """Tell all."""
        for listener in self._listeners:
            listener.begin(config, folder)

    def row(self, kind: RowKind, row: Row) -> None:
        """Tell all."""
        for listener in self._listeners:
            listener.row(kind, row)

    def message(self, text: str) -> None:
        """Tell all."""
        for listener in self._listeners:
            listener.message(text)

    def end(self, status: Literal["finished", "stopped", "failed"]) -> None:
        """Tell all."""
        for listener in self._listeners:
            listener.end(status)
