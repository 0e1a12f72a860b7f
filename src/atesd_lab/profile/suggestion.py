"""Which exposure to start with, from what a profile measured: one written rule, never tuned on results of training.

1. By alignment, where it can be measured: the ratio whose step would raise the student's success most, if its mean
   alignment is above 0, and ahead of at least one other ratio in both halves and by more than the noise.
2. Else by the teacher, if going on from its view it is right more often than the student: among the ratios above 0
   that cannot be told from its best one, that with the smallest KL. Ratio 0 takes no part: with the answer in view its
   accuracy is that of copying, without it that of the student.
3. Else full exposure (OPSD), for want of anything measurable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from atesd.maths.statistics import paired_bootstrap
from atesd_lab.stats.contrast import students_interval

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A ratio to start with, what it was chosen by, and why, in sentences."""

    reveal_ratio: float
    basis: Literal["alignment", "teacher accuracy", "nothing measurable"]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AlignmentRows:
    """Alignment of each rollout at each ratio, [n][K], and the half, 0 or 1, that it lies in."""

    rows: tuple[tuple[float, ...], ...]
    halves: tuple[int, ...]


def suggest(
    ratios: Sequence[float],
    alignment: AlignmentRows | str,
    student: Sequence[bool] | None,
    teacher: Sequence[Sequence[bool]] | None,
    kl: Sequence[float],
) -> Suggestion:
    """Apply the rule of this module. `alignment` is a sentence where there is none.

    `student` [n] and `teacher` [n][K] are verdicts on the same problems, None where nothing can be verified; `kl` [K]
    is the mean forward KL per token, nats.
    """
    found, first = _by_alignment(ratios, alignment)
    if found is not None:
        return Suggestion(found, "alignment", (first,))
    found, second = _by_teacher(ratios, student, teacher, kl)
    if found is not None:
        return Suggestion(found, "teacher accuracy", (first, second))
    last = "nothing measurable speaks for less than the whole reference: full exposure, as in OPSD"
    return Suggestion(1.0, "nothing measurable", (first, second, last))


def _by_alignment(ratios: Sequence[float], alignment: AlignmentRows | str) -> tuple[float | None, str]:
    if isinstance(alignment, str):
        return None, f"alignment: not measurable, {alignment}"
    rows, halves = np.array(alignment.rows), np.array(alignment.halves)
    best = int(rows.mean(0).argmax())
    low, high = students_interval(rows[:, best], LEVEL)
    named = f"{_written(ratios[best])} has the largest mean, {rows[:, best].mean():.3g} [{low:.3g}, {high:.3g}]"
    if low <= 0:
        return None, f"alignment: {named}, which is not above 0: no ratio would help, as far as can be seen"
    others = [k for k in range(len(ratios)) if k != best]
    behind = [k for k in others if _is_ahead(rows[:, best] - rows[:, k], halves, len(others))]
    tied = [ratios[k] for k in others if k not in behind]
    if not behind:
        return None, f"alignment: {named}, but no ratio can be told from it"
    ties = f"; not told from it: {_written(*tied)}" if tied else ""
    return ratios[best], f"alignment: {named}, told from {_written(*(ratios[k] for k in behind))}{ties}"


def _is_ahead(differences: NDArray[np.float64], halves: NDArray[np.int64], comparisons: int) -> bool:
    """Whether paired differences lie above 0 beyond their noise, and their mean does in each half (own directions).

    At `LEVEL` for all comparisons together (Bonferroni).
    """
    low, _ = students_interval(differences, 1 - (1 - LEVEL) / comparisons)
    return low > 0 and all(differences[halves == half].mean() > 0 for half in (0, 1))


def _by_teacher(
    ratios: Sequence[float],
    student: Sequence[bool] | None,
    teacher: Sequence[Sequence[bool]] | None,
    kl: Sequence[float],
) -> tuple[float | None, str]:
    if student is None or teacher is None:
        return None, "the teacher's accuracy: not measurable, there is no checker (data.checker: none)"
    right = np.array(teacher, dtype=float)
    taking_part = [k for k, ratio in enumerate(ratios) if ratio > 0]
    best = max(taking_part, key=lambda k: right[:, k].mean())
    low, high = paired_bootstrap(right[:, best], student)
    gain = f"{100 * (right[:, best].mean() - np.mean(student)):.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
    named = (
        f"the teacher's accuracy: at its best, ratio {_written(ratios[best])}, it differs from the student's by {gain}"
    )
    if low <= 0:
        return None, f"{named}, which is not above 0"
    tied = [k for k in taking_part if k == best or paired_bootstrap(right[:, best], right[:, k])[0] <= 0]
    chosen = min(tied, key=lambda k: kl[k])
    among = _written(*(ratios[k] for k in tied))
    return ratios[chosen], f"{named}; of the ratios not told from it ({among}), the smallest KL ({kl[chosen]:.3g} nats)"


def _written(*ratios: float) -> str:
    return ", ".join(f"{ratio:g}" for ratio in ratios)
