"""The run folder of another trainer's run, so that `atesd report` and `atesd compare` read it; and its checkpoints.

Of config.yaml, `exposure`, `credit` and `views` acted, and `data.segmenter` and `data.checker`; `model`, `sampling` and
`train` say what the bridge knows of the trainer, all else holds our defaults and says nothing of that trainer. Which
one it was stands in manifest.json under `trainer`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast, final

from atesd.bridges.core import Feedback, Handle, Told
from atesd.errors import CheckpointError, RunError
from atesd.records import Graded, Split, UpdateStats
from atesd.rows import MetricsRow, skipped_row
from atesd.runs import EndStatus, RunFolder, new_manifest

_STATE = "atesd"
_HELD: dict[Path, Log] = {}  # the logs of this process that hold their folder
_say = logging.getLogger("atesd").warning  # to stderr, unless the trainer has set up something else


@final
class Log:
    """Writes what a handle was told to a run folder. `close` releases the folder; `end` closes it as well."""

    def __init__(
        self, out: Path | str, handle: Handle, *, trainer: str, fingerprint: str, rank: int = 0, ranks: int = 1
    ) -> None:
        """Of several processes with a copy of the exposure each, rank 0 writes; the others only read state."""
        self._out, self._handle, self._first, self._ranks = Path(out), handle, rank == 0, ranks
        self._trainer, self._fingerprint = trainer, fingerprint
        self._held, self._run, self._lost = ExitStack(), cast("RunFolder | None", None), False

    def begin(self) -> None:
        """Begin a run in a new or empty folder. Raises `RunError` if it holds one."""
        if not self._first:
            return
        config, found = self._handle.config, self._fingerprint
        manifest = new_manifest(config, data_fingerprint=found, command=sys.argv, ranks=self._ranks)
        try:
            run = RunFolder.create(self._out, config, {**manifest, "trainer": self._trainer})
        except RunError as error:
            said = str(error).replace("resume it,", "resume the trainer from its checkpoint,")
            raise RunError(said.replace("choose another --out", "give another out")) from None
        self._hold(run)

    def start(self, args: Any, state: Any) -> None:
        """`begin`, or `resume` from the checkpoint of a trainer of transformers, by its arguments and its state."""
        if not state.global_step:
            self.begin()
            return
        named = args.resume_from_checkpoint
        self.resume(Path(named) if isinstance(named, str) else checkpoint_of(args, state), state.global_step)

    def resume(self, checkpoint: Path, updates_done: int, may_lose: int = 0) -> None:
        """Go on from what `save` wrote beside a checkpoint of the trainer; says what is not as it was.

        Rows of later updates are cut off. `may_lose`: by how many updates the state may be older than the trainer's;
        their feedback then never comes. Raises `CheckpointError` if there is no such state, `RunError` if folder,
        settings or problems are not those of the run.
        """
        from atesd.train.checkpoint import load_checkpoint

        run = RunFolder.open(self._out)
        folders = (_saved(checkpoint, updates_done - lost) for lost in range(min(may_lose, updates_done) + 1))
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            found = ", ".join(sorted(path.name for path in (checkpoint / _STATE).glob("update-*"))) or "none"
            raise CheckpointError(
                f"{checkpoint / _STATE}: expected the controller's state after {updates_done} updates, found {found}; "
                "resume from a checkpoint that was saved with the bridge, or begin again with another out"
            )
        loaded = load_checkpoint(folder, run.run_id)
        self._handle.load_state_dict(cast("Mapping[str, Any]", loaded.state))
        if not self._first:
            self._handle.lose(updates_done)
            return
        self._hold(run)
        config = self._handle.config
        run.check_config(config)
        run.check_data(self._fingerprint)
        run.truncate_after(loaded.updates_done, loaded.rows)
        for note in run.begin_session(config, command=sys.argv, updates_done=updates_done, ranks=self._ranks):
            _say("%s: %s", self._out, note)
        self.write(self._handle.lose(updates_done))

    def save(self, checkpoint: Path, updates_done: int, keep: int = 1) -> None:
        """Write the controller's state into a folder beside the trainer's own checkpoint, of which `keep` stay."""
        from atesd.train.checkpoint import save_checkpoint

        self._require_held()
        if self._run is not None:
            self._run.sync()
            rows = self._run.rows_written()
            save_checkpoint(
                checkpoint / _STATE, updates_done, self._handle.state_dict(), keep, run_id=self._run.run_id, rows=rows
            )

    def write(self, told: Sequence[Told]) -> None:
        """Append the rows of what the exposure was told."""
        from atesd.train.rows import decision_row

        self._require_held()
        for one in told if self._run is not None else ():
            for decision in one.decisions:
                self._append("decisions", decision_row(decision, one.update, "finished"))
            self._append("metrics", _metrics(one.update, one.feedback, one.stats))

    def evaluated(self, update: int, split: Split, graded: Sequence[Graded]) -> None:
        """Append an evaluation: every problem of a split with the same number of graded samples. `compare` reads it."""
        from atesd.evaluate.benchmark import summarise

        seed = self._handle.config.train.seed
        self._append("evaluations", summarise(graded, split=split, update=update, sampler={}, seed=seed))

    def end(self, status: EndStatus) -> None:
        """Write what is still open, and how the session ended; says what the exposure could not learn from."""
        from atesd.train.rows import decision_row

        lost = {"updates were lost: their feedback never came": self._handle.lost} if self._handle.lost else {}
        dropped = self._handle.exposure.dropped.items()
        lost |= {f"exposure decisions were dropped without a reward: {reason}": count for reason, count in dropped}
        for what, count in lost.items() if self._run is not None else ():
            _say("%s: %d %s", self._out, count, what)
        if self._run is not None:
            last = self._handle.config.train.num_updates
            for decision in self._handle.exposure.pending() if status == "finished" else ():
                self._append("decisions", decision_row(decision, last, "pending"))
            self._run.end_session(status)
        self.close()

    def close(self) -> None:
        """Release the folder, as after a training that raised; a new log may then resume it."""
        if _HELD.get(self._out.resolve()) is self:
            del _HELD[self._out.resolve()]
        self._held.close()
        self._run = None

    def _hold(self, run: RunFolder) -> None:
        """Lock the folder, which an interrupted training of this very process may still hold."""
        place = self._out.resolve()
        if (earlier := _HELD.get(place)) is not None:
            earlier.close()
            earlier._lost = True
        self._held.enter_context(run.lock())
        self._run, _HELD[place] = run, self

    def _require_held(self) -> None:
        if self._lost:
            raise RunError(f"{self._out}: a later exposure of this process has resumed this run; end this training")

    def _append(self, kind: Any, row: Any) -> None:
        if self._run is not None:
            self._run.append(kind, row)


def checkpoint_of(args: Any, state: Any) -> Path:
    """Where a trainer of transformers keeps the checkpoint of its present step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _saved(checkpoint: Path, updates_done: int) -> Path:
    return checkpoint / _STATE / f"update-{updates_done:06d}"


def _metrics(update: int, feedback: Feedback | None, stats: UpdateStats | None) -> MetricsRow:
    if feedback is None or stats is None:
        return skipped_row(update, "its feedback never came", 0.0)
    from atesd.train.rows import finite_or_none

    right = [right for _, right in stats.train_success]
    known: dict[str, float | None] = {
        **feedback.measured,
        "loss": feedback.loss,
        "kl": feedback.kl,
        "reveal_ratio": stats.reveal_ratio,
        "effective_ratio": stats.effective_ratio,
        "accuracy": sum(right) / len(right) if right else None,
    }
    values = {name: finite_or_none(value) for name, value in known.items()}
    row = {**skipped_row(update, "", feedback.learning_rate), "skipped": None, **values}
    return cast(MetricsRow, row)
