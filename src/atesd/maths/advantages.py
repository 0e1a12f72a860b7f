"""Advantages of rollouts within groups."""

from __future__ import annotations

from collections.abc import Sequence

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
