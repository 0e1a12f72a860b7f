"""AdamW with a learning-rate schedule that is a function of the update, and a guard against non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast, final

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


@dataclass(frozen=True, slots=True)
class Step:
    """An optimiser step: the gradient's norm before clipping, the learning rate, and whether the step was taken.

    `held_back`: it was not, on purpose.
    """

    grad_norm: float
    learning_rate: float
    taken: bool
    held_back: bool = False


@final
class Optimiser:
    """Applies one update, or skips it when loss or gradient is not finite."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self._parameters = parameters
        self._config = config

    @cached_property
    def _adam(self) -> torch.optim.AdamW:
        """Made when it is first needed: a model that is only evaluated may have nothing to train."""
        parameters, config = self._parameters.values(), self._config
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False)

    def learning_rate(self, update: int) -> float:
        """The learning rate of an update."""
        return learning_rate(self._config, update)

    def step(self, update: int, loss: float, *, held_back: bool = False) -> Step:
        """Clip the gradient, step unless gradient or loss is not finite, and clear the gradient.

        `held_back`: nothing moves, nor do the moments.
        """
        norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), self._config.max_grad_norm))
        rate, finite = self.learning_rate(update), math.isfinite(norm) and math.isfinite(loss)
        if finite and not held_back:
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return Step(norm, rate, finite, held_back)

    def preconditioned(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each gradient over the root of its second moments, as AdamW would step on it; unchanged before any step."""
        steps = {}
        beta2, epsilon = self._adam.defaults["betas"][1], self._adam.defaults["eps"]
        for name, gradient in gradients.items():
            state = self._adam.state.get(self._parameters[name])
            if not state:
                steps[name] = gradient
                continue
            moments = state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))
            steps[name] = gradient / (moments.sqrt() + epsilon)
        return steps

    def state_dict(self) -> dict[str, object]:
        """Moments and step counts."""
        return cast("dict[str, object]", self._adam.state_dict())

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore `state_dict`."""
        self._adam.load_state_dict(dict(state))
