"""The closed loop of the paper: sample, reveal, score, step, observe. The order of effects and nothing else."""

from __future__ import annotations

from functools import partial
from typing import Literal, final

from atesd.errors import ModelError, NonFiniteError
from atesd.rows import skipped_row
from atesd.runs import RunFolder
from atesd.train.checkpoint import digest
from atesd.train.components import Components
from atesd.train.listeners import Listener
from atesd.train.record import Record, UpdateRecord
from atesd.train.reveal import Batch, Revealed, reveal
from atesd.train.rows import decision_row, held_back, metrics_row, update_stats
from atesd.train.signals import StopRequest
from atesd.train.snapshots import Snapshots
from atesd.train.update import Example, accumulate


@final
class Trainer:
    """Trains one run folder to its last update, from wherever it stands. The caller holds the folder's lock."""

    def __init__(self, components: Components, run: RunFolder, listener: Listener) -> None:
        if not components.weights.trained:
            raise ModelError(
                f"model.path: {components.config.model.path} is an adapter on a bfloat16 model, kept apart, and leaves "
                "nothing to train; set model.lora for a new adapter, or model.dtype: float32"
            )
        self.components = components
        self.run = run
        self.snapshots = Snapshots(components, run, listener)
        self._record = Record(components, run, listener, self.snapshots)
        self._stop = StopRequest(listener.message)

    def resume(self) -> int:
        """Load the newest valid checkpoint, drop the rows behind it, and return how many updates are done."""
        return self.snapshots.resume()

    def train(self, updates_done: int) -> Literal["finished", "stopped"]:
        """Run every update after `updates_done`.

        `stopped`: a signal came, the checkpoint is saved, the same command resumes. Raises `TrainingError` after three
        updates in a row without a finite loss and gradient.
        """
        train, ranks = self.components.config.train, self.components.loaded.ranks
        with self._stop.listening():
            self._record.evaluate(updates_done)
            for update in range(updates_done, train.num_updates):
                try:
                    taken = self.update(update)
                except NonFiniteError as error:
                    taken = self._without_step(update, error)
                self._record.update(taken)
                stopping = ranks.any(self._stop.asked) and update + 1 < train.num_updates
                if stopping or (update + 1) % train.checkpoint_every == 0 or update + 1 == train.num_updates:
                    self.snapshots.save(update + 1)
                if stopping:
                    return "stopped"
        self._record.finish()
        return "finished"

    def update(self, update: int) -> UpdateRecord:
        """One student update."""
        c = self.components
        c.method.watch.restart()
        wanted = c.exposure.measurements(update)
        measured: dict[str, float | None] = {**c.probes.measure(wanted)}
        c.foresight.before(update)
        with c.method.watch.phase("sample"):
            written = c.sampler.rollouts(update, c.hints.ratio)
        hinted = c.hints.observe(written)
        rollouts = [g for g in written if g.hint is None] if c.config.distils else written
        drift = c.sampler.drift
        alignment = c.foresight.look(update, rollouts, c.exposure)
        with c.method.watch.phase("sample"):
            rows = reveal(rollouts, c.exposure, update, prompts=c.prompts, foresight=c.foresight, config=c.config)
        batch = Batch(rows, alignment, tuple(g for g in written if g.hint) if c.config.distils else ())
        self._require_one_controller(update, batch)
        meters = accumulate(c.method, self._asked(rows) if "grounding" in wanted else batch.examples, c.plan)
        measured["grounding"] = meters.grounding
        with c.method.watch.phase("loss_backward"):
            c.weights.add_up_gradients()
            step = c.optimiser.step(update, meters.loss, held_back=held_back(meters, c.config))
            c.teacher.after_update(update + 1)
            c.engine.publish(update + 1)
        c.foresight.after(written)
        stats = update_stats(batch, meters, c.config, measured)
        learned_from = c.exposure.observe(update, stats)
        decisions = [decision_row(finished, update, "finished") for finished in learned_from]
        row = metrics_row(update, batch, meters, stats, step, c.method.watch.seconds())
        if drift is not None:
            row["rollout_drift"] = drift
        if hinted is not None:
            row["hinted"] = hinted
        return UpdateRecord(update, row, decisions, batch, meters)

    def _without_step(self, update: int, error: NonFiniteError) -> UpdateRecord:
        """What is written of an update that came to no step. Its gradient is cleared; the teacher's clock goes on."""
        c = self.components
        if c.loaded.ranks.size > 1:
            raise error  # the other ranks have been told, and stop too
        for parameter in c.weights.trained.values():
            parameter.grad = None
        c.teacher.after_update(update + 1)
        rate = c.optimiser.learning_rate(update)
        return UpdateRecord(update, skipped_row(update, str(error), rate), [])

    def _asked(self, rows: tuple[Revealed, ...]) -> list[Example]:
        """The examples with what g_t is measured on."""
        prompts = self.components.prompts
        return [prompts.with_answer(row.example, row.graded.problem, row.view) for row in rows]

    def _require_one_controller(self, update: int, batch: Batch) -> None:
        """Every rank runs the exposure for itself, on numbers that all know; here they must have come to the same."""
        state = partial(_controller_state, self.components, batch)
        self.components.loaded.ranks.require_equal(state, f"the exposure before update {update}")


def _controller_state(components: Components, batch: Batch) -> tuple[list[float], str]:
    """What every rank's exposure has come to: its ratios, and a hash of its whole state."""
    return [row.reveal_ratio for row in batch.rows], digest(components.exposure.state_dict())
