"""Run a plan, show how it goes, and say what came out, for `atesd sweep`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TextIO, final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from atesd.cli.display import fitting
from atesd.rows import MetricsRow
from atesd.runs import RunFolder
from atesd.text import duration, percent, visible
from atesd_lab.sweep.grid import sweep_tables, write_index, write_shared
from atesd_lab.sweep.jobs import Entry, Watcher, run_all
from atesd_lab.sweep.plan import Cell
from atesd_lab.sweep.workers import slots, visible_gpus

LOOK_SECONDS = 1.0  # between two looks at the rows of the running cells
LINE_SECONDS = 60.0  # between two lines about them where there is no terminal
COUNTED = ("running", "waiting", "held", "failed", "blocked")


def run_cells(cells: Sequence[Cell], processes: int | None, out: Path) -> tuple[str, int]:
    """Train what is not finished; returns what to print at the end and how many cells are not finished."""
    board = train_cells(cells, processes, out)
    unfinished = [entry for entry in board if entry.status != "finished"]
    text = sweep_tables(cells)
    write_shared(out / "table.txt", text)
    lines = [text, *(entry.reason for entry in unfinished)]
    if unfinished:
        lines.append(f"{len(unfinished)} of {len(board)} cells are not finished; the same command tries them again")
    lines.append(f"run folders: {out}, one per cell, each with its log beside it; table: {out / 'table.txt'}")
    lines.append(f"one page about all of them: atesd report {shlex.quote(str(out))}")
    return "\n".join(lines), len(unfinished)


def train_cells(cells: Sequence[Cell], processes: int | None, out: Path, keep: bool = False) -> list[Entry]:
    """Train what is not finished, with a view of how it goes; says how each cell ended. `keep`: as of `write_index`."""
    gpus = [] if all(cell.job.config.model.device == "cpu" for cell in cells) else visible_gpus()
    environments = slots(processes, gpus)
    write_index(cells, out, keep)
    with view_for(cells, len(environments)) as view:
        return run_all([cell.job for cell in cells], environments, view)


@final
class SweepProgress:
    """What is known of a sweep while it runs: how the cells stand, and how fast updates go."""

    def __init__(self, cells: Sequence[Cell], processes: int) -> None:
        self._updates = {cell.job.folder: cell.job.config.train.num_updates for cell in cells}
        self._processes = processes
        self._done: dict[Path, int] = {}
        self._done_before: dict[Path, int] = {}
        self._rows: dict[Path, MetricsRow] = {}
        self._first: dict[Path, tuple[float, int]] = {}
        self._looked = 0.0
        self.board: Sequence[Entry] = ()

    def begin(self, board: Sequence[Entry]) -> None:
        """Know the cells, and what was done of them before."""
        self.board = board
        for entry in board:
            self._done[entry.job.folder] = _updates_done(entry)

    def look(self) -> None:
        """Read the newest rows of the running cells, at most once a second."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        for entry in self.with_status("running", "held"):
            row = _last_row(entry.job.folder)
            if row is not None:
                self._rows[entry.job.folder] = row
                self._done[entry.job.folder] = row["update"] + 1
                if self._done[entry.job.folder] > self._done_before.get(entry.job.folder, 0):
                    self._first.setdefault(entry.job.folder, (self._looked, self._done[entry.job.folder]))

    def began(self, entry: Entry) -> None:
        """A cell starts, perhaps from a checkpoint."""
        self._done[entry.job.folder] = self._done_before[entry.job.folder] = _updates_done(entry)

    def with_status(self, *wanted: str) -> list[Entry]:
        """The cells that stand so."""
        return [entry for entry in self.board if entry.status in wanted]

    @property
    def seconds_left(self) -> float | None:
        """What is left to do at the pace so far, in so many processes at a time; None before there is a pace."""
        unfinished = self.with_status("waiting", "running", "held")
        left = sum(self._updates[entry.job.folder] - self._done[entry.job.folder] for entry in unfinished)
        pace = self._seconds_per_update()
        return None if pace is None else pace * left / max(1, min(self._processes, len(unfinished)))

    def _seconds_per_update(self) -> float | None:
        """Wall time over this session's finished cells, start-up and evaluations included.

        Before one has finished: over the running ones, since their first update.
        """
        now = time.monotonic()
        spans = [
            (entry.seconds, self._updates[entry.job.folder] - self._done_before[entry.job.folder])
            for entry in self.with_status("finished")
            if entry.job.folder in self._done_before
        ] or [(now - began, self._done[folder] - first) for folder, (began, first) in self._first.items()]
        made = sum(updates for _, updates in spans)
        return sum(seconds for seconds, _ in spans) / made if made > 0 else None

    def figures(self) -> list[str]:
        """The whole sweep, the most important first."""
        counts = {status: len(self.with_status(status)) for status in COUNTED}
        words = [f"{count} {status}" for status, count in counts.items() if count]
        finished = len(self.with_status("finished"))
        return [f"{finished}/{len(self.board)} cells", *words, f"left {duration(self.seconds_left)}"]

    def cell_figures(self, entry: Entry) -> list[str]:
        """One running cell."""
        folder = entry.job.folder
        found = [f"{entry.job.name}: update {self._done.get(folder, 0)}/{self._updates[folder]}"]
        row = self._rows.get(folder)
        if row is not None and row["reveal_ratio"] is not None:
            found.append(f"ratio {row['reveal_ratio']:.2f}")
        if row is not None and row["accuracy"] is not None:
            found.append(f"accuracy {percent(row['accuracy'])} %")
        return found

    def line(self, entry: Entry) -> str:
        """What has become of a cell."""
        took = f" in {duration(entry.seconds)}" if entry.status == "finished" and entry.seconds else ""
        head = entry.reason if entry.reason else f"{entry.job.name}: {entry.status}{took}"
        return f"[{', '.join(self.figures())}] {head}"


