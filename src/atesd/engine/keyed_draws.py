"""A logits processor for vLLM that draws tokens as `atesd.engine.draw` does, from the uniforms of a request's key.

    vllm serve MODEL --logits-processors atesd.engine.keyed_draws:KeyedDraws ...

It runs inside vLLM's process (V1 model runner), which needs atesd beside it. The client asks for temperature 0; what is
left of the logits here is one token per row, which the greedy choice takes. So a server writes the tokens that the
builtin engine writes, up to the rounding of the logits: for tests, and for runs that must repeat whatever the batch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypedDict, final

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.interface import MoveDirectionality

from atesd.engine.draw import draw
from atesd.engine.interface import Key, SamplingParams
from atesd.maths.keyed import uniforms


class _Filters(TypedDict):
    """`SamplingParams` but for the length, which is the request's own."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float


class _Asked(TypedDict):
    """What a request says of its draws."""

    key: Key
    params: _Filters


@dataclass(frozen=True, slots=True)
class _Row:
    """A request that is being completed: how, its uniforms, and the tokens so far, a list that vLLM appends to."""

    params: SamplingParams
    uniforms: Tensor
    written: list[int]


@final
class KeyedDraws(LogitsProcessor):  # type: ignore[misc]
    """Requests with `vllm_xargs: {"atesd": JSON of key and params}` are drawn by key; others are left alone."""

    def __init__(self, vllm_config: object, device: torch.device, is_pin_memory: bool) -> None:  # noqa: ARG002
        """As vLLM makes its processors."""
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides what the greedy choice finds."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows of the persistent batch: those that leave, come and change places."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, written in batch_update.added:
            self._rows.pop(index, None)
            asked = (params.extra_args or {}).get("atesd")
            if asked is not None:
                self._rows[index] = _row(json.loads(asked), params.max_tokens, written)
        for source, target, way in batch_update.moved:
            moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if way is MoveDirectionality.SWAP and other is not None:
                self._rows[source] = other

    def apply(self, logits: Tensor) -> Tensor:
        """The logits [rows, V] with one token left in each row that is drawn by key."""
        for index, row in self._rows.items():
            uniform = row.uniforms[len(row.written)][None].to(logits.device)
            token, _ = draw(logits[index : index + 1].float(), uniform, row.params)
            logits[index] = -torch.inf
            logits[index, token] = 0.0
        return logits


def _row(asked: _Asked, tokens: int, written: list[int]) -> _Row:
    params = SamplingParams(**asked["params"], completion_tokens=tokens)
    return _Row(params, torch.from_numpy(uniforms(tokens, *asked["key"])), written)
