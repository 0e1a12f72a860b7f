"""The closed loop: reveal, sample, score, step, observe, log. The order of effects and nothing else."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any, Literal, final

import torch

from atesd.card import write_model_card
from atesd.config import Config
from atesd.errors import ModelError, NonFiniteError, TrainingError
from atesd.maths.divergence import Objective
from atesd.models.load import save_model, trainable_parameters
from atesd.records import Split, UpdateStats
from atesd.runs import RowKind, RunFolder
from atesd.train.batches import Batch, batch_at, draw_batch, group_of, with_answer
from atesd.train.checkpoint import digest, load_checkpoint, load_newest, save_checkpoint
from atesd.train.optimiser import Optimiser, learning_rate
from atesd.train.parts import Listener, Parts
from atesd.train.rows import decision_row, finite_or_none, metrics_row, sample_rows, skipped_row
from atesd.train.step import Row, StepMeters, distill, maximise_likelihood

SKIPS_BEFORE_STOPPING = 3


@final
class Trainer:
    """Trains one run folder to its last update, from wherever it stands. The caller holds the folder's lock."""

    def __init__(self, parts: Parts, run: RunFolder, listener: Listener) -> None:
        self.parts = parts
        self.run = run
        self._listener = listener
        self._parameters = trainable_parameters(parts.loaded)
        if not self._parameters:
            raise ModelError(
                f"model.path: {parts.config.model.path} is an adapter on a bfloat16 model, kept apart, and leaves "
                "nothing to train; set model.lora for a new adapter, or model.dtype: float32"
            )
        self._optimiser = Optimiser(self._parameters.values(), parts.config.train)
        if parts.lookahead:
            parts.lookahead.direction.step_metric = self._as_steps
        self._ranks = parts.loaded.ranks
        self._skipped_in_a_row = 0
        self._stop = threading.Event()

    def resume(self) -> int:
        """Load the newest valid checkpoint, cut the rows back to it, and return how many updates are done.

        Rank 0 picks the checkpoint; the others read the same one, so they must see the same file system.
        """
        done, name = self._ranks.from_first(self._load_newest) or (0, None)
        if name is not None and not self._ranks.first:
            self.load_state_dict(load_checkpoint(self.run.checkpoints / name, self.run.run_id).state)
        return done

    def train(self, done: int) -> Literal["finished", "stopped"]:
        """Run every update after `done`. `stopped`: a signal came, the checkpoint is saved, the same command resumes.

        Raises `TrainingError` after three non-finite updates in a row.
        """
        train = self.parts.config.train
        with self._signals():
            self._evaluate(done)
            for update in range(done, train.num_updates):
                batch, meters, row = self._update_or_skip(update)
                done = update + 1
                row["seconds"]["evaluate"] = self._evaluate(done)
                self._append("metrics", row)
                self._listener.update(row)
                if batch and meters and train.evaluate_every and update % train.evaluate_every == 0:
                    for sample_row in sample_rows(update, batch, meters, self.parts):
                        self._append("samples", sample_row)
                self._guard(update, batch, meters, row)
                stopping = self._ranks.any(self._stop.is_set()) and done < train.num_updates
                if done % train.checkpoint_every == 0 or done == train.num_updates or stopping:
                    self.save(done)
                if stopping:
                    return "stopped"
        self._ranks.from_first(self._finish)
        return "finished"

    def update(self, update: int) -> tuple[Batch, StepMeters, dict[str, Any]]:
        """One student update. Returns its batch, what the step measured, and its row of metrics.jsonl."""
        parts = self.parts
        watch = Stopwatch(parts.loaded.device)
        wanted = parts.exposure.measurements(update)
        probed: dict[str, float | None] = {**parts.probes.measure(wanted)}
        direction = parts.lookahead.direction if parts.lookahead else None
        if direction and update % parts.config.credit.hold_updates == 0:
            direction.renew(update)
        watch.lap("control")
        batch = draw_batch(parts, update)
        self._require_one_controller(update, batch)
        watch.lap("sample")
        watch.move("sample", "control", batch.lookahead_seconds)
        rows = batch.rows
        if "grounding" in wanted:
            shown = zip(batch.rows, batch.problems, batch.views, strict=True)
            rows = [with_answer(*row, parts.config, parts.encoder) for row in shown]
        watch.lap("control")
        meters = self._backward(rows)
        probed["grounding"] = meters.grounding
        self._ranks.sum_gradients(self._parameters.values())
        watch.lap("step")
        grad_norm, taken = self._optimiser.step(update, meters.loss)
        parts.teacher.after_update(update + 1)
        if direction:
            direction.remember(batch.problems, batch.rollouts, batch.verdicts)
        watch.lap("loss_backward")
        stats = update_stats(batch, meters, parts.config, probed)
        for finished in parts.exposure.observe(update, stats):
            self._append("decisions", decision_row(finished, update, "finished"))
        watch.lap("control")
        row = {
            **metrics_row(update, batch, meters, stats, parts.looping),
            "grad_norm": finite_or_none(grad_norm),
            "learning_rate": learning_rate(parts.config.train, update),
            "skipped": None if taken else "non-finite loss or gradient",
            "seconds": watch.seconds(meters.seconds),
        }
        return batch, meters, row

    def _update_or_skip(self, update: int) -> tuple[Batch | None, StepMeters | None, dict[str, Any]]:
        """An update, or the row that says why there was none: the model could not even write its completions."""
        try:
            return self.update(update)
        except NonFiniteError as error:
            if self._ranks.size > 1:
                raise  # the other ranks have been told, and stop too
            return None, None, skipped_row(update, str(error), learning_rate(self.parts.config.train, update))

    def save(self, done: int) -> None:
        """Write the checkpoint after `done` updates, once all ranks agree on what it holds."""
        self._ranks.require_equal(self._weight_sums, f"the student after {done} updates")
        self._ranks.from_first(lambda: self._save(done))

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; the data position and every draw are functions of the update."""
        return {
            "student": {name: parameter.detach() for name, parameter in self._parameters.items()},
            "optimiser": self._optimiser.state_dict(),
            "teacher": self.parts.teacher.state_dict(),
            "exposure": self.parts.exposure.state_dict(),
            "probes": self.parts.probes.state_dict(),
            "success": self.parts.lookahead.direction.state_dict() if self.parts.lookahead else {},
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state["student"][name])
        self._optimiser.load_state_dict(state["optimiser"])
        self.parts.teacher.load_state_dict(state["teacher"])
        self.parts.exposure.load_state_dict(state["exposure"])
        self.parts.probes.load_state_dict(state["probes"])
        if self.parts.lookahead:
            self.parts.lookahead.direction.load_state_dict(state["success"])
        self._skipped_in_a_row = state["skipped_in_a_row"]

    def _load_newest(self) -> tuple[int, str | None]:
        """Go back to the newest valid checkpoint: how many updates are done, and its name if there is one."""
        found = load_newest(self.run.checkpoints, self.run.run_id)
        done = found.updates_done if found else 0
        if found:
            for note in found.skipped:
                self._listener.message(f"damaged checkpoint passed over: {note}")
            self.load_state_dict(found.state)
        self.run.cut(done)
        return done, found.path.name if found else None

    def _append(self, kind: RowKind, row: dict[str, Any]) -> None:
        if self._ranks.first:
            self.run.append(kind, row)

    def _save(self, done: int) -> None:
        self.run.sync()
        keep = self.parts.config.train.keep_checkpoints
        save_checkpoint(self.run.checkpoints, done, self.state_dict(), keep, run_id=self.run.run_id)

    def _require_one_controller(self, update: int, batch: Batch) -> None:
        """Every rank runs the exposure for itself, on numbers that all know; here they must have come to the same."""
        exposure = self.parts.exposure
        self._ranks.require_equal(
            lambda: [batch.reveal_ratios, digest(exposure.state_dict())], f"the exposure before update {update}"
        )

    def _as_steps(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients by name, in the optimiser's metric."""
        steps = self._optimiser.preconditioned({self._parameters[name]: g for name, g in gradients.items()})
        return {name: steps[self._parameters[name]] for name in gradients}

    def _weight_sums(self) -> str:
        """A hash of the sum of every trained tensor: cheap, and it differs as soon as the ranks' weights do."""
        return digest([parameter.detach().sum(dtype=torch.float64) for parameter in self._parameters.values()])

    def _backward(self, rows: Sequence[Row]) -> StepMeters:
        parts, config = self.parts, self.parts.config
        cut: dict[str, Any] = {
            "reduction": config.loss.reduction,
            "micro_batch_size": config.train.micro_batch_size,
            "micro_batch_tokens": config.train.micro_batch_tokens,
            "chunk_tokens": config.loss.chunk_tokens,
        }
        if config.train.method == "distill":
            cut |= {"gate": parts.gate, "choose": parts.choose}
            return distill(parts.scorer, parts.teacher, rows, objective(config), **cut)
        temperature = 1.0 if config.train.method == "sft" else config.loss_temperature
        return maximise_likelihood(parts.scorer, rows, temperature=temperature, **cut)

    def _guard(self, update: int, batch: Batch | None, meters: StepMeters | None, row: dict[str, Any]) -> None:
        """Count and keep a skipped update; stop after three in a row."""
        if row["skipped"] is None:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        record: dict[str, Any] = {"reason": row["skipped"]}
        if batch and meters:
            rows = [{"problem_id": p.id, **asdict(r)} for p, r in zip(batch.problems, batch.rows, strict=True)]
            record |= {"loss": meters.loss, "token_loss": meters.tokens["loss"], "rows": rows}
        else:
            record["problems"] = [p.id for p in batch_at(self.parts.problems.train, self.parts.config, update)[0]]
        dump = self._ranks.from_first(lambda: str(self.run.dump_skipped(update, record)))
        self._listener.message(f"update {update} skipped: {row['skipped']}; what there is of its batch is in {dump}")
        if self._skipped_in_a_row >= SKIPS_BEFORE_STOPPING:
            raise TrainingError(
                f"updates {update - SKIPS_BEFORE_STOPPING + 1} to {update} were all skipped: {row['skipped']}. Their "
                f"batches are beside {dump}. Lower train.learning_rate or set model.dtype: float32, and start again "
                "from the last checkpoint"
            )

    def _evaluate(self, done: int) -> float:
        """Evaluate if it is time and not done yet; returns the seconds it took.

        Validation problems at every evaluation; the held-out test problems before the first and after the last update.
        """
        train = self.parts.config.train
        started = time.perf_counter()
        ends = done in (0, train.num_updates)
        if self.parts.checker is None or not train.evaluate_every or (done % train.evaluate_every and not ends):
            return 0.0
        splits: list[Split] = ["validation", "test"] if ends else ["validation"]
        seen = self._ranks.from_first(
            lambda: [row["split"] for row in self.run.rows("evaluations") if row["update"] == done]
        )
        for split in splits:
            if split not in seen and getattr(self.parts.problems, split):
                row = self.parts.evaluate(split, done)
                self._append("evaluations", row)
                self._listener.evaluation(row)
        return time.perf_counter() - started

    def _finish(self) -> None:
        for reason, count in self.parts.exposure.dropped.items():
            self._listener.message(f"{count} exposure decisions were dropped without a reward: {reason}")
        logged = self.run.rows("decisions")
        if not any(row["status"] == "pending" for row in logged):
            for decision in self.parts.exposure.pending():
                self.run.append("decisions", decision_row(decision, self.parts.config.train.num_updates, "pending"))
        save_model(self.parts.loaded, self.run.final)
        write_model_card(self.run.final, self.parts.config, self.run)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask for a checkpoint after the running update; a second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _: FrameType | None) -> None:
            if self._stop.is_set() and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop.set()
            self._listener.message("stopping after this update, with a checkpoint; Ctrl-C again stops at once")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@final
