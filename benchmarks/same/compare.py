"""Whether two run folders hold the same: every tensor bit for bit, every row but its times, the final model.

It reads the files as they are: safetensors' header and bytes, JSON. Nothing of atesd, torch or numpy is imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROWS = ("metrics", "decisions", "evaluations", "samples")
TIMES = frozenset({"seconds"})
"""Keys of rows that hold times."""

STATE_PATHS: Mapping[str, str] = {}
"""Path in a checkpoint before -> path after, or the same for the beginning of paths: "/success": "/lookahead"."""

ROW_KEYS: Mapping[str, str] = {}
"""Key of a row before -> key after."""

_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


@dataclass(slots=True)
class Comparison:
    """What was compared, and every difference: where, before, after."""

    rows: int = 0
    numbers: int = 0
    tensors: int = 0
    differences: list[str] = field(default_factory=list)

    def differs(self, where: str, before: Any, after: Any) -> None:
        """Take down a difference."""
        self.differences.append(f"{where}: {_shown(before)} -> {_shown(after)}")

    @property
    def verdict(self) -> str:
        """`equal`, or the first difference and how many there are."""
        more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
        return f"{self.differences[0]}{more}" if self.differences else "equal"


def compare_runs(before: Path, after: Path) -> Comparison:
    """Compare the newest checkpoints, all rows and the final models of two run folders."""
    found = Comparison()
    for kind in ROWS:
        _compare_rows(kind, before, after, found)
    _compare_checkpoints(newest_checkpoint(before), newest_checkpoint(after), found)
    _compare_tensors("final model", final_tensors(before), final_tensors(after), found)
    return found


def fingerprint(run: Path) -> str:
    """A hash of all that is compared: runs of different settings that agree in it say nothing of these settings."""
    total = hashlib.sha256()
    for kind in ROWS:
        rows = [{key: value for key, value in row.items() if key not in TIMES} for row in read_rows(run, kind)]
        total.update(json.dumps(rows, sort_keys=True).encode())
    for tensors in (checkpoint_tensors(newest_checkpoint(run))[1], final_tensors(run)):
        for name, tensor in sorted(tensors.items()):
            total.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.content)
    return total.hexdigest()


def read_rows(run: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of a kind; none if the file is missing."""
    path = run / f"{kind}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def newest_checkpoint(run: Path) -> Path:
    """The folder of the newest checkpoint. Raises `FileNotFoundError` if there is none."""
    found = sorted((run / "checkpoints").glob("update-*"), key=lambda path: int(path.name.removeprefix("update-")))
    if not found:
        raise FileNotFoundError(f"{run} has no checkpoint")
    return found[-1]


def checkpoint_tensors(checkpoint: Path) -> tuple[Any, dict[str, Stored]]:
    """The JSON state of a checkpoint and its tensors by path, those stored under another's name included."""
    content = json.loads((checkpoint / "state.json").read_bytes())
    tensors = read_tensors(checkpoint / "tensors.safetensors")
    tensors.update({name: tensors[source] for name, source in content["aliases"].items()})
    return content["state"], tensors


def final_tensors(run: Path) -> dict[str, Stored]:
    """Every tensor of the trained model or adapter, under file and name."""
    files = [path for path in sorted(run.rglob("*.safetensors")) if "checkpoints" not in path.relative_to(run).parts]
    return {f"{path.relative_to(run)} {name}": tensor for path in files for name, tensor in read_tensors(path).items()}


def read_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file: eight bytes of length, a JSON header, the contents."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def first_entry(before: Stored, after: Stored) -> tuple[int, Any, Any]:
    """Position and values of the first entry that differs between two tensors of one type and shape."""
    size = _BYTES[before.dtype]
    place = next(i for i, (a, b) in enumerate(zip(before.content, after.content, strict=True)) if a != b) // size
    entries = [tensor.content[place * size : (place + 1) * size] for tensor in (before, after)]
    return place, *(_number(entry, before.dtype) for entry in entries)


def compare_json(where: str, before: Any, after: Any, found: Comparison) -> None:
    """Compare two JSON values exactly: 1 is not 1.0, and -0.0 is not 0.0."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            values = before.get(key, _ABSENT), after.get(key, _ABSENT)
            compare_json(f"{where}/{key}", *values, found)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, pair in enumerate(zip(before, after, strict=True)):
            compare_json(f"{where}/{place}", *pair, found)
    else:
        found.numbers += type(before) in (int, float)
        if type(before) is not type(after) or repr(before) != repr(after):
            found.differs(where, before, after)


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()


def _compare_rows(kind: str, before: Path, after: Path, found: Comparison) -> None:
    pair = read_rows(before, kind), read_rows(after, kind)
    if len(pair[0]) != len(pair[1]):
        found.differs(f"{kind}, rows", len(pair[0]), len(pair[1]))
    for number, (old, new) in enumerate(zip(*pair, strict=False)):
        found.rows += 1
        mapped = {ROW_KEYS.get(key, key): value for key, value in old.items() if key not in TIMES}
        kept = {key: value for key, value in new.items() if key not in TIMES}
        compare_json(f"{kind} {number}", mapped, kept, found)


def _compare_checkpoints(before: Path, after: Path, found: Comparison) -> None:
    if before.name != after.name:
        found.differs("newest checkpoint", before.name, after.name)
    (old, old_tensors), (new, new_tensors) = checkpoint_tensors(before), checkpoint_tensors(after)
    compare_json("state", _moved_state(old), new, found)
    _compare_tensors("state", {_moved(name): tensor for name, tensor in old_tensors.items()}, new_tensors, found)


def _compare_tensors(where: str, before: Mapping[str, Stored], after: Mapping[str, Stored], found: Comparison) -> None:
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in before or name not in after:
            found.differs(f"{where} {name}", *("present" if name in side else _ABSENT for side in (before, after)))
            continue
        found.tensors += 1
        found.numbers += math.prod(before[name].shape)
        _compare_tensor(f"{where} {name}", before[name], after[name], found)


def _compare_tensor(where: str, before: Stored, after: Stored, found: Comparison) -> None:
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        found.differs(where, f"{before.dtype} {before.shape}", f"{after.dtype} {after.shape}")
    elif before.content != after.content:
        place, *values = first_entry(before, after)
        found.differs(f"{where} [{place}]", *values)


def _moved(path: str) -> str:
    """A path in a checkpoint before the change, where it lies after it."""
    for old, new in STATE_PATHS.items():
        if path == old or path.startswith(f"{old}/"):
            return new + path.removeprefix(old)
    return path


def _moved_state(state: Any) -> Any:
    """The JSON state with what `STATE_PATHS` moves in its new places, its references to tensors included."""
    if not STATE_PATHS:
        return state
    moved: dict[str, Any] = {}
    for path, value in _leaves(state, ""):
        _put(moved, _moved(path).split("/")[1:], value)
    return moved


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value and not any(key.startswith("#") for key in value):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    else:
        yield path, _replaced(value, _moved)


def _replaced(value: Any, move: Callable[[str], str]) -> Any:
    """A value with the path in each of its {"#tensor": path} moved."""
    if isinstance(value, dict):
        return {key: move(item) if key == "#tensor" else _replaced(item, move) for key, item in value.items()}
    return [_replaced(item, move) for item in value] if isinstance(value, list) else value


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _number(entry: bytes, dtype: str) -> Any:
    if dtype == "BF16":
        return struct.unpack("<f", b"\0\0" + entry)[0]
    return struct.unpack(_FORMATS[dtype], entry)[0] if dtype in _FORMATS else entry.hex()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
