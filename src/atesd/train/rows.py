"""What a run learns of an update, and what it writes down: the rows of metrics, decisions and samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Literal, cast

from atesd.config import Config, LookAheadGate
from atesd.maths.statistics import is_looping
from atesd.records import FinishedDecision, UpdateStats
from atesd.rows import AlignmentRow, DecisionRow, MetricsRow, SampleRow
from atesd.train.components import Components
from atesd.train.optimiser import Step
from atesd.train.reveal import Batch, group_of
from atesd.train.stopwatch import Phase
from atesd.train.update import StepMeters


def update_stats(batch: Batch, meters: StepMeters, config: Config, measured: dict[str, float | None]) -> UpdateStats:
    """What the exposure learns of an update; `measured` holds probe_nll, -_success, -_gain, -_kl and grounding."""
    graded = [
        (row.graded.problem, float(row.graded.verdict == "correct"))
        for row in batch.rows
        if row.graded.verdict is not None and row.graded.hint is None
    ]
    means = meters.means
    beside = "kept" in means or (config.distils and config.train.grpo_weight > 0)
    return UpdateStats(
        reveal_ratio=means.get("token_ratio", statistics.fmean(row.reveal_ratio for row in batch.rows)),
        effective_ratio=means.get(
            "token_effective_ratio", statistics.fmean(row.view.effective_ratio for row in batch.rows)
        ),
        # A gate and GRPO's term belong to the step. What a controller is rewarded by is the divergence of all tokens.
        loss=means["loss"] if beside else meters.loss,
        kl=means.get("kl", 0.0),
        top1_disagreement=means.get("top1_disagreement", 0.0),
        student_confidence=means["confidence"],
        train_success=tuple((problem.difficulty, correct) for problem, correct in graded),
        group_success=tuple((group_of(problem, config), correct) for problem, correct in graded),
        **measured,
    )


def held_back(meters: StepMeters, config: Config) -> bool:
    """Whether no step is to be taken on an update: its mean alignment is negative under `loss.gate.skip: update`."""
    gate = config.loss.gate
    return isinstance(gate, LookAheadGate) and gate.skip == "update" and meters.means.get("alignment", 0.0) < 0


def metrics_row(
    update: int, batch: Batch, meters: StepMeters, stats: UpdateStats, step: Step, seconds: Mapping[Phase, float]
) -> MetricsRow:
    """A row of metrics.jsonl. What was not measured, or is not finite, is None."""
    means, distilled = meters.means, "kl" in meters.means
    rollouts = [graded.rollout for graded in (*(row.graded for row in batch.rows), *batch.aside)]
    own = [row.graded.verdict for row in batch.rows if row.graded.hint is None]
    graded = [verdict == "correct" for verdict in own if verdict is not None]
    row: MetricsRow = {
        "update": update,
        "loss": finite_or_none(meters.loss),
        "kl": finite_or_none(stats.kl) if distilled else None,
        "top1_disagreement": finite_or_none(stats.top1_disagreement) if distilled else None,
        "student_confidence": finite_or_none(stats.student_confidence),
        "teacher_entropy": finite_or_none(means.get("teacher_entropy")),
        "student_entropy": finite_or_none(means["student_entropy"]),
        "clipped_share": finite_or_none(_share(means["clipped_mass"], means["loss"])) if distilled else None,
        "reversed_mass": finite_or_none(means.get("reversed_mass")),
        "reveal_ratio": finite_or_none(stats.reveal_ratio) if distilled else None,
        "effective_ratio": finite_or_none(stats.effective_ratio) if distilled else None,
        "completion_tokens": statistics.fmean(len(rollout.completion_ids) for rollout in rollouts),
        "truncated_share": statistics.fmean(rollout.truncated for rollout in rollouts),
        "loop_share": statistics.fmean(is_looping(rollout.completion_ids) for rollout in rollouts),
        "accuracy": statistics.fmean(graded) if graded else None,
        "probe_nll": finite_or_none(stats.probe_nll),
        "probe_success": finite_or_none(stats.probe_success),
        "probe_gain": finite_or_none(stats.probe_gain),
        "probe_kl": finite_or_none(stats.probe_kl),
        "grounding": finite_or_none(stats.grounding),
        "alignment": cast(AlignmentRow, asdict(batch.alignment)) if batch.alignment else None,
        "kept_share": finite_or_none(means.get("kept")),
        "curvature": finite_or_none(means.get("curvature")),
        "grad_norm": finite_or_none(step.grad_norm),
        "learning_rate": step.learning_rate,
        "skipped": None if step.taken else "non-finite loss or gradient",
        "seconds": {str(phase): spent for phase, spent in seconds.items()},
    }
    if "alignment" in means:
        row["token_alignment"] = finite_or_none(means["alignment"])
    if step.held_back:
        row["held_back"] = True
    return row


def decision_row(finished: FinishedDecision, update: int, status: Literal["finished", "pending"]) -> DecisionRow:
    """A decision as a row of decisions.jsonl."""
    decision = finished.decision
    return {
        "update": decision.update,
        "state": list(decision.state),
        "concentration1": decision.concentration1,
        "concentration0": decision.concentration0,
        "samples": decision.samples,
        "reveal_ratio": finished.reveal_ratio,
        "effective_ratio": finished.effective_ratio,
        "window": list(finished.window),
        "progress_signal": list(finished.progress_signal),
        "grounding_signal": list(finished.grounding_signal),
        "ratios_in_window": list(finished.ratios_in_window),
        "progress": finished.progress,
        "grounding": finished.grounding,
        "reward": finished.reward,
        "advantage": finished.advantage,
        "status": status,
        "logged_at": update,
    }


def sample_rows(update: int, batch: Batch, meters: StepMeters, components: Components) -> Iterator[SampleRow]:
    """The first rollouts of an update with both contexts, as rows of samples.jsonl."""
    encoder = components.encoder
    for place, row in enumerate(batch.rows[: components.config.train.log_samples]):
        problem, rollout, view, hint = row.graded.problem, row.graded.rollout, row.view, row.graded.hint
        yield {
            "update": update,
            "problem_id": problem.id,
            "difficulty": problem.difficulty,
            "reveal_ratio": row.reveal_ratio,
            "effective_ratio": view.effective_ratio,
            "student_context": encoder.student_text(hint.view.text if hint else components.renderer.student(problem)),
            "teacher_context": encoder.teacher_text(view.text) if view.text else "",
            "completion": encoder.decode(rollout.completion_ids),
            "verdict": row.graded.verdict,
            "truncated": rollout.truncated,
            "tokens": encoder.pieces(rollout.completion_ids),
            "token_kl": _of_tokens(meters, "kl", place),
            "token_alignment": _of_tokens(meters, "alignment", place),
            "token_ratio": _of_tokens(meters, "token_ratio", place),
        }


def _of_tokens(meters: StepMeters, name: str, place: int) -> list[float | None]:
    """A meter of every token of a row; empty if it was not measured."""
    return [finite_or_none(value) for value in meters.tokens[name][place]] if name in meters.tokens else []


def _share(clipped: float, kept: float) -> float | None:
    """Share of the divergence that the clip took off; None where there is no divergence at all."""
    return clipped / (clipped + kept) if clipped + kept else None


def finite_or_none(value: float | None) -> float | None:
    """JSON has no NaN: what is not finite is not known."""
    return value if value is not None and math.isfinite(value) else None
