"""Checkpoints: safetensors and JSON under SHA-256, written whole or not at all. No pickle.

    checkpoints/update-000025/  tensors.safetensors  state.json  manifest.json
                                rows-00000.safetensors  rows-00001.safetensors  ..

A state is a nested dict of what components' `state_dict()` give: tensors and JSON values, with tuples and integer keys
(as torch's optimisers have) kept. It is written to a temporary folder, forced to the disk, and renamed. The caller
holds the run's lock.

Of a tensor that is divided over ranks each rank writes its own rows (the second format); any number of ranks reads
them. A state without any is written in the first format, which is read for ever.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atesd.errors import CheckpointError
from atesd.models.ranks import SINGLE_PROCESS, Ranks
from atesd.models.weights import Part
from atesd.refusals import is_folder, reason, remove
from atesd.rows import RowKind
from atesd.runs import sync_directory, write_atomic
from atesd.shapes import RowsWritten

FORMATS = ("atesd-checkpoint-1", "atesd-checkpoint-2")
"""Without divided tensors, and with them."""

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_TEMPORARY, _TRASH, _REPLACED, _BEYOND = ".temporary-", ".trash-", ".replaced-", "beyond-"
_NAME = re.compile(r"update-(\d{6,})")
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
    | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
)


Rows = Callable[[str, int], slice]
"""Which rows to read of a tensor: of this path in the state, that has so many."""

_Held = Tensor | Part
_Divided = dict[str, tuple[int, list[int]]]
"""What a file has of divided tensors: the first row that it has of each, and the whole shape."""


def all_rows(_path: str, count: int) -> slice:
    """Every tensor whole."""
    return slice(0, count)


def no_rows(_path: str, _count: int) -> slice:
    """For whoever only asks whether a checkpoint is sound."""
    return slice(0, 0)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that passed every check, and why each newer one did not."""

    path: Path
    updates_done: int
    state: dict[str, object]
    skipped: tuple[str, ...]
    rows: Mapping[str, RowsWritten] | None = None
    """The rows that the run had written by then; None in a checkpoint of an earlier version."""


def save_checkpoint(
    folder: Path,
    updates_done: int,
    state: Mapping[str, object],
    keep: int,
    *,
    run_id: str,
    rows: Mapping[RowKind, RowsWritten] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Path:
    """Write `update-NNNNNN` into `folder` and delete all but the `keep` newest. Returns its path.

    Where the state holds a `Part` of a divided tensor all `ranks` call it, each with its own rows. All else is written
    by rank 0.

    A crash at any moment leaves the older checkpoints whole. Checkpoints beyond `updates_done`, left by a resume that
    had to go back further, are set aside as `beyond-update-NNNNNN`, so that no later resume takes them up. `rows` is
    what the run has written so far, for the resume to compare. A link is unlinked where a folder would be deleted.
    Raises `CheckpointError` that names the path inside the state of a non-finite number or of a value that neither
    safetensors nor JSON can hold, or says what the disk refused.
    """
    held: dict[str, _Held] = {}
    target = folder / _name(updates_done)
    temporary = folder / f"{_TEMPORARY}{target.name}"
    identity = {"updates_done": updates_done, "run_id": run_id, "rows": rows}
    encoded = _encode(state, "", held)
    ranks.gather(partial(_require_finite, state, ""))
    tensors = {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}
    own = {name: part for name, part in held.items() if isinstance(part, Part) and len(part.tensor)}
    try:
        ranks.broadcast(partial(_begin, folder, temporary, target))
        rows_of = ranks.gather(partial(_write_rows, temporary, own, ranks.rank, _writes(own, ranks), target))
        divided: dict[str, _Divided] = {name: rows for written in rows_of for name, rows in written.items()}
        ranks.broadcast(partial(_finish, temporary, target, encoded, tensors, identity, divided, keep))
    except BaseException:
        if ranks.first and folder.is_dir():
            _clean(folder)
        raise
    return target


def load_newest(folder: Path, run_id: str, rows: Rows = all_rows) -> LoadedCheckpoint | None:
    """The newest checkpoint of this run that passes every check, its tensors on the CPU; None if there is none at all.

    Of the tensors those `rows` are read. Raises `CheckpointError` that lists what is wrong with each if none passes.
    """
    try:
        if not os.path.lexists(folder):
            return None
        _clean(folder)
        candidates = _checkpoints(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {reason(error)}; expected a folder of checkpoints") from error
    skipped: list[str] = []
    for path in reversed(candidates):
        try:
            return replace(load_checkpoint(path, run_id, rows), skipped=tuple(skipped))
        except CheckpointError as error:
            skipped.append(f"{path.name}: {error}")
    if skipped:
        raise CheckpointError(
            f"{folder}: no checkpoint can be used:\n  "
            + "\n  ".join(skipped)
            + "\nRestore one of them from a copy, or begin again in another folder."
        )
    return None


def load_checkpoint(path: Path, run_id: str, rows: Rows = all_rows, *, hashed: bool = True) -> LoadedCheckpoint:
    """One checkpoint, those `rows` of its tensors on the CPU. Raises `CheckpointError` unless it passes every check.

    Without `hashed` the files' SHA-256 are taken on trust: another rank has just compared them.
    """
    try:
        manifest = _verify(path, run_id, hashed)
        written = cast("Mapping[str, RowsWritten] | None", manifest.get("rows"))
        state = _read(path, cast("dict[str, _Divided]", manifest.get("divided", {})), rows)
        return LoadedCheckpoint(path, cast(int, manifest["updates_done"]), state, (), written)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {reason(error)}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"is not what was once written: {type(error).__name__}: {error}") from error


def digest(state: object) -> str:
    """SHA-256 over every tensor (type, shape, bytes) and JSON value of a state, whatever the order of its keys."""
    held: dict[str, _Held] = {}
    encoded = _encode(state, "", held)
    total = hashlib.sha256(json.dumps(encoded, sort_keys=True).encode())
    for name in sorted(held):
        tensor = _tensor_of(held[name]).detach().cpu()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():  # a copy, because a single entry may carry a stride that `view` refuses
            total.update(tensor.reshape(-1).clone().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _name(updates_done: int) -> str:
    return f"update-{updates_done:06d}"


# State to JSON and named tensors, and back


def _tensor_of(held: _Held) -> Tensor:
    return held.tensor if isinstance(held, Part) else held


def _encode(value: object, path: str, tensors: dict[str, _Held]) -> object:
    """The JSON form of a value; its tensors, and parts of divided ones, go to `tensors` under their paths.

    Tuples become {"#tuple": [...]}, tensors {"#tensor": path}; a mapping whose keys are not all plain text becomes
    {"#keys": {...}} with an "i" or "s" before each key for its type.
    """
    if isinstance(value, (Tensor, Part)):
        tensor = _require_storable(_tensor_of(value), path)
        divided = isinstance(value, Part) and tuple(tensor.shape) != value.shape
        tensors[path] = value if divided else tensor
        return {"#tensor": path}
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) and not key.startswith("#") for key in value)
        items = {
            key if plain else _key(key, path): _encode(item, f"{path}/{_escaped(key)}", tensors)
            for key, item in value.items()
        }
        return items if plain else {"#keys": items}
    if isinstance(value, (list, tuple)):
        items_ = [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"#tuple": items_} if isinstance(value, tuple) else items_
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"state{path}: a {type(value).__name__} is neither a tensor nor a JSON value")


