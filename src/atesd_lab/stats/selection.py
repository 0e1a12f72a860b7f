"""Which checkpoint, and which fixed ratio: chosen on other problems than those that score it, wherever that can be."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atesd.maths.keyed import generator

Floats = NDArray[np.float64]


def best_fixed(ratios: Mapping[str, float], validated: Mapping[str, float]) -> str:
    """Of the arms with these reveal ratios the one with the highest mean on validation; the lowest ratio of equals."""
    return max(sorted(ratios, key=ratios.__getitem__), key=validated.__getitem__)


def halves_of(problems: int) -> NDArray[np.int64]:
    """A split of problems in two that depends on their number alone: 0 or 1 for each, in the order of their names."""
    sides: NDArray[np.int64] = generator(0, "compare halves", problems).permutation(problems) % 2
    return sides


def cross_fitted(scores: ArrayLike, halves: ArrayLike) -> tuple[Floats, tuple[int, int]]:
    """The scores of the checkpoint that the other half of the problems chose: [seeds, problems], and which two.

    `scores` is [checkpoints, seeds, problems], `halves` [problems] of 0 and 1. The checkpoint with the highest mean
    over one half (the earliest of equals) is scored on the other, both ways, so that no problem judges what it chose.
    """
    table, half = np.asarray(scores, dtype=np.float64), np.asarray(halves)
    chosen = [int(table[:, :, half == 1 - side].mean(axis=(1, 2)).argmax()) for side in (0, 1)]
    return np.where(half == 0, table[chosen[0]], table[chosen[1]]), (chosen[0], chosen[1])


def fair_peaks(scores: Floats) -> Floats:
    """Each seed's best checkpoint, chosen on one half of the problems and scored on the other: [seeds, problems]."""
    halves = halves_of(scores.shape[2])
    return np.concatenate([cross_fitted(scores[:, [seed]], halves)[0] for seed in range(scores.shape[1])])


def biased_peaks(scores: Floats) -> Floats:
    """Each seed's own best checkpoint, scored on the problems that chose it: [seeds, problems]."""
    return np.stack([scores[scores[:, seed].mean(axis=1).argmax(), seed] for seed in range(scores.shape[1])])
