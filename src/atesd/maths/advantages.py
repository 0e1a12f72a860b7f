"""Advantages of rollouts within groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import fmean

import torch

EPSILON = 1e-6
"""Keeps the advantage of a group whose rewards are all equal at 0."""


def group_advantages(rewards: Sequence[float], group_size: int) -> list[float]:
    """GRPO's advantage of each rollout: (reward - mean) / (std + 1e-6) within its group (arXiv 2402.03300).

    Groups of `group_size` rollouts follow one another; std is the sample standard deviation (n - 1). Raises
    `RuntimeError` if the rewards do not fill whole groups.
    """
    grouped = torch.tensor(list(rewards)).view(-1, group_size)
    centred = grouped - grouped.mean(1, keepdim=True)
    advantages: list[float] = (centred / (grouped.std(1, keepdim=True) + EPSILON)).flatten().tolist()
    return advantages


def difficulty_advantages(rewards: Sequence[float], difficulties: Sequence[Hashable]) -> list[float]:
    """The advantage of each rollout without groups: reward - mean(rewards of its difficulty). Ours.

    On average REINFORCE's, but for a factor (n - 1) / n per difficulty of n rollouts, as each is part of its own
    baseline; 0 for the only rollout of a difficulty.
    """
    of_level: dict[Hashable, list[float]] = defaultdict(list)
    for reward, level in zip(rewards, difficulties, strict=True):
        of_level[level].append(reward)
    means = {level: fmean(own) for level, own in of_level.items()}
    return [reward - means[level] for reward, level in zip(rewards, difficulties, strict=True)]
