"""The run folder: names, lock, rows, manifest. The only owner of that format; imports neither torch nor transformers.

    NAME/  config.yaml  manifest.json  metrics.jsonl  decisions.jsonl  evaluations.jsonl  samples.jsonl
           checkpoints/update-NNNNNN/  adapter/ or model/  report.html  skipped/update-NNNNNN.json

A row is one JSON object on one line and counts once its newline is written. Whoever writes holds the lock; reading
needs none. `updates_done = n` means that updates 0..n-1 are done.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, cast, get_args, overload

from filelock import FileLock, Timeout

from atesd.config import Config, ReplaySettings, acting_settings, dump_config, load_config
from atesd.errors import ConfigError, RunError
from atesd.importing import sha256_of
from atesd.refusals import reason, refusals_told
from atesd.rows import DecisionRow, EvaluationRow, MetricsRow, Row, RowKind, SampleRow, revealed
from atesd.shapes import RowsWritten, require_manifest, require_row

EndStatus = Literal["finished", "stopped", "failed"]

FORMAT = "atesd-run-1"
_WHERE = ("urls", "folder", "drift_limit", "drift_alarm", "timeout", "retries", "retry_wait", "sleep")
MAY_CHANGE = (
    "train.num_updates",
    "train.keep_checkpoints",
    "evaluation.",
    *(f"sampling.server.{name}" for name in _WHERE),
)
"""Settings that a resumed run may change: none of them enters an update. `train.num_updates` may only grow."""

_CONFIG, _MANIFEST, _LOCK, _OWNER = "config.yaml", "manifest.json", ".lock", ".owner.json"
_RESTORE = "restore the file from a copy, or begin again in another --out"
_TAIL_BYTES = 4096  # where the newest row is looked for first
_PACKAGES = ("atesd", "torch", "transformers", "peft", "safetensors", "numpy")


@dataclass
class _Tally:
    """The whole lines of a file of rows: how many, and their hash so far."""

    rows: int = 0
    hash: Any = field(default_factory=hashlib.sha256)

    def add(self, lines: bytes) -> None:
        self.rows += lines.count(b"\n")
        self.hash.update(lines)

    def written(self) -> RowsWritten:
        return {"rows": self.rows, "sha256": self.hash.hexdigest()}


class RunFolder:
    """One run on disk. Make it with `create` or `open`; write to it inside `with run.lock():`."""

    def __init__(self, path: Path, run_id: str) -> None:
        self.path = path
        self.run_id = run_id
        self._tallies: dict[RowKind, _Tally] = {}

    @classmethod
    def exists(cls, path: Path | str) -> bool:
        """Whether a run was begun here. A folder whose creation was interrupted holds none."""
        with refusals_told(Path(path), "looked into"):
            return (Path(path) / _MANIFEST).is_file()

    @classmethod
    def create(cls, path: Path | str, config: Config, manifest: Mapping[str, Any]) -> RunFolder:
        """Begin a run in a new or empty folder, with a manifest from `new_manifest`.

        Raises `RunError` if the folder holds a run or other files, or another process is at work in it.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{folder}: cannot make the run folder: {reason(error)}; choose another --out") from None
        interrupted = (folder / _LOCK).exists()
        with _locked(folder), refusals_told(folder, "written to"):
            if cls.exists(folder):
                raise RunError(f"{folder} already holds a run; resume it, or choose another --out")
            ours = {_LOCK, _OWNER, *(f".{name}.tmp" for name in (_OWNER, _CONFIG, _MANIFEST))}
            foreign = sorted(item.name for item in folder.iterdir() if item.name not in ours)
            if foreign and not (interrupted and foreign == [_CONFIG]):
                raise RunError(f"{folder} is not empty ({foreign[0]}) and holds no run; choose another --out")
            write_atomic(folder / _CONFIG, dump_config(config).encode())
            _write_json(folder / _MANIFEST, manifest)
        return cls(folder, manifest["run_id"])

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Open a run for reading, or for writing under its lock. Raises `RunError` if it is not a run folder."""
        folder = Path(path)
        if not cls.exists(folder):
            found = "no such folder" if not folder.exists() else "not a folder" if folder.is_file() else "none there"
            raise RunError(f"{folder} is not a run folder: expected {_MANIFEST} as `atesd train` writes it, {found}")
        return cls(folder, _read_manifest(folder)["run_id"])

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """Folder of the trained model, or of the adapter where LoRA was trained."""
        return self.path / ("adapter" if self.config.model.lora else "model")

    @property
    def report(self) -> Path:
        """The page that `atesd report` writes by default."""
        return self.path / "report.html"

    @property
    def config(self) -> Config:
        """The resolved config in force. Raises `ConfigError` if the file was damaged, `RunError` if it is missing."""
        if not (self.path / _CONFIG).is_file():
            raise RunError(f"{self.path}: {_CONFIG} is missing; a run folder keeps the resolved config there")
        with refusals_told(self.path / _CONFIG, "read"):
            file = os.stat(self.path / _CONFIG)
        return _read_config(str(self.path / _CONFIG), file.st_ino, file.st_mtime_ns, file.st_size)

    @property
    def manifest(self) -> dict[str, Any]:
        """manifest.json as it is now."""
        return _read_manifest(self.path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the folder. A second process gets `RunError` at once, naming host, process and since when.

        The operating system's lock decides and ends with its process; the owner file only names.
        """
        with _locked(self.path):
            yield

    def append(self, kind: RowKind, row: Row) -> None:
        """Write one row and flush it. Raises `RunError` for what strict JSON cannot hold, naming the key.

        A line left torn by a kill is dropped first, so that the new row never joins it.
        """
        _require_row(kind, row)
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        tally = self._tally(kind)
        with refusals_told(self._rows_path(kind), "written"), self._rows_path(kind).open("a+b") as file:
            _drop_torn_line(file)
            file.write(line)
        tally.add(line)

    @overload
    def rows(self, kind: Literal["metrics"]) -> list[MetricsRow]: ...
    @overload
    def rows(self, kind: Literal["decisions"]) -> list[DecisionRow]: ...
    @overload
    def rows(self, kind: Literal["evaluations"]) -> list[EvaluationRow]: ...
    @overload
    def rows(self, kind: Literal["samples"]) -> list[SampleRow]: ...
    def rows(self, kind: RowKind) -> Sequence[Row]:
        """Every row so far, oldest first. A torn last line is ignored; any other damage is a `RunError`."""
        path = self._rows_path(kind)
        *lines, _ = self._content(kind).split(b"\n")
        return [_parse_row(kind, line, f"{path}: line {number}") for number, line in enumerate(lines, start=1)]

    @overload
    def whole_rows(self, kind: Literal["metrics"]) -> list[MetricsRow]: ...
    @overload
    def whole_rows(self, kind: Literal["decisions"]) -> list[DecisionRow]: ...
    @overload
    def whole_rows(self, kind: Literal["evaluations"]) -> list[EvaluationRow]: ...
    @overload
    def whole_rows(self, kind: Literal["samples"]) -> list[SampleRow]: ...
    def whole_rows(self, kind: RowKind) -> Sequence[Row]:
        """`rows`, each with every key that a reader needs; `RunError` names file, line and key of one that lacks it."""
        rows: Sequence[Row] = self.rows(kind)
        for number, row in enumerate(rows, start=1):
            require_row(kind, row, f"{self._rows_path(kind)}: line {number}", whole=True)
        return rows

    def rows_written(self) -> dict[RowKind, RowsWritten]:
        """How many rows there are of each kind, and the hash of their lines: what a checkpoint remembers."""
        return {kind: self._tally(kind).written() for kind in get_args(RowKind)}

    def require_rows(self) -> None:
        """Raise `RunError` if rows that the run had when it ended are gone or changed. Later ones may have come."""
        recorded = self.manifest.get("rows") or {}
        for kind in get_args(RowKind) if recorded else ():
            lines = self._content(kind).split(b"\n")[:-1]
            self._require_kept(kind, lines, recorded.get(kind), "the end of the run")

    @overload
    def last_row(self, kind: Literal["metrics"]) -> MetricsRow | None: ...
    @overload
    def last_row(self, kind: RowKind) -> Row | None: ...
    def last_row(self, kind: RowKind) -> Row | None:
        """The newest whole row, read from the end of the file; None if there is none."""
        path = self._rows_path(kind)
        if not path.exists():
            return None
        with refusals_told(path, "read"), path.open("rb") as file:
            size, block = file.seek(0, os.SEEK_END), _TAIL_BYTES
            while True:
                file.seek(max(0, size - block))
                lines = file.read(min(size, block)).split(b"\n")[:-1]
                if len(lines) > 1 or (lines and block >= size):
                    return _parse_row(kind, lines[-1], f"{path}: last line")
                if block >= size:
                    return None
                block *= 4

    def sync(self) -> None:
        """Force every row to the disk: to be called before the checkpoint that relies on them."""
        for kind in get_args(RowKind):
            if self._rows_path(kind).exists():
                with refusals_told(self._rows_path(kind), "written"), self._rows_path(kind).open("ab") as file:
                    os.fsync(file.fileno())
        with refusals_told(self.path, "written to"):
            sync_directory(self.path)

    def truncate_after(
        self, updates_done: int, recorded: Mapping[str, RowsWritten] | None = None
    ) -> dict[RowKind, int]:
        """Drop the rows that a run resumed after `updates_done` updates will write again; returns how many of each.

        Kept are metrics and samples of updates below `updates_done`, finished decisions logged below it, and
        evaluations up to and including it, because a checkpoint follows the evaluation that counts as many updates.
        Pending decisions go: the resumed run holds them as state. After 0 updates there is no checkpoint to have
        followed anything, and nothing is kept.

        `recorded` is the `rows_written` of the checkpoint. Raises `RunError`, and changes nothing, if what is to be
        kept is not what it says; without it (a checkpoint of an earlier version), if an update has no row.
        """
        kept: dict[RowKind, list[bytes]] = {}
        dropped: dict[RowKind, int] = {}
        for kind in get_args(RowKind):
            rows = self.rows(kind)
            kept[kind] = [_line(row) for row in rows if _survives(kind, row, updates_done)]
            dropped[kind] = len(rows) - len(kept[kind])
            if recorded is not None:
                self._require_kept(kind, kept[kind], recorded.get(kind), f"update {updates_done}")
                self._require_none_added(kind, kept[kind], recorded.get(kind), updates_done)
        if recorded is None and len(kept["metrics"]) != updates_done:
            self._tell_lost("metrics", updates_done, len(kept["metrics"]), f"update {updates_done}")
        if any(dropped.values()):
            self._forget_rows()
        for kind, lines in kept.items():
            self._replace_rows(kind, b"".join(line + b"\n" for line in lines))
        return dropped

    def require_unsaved(self) -> None:
        """Raise `RunError` if there must have been a checkpoint, for a run that holds none: it would begin again."""
        manifest, every = self.manifest, self.config.train.checkpoint_every
        done = len(self.rows("metrics"))
        saved = manifest["status"] in ("finished", "stopped") or manifest["sessions"][-1]["updates_done"] > 0
        if saved or done > every:
            raise RunError(
                f"{self.checkpoints}: holds no checkpoint, although the run is {manifest['status']} with {done} rows "
                f"in metrics.jsonl and saves one every {every} updates; restore the folder from a copy, or begin "
                "again in another --out"
            )

    def continued(self, config: Config) -> Config:
        """`config` with the attention that earlier versions recorded where none was set: the run goes on with it."""
        if config.model.attention is not None or self.config.model.attention != "sdpa":
            return config
        return config.model_copy(update={"model": config.model.model_copy(update={"attention": "sdpa"})})

    def check_config(self, config: Config) -> list[str]:
        """The permitted changes against the recorded config, as 'setting: old -> new'.

        Raises `RunError` that lists every other change: a resumed run must be the same run.
        """
        changes = _changes(acting_settings(self.config), acting_settings(self.continued(config)))
        refused = [text for setting, text in changes.items() if not _may_change(setting)]
        if config.train.num_updates < self.config.train.num_updates:
            refused.append(changes["train.num_updates"] + " (it may only grow)")
        elif "train.num_updates" in changes and _is_shuffled_replay(config):
            refused.append(changes["train.num_updates"] + " (exposure.replay_order: shuffled permutes the whole run)")
        if refused:
            raise RunError(
                f"{self.path}: the config differs from the one this run began with:\n  "
                + "\n  ".join(refused)
                + "\nTake these changes back, or start a new run with another --out."
            )
        return list(changes.values())

    def check_data(self, fingerprint: str, files: Mapping[str, str] | None = None) -> None:
        """Raise `RunError` if the problems are not those that the run began with; `files`: their SHA-256 by name."""
        recorded = self.manifest["data_fingerprint"]
        if fingerprint != recorded:
            before = self.manifest.get("data_files") or {}
            other = [name for name, sha256 in (files or {}).items() if before.get(name, sha256) != sha256]
            raise RunError(
                f"{self.path}: the problems have changed: fingerprint {fingerprint}, recorded {recorded}; "
                + (f"changed is {', '.join(other)}; " if other else "")
                + "restore the data, or start a new run with another --out"
            )

    def begin_session(
        self, config: Config, *, command: Sequence[str], updates_done: int, threads: int | None = None, ranks: int = 1
    ) -> list[str]:
        """Record a resume, put a permitted config change in force, and return what to tell the user.

        A changed package, processor, thread count, number of ranks or function of the user's, and a longer run where a
        schedule depends on the length, are told because the run is then no longer equal, bit for bit, to the
        uninterrupted one.
        """
        notes = [*self.check_config(config), *_length_notes(self.config, config)]
        manifest, session = self.manifest, _session(config, command, updates_done, threads, ranks)
        before = manifest["sessions"][-1]
        notes += [f"{change}; no longer bit-exact" for change in _environment_changes(before, session)]
        notes += factory_changes(before.get("factories"), config)
        if before["status"] == "running":
            before["status"] = "killed"
        manifest["sessions"].append({**session, "notes": notes})
        manifest["status"], manifest["ended"], manifest["rows"] = "running", None, None
        with refusals_told(self.path / _CONFIG, "written"):
            write_atomic(self.path / _CONFIG, dump_config(config).encode())
        _write_json(self.path / _MANIFEST, manifest)
        return notes

    def end_session(self, status: EndStatus) -> None:
        """Record how and when the current session ended."""
        manifest = self.manifest
        manifest["status"] = manifest["sessions"][-1]["status"] = status
        manifest["ended"] = manifest["sessions"][-1]["ended"] = _now()
        manifest["rows"] = self.rows_written()
        _write_json(self.path / _MANIFEST, manifest)

    def dump_skipped(self, update: int, record: Mapping[str, Any]) -> Path:
        """Keep the batch of a skipped update for inspection. Non-finite numbers are written as text, such as "nan"."""
        path = self.path / "skipped" / f"update-{update:06d}.json"
        with refusals_told(path, "written"):
            path.parent.mkdir(exist_ok=True)
        _write_json(path, _spelled_out(record))
        return path

    def _content(self, kind: RowKind) -> bytes:
        """The file of a kind; empty where there is none."""
        path = self._rows_path(kind)
        with refusals_told(path, "read"), suppress(FileNotFoundError):
            return path.read_bytes()
        return b""

    def _tally(self, kind: RowKind) -> _Tally:
        """The tally of a kind, from the file when it is first asked for and from what is appended then on."""
        if kind not in self._tallies:
            content = self._content(kind)
            tally = self._tallies[kind] = _Tally()
            tally.add(content[: content.rfind(b"\n") + 1])
        return self._tallies[kind]

    def _replace_rows(self, kind: RowKind, content: bytes) -> None:
        """Write a file of rows anew if it holds anything else."""
        path = self._rows_path(kind)
        if self._content(kind) != content:
            with refusals_told(path, "written"):
                write_atomic(path, content)
        tally = self._tallies[kind] = _Tally()
        tally.add(content)

    def _forget_rows(self) -> None:
        """Take the record of the rows out of the manifest before rows are dropped: a kill then leaves no false one."""
        manifest = self.manifest
        if manifest.get("rows"):
            _write_json(self.path / _MANIFEST, {**manifest, "rows": None})

    def _require_kept(self, kind: RowKind, lines: Sequence[bytes], written: RowsWritten | None, since: str) -> None:
        """Raise `RunError` unless `lines` begin with what was written. More may follow: an evaluation made later."""
        if written is None:
            return
        if len(lines) < written["rows"]:
            self._tell_lost(kind, written["rows"], len(lines), since)
        digest = hashlib.sha256(b"".join(line + b"\n" for line in lines[: written["rows"]])).hexdigest()
        if digest != written["sha256"]:
            raise RunError(
                f"{self._rows_path(kind)}: its first {written['rows']} rows are not those written when {since} was "
                f"saved: SHA-256 {digest[:12]}, expected {written['sha256'][:12]}; {_RESTORE}"
            )

    def _require_none_added(
        self, kind: RowKind, lines: Sequence[bytes], written: RowsWritten | None, updates_done: int
    ) -> None:
        """Raise `RunError` for rows that the checkpoint does not know; of evaluations, for what stands twice.

        Any update may be evaluated later, on other problems too; that of the checkpoint may stand twice.
        """
        first = len(lines) if written is None else written["rows"]
        added = list(lines[first:])
        if kind == "evaluations":
            twice = [line for place, line in enumerate(added, first) if line in lines[:place]]
            added = [line for line in twice if json.loads(line)["update"] < updates_done]
        if added:
            raise RunError(
                f"{self._rows_path(kind)}: holds {len(added)} more rows of the first {updates_done} updates than when "
                f"they were saved: some stand twice or were added; {_RESTORE}"
            )

    def _tell_lost(self, kind: RowKind, expected: int, found: int, since: str) -> NoReturn:
        raise RunError(
            f"{self._rows_path(kind)}: holds {found} of the {expected} rows that it had when {since} was saved; "
            f"{_RESTORE}"
        )

    def _rows_path(self, kind: RowKind) -> Path:
        return self.path / f"{kind}.jsonl"


