"""What the processor computes in, and what is chosen there for a model in bfloat16.

On a CPU the backward pass of torch's fused attention is slower in bfloat16 than plain products, and an adapter that
computes in float32 spends its time on copies of what it reads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atesd.config import ModelConfig


def computes_in_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16: AVX512-BF16 or AMX."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def chooses_bfloat16(config: ModelConfig) -> bool:
    """Whether attention and adapters are those for bfloat16 on a processor."""
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    return config.prefers_eager_on_cpu and on_cpu and computes_in_bfloat16()


def attention_of(config: ModelConfig) -> str:
    """`model.attention`; where it is not set `eager` if bfloat16 is computed on this processor, else `sdpa`."""
    return config.attention or ("eager" if chooses_bfloat16(config) else "sdpa")


def attention_note(config: ModelConfig) -> str | None:
    """What a user should know of the choice; None where there was nothing to choose."""
    if not chooses_bfloat16(config):
        return None
    adapter = ", and the adapter computes in bfloat16 (its weights stay float32)" if config.lora is not None else ""
    return (
        f"model.attention: eager{adapter}: the faster way on this processor, which computes in bfloat16; on "
        "another one, or with model.attention: sdpa, the run has other bits"
    )


class RoundedLinear(nn.Linear):
    """x W^T in the type of x: the weight stays in its own, and is rounded anew for each product."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, self.weight.to(x.dtype))


def adapters_as_their_inputs(model: nn.Module) -> None:
    """Let plain LoRA layers compute in the type of what they read; their weights and gradients keep their own."""
    for layer in model.modules():
        adapted: Any = layer
        matrices = [m for side in ("lora_A", "lora_B") for m in getattr(adapted, side, nn.ModuleDict()).values()]
        if matrices and all(type(m) is nn.Linear and m.bias is None for m in matrices):
            adapted.cast_input_dtype_enabled = False  # PEFT would cast what it reads to the type of the weights
            for matrix in matrices:
                matrix.__class__ = RoundedLinear