def _updates_done(entry: Entry) -> int:
    row = _last_row(entry.job.folder)
    return row["update"] + 1 if row else 0


def _last_row(folder: Path) -> MetricsRow | None:
    return RunFolder.open(folder).last_row("metrics") if RunFolder.exists(folder) else None


@final
class PlainSweep:
    """For files and pipes: a line per event, and one a minute per running cell."""

    def __init__(self, progress: SweepProgress, file: TextIO | None = None) -> None:
        self._progress = progress
        self._file = file or sys.stdout
        self._said = time.monotonic()

    def begin(self, board: Sequence[Entry]) -> None:
        """One line."""
        self._progress.begin(board)
        self._say(f"{len(board)} cells, {len(self._progress.with_status('finished'))} of them finished")

    def changed(self, entry: Entry) -> None:
        """One line."""
        if entry.status == "running":
            self._progress.began(entry)
        self._say(self._progress.line(entry))

    def tick(self) -> None:
        """A line per running cell, now and then."""
        self._progress.look()
        if time.monotonic() - self._said >= LINE_SECONDS:
            for entry in self._progress.with_status("running"):
                self._say("  ".join(self._progress.cell_figures(entry)))

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(visible(text), file=self._file, flush=True)


@final
class LiveSweep:
    """For terminals: a bar and the running cells at the bottom, what has ended above."""

    def __init__(self, progress: SweepProgress, console: Console) -> None:
        self._progress = progress
        self._console = console

    def begin(self, board: Sequence[Entry]) -> None:
        """Know the cells."""
        self._progress.begin(board)

    def changed(self, entry: Entry) -> None:
        """One line above the bar for what has ended."""
        if entry.status == "running":
            self._progress.began(entry)
        else:
            took = f" in {duration(entry.seconds)}" if entry.status == "finished" else ""
            self._console.print(Text(visible(entry.reason or f"{entry.job.name}: {entry.status}{took}")))

    def tick(self) -> None:
        """Look at the running cells; the bar draws itself."""
        self._progress.look()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar, its figures, and a line per running cell."""
        board, width = self._progress.board, options.max_width
        done = len(self._progress.with_status("finished"))
        yield ProgressBar(total=max(1, len(board)), completed=done, width=min(width, 100))
        yield Segment.line()
        lines = [self._progress.figures(), *map(self._progress.cell_figures, self._progress.with_status("running"))]
        for figures in lines:
            yield Text(fitting(figures, width), no_wrap=True, overflow="ellipsis")


def view_for(cells: Sequence[Cell], processes: int) -> AbstractContextManager[Watcher]:
    """A bar where stdout is a terminal, lines elsewhere."""
    progress, console = SweepProgress(cells, processes), Console()
    return _live(progress, console) if console.is_terminal else nullcontext(PlainSweep(progress))


@contextmanager
def _live(progress: SweepProgress, console: Console) -> Iterator[Watcher]:
    view = LiveSweep(progress, console)
    with Live(view, console=console, refresh_per_second=2):
        yield view