def recorded_ratios(config: Config) -> tuple[list[float], int]:
    """The ratio of every update of `exposure.replay_run`, and how long each held there; none under another kind.

    As many as this run needs, if there are so many; an update that was skipped there has the ratio of its hold. Raises
    `ConfigError` where no update of that hold has one.
    """
    if not isinstance(config.exposure, ReplaySettings):
        return [], 1
    recorded = RunFolder.open(config.exposure.replay_run)
    hold_updates = recorded.config.credit.hold_updates if recorded.config.exposure.holds else 1
    rows = recorded.whole_rows("metrics")
    found: list[float] = []
    for update in range(min(len(rows), config.train.num_updates) if revealed(rows) else 0):
        start = update - update % hold_updates
        held = revealed(rows[start : update + 1]) or revealed(rows[update : start + hold_updates])[:1]
        if not held:
            raise ConfigError(
                f"exposure.replay_run: update {update} was skipped in {recorded.path}, and nobody knows its ratio; set "
                f"train.num_updates to at most {update}, or replay another run"
            )
        found.append(held[-1])
    return found, hold_updates


def new_manifest(
    config: Config, *, data_fingerprint: str, command: Sequence[str], threads: int | None = None, ranks: int = 1
) -> dict[str, Any]:
    """The manifest of a run about to begin, with its first session: versions, commit, machine, seed, data, command."""
    session = _session(config, command, 0, threads, ranks)
    copied = ("started", "command", "commit", "versions", "host", "cpu", "cores", "threads", "ranks", "factories")
    return {
        "format": FORMAT,
        "run_id": uuid.uuid4().hex,
        "seed": config.train.seed,
        "data_fingerprint": data_fingerprint,
        "status": "running",
        "ended": None,
        **{key: session[key] for key in copied},
        "sessions": [session],
    }


