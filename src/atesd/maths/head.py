"""The output projection of a language model, as numbers: what turns its last hidden states into logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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
        logits = hidden.to(wide)
        if self.weight is not None:
            logits = F.linear(logits, self.weight.to(wide), None if self.bias is None else self.bias.to(wide))
        logits = logits * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def is_linear_twin(self, other: Head) -> bool:
        """Whether both are the very same tensor in memory, scaled alike and without a soft cap.

        Then the difference of two logits is the projection of the difference of two hidden states.
        """
        if self.weight is None or other.weight is None or self.soft_cap is not None or other.soft_cap is not None:
            return False
        return self.scale == other.scale and _same(self.weight, other.weight) and _same(self.bias, other.bias)

    @property
    def trained(self) -> list[Tensor]:
        """The tensors of the head that are being trained."""
        return [tensor for tensor in (self.weight, self.bias) if tensor is not None and tensor.requires_grad]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
