"""A KV cache with room to grow: a step writes its own tokens and does not copy the past.

Also the one place that knows by which name a model takes its cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from atesd.errors import ModelError

_BLOCK = 256  # tokens; room grows by whole blocks
# Transformers 5.24 renamed the argument for its own models; a model with code of its own may keep the older name.
_CACHE_NAMES = ("cache", "past_key_values")


@runtime_checkable
class Model(Protocol):
    """Whatever has a forward: a model, or what wraps one."""

    @property
    def forward(self) -> Callable[..., object]:
        """Its pass."""


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of full attention whose `keys` and `values`, [B, heads, length, dim], are views of larger buffers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append [B, heads, new, dim]; return all keys and values so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room is None or end > self._room[0].shape[-2]:
            past = (self.keys, self.values) if start else (None, None)
            self._room = _buffer(key_states, end, past[0]), _buffer(value_states, end, past[1])
        keys, values = self._room
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows; the next update makes room for them anew."""
        super().batch_select_indices(indices)
        self._room = None


def preallocated_cache(config: PreTrainedConfig) -> DynamicCache:
    """The library's cache for this model, with room made in its layers of full attention."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_argument(model: Model) -> str:
    """The name under which the model's forward takes a KV cache: `cache`, or `past_key_values` where it knows no other.

    Looks at the signature of the model itself, inside torch.compile and PEFT, whose forwards hand on any name. Raises
    `ModelError` if it takes neither: a forward with `**kwargs` would ignore the cache, and each token lose its past.
    """
    plain = _plain(model)
    taken = inspect.signature(plain.forward).parameters
    for name in _CACHE_NAMES:
        if name in taken:
            return name
    raise ModelError(
        f"{type(plain).__name__}.forward takes no KV cache: its arguments ({', '.join(taken)}) name neither "
        f"{' nor '.join(_CACHE_NAMES)}, so it cannot be sampled from; use a model whose forward names one of them"
    )


def _plain(model: Model) -> Model:
    """The model inside `torch.compile` and PEFT, in whichever order they wrap it."""
    if hasattr(model, "_orig_mod"):
        return _plain(model._orig_mod)
    return _plain(model.get_base_model()) if hasattr(model, "get_base_model") else model


def _buffer(new: Tensor, length: int, past: Tensor | None) -> Tensor:
    """Room for at least `length` tokens shaped like `new`, with the past copied into it."""
    buffer = new.new_empty(*new.shape[:2], -(-length // _BLOCK) * _BLOCK, new.shape[-1])
    if past is not None:
        buffer[:, :, : past.shape[-2]] = past
    return buffer
