"""Sampling: the student writes completions, each draw a function of its own uniforms and of nothing else in the batch.

One uniform per row and step picks a token by inversion of the cumulative distribution. So the same request gives the
same tokens in any batch, up to the rounding of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atesd.engine.cache import cache_argument, roomy_cache
from atesd.engine.captured import StaticSteps
from atesd.engine.decode import Decoder
from atesd.engine.layers import Network, read_network, unsupported
from atesd.errors import ModelError, NonFiniteError
from atesd.models.load import LoadedModel, without_checkpointing
from atesd.models.ranks import SINGLE_PROCESS
from atesd.records import Rollout

# Sorting a whole vocabulary is the dearest step of top-p; its nucleus nearly always lies within this many tokens.
_NUCLEUS_GUESS = 256
# Asking whether rows have finished makes the CPU wait for the GPU.
_STEPS_BETWEEN_CHECKS_ON_GPU = 16


@dataclass(frozen=True)
class Request:
    """A prompt to complete, with one uniform in [0, 1) for each step of the completion."""

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    uniforms: NDArray[np.float64]


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn: temperature (0: greedy), then top-k (0: off), then top-p, then min-p.

    `completion_tokens` is the longest completion. `batch_size` rows are decoded together; it does not change the draws.
    Nor does `engine`, up to rounding: it says whose code runs the network (`engine_of`).
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    completion_tokens: int
    batch_size: int
    engine: Literal["auto", "builtin", "transformers"] = "auto"


def engine_of(loaded: LoadedModel, engine: str) -> Literal["builtin", "transformers"]:
    """The engine that decodes this model; `auto` is builtin where the architecture allows it.

    Raises `ModelError` if `builtin` is asked for and does not.
    """
    why_not = None if engine == "transformers" else unsupported(loaded.model)
    if engine == "builtin" and why_not is not None:
        raise ModelError(f"sampling.engine: builtin cannot decode this model ({why_not}); set sampling.engine: auto")
    return "builtin" if engine != "transformers" and why_not is None else "transformers"


def engine_note(loaded: LoadedModel, engine: str) -> str | None:
    """What to tell the user of the choice that `auto` made; None: nothing."""
    why_not = unsupported(loaded.model) if engine == "auto" else None
    return None if why_not is None else f"sampling goes through transformers, which is slower: {why_not}"


def sample(loaded: LoadedModel, requests: Sequence[Request], sampler: Sampler) -> list[Rollout]:
    """Complete every request, shared between the ranks of the model; the rollouts are in the order of the requests.

    Completions hold their end token; one that reaches the limit without it is `truncated`. Raises `NonFiniteError` that
    names the problem if the model's logits are not finite, `ValueError` for an empty prompt or too few uniforms.
    """
    for request in requests:
        if not request.prompt_ids:
            raise ValueError(f"the prompt of {request.problem_id} is empty")
        if sampler.temperature > 0 and len(request.uniforms) < sampler.completion_tokens:
            raise ValueError(
                f"{request.problem_id}: {len(request.uniforms)} uniforms, {sampler.completion_tokens} steps"
            )
    if loaded.ranks.size > 1:
        alone = replace(loaded, ranks=SINGLE_PROCESS)
        told = loaded.ranks.map_sharded(
            requests, lambda mine: [asdict(rollout) for rollout in sample(alone, mine, sampler)]
        )
        return [_from_json(rollout) for rollout in told]
    by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
    rollouts: dict[int, Rollout] = {}
    with torch.no_grad(), without_checkpointing(loaded.model):
        builtin = engine_of(loaded, sampler.engine) == "builtin"
        rows_together = min(len(requests), sampler.batch_size)
        network = read_network(loaded.model, rows_together) if builtin and requests else None
        for start in range(0, len(requests), sampler.batch_size):
            rows = by_length[start : start + sampler.batch_size]
            completed = _Batch(loaded, network, [requests[i] for i in rows], sampler).complete()
            rollouts.update(zip(rows, completed, strict=True))
    return [rollouts[i] for i in range(len(requests))]


def _from_json(rollout: dict[str, Any]) -> Rollout:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in rollout.items()}
    return Rollout(**values)


def draw(logits: Tensor, uniforms: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability in nats: [B, V] float32 and [B] float64 to [B] and [B].

    The log-probability is that of the temperature-scaled distribution before any filter (temperature 0: of the
    unscaled one). It is NaN or infinite exactly where the logits are not usable.
    """
    scaled = logits / sampler.temperature if sampler.temperature not in (0, 1) else logits
    token = _invert(scaled, uniforms, sampler) if sampler.temperature > 0 else logits.argmax(-1)
    logprob = scaled.gather(-1, token[:, None]).squeeze(-1) - scaled.logsumexp(-1)
    return token, logprob


