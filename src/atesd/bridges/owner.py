"""An exposure with its run folder in one object: for a trainer whose workers and driver are different processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from atesd.bridges.core import Feedback, Handle, config_from_text
from atesd.bridges.log import Log
from atesd.bridges.problems import problem_in, require_problems
from atesd.data.own_segmenter import segmenter_of
from atesd.errors import TrainingError


@final
class Owner:
    """Everything that workers and driver ask, for one call at a time, as in an actor.

    `config` is what `dump_config` wrote, so that it can travel to the actor; `folder` is where the trainer's checkpoint
    of `updates_done` updates lies, if there is one.
    """

    def __init__(self, config: str, out: str, trainer: str, updates_done: int, folder: str) -> None:
        self._handle, self._failures = Handle(config_from_text(config)), list[str]()
        fingerprint = f"of the rows of {trainer}, which come one by one"
        self._log = Log(out, self._handle, trainer=trainer, fingerprint=fingerprint)
        self._resumed, self._seen = bool(updates_done), set[str]()
        if updates_done:
            self._log.resume(Path(folder), updates_done, may_lose=1)
        else:
            self._log.begin()

    def show(self, update: int, prompt: str, context: Mapping[str, Any]) -> str:
        """What the teacher sees of a row's reference at an update."""
        config = self._handle.config
        require_problems([(prompt, dict(context))], config, f"'{prompt:.40}', row")
        return self._handle.show(update, problem_in(prompt, dict(context), segmenter_of(config.data))).text

    def due(self, update: int) -> frozenset[str]:
        """What of an update must have been logged, as it never was before; nothing in a run that goes on."""
        return frozenset() if self._resumed else self._handle.due(update) - self._seen

    def failed(self, message: str) -> None:
        """Remember an error of a worker, which its trainer may only log."""
        self._failures.append(message)

    def told(self, update: int, loss: float, rate: float, values: Mapping[str, float], saved: str | None) -> None:
        """Take in a step and what was validated before it; save the state where the trainer has just saved.

        Raises `TrainingError` if a worker could not show the teacher its view.
        """
        if self._failures:
            count = len(self._failures)
            raise TrainingError(f"update {update}: {count} rollouts had no teacher; the first: {self._failures[0]}")
        self._seen |= values.keys()
        measured = {name: value for name, value in values.items() if name != "train_success"}
        if "train_success" in values:
            self._handle.grade(update, [("", 0, values["train_success"])])
        self._log.write(self._handle.observe(update, Feedback(loss, None, rate, measured)))
        if saved is not None:
            self._log.save(Path(saved), update + 1)

    def end(self, finished: bool) -> None:
        """Close the run."""
        self._log.end("finished" if finished else "stopped")
