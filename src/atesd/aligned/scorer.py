"""The first-order look-ahead on an update's rollouts: alignment per ratio, rollout and token.

The rollouts that are scored are newer than those that gave the direction (`SuccessDirection`), so that a rollout never
speaks for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Literal, final

import torch
from torch import Tensor

from atesd.aligned.direction import SuccessDirection
from atesd.maths.alignment import alignments
from atesd.maths.divergence import Objective
from atesd.maths.fused import token_blocks
from atesd.models.score import Pair, Scored, Scorer, completion_tokens, micro_batches, pair_length
from atesd.models.shared_prefix import shared_hidden
from atesd.models.teacher import Teacher
from atesd.records import Alignment


@final
class AlignmentScorer:
    """Scores an update's rollouts on both sides of the student, along the success direction."""

    def __init__(
        self,
        direction: SuccessDirection,
        scorer: Scorer,
        teacher: Teacher,
        objective: Objective,
        ratios: Sequence[float],
        *,
        micro_batch_size: int,
        chunk_tokens: int | None,
        reduction: Literal["sequence", "token"] = "sequence",
    ) -> None:
        self.direction = direction
        self.ratios = tuple(ratios)
        self._scorer, self._teacher, self._objective = scorer, teacher, objective
        self._micro_batch_size, self._chunk_tokens = micro_batch_size, chunk_tokens
        self._reduction = reduction

    def by_ratio(self, students: Sequence[Pair], contexts: Sequence[Sequence[tuple[int, ...]]]) -> list[list[float]]:
        """Alignment of each rollout at each ratio, [rows][K], so that the mean over rows has the weights of the loss.

        `contexts` are the teacher's at each ratio, [K][rows]. An alignment is the rollout's mean per token, and under
        reduction `token` times its length over the mean length. Shared between the ranks of the model.
        """
        rows = list(zip(students, zip(*contexts, strict=True), strict=True))
        means = self._scorer.ranks.map_sharded(rows, self._rows_by_ratio)
        if self._reduction == "sequence":
            return means
        lengths = [len(completion) for _, completion in students]
        mean_length = fmean(lengths)
        return [[value * n / mean_length for value in row] for row, n in zip(means, lengths, strict=True)]

    def tokens(
        self, batch: Sequence[Pair], teachers: Sequence[Scored], tokens: Tensor, student: Scored | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Alignment of every token under each teacher, [K, N], and the curvature [N] where it is measured.

        `student`: what is known of the batch already, which saves a pass or makes the derivative more exact.
        """
        found, bends = [], []
        with torch.no_grad():
            line = self.direction.line(batch, student)
            for block in token_blocks(len(tokens), line.vocabulary, tokens.device, self._chunk_tokens):
                own = line.tangent(block)
                logits = [teacher.logits(block) for teacher in teachers]
                found.append(alignments(self._objective, logits, own.logits, own.slope, tokens[block]))
                if own.curvature is not None:
                    bends.append(own.curvature)
        return torch.cat(found, dim=1), torch.cat(bends) if bends else None

    def _rows_by_ratio(self, rows: Sequence[tuple[Pair, tuple[tuple[int, ...], ...]]]) -> list[list[float]]:
        found: dict[int, list[float]] = {}
        for indices in micro_batches([pair_length(pair) for pair, _ in rows], self._micro_batch_size):
            batch = [rows[i] for i in indices]
            pairs = [pair for pair, _ in batch]
            views = [[(context, completion) for context in contexts] for (_, completion), contexts in batch]
            with self._teacher.weights():
                by_ratio = zip(*shared_hidden(self._scorer, views), strict=True)
                teachers = [Scored(torch.cat(hidden), self._scorer.head()) for hidden in by_ratio]
            values, _ = self.tokens(pairs, teachers, completion_tokens(pairs, self._scorer.device))
            by_row = torch.split(values.double(), [len(completion) for _, completion in pairs], dim=1)
            found.update(zip(indices, [row.mean(1).tolist() for row in by_row], strict=True))
        return [found[i] for i in range(len(rows))]


def grouped(ratios: Sequence[float], rows: Sequence[Sequence[float]], groups: Sequence[str]) -> Mapping[str, Alignment]:
    """The alignments of each group's rollouts: mean and standard error over its rows (0 for a single one)."""
    members: dict[str, list[Sequence[float]]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(row)
    return {group: _alignment(ratios, own) for group, own in members.items()}


def _alignment(ratios: Sequence[float], rows: Sequence[Sequence[float]]) -> Alignment:
    columns = list(zip(*rows, strict=True))
    errors = tuple(stdev(column) / len(column) ** 0.5 if len(column) > 1 else 0.0 for column in columns)
    return Alignment(tuple(ratios), tuple(fmean(column) for column in columns), errors, len(rows))
