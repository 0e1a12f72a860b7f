"""AdamW with a learning-rate schedule that is a function of the update, and a guard against non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from atesd.config import TrainConfig


def learning_rate(config: TrainConfig, update: int) -> float:
    """The learning rate of this update: linear warm-up from 0, then constant, linear to 0, or half a cosine to 0."""
    if update < config.warmup_updates:
        return config.learning_rate * (update + 1) / config.warmup_updates
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    progress = (update - config.warmup_updates) / max(1, config.num_updates - config.warmup_updates)
    if config.learning_rate_schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@final
class Optimiser:
    """Applies one update, or skips it when loss or gradient is not finite."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: TrainConfig) -> None:
        self._parameters = list(parameters)
        self._config = config
        self._adam = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False
        )

    def step(self, update: int, loss: float) -> tuple[float, bool]:
        """Clip the gradient, step, and clear it. Returns its norm before clipping and whether the step was taken."""
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            for group in self._adam.param_groups:
                group["lr"] = learning_rate(self._config, update)
            self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm, finite

    def preconditioned(self, gradients: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Each gradient over the root of its second moments, as AdamW would step on it; unchanged before any step."""
        found = {}
        beta2, epsilon = self._adam.defaults["betas"][1], self._adam.defaults["eps"]
        for parameter, gradient in gradients.items():
            state = self._adam.state.get(parameter)
            if not state:
                found[parameter] = gradient
                continue
            moments = state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))
            found[parameter] = gradient / (moments.sqrt() + epsilon)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._adam.load_state_dict(state)
