"""Decoding steps of unchanging shape: whatever moves lies in tensors, so that a CUDA graph can be replayed.

A step reads all columns of the current block of the cache and masks those not yet written. One graph is captured for
each length of the cache, with the drawing of the token in it. On a CPU the same steps run without a graph, for tests:
there a moving slice is faster.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from atesd.engine.decode import Decoder
from atesd.engine.draw import Choose


@final
class CudaGraphDecoder:
    """Goes on with a batch whose prompts a decoder has read. Its rows are fixed; dropping some takes a new object."""

    def __init__(self, decoder: Decoder, choose: Choose, ids: Tensor, uniforms: Tensor) -> None:
        """`ids` [B, 1]: the tokens drawn last. `uniforms` [B, steps]: one for each step that is still to come."""
        self._decoder, self._choose, self._uniforms = decoder, choose, uniforms
        self._ids = ids.clone()
        self._column = torch.tensor([decoder.length], device=ids.device)  # of the cache, for the token read next
        self._step = torch.zeros(1, dtype=torch.long, device=ids.device)
        self._tokens = torch.zeros_like(uniforms, dtype=torch.long)
        self._logprobs = torch.zeros_like(uniforms, dtype=torch.float32)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._done = 0

    def advance(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw `count` tokens for every row: tokens and log-probabilities, [B, count] each."""
        for _ in range(count):
            room = self._decoder.make_room(len(self._ids), self._decoder.length + 1)
            if self._ids.is_cuda:
                self._graph(room).replay()
            else:
                self._one(room)
            self._decoder.length += 1
        drawn = slice(self._done, self._done + count)
        self._done += count
        return self._tokens[:, drawn].clone(), self._logprobs[:, drawn].clone()

    def _one(self, room: int) -> None:
        logits = self._decoder.static_logits(self._ids, self._column, room)
        token, logprob = self._choose(logits, self._uniforms.index_select(1, self._step).squeeze(1))
        self._tokens.index_copy_(1, self._step, token[:, None])
        self._logprobs.index_copy_(1, self._step, logprob[:, None])
        self._ids.copy_(token[:, None])
        self._column += 1
        self._step += 1

    def _graph(self, room: int) -> torch.cuda.CUDAGraph:
        """The graph of a step for this room. Growing replaces the buffers, and with them the graph."""
        if room not in self._graphs:
            moving = (self._ids, self._column, self._step)
            before = [tensor.clone() for tensor in moving]
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries allocate and choose kernels in a first run, outside the graph
                self._one(room)
            torch.cuda.current_stream().wait_stream(aside)
            for tensor, value in zip(moving, before, strict=True):
                tensor.copy_(value)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._one(room)
            self._graphs = {room: graph}
        return self._graphs[room]
