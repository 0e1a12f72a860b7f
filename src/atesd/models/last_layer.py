"""The last layer of a backbone by itself: what a pass gave it, from which its output can be computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atesd.models.token_tree import Backbone


@final
@dataclass(slots=True)
class Call:
    """What the last layer was given in one pass, without gradient."""

    arguments: tuple[object, ...] = ()
    options: dict[str, object] = field(default_factory=dict)


@final
class LastLayer:
    """The last decoder layer of a backbone and the norm behind it, called as the backbone calls them."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        self._layer, self._norm = layer, norm

    def parameters(self) -> set[int]:
        """The ids of the parameters of layer and norm."""
        return {id(parameter) for part in (self._layer, self._norm) for parameter in part.parameters()}

    @contextmanager
    def heard(self) -> Iterator[Call]:
        """Inside, a pass of the backbone tells what it gives to the last layer."""
        call = Call()

        def hear(_module: nn.Module, arguments: tuple[object, ...], options: dict[str, object]) -> None:
            call.arguments = tuple(map(_detached, arguments))
            call.options = {name: _detached(value) for name, value in options.items()}

        handle = self._layer.register_forward_pre_hook(hear, with_kwargs=True)
        try:
            yield call
        finally:
            handle.remove()

    def again(self, call: Call) -> Float[Tensor, "B T F"]:
        """What the backbone's output of that pass is with layer and norm as they are now; gradients flow to them."""
        found = self._layer(*call.arguments, **call.options)
        hidden: Tensor = self._norm(found if isinstance(found, Tensor) else found[0])
        return hidden


def last_layer_of(backbone: Backbone, ids: Tensor) -> LastLayer | None:
    """The last layer, if computing it again gives the backbone's own output, bit for bit, on some ids; None if not."""
    layers, norm = getattr(backbone, "layers", None), getattr(backbone, "norm", None)
    if not isinstance(layers, nn.ModuleList) or norm is None:
        return None
    layer = LastLayer(layers[-1], norm)
    with torch.no_grad(), layer.heard() as call:
        wanted = backbone(input_ids=ids, use_cache=False).last_hidden_state
        return layer if torch.equal(layer.again(call), wanted) else None


def _detached(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach()
    return tuple(map(_detached, value)) if isinstance(value, tuple) else value
