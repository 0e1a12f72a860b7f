"""What the processor computes in, and the attention that is quickest there."""

from __future__ import annotations

import torch

from atesd.config import ModelConfig


def computes_in_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16: AVX512-BF16 or AMX."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def attention_of(config: ModelConfig) -> str:
    """`model.attention`, or the one chosen where it is not set.

    That is `sdpa`, but `eager` for bfloat16 on a processor that computes in it: there the backward pass of torch's
    fused attention is slower than plain products.
    """
    if config.attention is not None:
        return config.attention
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    return "eager" if config.dtype == "bfloat16" and on_cpu and computes_in_bfloat16() else "sdpa"


def attention_note(config: ModelConfig) -> str | None:
    """What a user should know of the choice; None where there was nothing to choose."""
    if config.attention is not None or attention_of(config) == "sdpa":
        return None
    return (
        "model.attention: eager, the faster one for model.dtype: bfloat16 on this processor, which computes in it; on "
        "another, or with model.attention: sdpa, a run has other bits"
    )
