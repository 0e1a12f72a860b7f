"""The next token from logits and a uniform, the same code for every engine.

One uniform per row and step picks a token by inversion of the cumulative distribution. So the same request gives the
same tokens in any batch, up to the rounding of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from atesd.engine.interface import SamplingParams

Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits [B, V] and uniforms [B] to tokens [B] and log-probabilities [B], without making the CPU wait."""

# Sorting a whole vocabulary is the dearest step of top-p; its nucleus nearly always lies within this many tokens.
_NUCLEUS_GUESS = 256


def draw(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability in nats: [B, V] float32 and [B] float64 to [B] and [B].

    The log-probability is that of the temperature-scaled distribution before any filter (temperature 0: of the
    unscaled one). It is NaN or infinite exactly where the logits are not usable.
    """
    scaled = logits / params.temperature if params.temperature not in (0, 1) else logits
    token = _invert(scaled, uniforms, params) if params.temperature > 0 else logits.argmax(-1)
    logprob = scaled.gather(-1, token[:, None]).squeeze(-1) - scaled.logsumexp(-1)
    return token, logprob


def _invert(scaled: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    """The first kept token, in the order of ids, at which the cumulative probability exceeds the uniform."""
    scores, ids = _kept(scaled, params)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # In float64 u * total rounds to less than total for every u <= 1 - 2^-53: such a token exists.
    place = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    place = place.clamp(max=scores.shape[-1] - 1)  # only NaN can reach beyond; it is reported by its log-probability
    return (place if ids is None else ids.gather(-1, place)).squeeze(-1)


def _kept(scaled: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Scores of the tokens that the filters keep (others -inf) and their ids, ascending; ids None: all of them."""
    ids: Tensor | None = None
    if 0 < params.top_k < scaled.shape[-1]:
        scaled, ids = scaled.topk(params.top_k, dim=-1)
    if params.top_p < 1:
        scaled, ids = _nucleus(scaled, ids, params.top_p)
    if params.min_p > 0:
        floor = scaled.amax(-1, keepdim=True) + math.log(params.min_p)
        scaled = scaled.masked_fill(scaled < floor, -math.inf)
    if ids is None:
        return scaled, None
    ids, order = ids.sort(-1)
    return scaled.gather(-1, order), ids


def _nucleus(scaled: Tensor, ids: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The smallest set of most probable tokens whose mass reaches `top_p`; `ids` given: `scaled` already descends."""
    normaliser = scaled.logsumexp(-1, keepdim=True)
    if ids is not None:
        best = scaled
    elif scaled.is_cuda or scaled.shape[-1] <= _NUCLEUS_GUESS:  # a CUDA graph cannot ask whether the guess sufficed
        best, ids = scaled.sort(-1, descending=True)
    else:
        best, ids = scaled.topk(_NUCLEUS_GUESS, dim=-1)
        if not bool(((best - normaliser).exp().sum(-1) >= top_p).all()):
            best, ids = scaled.sort(-1, descending=True)
    probability = (best - normaliser).exp().double()
    mass_before = probability.cumsum(-1) - probability
    return best.masked_fill(mass_before >= top_p, -math.inf), ids