class Stopwatch:
    """Adds up the seconds of each phase of an update."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = self._now()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Book the time since the last lap under this phase."""
        now = self._now()
        self._laps[phase] = self._laps.get(phase, 0.0) + now - self._last
        self._last = now

    def move(self, phase: str, other: str, seconds: float) -> None:
        """Book seconds of one phase under another."""
        self._laps[phase] -= seconds
        self._laps[other] = self._laps.get(other, 0.0) + seconds

    def seconds(self, of_step: dict[str, float]) -> dict[str, float]:
        """Seconds by phase, with the lap `step` split as the step itself measured it."""
        rest = self._laps["step"] - sum(of_step.values())
        laps = {phase: time for phase, time in self._laps.items() if phase != "step"}
        laps["loss_backward"] += rest
        return {phase: laps.get(phase, 0.0) + of_step.get(phase, 0.0) for phase in {**of_step, **laps}}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def update_stats(batch: Batch, meters: StepMeters, config: Config, measured: dict[str, float | None]) -> UpdateStats:
    """What the exposure learns of an update; `measured` holds probes and grounding."""
    graded = [
        (problem, float(verdict == "correct"))
        for problem, verdict in zip(batch.problems, batch.verdicts, strict=True)
        if verdict is not None
    ]
    return UpdateStats(
        reveal_ratio=meters.means.get("token_ratio", statistics.fmean(batch.reveal_ratios)),
        effective_ratio=meters.means.get(
            "token_effective_ratio", statistics.fmean(view.effective_ratio for view in batch.views)
        ),
        loss=meters.loss,
        kl=meters.means.get("kl", 0.0),
        top1_disagreement=meters.means.get("top1_disagreement", 0.0),
        student_confidence=meters.means["confidence"],
        train_success=tuple((problem.difficulty, correct) for problem, correct in graded),
        group_success=tuple((group_of(problem, config), correct) for problem, correct in graded),
        **measured,
    )


def objective(config: Config) -> Objective:
    """The configured divergence."""
    loss = config.loss
    divergence = loss.divergence
    return Objective(divergence.kind, loss.clip, loss.threshold, config.loss_temperature, loss.jsd_weight, loss.top_k)
