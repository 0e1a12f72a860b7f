"""Several training runs side by side: each the command that its log begins with, none repeated, none lost.

What is finished is read from the run folders alone, so that a kill of anything at any moment costs the updates since
the last checkpoints and nothing else. Several callers may share a folder: a run is trained by whoever claims it first.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol, final

from filelock import FileLock, Timeout

from atesd.config import Config, load_config, with_overrides
from atesd.data.benchmarks import Asked
from atesd.errors import AtesdError, RunError
from atesd.refusals import reason, refusals_told
from atesd.rows import EvaluationRow
from atesd.runs import RunFolder
from atesd.text import duration
from atesd_lab.sweep.workers import Ending, Worker, slots, wait

Status = Literal["waiting", "running", "held", "finished", "failed", "blocked"]
"""held: another process trains it; blocked: a run that it needs has failed."""

Say = Callable[[str], object]
"""Prints a line."""

INTERRUPTED = 130  # exit code after a second interrupt
LOG_LINES = 5
POLL_SECONDS = 0.2
RUN_LOCK = ".lock"  # of a run folder, held by whoever trains it
HELD_SECONDS = 2.0  # between two looks at a run that another process trains


@dataclass(frozen=True, slots=True)
class Scoring:
    """Benchmarks on which a run is evaluated once it is trained, and with `base` its model before training too."""

    asked: tuple[Asked, ...]
    settings: tuple[str, ...] = ()
    base: bool = False

    def commands(self, folder: Path) -> list[list[str]]:
        """The words after `atesd` of each evaluation."""
        names = ",".join(one.name if one.file is None else f"{one.name}={one.file}" for one in self.asked)
        words = ["evaluate", str(folder), "--benchmark", names]
        for one in self.asked:
            words += [] if one.expected is None else ["--expect-hash", f"{one.name}={one.expected}"]
        words += [word for setting in self.settings for word in ("--set", setting)]
        return [words, *([[*words, "--update", "0"]] if self.base else [])]

    def is_done(self, run: RunFolder, config: Config) -> bool:
        """Whether the newest rows of the run are these evaluations: this content, so many samples, drawn like this."""
        wanted = with_overrides(config, self.settings)
        newest = {(row["split"], row["update"]): row for row in run.rows("evaluations")}
        updates = [config.train.num_updates, *([0] if self.base else [])]
        rows = [(one, newest.get((one.name, update))) for one in self.asked for update in updates]
        return all(row is not None and _answers(row, one, wanted) for one, row in rows)


def _answers(row: EvaluationRow, one: Asked, config: Config) -> bool:
    """Whether an evaluation is that of a benchmark by a config. Known by its hash, or else by where it is from."""
    about, sha256 = row.get("benchmark"), one.expected or one.entry.sha256
    if about is None or row["samples"] != config.evaluation.samples:
        return False
    source = Path(one.file).name if one.file else one.entry.hub
    drawn = {name: getattr(config.evaluation, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    drawn["completion_tokens"] = config.evaluation_tokens
    same = about["sha256"] == sha256 if sha256 else about["source"] == source
    return same and all(row["sampler"].get(name) == value for name, value in drawn.items())


def holds_base(folder: Path, names: Sequence[str]) -> bool:
    """Whether a run was evaluated on all of these benchmarks before its training."""
    rows = RunFolder.open(folder).whole_rows("evaluations") if RunFolder.exists(folder) else []
    return set(names) <= {row["split"] for row in rows if row["update"] == 0}


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a recipe, what differs from it, where it goes, and the runs that must be finished before it.

    `scoring`: the evaluations that follow, and belong to it.
    """

    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    needs: tuple[Path, ...] = ()
    scoring: Scoring | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """What its command printed, beside its folder."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def command(self) -> list[str]:
        """The words after `atesd` that train it, as a user would type them."""
        settings = [word for override in self.overrides for word in ("--set", override)]
        return ["train", self.recipe, *settings, "--out", str(self.folder)]

    @property
    def commands(self) -> list[list[str]]:
        """The same of all its commands."""
        return [self.command, *(self.scoring.commands(self.folder) if self.scoring else [])]

    @property
    def command_line(self) -> str:
        """Its commands as a shell takes them, in one line."""
        return " && ".join(f"atesd {shlex.join(words)}" for words in self.commands)

    @property
    def config(self) -> Config:
        """The config it resolves to. Raises `ConfigError`."""
        return load_config(self.recipe, self.overrides)

    def is_finished(self) -> bool:
        """Whether the run is there and finished with these settings. Raises `RunError` for a run with others.

        A finished run that shall now be longer is not finished. One that was evaluated with other settings is refused:
        going on would not evaluate it again.
        """
        if not RunFolder.exists(self.folder):
            return False
        run, config = RunFolder.open(self.folder), self.config
        changes = [change for change in run.check_config(config) if change.startswith("evaluation.")]
        if changes:
            raise RunError(
                f"{self.folder} was evaluated with other settings:\n  " + "\n  ".join(changes) + "\n"
                "Take these changes back, choose another --out, or use `atesd evaluate` for more evaluations of a run."
            )
        ended = run.manifest["status"] == "finished" and run.config.train.num_updates == config.train.num_updates
        return bool(ended and (self.scoring is None or self.scoring.is_done(run, config)))

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Be the one who trains it, from before a model is loaded; False if another process is. Ends with ours.

        Raises `RunError` where the disk allows no lock.
        """
        claims = self.folder.parent / ".claims"
        with refusals_told(claims, "made"):
            claims.mkdir(parents=True, exist_ok=True)
        with _locked(claims / f"{self.name}.lock") as ours:
            yield ours

    def is_in_use(self) -> bool:
        """Whether a process holds the run folder: perhaps an `atesd train` that no sweep started.

        Nothing is written. Raises `RunError` where the disk allows no lock, which says nothing about other processes.
        """
        if not RunFolder.exists(self.folder):
            return False
        with _locked(self.folder / RUN_LOCK) as free:
            return not free

    def is_held(self) -> bool:
        """Whether another process trains it now. Raises `RunError` where the disk allows no lock."""
        with self.claim() as ours:
            return not ours or self.is_in_use()

    def was_finished(self) -> bool:
        """As `is_finished`, for a run that somebody else may have begun meanwhile: what is wrong, training will say."""
        try:
            return self.is_finished()
        except AtesdError:
            return False

    def log_end(self) -> str:
        """The last lines of its log, without the command."""
        lines = self.log.read_text("utf-8", "replace").splitlines()[1:] if self.log.exists() else []
        return "\n  ".join(lines[-LOG_LINES:]) or "(nothing)"


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock of the operating system; False where another process has it. `RunError` if there can be none."""
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        cause = reason(error) if isinstance(error, OSError) else str(error)
        raise RunError(f"{path}: cannot be locked: {cause}; free some space or change permissions") from error
    try:
        yield True
    finally:
        lock.release()


@dataclass(slots=True)
class Entry:
    """A job and how it stands. `began` is in monotonic seconds; `reason` says why it failed or waits."""

    job: Job
    status: Status
    began: float = 0.0
    seconds: float = 0.0
    reason: str = ""


class Watcher(Protocol):
    """Is told how a set of runs goes; what it raises ends the set."""

    def begin(self, board: Sequence[Entry]) -> None:
        """Before the first run, with what is finished already."""
        ...

    def changed(self, entry: Entry) -> None:
        """A run began, ended, or was found to be held or blocked."""
        ...

    def tick(self) -> None:
        """Time has passed; several times a second."""
        ...


def run_all(jobs: Sequence[Job], environments: Sequence[Mapping[str, str]], watcher: Watcher) -> list[Entry]:
    """Train what is not finished, one run at a time in each of `environments`; a failed run does not stop the others.

    Cut runs go on, runs held by other processes are waited for. Whatever ends this call early (an exception of the
    watcher, Ctrl-C, SIGTERM as `KeyboardInterrupt`) ends the runs too, each with a checkpoint. Raises `RunError` before
    anything begins if a folder holds a run with other settings.
    """
    _require_distinct(jobs)
    board = [Entry(job, "finished" if job.is_finished() else "waiting") for job in jobs]
    watcher.begin(board)
    with _stopping(_Crew(environments)) as crew:
        while any(entry.status in ("waiting", "running", "held") for entry in board):
            for entry in _block(board):
                watcher.changed(entry)
            for entry in _dispatch(board, crew):
                watcher.changed(entry)
            for entry, ending in crew.ended():
                _settle(entry, ending)
                watcher.changed(entry)
            watcher.tick()
    return board


def train_all(jobs: Sequence[Job], processes: int, say: Say) -> None:
    """Train what is not finished, so many at a time; finished runs are not repeated and cut ones go on.

    Raises `RunError` if one fails. Whatever ends this call early ends the children too, each with a checkpoint.
    """
    run_all(jobs, slots(processes), _Saying(processes, say))


@final
class _Saying:
    """One line per finished run; the first failure ends the set."""

    def __init__(self, processes: int, say: Say) -> None:
        self._processes = processes
        self._say = say

    def begin(self, board: Sequence[Entry]) -> None:
        parents = ", ".join(sorted({str(entry.job.folder.parent) for entry in board}))
        finished = sum(entry.status == "finished" for entry in board)
        self._say(f"{len(board)} runs under {parents}, {finished} of them finished; {self._processes} at a time")

    def changed(self, entry: Entry) -> None:
        match entry.status:
            case "finished":
                self._say(f"{entry.job.name}: done in {duration(entry.seconds)}")
            case "failed" | "blocked":
                raise RunError(entry.reason)
            case "held":
                self._say(entry.reason)

    def tick(self) -> None:
        pass


@final
class _Crew:
    """The places at which runs are trained, each with a worker while it has something to do."""

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self._environments = environments
        self._workers: dict[int, Worker] = {}
        self._busy: dict[int, Entry] = {}

    @property
    def is_full(self) -> bool:
        return len(self._busy) == len(self._environments)

    def train(self, entry: Entry) -> None:
        place = next(place for place in range(len(self._environments)) if place not in self._busy)
        if place not in self._workers:
            self._workers[place] = Worker(self._environments[place])
        job = entry.job
        scoring = asdict(job.scoring) if job.scoring else None
        self._workers[place].give([job.recipe, list(job.overrides), str(job.folder), scoring])
        self._busy[place] = entry

    def ended(self) -> list[tuple[Entry, Ending]]:
        """What has ended, after a short wait for it. A worker that takes no further run is closed."""
        found = []
        ready = wait([self._workers[place] for place in self._busy], POLL_SECONDS)
        for place in [place for place in self._busy if self._workers[place] in ready]:
            ending = self._workers[place].ending()
            found.append((self._busy.pop(place), ending))
            if not ending.goes_on:
                self._workers.pop(place).close()
        return found

    def stop(self) -> None:
        """Ask every run for a checkpoint, and wait for all processes."""
        for place in self._busy:
            self._workers[place].terminate()
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def kill(self) -> None:
        """End all processes at once."""
        for worker in self._workers.values():
            worker.kill()


@contextmanager
def _stopping(crew: _Crew) -> Iterator[_Crew]:
    """Whatever ends us, an interrupt, SIGTERM or an error, first ends the workers, each run with its checkpoint.

    An interrupt while we wait for that ends them, and us, at once.
    """

    def interrupt(*_: int | FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield crew
    finally:
        try:
            crew.stop()
        except KeyboardInterrupt:
            crew.kill()
            raise SystemExit(INTERRUPTED) from None
        finally:
            signal.signal(signal.SIGTERM, before)


def _require_distinct(jobs: Sequence[Job]) -> None:
    names = [str(job.folder).casefold() for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    unknown = {folder for job in jobs for folder in job.needs} - {job.folder for job in jobs}
    if twice or unknown:
        raise ValueError(f"folders of two jobs: {twice}; folders that are needed and no job's: {sorted(unknown)}")


def _block(board: Sequence[Entry]) -> list[Entry]:
    """The waiting runs that will never get what they need."""
    by_folder = {entry.job.folder: entry for entry in board}
    blocked = []
    for entry in board:
        lost = [folder for folder in entry.job.needs if by_folder[folder].status in ("failed", "blocked")]
        if entry.status == "waiting" and lost:
            entry.status = "blocked"
            entry.reason = f"{entry.job.name} was not begun: it needs {lost[0]}, which is not finished"
            blocked.append(entry)
    return blocked


def _dispatch(board: Sequence[Entry], crew: _Crew) -> list[Entry]:
    """Give runs to free places: those that wait, then those that were held when last looked at."""
    by_folder = {entry.job.folder: entry for entry in board}
    changed = []
    for entry in [*_with(board, "waiting"), *_with(board, "held")]:
        if crew.is_full:
            break
        before = entry.status
        if before == "held" and time.monotonic() - entry.began < HELD_SECONDS:
            continue
        if any(by_folder[folder].status != "finished" for folder in entry.job.needs):
            continue
        entry.began = time.monotonic()
        try:
            held = entry.job.is_held()
        except RunError as error:  # of the disk; a cell that waited for it would wait for ever
            entry.status, entry.reason = "failed", f"{entry.job.name}: {error}"
            changed.append(entry)
            continue
        if held:
            _hold(entry)
        elif entry.job.was_finished():
            entry.status, entry.reason = "finished", ""
        else:
            entry.status, entry.reason = "running", ""
            crew.train(entry)
        if entry.status != before:
            changed.append(entry)
    return changed


def _with(board: Sequence[Entry], status: Status) -> list[Entry]:
    return [entry for entry in board if entry.status == status]


def _hold(entry: Entry) -> None:
    entry.status, entry.reason = "held", f"{entry.job.name}: another process trains it; it is looked at again"


def _settle(entry: Entry, ending: Ending) -> None:
    entry.seconds = time.monotonic() - entry.began
    if ending.held:
        _hold(entry)
    elif ending.code == 0:
        entry.status = "finished"
    else:
        how = f"ended with exit code {ending.code}" if ending.code > 0 else f"was killed by signal {-ending.code}"
        entry.status = "failed"
        entry.reason = f"{entry.job.name} {how}; its log {entry.job.log} ends with\n  {entry.job.log_end()}"
