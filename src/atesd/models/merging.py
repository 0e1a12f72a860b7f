"""What rounding swallows of an adapter that is added into its base."""

from __future__ import annotations

import math
from typing import Any

import torch

MOST_LOST = 0.5
"""Largest share of the adapter's change that rounding the merged weights may swallow (ours)."""


@torch.no_grad()
def swallowed_share(model: torch.nn.Module, dtype: torch.dtype) -> float:
    """The length of all rounding errors of the adapted weights, merged and in `dtype`, over that of what is added.

    In float32; 0 where the adapter adds nothing.
    """
    error, change = 0.0, 0.0
    for module in model.modules():
        layer: Any = module
        if getattr(layer, "lora_A", None):
            delta = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
            whole = layer.get_base_layer().weight + delta
            error += (whole.to(dtype).float() - whole).square().sum().item()
            change += delta.square().sum().item()
    return math.sqrt(error / change) if change else 0.0
