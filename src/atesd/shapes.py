"""Whether JSON that was read is what was written: keys that must be there, and the type of every known value.

A row or manifest may lack a key that later versions added, and may hold one that is not known here; a known value of
another type is never taken. (Annotations are not postponed here: a TypedDict would then not know its required keys.)
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

from atesd.errors import RunError
from atesd.rows import DecisionRow, EvaluationRow, MetricsRow, RowKind, SampleRow

LARGEST_INTEGER = 2**63 - 1
LARGEST_NUMBER = 1e150  # its square is finite


class RowsWritten(TypedDict):
    """How many rows a file held, and the SHA-256 of their lines."""

    rows: int
    sha256: str


class Session(TypedDict):
    """One session of a run, in manifest.json."""

    status: Literal["running", "finished", "stopped", "failed", "killed"]
    updates_done: int
    commit: str | None
    versions: Mapping[str, str | None]
    cpu: str
    threads: int | None
    started: NotRequired[str]
    ended: NotRequired[str | None]
    ranks: NotRequired[int]
    notes: NotRequired[Sequence[str]]
    factories: NotRequired[Mapping[str, Mapping[str, str | None]]]


class Manifest(TypedDict):
    """manifest.json, as far as anything reads it."""

    run_id: str
    seed: int
    data_fingerprint: str
    status: Literal["running", "finished", "stopped", "failed"]
    commit: str | None
    versions: Mapping[str, str | None]
    cpu: str
    threads: int | None
    sessions: Sequence[Session]
    started: NotRequired[str]
    ended: NotRequired[str | None]
    command: NotRequired[Sequence[str]]
    cores: NotRequired[int | None]
    rows: NotRequired[Mapping[str, RowsWritten] | None]
    trainer: NotRequired[str]
    data_files: NotRequired[Mapping[str, str]]


_SHAPES: Mapping[RowKind, type] = {
    "metrics": MetricsRow,
    "decisions": DecisionRow,
    "evaluations": EvaluationRow,
    "samples": SampleRow,
}
_CORE: Mapping[RowKind, tuple[str, ...]] = {
    "metrics": ("update",),
    "decisions": ("update", "logged_at", "status"),
    "evaluations": ("update",),
    "samples": ("update",),
}
_WHOLE: Mapping[RowKind, tuple[str, ...]] = {
    "metrics": ("loss", "kl", "reveal_ratio", "completion_tokens", "accuracy", "learning_rate", "skipped", "seconds"),
    "decisions": ("reveal_ratio", "effective_ratio", "window", "reward"),
    "evaluations": ("split", "problems", "samples", "average", "verdicts", "truncated_share"),
    "samples": ("problem_id", "student_context", "teacher_context", "completion", "tokens", "token_kl"),
}


def require_row(kind: RowKind, row: Mapping[str, object], where: str, *, whole: bool = False) -> None:
    """Raise `RunError` unless the keys that place a row, or with `whole` all that readers need, hold what they should.

    `where` names file and line.
    """
    needed = (*_CORE[kind], *(_WHOLE[kind] if whole else ()))
    fault = _missing(row, needed, "") or _fault_in_dict(row, _hints(_SHAPES[kind]), "")
    if fault:
        raise RunError(f"{where} is damaged: {fault}; restore the file from a copy")


def require_manifest(manifest: Mapping[str, object], path: object) -> None:
    """Raise `RunError` that names the key unless a manifest holds what its readers need."""
    fault = _fault(manifest, Manifest, "")
    if not fault and not manifest["sessions"]:
        fault = "sessions is empty, expected one for each time the run was trained"
    if fault:
        raise RunError(f"{path}: {fault}; restore the file from a copy")


@cache
def _hints(shape: type) -> dict[str, Any]:
    return get_type_hints(shape)


def _missing(value: Mapping[str, object], keys: Sequence[str], where: str) -> str | None:
    return next((f"{where}{key} is missing" for key in keys if key not in value), None)


def _fault(value: object, hint: Any, where: str) -> str | None:
    """What is wrong with a value that should be of a type; None if nothing is."""
    origin, inner = get_origin(hint), get_args(hint)
    if is_typeddict(hint):
        if not isinstance(value, dict):
            return _wrong(value, "an object", where)
        below = f"{where}." if where else ""
        return _missing(value, sorted(hint.__required_keys__), below) or _fault_in_dict(value, _hints(hint), below)
    if origin is Literal:
        return None if value in inner and isinstance(value, str) else _wrong(value, " or ".join(inner), where)
    if origin is not None and _is_kind_of(origin, Mapping):
        return _fault_in_items(value, inner[1], where)
    if origin is not None and _is_kind_of(origin, Sequence):
        return _fault_in_list(value, inner[0], where)
    if inner:  # a union
        faults = [_fault(value, one, where) for one in inner]
        return None if None in faults else next((fault for fault in faults if fault), None)
    return None if _is_plain(value, hint) else _wrong(value, _word(hint), where)


def _is_kind_of(origin: object, base: type) -> bool:
    """Whether the origin of a generic type is a kind of `base`."""
    return isinstance(origin, type) and issubclass(origin, base)


def _fault_in_dict(value: Mapping[str, object], hints: Mapping[str, Any], where: str) -> str | None:
    faults = (_fault(value[key], hint, f"{where}{key}") for key, hint in hints.items() if key in value)
    return next((fault for fault in faults if fault), None)


def _fault_in_items(value: object, hint: Any, where: str) -> str | None:
    if not isinstance(value, dict):
        return _wrong(value, "an object", where)
    return next((fault for key, item in value.items() if (fault := _fault(item, hint, f"{where}.{key}"))), None)


def _fault_in_list(value: object, hint: Any, where: str) -> str | None:
    if not isinstance(value, list):
        return _wrong(value, "a list", where)
    return next((fault for i, item in enumerate(value) if (fault := _fault(item, hint, f"{where}[{i}]"))), None)


def _is_plain(value: object, hint: Any) -> bool:
    if hint is type(None):
        return value is None
    if hint is float:
        return type(value) in (int, float) and abs(value) <= LARGEST_NUMBER  # type: ignore[arg-type]
    if hint is int:
        return type(value) is int and 0 <= value <= LARGEST_INTEGER
    return type(value) is hint


def _word(hint: Any) -> str:
    words = {float: "a number", int: "an integer from 0 to 2^63 - 1", str: "text", type(None): "null", bool: "a bool"}
    return words.get(hint, str(hint))


def _wrong(value: object, expected: str, where: str) -> str:
    shown = repr(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
    return f"{where or 'it'} is {shown[:60]}, expected {expected}"
