"""Rows that are decoded together by a model of this process; the engines differ in what reads the tokens.

Each draw is a function of its own request's key and of nothing else in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, final

import numpy as np
import torch
from torch import Tensor

from atesd.engine.draw import Choose, draw
from atesd.engine.interface import Request, SamplingParams
from atesd.errors import NonFiniteError
from atesd.maths.keyed import uniforms
from atesd.models.load import LoadedModel, without_checkpointing
from atesd.records import Rollout

# Asking whether rows have finished makes the CPU wait for the GPU.
_STEPS_BETWEEN_CHECKS_ON_GPU = 16


class Reader(Protocol):
    """What runs the network for a batch of left-padded rows."""

    def logits(self, ids: Tensor) -> Tensor:
        """Read the next tokens, [B, T]; give the logits of those after them, [B, V] in float32."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        ...


class Steps(Protocol):
    """Draws tokens without coming back to Python between them."""

    def advance(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` tokens of every row and their log-probabilities, [B, count] each."""
        ...


Capture = Callable[[Choose, Tensor, Tensor], Steps]
"""(how a token is chosen, the tokens drawn last [B, 1], one uniform for each step to come [B, steps]) to steps."""


@final
class Batch:
    """Rows that are decoded together; rows that have ended leave once they are the majority."""

    def __init__(
        self,
        loaded: LoadedModel,
        requests: Sequence[Request],
        params: SamplingParams,
        reader: Reader,
        capture: Capture | None = None,
    ) -> None:
        """`capture`: how steps after the first are drawn, where the reader has something faster than its `logits`."""
        self._loaded, self._requests, self._params = loaded, requests, params
        self._reader, self._capture = reader, capture
        device, steps = loaded.device, params.completion_tokens
        longest = max(len(request.prompt_ids) for request in requests)
        padded = [(loaded.pad_id,) * (longest - len(r.prompt_ids)) + r.prompt_ids for r in requests]
        self._ids = torch.tensor(padded, device=device)
        if params.temperature > 0:
            drawn = np.stack([uniforms(steps, *request.key) for request in requests])
        else:
            drawn = np.zeros((len(requests), steps))
        self._uniforms = torch.from_numpy(drawn).to(device)
        self._ends = torch.tensor(sorted(loaded.end_ids), device=device)
        self._rows = torch.arange(len(requests), device=device)
        self._finished = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self._tokens = torch.full((len(requests), steps), loaded.pad_id, device=device)
        self._logprobs = torch.zeros((len(requests), steps), device=device)
        # No method of this object: a cycle would keep graphs and KV cache until Python looks for cycles.
        self._choose = partial(draw, params=params)
        self._captured: Steps | None = None

    def complete(self) -> list[Rollout]:
        """Decode until every row has ended or reached the limit."""
        steps, step = self._params.completion_tokens, 0
        interval = 1 if self._loaded.device.type == "cpu" else _STEPS_BETWEEN_CHECKS_ON_GPU
        while step < steps:
            count = 1 if step == 0 else min(interval, steps - step)
            self._advance(step, count)
            step += count
            ended = int(self._finished.sum())
            if ended == len(self._rows):
                break
            if 2 * ended > len(self._rows):
                self._drop_finished()
        tokens, logprobs = self._tokens.tolist(), self._logprobs.tolist()
        return [self._rollout(r, t, p) for r, t, p in zip(self._requests, tokens, logprobs, strict=True)]

    def _advance(self, step: int, count: int) -> None:
        """Draw the next `count` tokens of every row."""
        if self._capture is not None and step > 0:
            if self._captured is None:
                self._captured = self._capture(self._choose, self._ids, self._uniforms[:, step:].contiguous())
            tokens, logprobs = self._captured.advance(count)
        else:
            drawn = []
            for place in range(step, step + count):
                drawn.append(self._choose(self._reader.logits(self._ids), self._uniforms[:, place]))
                self._ids = drawn[-1][0][:, None]
            tokens, logprobs = (torch.stack(some, 1) for some in zip(*drawn, strict=True))
        self._ids = tokens[:, -1:]
        rows = slice(None) if len(self._rows) == len(self._tokens) else self._rows
        self._tokens[rows, step : step + count] = tokens
        self._logprobs[rows, step : step + count] = logprobs
        self._finished |= (tokens[..., None] == self._ends).flatten(1).any(1)

    def _drop_finished(self) -> None:
        kept = (~self._finished).nonzero().squeeze(-1)
        self._reader.keep(kept)
        self._ids, self._uniforms, self._rows = self._ids[kept], self._uniforms[kept], self._rows[kept]
        self._finished, self._captured = self._finished[kept], None

    def _rollout(self, request: Request, tokens: list[int], logprobs: list[float]) -> Rollout:
        end = next((i for i, token in enumerate(tokens) if token in self._loaded.end_ids), None)
        length = len(tokens) if end is None else end + 1
        if not all(map(math.isfinite, logprobs[:length])):
            raise NonFiniteError(f"the model's logits are not finite while it completes {request.problem_id}")
        return Rollout(
            problem_id=request.problem_id,
            sample=request.sample,
            prompt_ids=request.prompt_ids,
            completion_ids=tuple(tokens[:length]),
            logprobs=tuple(logprobs[:length]),
            truncated=end is None,
        )


def complete_in_batches(
    loaded: LoadedModel,
    requests: Sequence[Request],
    batch_size: int,
    open_batch: Callable[[Sequence[Request]], Batch],
) -> list[Rollout]:
    """Complete the requests, `batch_size` of about the same length together, without gradient; in their order.

    Raises `ValueError` that names the problem of an empty prompt.
    """
    for request in requests:
        if not request.prompt_ids:
            raise ValueError(f"the prompt of {request.problem_id} is empty")
    by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
    rollouts: dict[int, Rollout] = {}
    with torch.no_grad(), without_checkpointing(loaded.model):
        for start in range(0, len(requests), batch_size):
            rows = by_length[start : start + batch_size]
            completed = open_batch([requests[i] for i in rows]).complete()
            rollouts.update(zip(rows, completed, strict=True))
    return [rollouts[i] for i in range(len(requests))]
