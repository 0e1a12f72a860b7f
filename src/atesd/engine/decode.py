"""The builtin decoder: static KV buffers of our own, grouped queries without repeated keys, no work but the network's.

Follows the forward passes of transformers' Llama, Qwen2 and Qwen3 (norms in float32, rotary tables from the model's own
module), so that greedy completions equal `generate` token for token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from atesd.engine.layers import Layer, Network

_BLOCK = 256  # tokens; room in the cache grows by whole blocks


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pass of T new tokens stands: its rotary tables, where its keys go, and which keys it sees."""

    cos: Tensor  # [B or 1, T, 1, head_dim]
    sin: Tensor  # the same, its first half negated: rotating then is x cos + roll(x) sin
    write: slice | Tensor  # columns of the cache that take the new keys and values
    end: int  # columns of the cache that are read
    # Added to the scores, [B, 1, T, end]; None: causal, no padding. Every token sees itself, padding too: from a row
    # that sees nothing some kernels make NaN, which a weight of 0 does not keep from the others (pytorch issue 110213).
    mask: Tensor | None


class Decoder:
    """Reads tokens of a batch of left-padded rows, gives the logits of the next ones."""

    def __init__(self, network: Network, lengths: Sequence[int], steps: int) -> None:
        self._network = network
        self._limit = max(lengths) + steps
        self._cache: list[tuple[Tensor, Tensor]] = []
        padding = torch.tensor([max(lengths) - length for length in lengths], device=network.device)
        self._padding = padding if bool(padding.any()) else None
        self._cos, self._sin = rotary_tables(network, self._limit)
        self._hidden = None if self._padding is None else hidden_columns(padding, self._limit, network.dtype)
        # Products of a few bfloat16 queries with them are then up to twice as fast on a CPU, with the same sums.
        self._keys_by_column = network.device.type == "cpu" and network.dtype == torch.bfloat16
        self.length = 0  # columns of the cache that are written

    def logits(self, ids: Tensor) -> Tensor:
        """Read the next tokens, [B, T]: the prompts, then one at a time. Of what follows, [B, V] in float32."""
        start, end = self.length, self.length + ids.shape[1]
        self.make_room(len(ids), end)
        hidden = forward(self._network, ids, self._place(start, end), self._cache)
        self.length = end
        return self._network.head(hidden[:, -1]).float()

    def static_logits(self, ids: Tensor, column: Tensor, room: int) -> Tensor:
        """Of one token each, [B, 1], at the `column` [1] that a tensor holds; no shape depends on its value."""
        later = torch.arange(room, device=column.device) > column
        mask = later.to(self._network.dtype)[None, None, None] * torch.finfo(self._network.dtype).min
        positions = column[:, None]
        if self._padding is not None and self._hidden is not None:
            positions = (column - self._padding)[:, None]
            mask = torch.minimum(mask, self._hidden[:, None, None, :room])
        place = Place(self._cos[positions], self._sin[positions], column, room, mask)
        return self._network.head(forward(self._network, ids, place, self._cache)[:, -1]).float()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        swap = self._keys_by_column
        self._cache = [(keys.mT[rows].mT if swap else keys[rows], values[rows]) for keys, values in self._cache]
        if self._padding is not None and self._hidden is not None:
            self._padding, self._hidden = self._padding[rows], self._hidden[rows]

    def _place(self, start: int, end: int) -> Place:
        if self._padding is None or self._hidden is None:
            return Place(self._cos[None, start:end], self._sin[None, start:end], slice(start, end), end, None)
        columns = torch.arange(start, end, device=self._padding.device)
        positions = (columns - self._padding[:, None]).clamp(min=0)
        mask = self._hidden[:, None, None, :end]
        if end > start + 1:
            mask = mask + causal_mask(columns, end, mask.dtype)
            mask.diagonal(offset=start, dim1=-2, dim2=-1).zero_()
        return Place(self._cos[positions], self._sin[positions], slice(start, end), end, mask)

    def make_room(self, rows: int, end: int) -> int:
        """Buffers of at least `end` columns, with what was written; how many columns they have."""
        network, held = self._network, self._cache[0][0].shape[2] if self._cache else 0
        if end <= held:
            return held
        room = min(-(-end // _BLOCK) * _BLOCK, self._limit)
        shape = (rows, network.kv_heads, room, network.head_dim)
        turned = (*shape[:2], network.head_dim, room)
        for layer in range(len(network.layers)):
            # Zeros, since a masked column may be multiplied by a weight of 0, and 0 times NaN is NaN.
            values = network.embedding.new_zeros(shape)
            keys = network.embedding.new_zeros(turned).mT if self._keys_by_column else torch.zeros_like(values)
            if held:
                keys[:, :, :held], values[:, :, :held] = self._cache[layer]
                self._cache[layer] = keys, values
            else:
                self._cache.append((keys, values))
        return room


def forward(network: Network, ids: Tensor, place: Place, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Last hidden states of the new tokens, [B, T] to [B, T, hidden]; writes their keys and values into the cache.

    `cache` holds keys and values of each layer, [B, kv_heads, room, head_dim].
    """
    x = F.embedding(ids, network.embedding)
    for layer, (keys, values) in zip(network.layers, cache, strict=True):
        x = x + _attention(network, layer, _norm(x, layer.attention_norm, network.epsilon), place, keys, values)
        gate, up = layer.gate_up(_norm(x, layer.forward_norm, network.epsilon)).chunk(2, -1)
        x = x + layer.forward_out(F.silu(gate) * up)
    return _norm(x, network.norm, network.epsilon)


def rotary_tables(network: Network, length: int) -> tuple[Tensor, Tensor]:
    """The model's own cos and sin at positions 0 .. length - 1, each [length, 1, head_dim], as `Place` holds them."""
    positions = torch.arange(length, device=network.device)[None]
    cos, sin = network.rotary(network.embedding[:1, None], positions)
    half = network.head_dim // 2
    signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
    return cos[0, :, None], signed[:, None]


def hidden_columns(padding: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[B, length], 0 at a row's own columns and the lowest number at the `padding` columns on its left."""
    columns = torch.arange(length, device=padding.device)
    hidden = torch.zeros(len(padding), length, dtype=dtype, device=padding.device)
    return hidden.masked_fill(columns < padding[:, None], torch.finfo(dtype).min)


def causal_mask(columns: Tensor, end: int, dtype: torch.dtype) -> Tensor:
    """[T, end], minus infinity at the keys that come after each of these query columns."""
    later = torch.arange(end, device=columns.device) > columns[:, None]
    return torch.zeros(later.shape, dtype=dtype, device=columns.device).masked_fill(later, -torch.inf)


def _attention(network: Network, layer: Layer, x: Tensor, place: Place, keys: Tensor, values: Tensor) -> Tensor:
    batch, new, _ = x.shape
    rotated = network.heads + network.kv_heads
    qkv = layer.qkv(x).view(batch, new, rotated + network.kv_heads, network.head_dim)
    qk = qkv[:, :, :rotated]
    if layer.qk_norm is not None:
        qk = _norm(qk, layer.qk_norm, network.epsilon)
    qk = torch.addcmul(qk * place.cos, qk.roll(network.head_dim // 2, -1), place.sin)
    keys[:, :, place.write] = qk[:, :, network.heads :].transpose(1, 2)
    values[:, :, place.write] = qkv[:, :, rotated:].transpose(1, 2)
    keys, values, query = keys[:, :, : place.end], values[:, :, : place.end], qk[:, :, : network.heads]
    mix = _mix_prompt if new > 1 else _mix_step if x.device.type == "cpu" else _mix_step_fused
    return layer.attention_out(mix(query, keys, values, place.mask, network.scale).reshape(batch, new, -1))


def _mix_prompt(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of many new tokens: [B, T, heads, D] queries, [B, kv_heads, end, D] keys and values.

    With a mask the keys are repeated: for grouped ones CUDA has then only the plain kernel, which holds all scores.
    Keys by column are copied, since only the plain kernel takes them.
    """
    group = query.shape[2] // keys.shape[1]
    grouped = group > 1 and mask is None
    if group > 1 and mask is not None:
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    if keys.stride(-1) != 1:
        keys = keys.contiguous()
    return F.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    ).transpose(1, 2)


def _mix_step_fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Of one new token each. A group's queries stand where new tokens would, so that its keys are read once."""
    grouped = query.view(len(keys), keys.shape[1], -1, keys.shape[3])
    return F.scaled_dot_product_attention(grouped, keys, values, mask, scale=scale)


def _mix_step(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same by plain products, up to twice as fast on a CPU where there are few keys."""
    grouped = query.reshape(len(keys) * keys.shape[1], -1, keys.shape[3])
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    if mask is None:
        scores = torch.bmm(grouped, keys.transpose(1, 2)).mul_(scale)
    else:
        hidden = mask.expand(-1, len(keys) // len(mask), -1, -1).flatten(0, 1)
        scores = torch.baddbmm(hidden, grouped, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1, dtype=torch.float32).to(values.dtype), values)


def _norm(x: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
    """RMS norm over the last axis: in float32, rounded to the model's type before the weight."""
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = torch.addcmul(epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()
    return weight * (wide * inverse).to(x.dtype)