def _invert(scaled: Tensor, uniforms: Tensor, sampler: Sampler) -> Tensor:
    """The first kept token, in the order of ids, at which the cumulative probability exceeds the uniform."""
    scores, ids = _kept(scaled, sampler)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # In float64 u * total rounds to less than total for every u <= 1 - 2^-53: such a token exists.
    place = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    place = place.clamp(max=scores.shape[-1] - 1)  # only NaN can reach beyond; it is reported by its log-probability
    return (place if ids is None else ids.gather(-1, place)).squeeze(-1)


def _kept(scaled: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor | None]:
    """Scores of the tokens that the filters keep (others -inf) and their ids, ascending; ids None: all of them."""
    ids: Tensor | None = None
    if 0 < sampler.top_k < scaled.shape[-1]:
        scaled, ids = scaled.topk(sampler.top_k, dim=-1)
    if sampler.top_p < 1:
        scaled, ids = _nucleus(scaled, ids, sampler.top_p)
    if sampler.min_p > 0:
        floor = scaled.amax(-1, keepdim=True) + math.log(sampler.min_p)
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


class _Reader(Protocol):
    """What runs the network for a batch of left-padded rows."""

    def logits(self, ids: Tensor) -> Tensor:
        """Read the next tokens, [B, T]; give the logits of those after them, [B, V] in float32."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        ...


class _TransformersReader:
    """The model's own forward, for any architecture."""

    def __init__(self, loaded: LoadedModel, lengths: Sequence[int], steps: int) -> None:
        self._model, self._length = loaded.model, 0
        places = torch.arange(max(lengths) + steps) - (max(lengths) - torch.tensor(lengths))[:, None]
        self._mask = (places >= 0).long().to(loaded.device)
        self._positions = places.clamp(min=0).to(loaded.device)
        self._cache, self._cache_argument = roomy_cache(loaded.model.config), cache_argument(loaded.model)

    def logits(self, ids: Tensor) -> Tensor:
        start, self._length = self._length, self._length + ids.shape[1]
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask[:, : self._length],
            position_ids=self._positions[:, start : self._length],
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self._cache},
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]


class _Batch:
    """Rows that are decoded together; rows that have ended leave once they are the majority."""

    def __init__(
        self, loaded: LoadedModel, network: Network | None, requests: Sequence[Request], sampler: Sampler
    ) -> None:
        self._loaded, self._requests, self._sampler = loaded, requests, sampler
        device, steps = loaded.device, sampler.completion_tokens
        lengths = [len(request.prompt_ids) for request in requests]
        self._reader: _Reader = (
            _TransformersReader(loaded, lengths, steps) if network is None else Decoder(network, lengths, steps)
        )
        padded = [(loaded.pad_id,) * (max(lengths) - len(r.prompt_ids)) + r.prompt_ids for r in requests]
        self._ids = torch.tensor(padded, device=device)
        if sampler.temperature > 0:
            drawn = np.stack([request.uniforms[:steps] for request in requests])
        else:
            drawn = np.zeros((len(requests), steps))
        self._uniforms = torch.from_numpy(drawn).to(device)
        self._ends = torch.tensor(sorted(loaded.end_ids), device=device)
        self._rows = torch.arange(len(requests), device=device)
        self._finished = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self._tokens = torch.full((len(requests), steps), loaded.pad_id, device=device)
        self._logprobs = torch.zeros((len(requests), steps), device=device)
        # No method of this object: a cycle would keep graphs and KV cache until Python looks for cycles.
        self._choose = partial(draw, sampler=sampler)
        self._static: StaticSteps | None = None

    def complete(self) -> list[Rollout]:
        """Decode until every row has ended or reached the limit."""
        steps, step = self._sampler.completion_tokens, 0
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
        if isinstance(self._reader, Decoder) and self._ids.is_cuda and step > 0:
            if self._static is None:
                self._static = StaticSteps(self._reader, self._choose, self._ids, self._uniforms[:, step:].contiguous())
            tokens, logprobs = self._static.advance(count)
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
        self._finished, self._static = self._finished[kept], None

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
