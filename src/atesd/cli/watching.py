"""The listeners and trackers that a user names on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

from atesd.importing import named_function, require_offers
from atesd.train.listeners import Listener

OPTION = "--listener"


@final
class NamedListeners:
    """The makers of listeners, imported before anything is loaded, and called once the run folder is known."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names`: module:function each. Raises `ConfigError` for one that cannot be imported."""
        self._makers: list[tuple[str, Callable[[Path], Listener]]] = [(n, named_function(n, OPTION)) for n in names]

    def made(self, folder: Path) -> list[Listener]:
        """What each makes for a run folder. Raises `ConfigError` for what is no listener."""
        found = []
        for name, make in self._makers:
            listener = make(folder)
            fix = "atesd.train.listeners.Listener says what each is told"
            require_offers(listener, Listener, f"{OPTION}: {name}", fix)
            found.append(listener)
        return found


def trackers(names: Sequence[str]) -> list[Listener]:
    """A listener for each word of `--track`, its package imported. Raises `ConfigError` for what cannot be had."""
    from atesd.trackers.interface import tracker_named
    from atesd.trackers.listener import Tracked, report_page

    return [Tracked(tracker_named(name), report_page) for name in dict.fromkeys(names)]