def _decode(value: object, tensors: Mapping[str, Tensor]) -> object:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"#tensor": name}:
            return tensors[name].clone()
        case {"#tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case {"#keys": items}:
            return {
                int(key[1:]) if key.startswith("i") else key[1:]: _decode(item, tensors) for key, item in items.items()
            }
    return {key: _decode(item, tensors) for key, item in value.items()}


def _key(key: object, path: str) -> str:
    if isinstance(key, str):
        return f"s{key}"
    if type(key) is int:
        return f"i{key}"
    raise CheckpointError(f"state{path}: the key {key!r} of type {type(key).__name__} is neither text nor an integer")


def _escaped(key: object) -> str:
    """One part of a path: JSON pointer's escapes (RFC 6901), and '#' before an integer, so that 0 and "0" differ."""
    return f"#{key}" if type(key) is int else str(key).replace("~", "~0").replace("/", "~1").replace("#", "~2")


def _require_storable(tensor: Tensor, path: str) -> Tensor:
    if type(tensor.detach()) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta:
        kind = f"{type(tensor.detach()).__name__} ({tensor.layout}, {tensor.device})"
        raise CheckpointError(f"state{path}: a {kind} cannot be stored; gather it to one plain dense tensor")
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"state{path}: tensors of {tensor.dtype} cannot be stored")
    return tensor


