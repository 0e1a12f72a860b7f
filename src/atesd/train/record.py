"""What a run writes: its rows, its evaluations, the batches of skipped updates, the final model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import final

from torch import Tensor

from atesd.card import write_model_card
from atesd.errors import TrainingError
from atesd.models.load import save_model
from atesd.records import Split
from atesd.refusals import refusals_told
from atesd.rows import DecisionRow, MetricsRow, Row, RowKind
from atesd.runs import RunFolder
from atesd.train.components import Components
from atesd.train.listeners import Listener
from atesd.train.reveal import Batch
from atesd.train.rows import decision_row, sample_rows
from atesd.train.snapshots import Snapshots
from atesd.train.update import StepMeters

SKIPS_BEFORE_STOPPING = 3


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """What there is to write of an update; batch and meters are None if it never came to a step."""

    update: int
    row: MetricsRow
    decisions: Sequence[DecisionRow]
    batch: Batch | None = None
    meters: StepMeters | None = None


@final
class Record:
    """Writes to the run folder on rank 0, tells the listener, and stops a run whose updates are all skipped."""

    def __init__(self, components: Components, run: RunFolder, listener: Listener, snapshots: Snapshots) -> None:
        self._components, self._run, self._listener = components, run, listener
        self._snapshots = snapshots
        self._ranks = components.loaded.ranks

    def update(self, taken: UpdateRecord) -> None:
        """Write an update's decisions, the evaluations that are due, its row and samples; count it if it was skipped.

        Raises `TrainingError` after three skipped updates in a row.
        """
        train = self._components.config.train
        for decision in taken.decisions:
            self._append("decisions", decision)
        with self._components.method.watch.phase("evaluate"):
            self.evaluate(taken.update + 1)
        seconds = self._components.method.watch.seconds().get("evaluate", 0.0)
        row: MetricsRow = {**taken.row, "seconds": {**taken.row["seconds"], "evaluate": seconds}}
        self._append("metrics", row)
        if taken.batch and taken.meters and train.evaluate_every and taken.update % train.evaluate_every == 0:
            for sample in sample_rows(taken.update, taken.batch, taken.meters, self._components):
                self._append("samples", sample)
        self._count_skips(taken)

    def evaluate(self, updates_done: int) -> None:
        """Evaluate if it is time and not done yet.

        Validation problems at every evaluation; the held-out test problems before the first and after the last update.
        """
        train, problems = self._components.config.train, self._components.problems
        ends = updates_done in (0, train.num_updates)
        due = train.evaluate_every and (ends or updates_done % train.evaluate_every == 0)
        if self._components.checker is None or not due:
            return
        splits: list[Split] = ["validation", "test"] if ends else ["validation"]
        evaluated = self._ranks.broadcast(partial(self._evaluated, updates_done))
        for split in splits:
            if split not in evaluated and getattr(problems, split):
                self._append("evaluations", self._components.evaluation.evaluate(split, updates_done))

    def finish(self) -> None:
        """Write what is still open, the trained model and its card."""
        tensors = self._components.weights.saved()
        self._ranks.broadcast(partial(self._finish, tensors))

    def _evaluated(self, updates_done: int) -> list[str]:
        """The splits that were evaluated after so many updates."""
        return [str(row["split"]) for row in self._run.whole_rows("evaluations") if row["update"] == updates_done]

    def _append(self, kind: RowKind, row: Row) -> None:
        if self._ranks.first:
            self._run.append(kind, row)
            self._listener.row(kind, row)

    def _count_skips(self, taken: UpdateRecord) -> None:
        """Count and keep a skipped update; stop after three in a row."""
        reason, update = taken.row["skipped"], taken.update
        if reason is None:
            self._snapshots.skipped_in_a_row = 0
            return
        self._snapshots.skipped_in_a_row += 1
        dump = self._ranks.broadcast(partial(self._dump, taken))
        self._listener.message(f"update {update} skipped: {reason}; what there is of its batch is in {dump}")
        if self._snapshots.skipped_in_a_row >= SKIPS_BEFORE_STOPPING:
            raise TrainingError(
                f"updates {update - SKIPS_BEFORE_STOPPING + 1} to {update} were all skipped: {reason}. Their batches "
                f"are beside {dump}. Lower train.learning_rate or set model.dtype: float32, and start again from the "
                "last checkpoint"
            )

    def _dump(self, taken: UpdateRecord) -> str:
        """Keep what there is of a skipped update's batch; returns the file."""
        record: dict[str, object] = {"reason": taken.row["skipped"]}
        if taken.batch and taken.meters:
            rows = [{"problem_id": row.graded.problem.id, **asdict(row.example)} for row in taken.batch.rows]
            record |= {"loss": taken.meters.loss, "token_loss": taken.meters.tokens["loss"], "rows": rows}
        else:
            record["problems"] = [problem.id for problem in self._components.sampler.batch(taken.update)[0]]
        return str(self._run.dump_skipped(taken.update, record))

    def _finish(self, tensors: Mapping[str, Tensor] | None) -> None:
        exposure, config = self._components.exposure, self._components.config
        if held_back := sum(row.get("held_back", False) for row in self._run.rows("metrics")):
            self._listener.message(f"{held_back} updates took no step: their mean alignment was negative")
        for reason, count in exposure.dropped.items():
            self._listener.message(f"{count} exposure decisions were dropped without a reward: {reason}")
        if not any(row["status"] == "pending" for row in self._run.rows("decisions")):
            for decision in exposure.pending():
                self._append("decisions", decision_row(decision, config.train.num_updates, "pending"))
        with refusals_told(self._run.final, "written"):
            save_model(self._components.loaded, self._run.final, tensors)
            write_model_card(self._run.final, config, self._run)
