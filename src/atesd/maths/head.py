"""The output projection of a language model, as numbers: what turns its last hidden states into logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_TILE_ENTRIES = 8192


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap(scale (W h + bias)), cap(z) = soft_cap tanh(z / soft_cap): float32 logits from hidden states.

    Holds the weight tensor itself, so that a teacher's head stays the teacher's after its weights are swapped out. With
    `weight` None the "hidden states" are the model's own logits already (an architecture we do not take apart).
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden: Float[Tensor, "N F"]) -> Float[Tensor, "N V"]:
        """Logits in float32 (float64 for float64 hidden states): rounding logits to bfloat16 would spoil small KLs."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        if self.weight is None:
            logits = hidden.to(wide)
        elif torch.is_grad_enabled() or self.weight.dtype == wide:
            logits = F.linear(hidden.to(wide), self.weight.to(wide), bias)
        else:
            logits = project(hidden, self.weight, hidden.new_empty(len(hidden), len(self.weight), dtype=wide))
            logits = logits if bias is None else logits.add_(bias)
        logits = logits * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def slope(self, change: Float[Tensor, "N F"], logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """The derivative of `logits` when their hidden states move along `change`; exact."""
        straight = replace(self, bias=None, soft_cap=None).logits(change)
        return straight if self.soft_cap is None else straight * (1 - (logits / self.soft_cap) ** 2)

    def is_linear_twin(self, other: Head) -> bool:
        """Whether both are the very same tensor in memory, scaled alike and without a soft cap.

        Then the difference of two logits is the projection of the difference of two hidden states.
        """
        if self.weight is None or other.weight is None or self.soft_cap is not None or other.soft_cap is not None:
            return False
        return self.scale == other.scale and _same(self.weight, other.weight) and _same(self.bias, other.bias)

    def detached(self) -> Head:
        """The same tensors as they are now, without gradient."""
        return replace(
            self,
            weight=None if self.weight is None else self.weight.detach(),
            bias=None if self.bias is None else self.bias.detach(),
        )

    @property
    def trained(self) -> list[Tensor]:
        """The tensors of the head that are being trained."""
        return [tensor for tensor in (self.weight, self.bias) if tensor is not None and tensor.requires_grad]


def project(hidden: Float[Tensor, "N F"], weight: Float[Tensor, "V F"], out: Float[Tensor, "N V"]) -> Tensor:
    """`out` = hidden W^T in its own dtype, float32 or better, without a copy of all weights in it. Without gradient."""
    if weight.dtype == out.dtype:
        return torch.mm(hidden.to(out.dtype), weight.T, out=out)
    if multiplies_into_float32(weight):
        return torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=out.dtype, out=out)
    hidden = hidden.to(out.dtype)
    for tile in tiles(len(weight)):
        torch.mm(hidden, weight[tile].to(out.dtype).T, out=out[:, tile])
    return out


def multiplies_into_float32(tensor: Tensor) -> bool:
    """Whether products of such tensors can come out in float32: not on a CPU, and float16 would underflow."""
    return tensor.is_cuda and tensor.dtype == torch.bfloat16


def tiles(entries: int) -> Iterator[slice]:
    """A vocabulary a part at a time, for what must be cast."""
    return (slice(start, start + _TILE_ENTRIES) for start in range(0, entries, _TILE_ENTRIES))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