def _require_finite(value: object, path: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_finite(item, f"{path}/{_escaped(key)}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _require_finite(item, f"{path}/{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"state{path} is {value}; a checkpoint holds only finite numbers")
    elif isinstance(value, Part):
        _require_finite(value.tensor, path)
    elif isinstance(value, Tensor) and value.is_floating_point():
        bad = int((~torch.isfinite(value.detach())).sum())
        if bad:
            share = f"{bad:,} of {value.numel():,} entries are not finite"
            raise CheckpointError(f"state{path}: {share}; a checkpoint holds only finite numbers")


# Files


@contextmanager
def _refusals(target: Path) -> Iterator[None]:
    """What the disk or safetensors refuse inside, as a `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = reason(error) if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"{target}: cannot be written: {cause}; older checkpoints are untouched. Free some space or mend the "
            "folder, and give the same command again: it resumes"
        ) from error


def _begin(folder: Path, temporary: Path, target: Path) -> None:
    """An empty temporary folder."""
    with _refusals(target):
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        temporary.mkdir()


def _writes(own: Mapping[str, Part], ranks: Ranks) -> bool:
    """Whether this rank writes its rows: the first of those that hold the same ones."""
    first_rows = {name: part.first_row for name, part in own.items()}
    mark = hashlib.sha256(json.dumps(first_rows, sort_keys=True).encode()).hexdigest()
    return ranks.gather(partial(str, mark)).index(mark) == ranks.rank and bool(own)


def _write_rows(folder: Path, own: Mapping[str, Part], rank: int, writes: bool, target: Path) -> dict[str, _Divided]:
    """Write this rank's rows; the file, and what it has of which tensors."""
    if not writes:
        return {}
    file = folder / f"rows-{rank:05d}.safetensors"
    storages: set[int] = set()
    with _refusals(target):
        save_file({name: _alone(part.tensor, storages) for name, part in own.items()}, file)
        _sync_file(file)
    return {file.name: {name: (part.first_row, list(part.shape)) for name, part in own.items()}}


def _finish(
    temporary: Path,
    target: Path,
    encoded: object,
    tensors: Mapping[str, Tensor],
    identity: Mapping[str, object],
    divided: Mapping[str, _Divided],
    keep: int,
) -> None:
    """Write what is whole and the manifest of all, and give the folder its name."""
    with _refusals(target):
        _write(temporary, encoded, tensors, identity, divided)
        _put_in_place(temporary, target)
        _retire(target.parent, cast(int, identity["updates_done"]), keep)


def _write(
    folder: Path,
    encoded: object,
    tensors: Mapping[str, Tensor],
    identity: Mapping[str, object],
    divided: Mapping[str, _Divided],
) -> None:
    stored, aliases = _stored(tensors)
    save_file(stored, folder / _TENSORS)
    _sync_file(folder / _TENSORS)
    state = json.dumps({"state": encoded, "aliases": aliases}, allow_nan=False, separators=(",", ":"))
    write_atomic(folder / _STATE, state.encode())
    files = {name: _fingerprint(folder / name) for name in (_STATE, _TENSORS, *divided)}
    second = {"divided": divided} if divided else {}
    manifest = {"format": FORMATS[bool(divided)], **identity, **second, "files": files}
    write_atomic(folder / _MANIFEST, _manifest_bytes(manifest))


def _fingerprint(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _stored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous CPU tensors, none sharing memory, each once: (stored, {other name: name it is stored under})."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        stored[name] = _alone(tensor, storages)
    return stored, aliases


def _alone(tensor: Tensor, storages: set[int]) -> Tensor:
    """The tensor on the CPU, contiguous, in memory that it shares with none of those before."""
    own = tensor.detach().cpu().contiguous()
    storage = own.untyped_storage()
    if storage.data_ptr() in storages or storage.nbytes() != own.numel() * own.element_size():
        own = own.clone()
    storages.add(own.untyped_storage().data_ptr())
    return own


def _read(path: Path, divided: Mapping[str, _Divided], rows: Rows) -> dict[str, object]:
    """The state in a verified checkpoint, its tensors cut to the rows that are wanted."""
    content = json.loads((path / _STATE).read_bytes())
    with ExitStack() as files:
        opened = files.enter_context(safe_open(path / _TENSORS, "pt"))
        tensors = {name: _cut(opened, name, rows) for name in opened.keys()}  # noqa: SIM118  (it is no mapping)
        pieces: dict[str, list[_Piece]] = {}
        for file, parts in divided.items():
            opened = files.enter_context(safe_open(path / file, "pt"))
            for name, (first_row, shape) in parts.items():
                pieces.setdefault(name, []).append(_Piece(opened, first_row, tuple(shape)))
        tensors |= {name: _joined(name, some, rows) for name, some in pieces.items()}
    aliases = {name: tensors[source] for name, source in content["aliases"].items()}
    return cast("dict[str, object]", _decode(content["state"], tensors | aliases))


class _File(Protocol):
    """What is used of an opened safetensors file."""

    def get_tensor(self, name: str) -> Tensor: ...

    def get_slice(self, name: str) -> _Slice: ...


class _Slice(Protocol):
    """What is used of a tensor in one, which is read as it is indexed."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a divided tensor in one file."""

    file: _File
    first_row: int
    shape: tuple[int, ...]


def _cut(file: _File, name: str, rows: Rows) -> Tensor:
    """The wanted rows of a tensor that lies whole in a file."""
    shape = file.get_slice(name).get_shape()
    wanted = rows(name, shape[0]) if shape else slice(0, 1)
    if not shape or wanted == slice(0, shape[0]):
        return file.get_tensor(name)
    return file.get_slice(name)[wanted]


def _joined(name: str, pieces: Sequence[_Piece], rows: Rows) -> Tensor:
    """The wanted rows of a divided tensor. Raises `CheckpointError` where a row is in no file."""
    shape = pieces[0].shape
    wanted = rows(name, shape[0])
    reached, found = wanted.start, []
    for piece in sorted(pieces, key=attrgetter("first_row")):
        held = piece.file.get_slice(name)
        first, last = max(reached, piece.first_row), min(wanted.stop, piece.first_row + held.get_shape()[0])
        if first == reached and first < last:
            found.append(held[first - piece.first_row : last - piece.first_row])
            reached = last
    if reached < wanted.stop:
        raise CheckpointError(f"{name}: its rows from {reached:,} on are in no file, of {shape[0]:,}")
    return torch.cat(found) if found else pieces[0].file.get_slice(name)[0:0]


def _verify(path: Path, run_id: str, hashed: bool) -> dict[str, object]:
    """The manifest of a checkpoint whose every byte is as it was written. Raises `CheckpointError` otherwise."""
    if not path.is_dir():
        raise CheckpointError("is no folder" + (", but a link to none" if path.is_symlink() else ""))
    manifest = _read_manifest(path / _MANIFEST)
    if manifest["run_id"] != run_id:
        raise CheckpointError(f"belongs to run {manifest['run_id']}, not to this run, {run_id}")
    updates_done = cast(int, manifest["updates_done"])
    if path.name != _name(updates_done):
        raise CheckpointError(f"holds {_name(updates_done)}; the folder was renamed")
    for name, expected in cast("dict[str, dict[str, object]]", manifest["files"]).items():
        if not (path / name).is_file():
            raise CheckpointError(f"{name} is missing")
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{name} has {size:,} bytes, expected {expected['bytes']:,}")
        if hashed and _sha256(path / name) != expected["sha256"]:
            raise CheckpointError(f"{name} does not match its SHA-256; its content was damaged")
    return manifest


def _read_manifest(path: Path) -> dict[str, object]:
    """The manifest, checked against its own checksum, or, of another format, against nothing but its name."""
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
        found = manifest.get("format")
    except FileNotFoundError:
        raise CheckpointError(f"{_MANIFEST} is missing") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{_MANIFEST} cannot be read: {error}") from None
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if found not in FORMATS:
        raise CheckpointError(f"format {found!r}, expected {' or '.join(map(repr, FORMATS))}")
    if raw != _manifest_bytes(content):
        raise CheckpointError(f"{_MANIFEST} does not match its SHA-256; its content was damaged")
    return content


def _manifest_bytes(content: Mapping[str, object]) -> bytes:
    """A manifest with a checksum of itself, in the only spelling that is accepted."""
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": checksum}, indent=1).encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


# Names in the folder of checkpoints


def _put_in_place(temporary: Path, target: Path) -> None:
    replaced = target.with_name(f"{_REPLACED}{target.name}")
    if os.path.lexists(target):
        _remove(replaced)
        os.replace(target, replaced)
    os.replace(temporary, target)
    sync_directory(target.parent)
    _remove(replaced)


def _retire(folder: Path, updates_done: int, keep: int) -> None:
    checkpoints = _checkpoints(folder)
    current = checkpoints.index(folder / _name(updates_done)) + 1
    for path in checkpoints[current:]:
        beyond = path.with_name(f"{_BEYOND}{path.name}")
        _remove(beyond)
        os.replace(path, beyond)
    for path in checkpoints[:current][:-keep]:
        _remove(path)


def _checkpoints(folder: Path) -> list[Path]:
    """Whatever bears a checkpoint's name, oldest first."""
    numbered = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def _remove(path: Path) -> None:
    """Delete what bears a name, if anything does, in one step as far as names go: a folder is trash before it is gone.

    A link is unlinked, whatever it leads to.
    """
    if is_folder(path):
        trash = path.with_name(f"{_TRASH}{path.name}")
        remove(trash)
        os.replace(path, trash)
        remove(trash)
    else:
        path.unlink(missing_ok=True)


def _clean(folder: Path) -> None:
    """Finish what a crash interrupted: drop unfinished and half-deleted folders, put back one not yet replaced.

    What cannot be cleared away is left: it is in nobody's way, and must keep no run from going on.
    """
    for replaced in folder.glob(f"{_REPLACED}*"):
        target = folder / replaced.name.removeprefix(_REPLACED)
        with suppress(OSError):
            if os.path.lexists(target):
                _remove(replaced)
            elif _NAME.fullmatch(target.name):
                os.replace(replaced, target)
    for leftover in (*folder.glob(f"{_TEMPORARY}*"), *folder.glob(f"{_TRASH}*")):
        with suppress(OSError):
            remove(leftover)
