"""The state of a run between two updates: what a checkpoint holds, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict, cast, final

from torch import Tensor

from atesd.errors import CheckpointError
from atesd.models.ranks import SINGLE_PROCESS, Ranks
from atesd.models.weights import Part, Weights
from atesd.rows import RowKind
from atesd.runs import RunFolder
from atesd.shapes import RowsWritten
from atesd.train.checkpoint import LoadedCheckpoint, load_checkpoint, load_newest, save_checkpoint
from atesd.train.components import Components
from atesd.train.listeners import Listener


class RunState(TypedDict):
    """Everything that a resumed run needs; the place in the data and every draw are functions of the update."""

    student: Mapping[str, Tensor | Part]
    optimiser: Mapping[str, object]
    teacher: Mapping[str, object]
    exposure: dict[str, object]
    probes: Mapping[str, object]
    success: Mapping[str, object]
    skipped_in_a_row: int
    hints: NotRequired[Mapping[str, object]]


@final
class Snapshots:
    """Saves a run's state after an update and goes back to the newest valid one; rank 0 alone touches files."""

    def __init__(self, components: Components, run: RunFolder, listener: Listener) -> None:
        self._components, self._run, self._listener = components, run, listener
        self._ranks = components.loaded.ranks
        self.skipped_in_a_row = 0

    def resume(self) -> int:
        """Load the newest valid checkpoint, drop the rows behind it, and return how many updates are done.

        Rank 0 picks the checkpoint; the others read the same one, so they must see the same file system.
        """
        updates_done, name = self._ranks.broadcast(self._load_newest) or (0, None)
        if name is not None and not self._ranks.first:
            path = self._run.checkpoints / name
            self._restore(load_checkpoint(path, self._run.run_id, self._rows, hashed=False))
        return updates_done

    def save(self, updates_done: int) -> None:
        """Write the checkpoint after so many updates, once all ranks agree on what it holds."""
        agreed = partial(str, self._components.weights.agreement())  # which speaks to the other ranks itself
        self._ranks.require_equal(agreed, f"the student after {updates_done} updates")
        if self._components.weights.in_step:  # each rank writes its own rows
            self._save(updates_done, self._ranks)
        else:
            self._ranks.broadcast(partial(self._save, updates_done, SINGLE_PROCESS))

    def state_dict(self) -> RunState:
        """The state after the last update."""
        c = self._components
        state: RunState = {
            "student": c.weights.parts(),
            "optimiser": cast("dict[str, object]", _parted(c.optimiser.state_dict(), c.weights)),
            "teacher": {"values": _like(c.weights.parts(), c.teacher.state_dict())},
            "exposure": c.exposure.state_dict(),
            "probes": c.probes.state_dict(),
            "success": c.foresight.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        if hints := c.hints.state_dict():
            state["hints"] = hints
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore `state_dict`."""
        c, kept = self._components, cast("RunState", state)
        c.weights.load(cast("Mapping[str, Tensor]", kept["student"]))
        c.optimiser.load_state_dict(_beside(kept["optimiser"], c.weights))
        c.teacher.load_state_dict(kept["teacher"])
        c.exposure.load_state_dict(kept["exposure"])
        c.probes.load_state_dict(kept["probes"])
        c.foresight.load_state_dict(kept["success"])
        c.hints.load_state_dict(kept.get("hints", {}))
        self.skipped_in_a_row = kept["skipped_in_a_row"]

    def _load_newest(self) -> tuple[int, str | None]:
        """Go back to the newest valid checkpoint: how many updates are done, and its name if there is one."""
        found = load_newest(self._run.checkpoints, self._run.run_id, self._rows)
        updates_done = found.updates_done if found else 0
        if found:
            for note in found.skipped:
                self._listener.message(f"damaged checkpoint passed over: {note}")
        if found is None:
            self._run.require_unsaved()
        self._run.truncate_after(updates_done, found.rows if found else None)
        if found:
            self._restore(found)
        return updates_done, found.path.name if found else None

    def _restore(self, found: LoadedCheckpoint) -> None:
        try:
            self.load_state_dict(found.state)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"{found.path}: is whole, but its state does not fit this run ({type(error).__name__}: {error}); go on "
                "with the version of atesd that wrote it, or begin again in another --out"
            ) from error

    def _save(self, updates_done: int, ranks: Ranks) -> None:
        run, rows = self._run, ranks.broadcast(self._written)
        keep, state = self._components.config.train.keep_checkpoints, self.state_dict()
        save_checkpoint(run.checkpoints, updates_done, state, keep, run_id=run.run_id, rows=rows, ranks=ranks)

    def _written(self) -> dict[RowKind, RowsWritten]:
        self._run.sync()
        return self._run.rows_written()

    def _rows(self, path: str, count: int) -> slice:
        return _rows_of(self._components.weights, path, count)


def load_student(path: Path, run_id: str, weights: Weights) -> None:
    """Give the model the student's weights of a checkpoint. Raises `CheckpointError` as `load_checkpoint` does."""
    state = load_checkpoint(path, run_id, partial(_rows_of, weights)).state
    weights.load(cast("Mapping[str, Tensor]", cast("RunState", state)["student"]))


def _rows_of(weights: Weights, path: str, count: int) -> slice:
    """What this rank reads of a tensor in a checkpoint: its rows of what belongs to a trained parameter."""
    trained = path.startswith(("/student/", "/teacher/", "/optimiser/"))
    return weights.rows(count) if trained else slice(0, count)


def _parted(value: object, weights: Weights) -> object:
    """An optimiser's state with what this rank holds of each of its tensors."""
    if isinstance(value, Tensor):
        return weights.part(value)
    if isinstance(value, dict):
        return {key: _parted(item, weights) for key, item in value.items()}
    return value


def _like(parts: Mapping[str, Part], state: Mapping[str, object]) -> dict[str, Part]:
    """The teacher's tensors, divided as the student's of the same names are."""
    values = cast("dict[str, Tensor]", state["values"])
    return {name: replace(parts[name], tensor=value) for name, value in values.items()}


def _beside(state: Mapping[str, object], weights: Weights) -> dict[str, object]:
    """An optimiser's state whose tensors are divided as the parameters are, which it knows by their places."""
    names, moments = list(weights.trained), cast("dict[int, dict[str, object]]", state["state"])
    divided = {
        place: {key: weights.beside(names[place], v) if isinstance(v, Tensor) else v for key, v in of_one.items()}
        for place, of_one in moments.items()
    }
    return {**state, "state": divided}
