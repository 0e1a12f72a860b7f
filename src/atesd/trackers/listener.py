"""A listener that hands what it is told to a tracker, as figures by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

from atesd.config import Config, acting_settings
from atesd.errors import RunError
from atesd.rows import Row, RowKind
from atesd.runs import EndStatus
from atesd.trackers.interface import Tracker
from atesd.train.listeners import RunInfo

REPORT_SECONDS = 300
"""The longest that the page at the end may take."""


@final
class Tracked:
    """Metrics, decisions and evaluations as figures over updates; the settings; the page of the report at the end.

    Texts (samples, messages) stay in the run folder.
    """

    def __init__(self, kind: type[Tracker], page_of: Callable[[Path], Path]) -> None:
        """`page_of` writes the report of a run folder and returns its path."""
        self._kind, self._page_of = kind, page_of
        self._begun: tuple[Config, RunInfo] | None = None
        self._tracker: Tracker | None = None

    def begin(self, config: Config, info: RunInfo) -> None:
        """Nothing yet: a session without rows leaves no record."""
        self._begun = config, info

    def row(self, kind: RowKind, row: Row) -> None:
        """Log the figures of a row; the first opens the record."""
        figures = dict(figures_of(kind, row))
        if figures and self._begun is not None:
            if self._tracker is None:
                config, info = self._begun
                self._tracker = self._kind(info.path.resolve(), info.run_id, acting_settings(config))
            self._tracker.log(step_of(kind, row), figures)

    def message(self, text: str) -> None:
        """Nothing: a message is for the one at the terminal."""

    def end(self, status: EndStatus) -> None:
        """Add the page, where there is something to show, and close the record."""
        if self._tracker is None or self._begun is None:
            return
        try:
            if status != "failed":
                self._tracker.page(self._page_of(self._begun[1].path))
        finally:
            self._tracker.close(status)


def report_page(folder: Path) -> Path:
    """Write the page of a run as `atesd report` does, in a process of its own. Raises `RunError` with what it says."""
    command = [sys.executable, "-m", "atesd.cli", "report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=REPORT_SECONDS)
    if done.returncode:
        raise RunError(f"no page for the tracker: {done.stderr.strip() or done.stdout.strip()}")
    return folder / "report.html"


def step_of(kind: RowKind, row: Mapping[str, Any]) -> int:
    """After how many updates a row was known: 1 for the row of update 0."""
    return int({"metrics": row["update"] + 1, "decisions": row.get("logged_at", 0) + 1}.get(kind, row["update"]))


def figures_of(kind: RowKind, row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row under their names in the run folder; what was not measured is left out."""
    if kind == "metrics":
        yield from _numbers("train", {name: value for name, value in row.items() if name != "update"})
        yield from _numbers("seconds", row["seconds"])
    elif kind == "decisions" and row["status"] == "finished":
        names = ("update", "reveal_ratio", "effective_ratio", "concentration1", "concentration0", "reward", "advantage")
        yield from _numbers("decision", {name: row[name] for name in (*names, "progress", "grounding")})
    elif kind == "evaluations":
        scores = {name: {**row[name]} for name in ("average", "pass_at_k")}
        split = f"evaluation/{row['split']}"
        yield from _numbers(split, {name: estimate["value"] for name, estimate in scores.items()})
        yield from _numbers(split, {f"average_{end}": scores["average"][end] for end in ("low", "high")})
        yield from _numbers(split, {name: row[name] for name in ("mean_tokens", "truncated_share", "loop_share")})


def _numbers(group: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{group}/{name}", float(value)
