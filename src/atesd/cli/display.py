"""What a training run shows: a bar and its figures on a terminal, one line per update elsewhere, and a summary."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, TextIO, cast, final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from atesd.config import Config
from atesd.rows import EvaluationRow, MetricsRow, Row, RowKind
from atesd.runs import EndStatus, RunFolder
from atesd.text import MISSING, duration, number, percent, percent_interval, visible
from atesd.train.listeners import Listener, RunInfo

PHASES = ("sample", "teacher", "student", "loss_backward", "control", "evaluate")


@final
class Progress:
    """What is known of a run while it trains: the last row, the last reward, and how long an update takes."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.num_updates = config.train.num_updates
        self.updates_done = 0
        self.row: MetricsRow | None = None
        self.reward: float | None = None
        self._decides = config.exposure.decides
        self._folder = folder
        self._seconds = 0.0
        self._updates = 0
        self._began = time.monotonic()

    def update(self, row: MetricsRow) -> None:
        """Take in a row of metrics.jsonl."""
        self.row, self.updates_done = row, row["update"] + 1
        self._seconds += sum(row["seconds"].values())
        self._updates += 1
        if self._decides:
            self.reward = _last_reward(self._folder)

    @property
    def seconds_left(self) -> float | None:
        """At the mean time of this session's updates, their evaluations included; None before the first."""
        if not self._updates:
            return None
        return self._seconds / self._updates * (self.num_updates - self.updates_done)

    def figures(self) -> list[str]:
        """The figures of the last update, the most important first."""
        row = self.row
        found = [f"update {self.updates_done}/{self.num_updates}"]
        if not row:
            return [*found, f"preparing, {duration(time.monotonic() - self._began)}"]
        if row["skipped"] is not None:
            found.append(f"SKIPPED: {row['skipped']}")
        found.append(f"loss {number(row['loss'])}")
        if row["reveal_ratio"] is not None:
            found.append(f"ratio {row['reveal_ratio']:.2f}")
        if self._decides:
            found.append(f"reward {MISSING if self.reward is None else format(self.reward, '+.3f')}")
        if row["accuracy"] is not None:
            found.append(f"accuracy {percent(row['accuracy'])} %")
        return [*found, f"left {duration(self.seconds_left)}"]


def _last_reward(folder: Path) -> float | None:
    rewards = [row["reward"] for row in RunFolder.open(folder).whole_rows("decisions") if row["status"] == "finished"]
    return rewards[-1] if rewards else None


@final
class PlainLines:
    """A listener for files and pipes: one line per event, flushed."""

    def __init__(self, progress: Progress, file: TextIO | None = None) -> None:
        self._progress = progress
        self._file = file or sys.stdout

    def begin(self, config: Config, info: RunInfo) -> None:
        """Nothing yet."""

    def row(self, kind: RowKind, row: Row) -> None:
        """One line for an update and for an evaluation."""
        if kind == "metrics":
            self._progress.update(cast(MetricsRow, row))
            self.message("  ".join(self._progress.figures()))
        elif kind == "evaluations":
            self.message(evaluation_line(cast(EvaluationRow, row)))

    def end(self, status: EndStatus) -> None:
        """Nothing more."""

    def message(self, text: str) -> None:
        """The text, with nothing invisible in it."""
        print(visible(text), file=self._file, flush=True)


@final
class LiveBar:
    """A listener for terminals: a bar that stays at the bottom, events above it."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._console = console

    def begin(self, config: Config, info: RunInfo) -> None:
        """Nothing yet."""

    def row(self, kind: RowKind, row: Row) -> None:
        """Move the bar for an update; one line above it for an evaluation."""
        if kind == "metrics":
            self._progress.update(cast(MetricsRow, row))
        elif kind == "evaluations":
            self.message(evaluation_line(cast(EvaluationRow, row)))

    def end(self, status: EndStatus) -> None:
        """Nothing more."""

    def message(self, text: str) -> None:
        """The text above the bar, never read as markup."""
        self._console.print(Text(visible(text)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar, and under it as many figures as the width holds."""
        updates_done, total = self._progress.updates_done, self._progress.num_updates
        yield ProgressBar(total=total, completed=updates_done, width=min(options.max_width, 100))
        yield Segment.line()
        yield Text(fitting(self._progress.figures(), options.max_width), no_wrap=True, overflow="ellipsis")


def display_for(config: Config, folder: Path) -> AbstractContextManager[Listener]:
    """A bar where stdout is a terminal, lines elsewhere."""
    progress, console = Progress(config, folder), Console()
    return _live(progress, console) if console.is_terminal else _plain(progress)


@contextmanager
def _plain(progress: Progress) -> Iterator[Listener]:
    yield PlainLines(progress)


@contextmanager
def _live(progress: Progress, console: Console) -> Iterator[Listener]:
    bar = LiveBar(progress, console)
    with Live(bar, console=console, refresh_per_second=4):
        yield bar


def fitting(figures: Sequence[str], width: int) -> str:
    """The figures that fit into a line, the last one (the time left) kept as long as it can be."""
    kept = list(figures)
    while len(kept) > 1 and len("  ".join(kept)) > width:
        kept.pop(-2 if len(kept) > 2 else -1)
    return "  ".join(kept)


def evaluation_line(row: EvaluationRow) -> str:
    """A row of evaluations.jsonl on one line."""
    return (
        f"{row['split']} after {row['update']} updates: Average@{row['samples']} {percent_interval(row['average'])} %, "
        f"{row['problems']} problems, truncated {percent(row['truncated_share'])} %"
    )


def closing_lines(run: RunFolder, config: Config, status: Literal["finished", "stopped"]) -> list[str]:
    """What to know at the end: how it ended, where the time went, where everything is, what to do next."""
    rows = run.whole_rows("metrics")
    seconds = {phase: sum(row["seconds"].get(phase, 0.0) for row in rows) for phase in PHASES}
    total = sum(seconds.values())
    training = total - seconds["evaluate"]
    tokens = sum(row["completion_tokens"] or 0.0 for row in rows) * config.train.batch_size
    of = f"{len(rows)} of {config.train.num_updates} updates"
    lines = [f"finished: {of}" if status == "finished" else f"stopped after {of}; the same command resumes"]
    if total:
        speed = f"{tokens / training:,.0f} tokens per second"
        lines.append(f"{tokens:,.0f} completion tokens in {duration(training)} of training: {speed}")
        lines.append("time: " + ", ".join(f"{phase} {100 * spent / total:.0f} %" for phase, spent in seconds.items()))
    lines.append(f"run folder: {run.path}")
    if status == "finished":
        lines.append(f"trained model: {run.final}")
    return [*lines, f"report: atesd report {shlex.quote(str(run.path))}"]