def leave_token(out: Path) -> str:
    """Make an empty file of a name that never was, in `out` or where it will be made; gives its path.

    Other processes that see it see the same folder. Raises `RunError` where none can be made.
    """
    place = next(folder for folder in (out, *out.parents) if folder.is_dir())
    token = place / f".ranks-{secrets.token_hex(8)}"
    with refusals_told(place, "written to"):
        token.touch()
    return str(token)


def sees_token(token: str, patience: float) -> bool:
    """Whether the file is there, or appears within `patience` seconds, as on a network's file system it may."""
    until = time.monotonic() + patience
    while not Path(token).exists():
        if time.monotonic() >= until:
            return False
        time.sleep(min(0.2, patience))
    return True


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file so that a crash leaves the old content or the new, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    taken = f"{folder} is in use by {{owner}}; wait until it ends, stop it, or choose another --out"
    with held(folder, taken, "--out"):
        yield


@contextmanager
def held(folder: Path, taken: str, setting: str) -> Iterator[None]:
    """Own a folder: the operating system's lock, which ends with its process, and a file that names who has it.

    Raises `RunError` at once if another process has it, in the words of `taken`, where `{owner}` stands for it; and
    one that says to choose another `setting` if the disk allows no lock.
    """
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(taken.replace("{owner}", _owner(folder))) from None
    except (OSError, NotImplementedError) as error:
        cause = reason(error) if isinstance(error, OSError) else str(error)
        raise RunError(f"{folder / _LOCK}: cannot be locked: {cause}; choose another {setting}") from error
    try:
        _write_json(folder / _OWNER, {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()})
        yield
    finally:
        with suppress(OSError):  # it only names; what ended the work is told
            (folder / _OWNER).unlink()
        lock.release()


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / _OWNER).read_bytes())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        with refusals_told(path, "read"):
            manifest = json.loads(path.read_bytes(), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not valid JSON ({error}); expected the manifest of a run") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise RunError(f"{path}: format {found!r:.60}, expected {FORMAT!r}; the folder belongs to something else")
    require_manifest(manifest, path)
    return manifest


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with refusals_told(path, "written"):
        write_atomic(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def _drop_torn_line(file: BinaryIO) -> None:
    """Cut a file back to its last newline; a file that ends in one is only looked at."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _require_row(kind: RowKind, row: Mapping[str, object]) -> None:
    for key in ("update", "logged_at") if kind == "decisions" else ("update",):
        if type(row.get(key)) is not int:
            raise RunError(f"{kind} row: {key} is {row.get(key)!r}, expected an integer")
    if kind == "decisions" and row.get("status") not in ("finished", "pending"):
        raise RunError(f"decisions row: status is {row.get('status')!r}, expected finished or pending")
    _require_json(row, f"{kind} row: ")


def _require_json(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise RunError(f"{where} is {value}; rows hold finite numbers, and None for what was not measured")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RunError(f"{where} has the key {key!r} of type {type(key).__name__}; keys are text")
            _require_json(item, f"{where}{key}" if where.endswith(" ") else f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _require_json(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise RunError(f"{where} is a {type(value).__name__}; rows hold JSON values")


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode()


def _parse_row(kind: RowKind, line: bytes, where: str) -> Row:
    try:
        row = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where} is damaged ({error}); restore the file or remove that line") from None
    if not isinstance(row, dict):
        raise RunError(f"{where} is damaged: a {type(row).__name__} where an object was expected")
    require_row(kind, row, where)
    return cast(Row, row)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits:.20} is not finite")
    return number


def _survives(kind: RowKind, row: Mapping[str, Any], updates_done: int) -> bool:
    if kind in ("metrics", "samples"):
        return bool(row["update"] < updates_done)
    if kind == "decisions":
        return bool(row["logged_at"] < updates_done and row["status"] == "finished")
    return bool(updates_done > 0 and row["update"] <= updates_done)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Each leaf that differs between two nested mappings: its dotted path -> 'path: old -> new'."""
    before, after, absent = _flat(dict(old)), _flat(dict(new)), "(unset)"
    return {
        path: f"{path}: {before.get(path, absent)} -> {after.get(path, absent)}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path, absent) != after.get(path, absent)
    }


@lru_cache(maxsize=4096)
def _read_config(path: str, inode: int, modified: int, size: int) -> Config:  # noqa: ARG001
    """The config of a file as it was written last: parsing takes 20 ms, and tables read hundreds of runs repeatedly."""
    return load_config(path)


def _may_change(setting: str) -> bool:
    return any(setting.startswith(allowed) if allowed.endswith(".") else setting == allowed for allowed in MAY_CHANGE)


def _length_notes(old: Config, new: Config) -> list[str]:
    """What a longer run changes besides its length: everything that is a function of the share of the run done."""
    if old.train.num_updates == new.train.num_updates:
        return []
    dependent = {
        "exposure.schedule depends": new.distils and new.exposure.kind == "schedule",
        "exposure.kind: annealing depends": new.distils and new.exposure.kind == "annealing",
        "exposure.factory may depend": new.distils and new.exposure.kind == "custom",
        "exposure.policy.entropy_cost depends": new.decides and new.exposure.kind == "learned",
        "train.learning_rate_schedule depends": new.train.learning_rate_schedule != "constant",
    }
    return [f"{name} on train.num_updates; no longer bit-exact" for name, is_so in dependent.items() if is_so]


def _is_shuffled_replay(config: Config) -> bool:
    return isinstance(config.exposure, ReplaySettings) and config.exposure.replay_order == "shuffled"


def recorded_factories(config: Config) -> dict[str, dict[str, str | None]]:
    """Name, and SHA-256 of the source file, of each function of the user's that decides in a run, by its setting."""
    return {setting: {"name": name, "sha256": sha256_of(name)} for setting, name in config.factories.items()}


def factory_changes(before: Mapping[str, Mapping[str, str | None]] | None, config: Config) -> list[str]:
    """What to say of functions of the user's whose file is not the one that was recorded."""
    now, known = recorded_factories(config), before or {}
    return [
        f"{setting}: the file of {named['name']} has changed: SHA-256 {str(named['sha256'])[:12]}, before "
        f"{str(known[setting]['sha256'])[:12]}; what follows is by the new one, and no longer bit-exact"
        for setting, named in now.items()
        if setting in known and known[setting]["sha256"] != named["sha256"]
    ]


def _session(
    config: Config, command: Sequence[str], updates_done: int, threads: int | None, ranks: int
) -> dict[str, Any]:
    return {
        "started": _now(),
        "ended": None,
        "status": "running",
        "updates_done": updates_done,
        "command": list(command),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "ranks": ranks,
        "factories": recorded_factories(config),
    }


def _environment_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    keys = ("versions", "cpu", "threads", "ranks")
    recorded = {"ranks": 1, **before}
    return list(_changes({key: recorded[key] for key in keys}, {key: after[key] for key in keys}).values())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit this file was checked out from, with '+changes' if tracked files differ; None outside a checkout."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    changes = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{_git(here.parent, 'rev-parse', 'HEAD')}{'+changes' if changes else ''}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _spelled_out(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _spelled_out(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled_out(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
