"""The noise of a frozen student, measured on the recipe's own model and data: the input of the null test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch

from atesd.experiments.null_test import MeasuredBatch, MeasuredRatio
from atesd.records import Problem
from atesd.train.batches import Batch, draw_batch, teacher_view
from atesd.train.loop import objective
from atesd.train.parts import Parts
from atesd.train.step import distill

GRID = tuple(i / 10 for i in range(11))


@torch.no_grad()
def measure(parts: Parts, batches: int, ratios: Sequence[float] = GRID) -> list[MeasuredRatio]:
    """Score the rollouts of the first `batches` updates at every ratio, never taking a step.

    Each batch is sampled once, so that the same completions are scored at all ratios.
    """
    drawn = [draw_batch(parts, update) for update in range(batches)]
    return [MeasuredRatio(ratio, tuple(_at_ratio(parts, batch, ratio) for batch in drawn)) for ratio in ratios]


def _at_ratio(parts: Parts, batch: Batch, reveal_ratio: float) -> MeasuredBatch:
    config = parts.config
    contexts = [_context(parts, problem, reveal_ratio) for problem in batch.problems]
    answers = [parts.encoder.completion(f"\\boxed{{{problem.answer}}}")[:-1] for problem in batch.problems]
    seen = zip(batch.rows, contexts, answers, strict=True)
    rows = [replace(row, teacher_context=context, answer=answer) for row, context, answer in seen]
    meters = distill(
        parts.scorer,
        parts.teacher,
        rows,
        objective(config),
        reduction=config.loss.reduction,
        micro_batch_size=config.train.micro_batch_size,
        micro_batch_tokens=config.train.micro_batch_tokens,
        chunk_tokens=config.loss.chunk_tokens,
    )
    graded = zip(batch.problems, batch.verdicts, strict=True)
    return MeasuredBatch(
        loss=meters.loss,
        kl=meters.means["kl"],
        top1_disagreement=meters.means["top1_disagreement"],
        grounding=fmean(fmean(answer) for answer in meters.answers),
        student_confidence=meters.means["confidence"],
        train_success=tuple((p.difficulty, float(v == "correct")) for p, v in graded if v is not None),
    )


def _context(parts: Parts, problem: Problem, reveal_ratio: float) -> tuple[int, ...]:
    others = parts.problems.train
    return teacher_view(problem, reveal_ratio, parts.config, parts.encoder, parts.renderer, others)[1]
