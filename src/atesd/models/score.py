"""Score given tokens: hidden states at the completion positions, and the head that turns them into logits.

The logits of a batch never exist at once: a backbone pass gives one hidden state per completion token, the caller
projects them a block at a time (`maths.fused`). Rows are right-padded and attention is causal, so
that padding can reach no real token; masks come from lengths, never from the pad id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atesd.errors import ModelError
from atesd.maths.fused import fused_likelihood
from atesd.maths.head import Head
from atesd.models.last_layer import Call, LastLayer, last_layer_of
from atesd.models.last_mlp import LastMlp, last_half_of, last_mlp_of
from atesd.models.load import LoadedModel
from atesd.models.ranks import Ranks
from atesd.models.token_tree import Backbone, follows_trees
from atesd.models.weights import ReplicatedWeights, Weights

T = TypeVar("T")
R = TypeVar("R")
Part = Literal["last_layer", "last_half", "last_mlp"]
"""The end of a model from which it can be read again."""

_ENDS: Mapping[Part, Callable[[Backbone, Tensor], LastLayer | LastMlp | None]] = {
    "last_layer": last_layer_of,
    "last_half": last_half_of,
    "last_mlp": last_mlp_of,
}

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Context ids and completion ids."""


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of one pass: what its last layer read, and which of its states predict the completion tokens."""

    layer: LastLayer
    call: Call
    rows: Int[Tensor, " N"]
    columns: Int[Tensor, " N"]

    def hidden(self) -> Float[Tensor, "N F"]:
        """The hidden states with the last layer as it is now."""
        return self.layer.again(self.call)[self.rows, self.columns]


@dataclass(frozen=True, slots=True)
class MlpTail:
    """The end of one pass: what the block at its end read where completion tokens are predicted."""

    block: LastMlp
    states: Float[Tensor, "N F"]

    def change(self, along: Mapping[int, Tensor]) -> Float[Tensor, "N F"]:
        """The derivative of the hidden states when parameters of the block move along `along`, by their ids."""
        return self.block.change(self.states, along)


@dataclass(frozen=True, slots=True)
class Scored:
    """Hidden states at some tokens, [N, F], and the head that reads them."""

    hidden: Float[Tensor, "N F"]
    head: Head
    tail: Tail | MlpTail | None = None
    """From where the last layer, or its feed-forward block, can be read again, if the scorer keeps it."""

    @property
    def vocabulary(self) -> int:
        """How many entries its logits have."""
        return self.hidden.shape[-1] if self.head.weight is None else len(self.head.weight)

    def logits(self, block: slice) -> Float[Tensor, "C V"]:
        """The logits of a block of the tokens."""
        return self.head.logits(self.hidden[block])


class Scorer:
    """Gives hidden states and head of one model; knows how its architecture makes logits."""

    def __init__(self, loaded: LoadedModel, weights: Weights | None = None, *, keeps: Part | None = None) -> None:
        """`weights`: those of the run that trains this model; by default its parameters as they are.

        With `keeps`, what is `scored` has a `tail`; `ModelError` if that part cannot be computed by itself.
        """
        self._loaded = loaded
        self._weights = weights or ReplicatedWeights(loaded.model, loaded.ranks)
        model: Any = loaded.model
        self._causal_lm: Any = model.get_base_model() if hasattr(model, "peft_config") else model
        self._backbone: Backbone = self._causal_lm.get_decoder()
        self._reading = self._reading_that_gives_the_models_logits()
        self._end = None if keeps is None else self._own_end(keeps)

    @property
    def has_separable_head(self) -> bool:
        """Whether backbone and head are used apart; if not, the model's own logits stand in for hidden states."""
        return self._reading is not None

    @property
    def end(self) -> LastLayer | LastMlp | None:
        """The part of the model that tails begin with, if they are kept."""
        return self._end

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self._loaded.device

    @property
    def ranks(self) -> Ranks:
        """The processes that hold this model."""
        return self._loaded.ranks

    @property
    def in_step(self) -> bool:
        """Whether a pass is one of all ranks, so that each must make as many."""
        return self._weights.in_step

    def whole(self) -> AbstractContextManager[None]:
        """`Weights.whole`: inside, each rank makes as many passes as it likes."""
        return self._weights.whole()

    def map_sharded(
        self, items: Sequence[T], work: Callable[[Sequence[T]], list[R]], *, exchanges: bool = False
    ) -> list[R]:
        """`Ranks.map_sharded` for work without gradient that runs this model, on each rank as often as it likes.

        `exchanges`: the work exchanges its weights, on all ranks equally often.
        """
        in_step = exchanges and self._weights.in_step
        with self._weights.whole():
            return self._loaded.ranks.map_sharded(items, work, in_step=in_step)

    @property
    def backbone(self) -> Backbone:
        """The model without its head."""
        return self._backbone

    @cached_property
    def follows_trees(self) -> bool:
        """Whether a pass over a tree of tokens gives the hidden states of separate passes (tried once)."""
        return self.has_separable_head and follows_trees(self._backbone)

    def head(self) -> Head:
        """The head as it stands now; its tensors are those of the model at this moment.

        Without gradient it stays what it is when `Teacher.weights` or a displacement ends.
        """
        if self._reading is None:
            return Head(None)
        return self._weights.head(self._reading, keep=not torch.is_grad_enabled())

    def scored(self, pairs: Sequence[Pair]) -> Scored:
        """`hidden` and `head` of this moment, and the tail of the pass if tails are kept."""
        end = self._end
        if end is None:
            return Scored(self.hidden(pairs), self.head())
        ids, rows, columns = self._layout(pairs)
        if isinstance(end, LastMlp):
            with end.heard() as read:
                hidden = self._states(ids)[rows, columns]
            return Scored(hidden, self.head(), MlpTail(end, read.at(rows, columns)))
        with end.heard() as call:
            hidden = self._states(ids)[rows, columns]
        return Scored(hidden, self.head(), Tail(end, call, rows, columns))

    def hidden(self, pairs: Sequence[Pair]) -> Float[Tensor, "N F"]:
        """The hidden states that predict each completion token, rows one after another: N = sum of completion lengths.

        Gradients flow if they are enabled. The completion must not be empty (`ValueError`).
        """
        ids, rows, columns = self._layout(pairs)
        return self._states(ids)[rows, columns]

    def _states(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T F"]:
        """The last hidden states, or the logits where there is no head to be taken apart."""
        if not self.has_separable_head:
            logits: Tensor = self._loaded.model(input_ids=ids, use_cache=False).logits
            return logits
        hidden: Tensor = self._backbone(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def _layout(self, pairs: Sequence[Pair]) -> tuple[Int[Tensor, "B T"], Int[Tensor, " N"], Int[Tensor, " N"]]:
        if any(not context or not completion for context, completion in pairs):
            raise ValueError("every context and every completion needs at least one token")
        lengths = [len(context) + len(completion) - 1 for context, completion in pairs]
        ids = torch.full((len(pairs), max(lengths)), self._loaded.pad_id, dtype=torch.long)
        for row, (context, completion) in enumerate(pairs):
            ids[row, : lengths[row]] = torch.tensor((*context, *completion[:-1]), dtype=torch.long)
        rows = [row for row, (_, completion) in enumerate(pairs) for _ in completion]
        columns = [len(context) - 1 + n for context, completion in pairs for n in range(len(completion))]
        device = self._loaded.device
        return ids.to(device), torch.tensor(rows, device=device), torch.tensor(columns, device=device)

    def _own_end(self, part: Part) -> LastLayer | LastMlp:
        ids = torch.arange(8, device=self._loaded.device)[None] % self._causal_lm.config.get_text_config().vocab_size
        found: LastLayer | LastMlp | None = None
        if self.has_separable_head:
            found = _ENDS[part](self._backbone, ids)
        if found is None:
            raise ModelError(
                f"alignment.parameters: {part} cannot be for a {type(self._causal_lm).__name__}, where it does not "
                "give the model's output from what it reads; set alignment.parameters: all"
            )
        return found

    @torch.no_grad()
    def _reading_that_gives_the_models_logits(self) -> Head | None:
        """How this architecture makes logits (no tensors in it): the first reading that gives the model's own, or None.

        Checked on eight tokens to what the rounding of the dtype allows.
        """
        layer = self._causal_lm.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            return None
        ids = torch.arange(8, device=self._loaded.device)[None] % self._causal_lm.config.get_text_config().vocab_size
        own = self._loaded.model(input_ids=ids, use_cache=False).logits[0].float()
        head = self._weights.head(Head(None), keep=True)
        if not torch.isfinite(own).all():
            raise ModelError("the model gives non-finite logits on a plain input; its weights or dtype are unusable")
        hidden = getattr(self._backbone(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != layer.in_features or own.shape[-1] != layer.out_features:
            return None
        allowed = (1e-2 if hidden.dtype == torch.bfloat16 else 1e-4) * own.norm()
        for reading in readings(self._causal_lm.config.get_text_config()):
            apart = replace(reading, weight=head.weight, bias=head.bias).logits(hidden[0])
            if (own - apart).norm() <= allowed:
                return reading
        return None


FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")


def readings(config: object) -> Iterator[Head]:
    """What the fields of a transformers config may say of the scale and soft cap of the logits, likeliest first.

    The same word means different things: Granite divides by its `logits_scaling`, HyperCLOVA X multiplies; and a field
    may be inherited and unused. So these are candidates, to be compared with the model's own logits.
    """
    factor = math.prod(_numbers(config, FACTORS))
    divisor = math.prod(_numbers(config, DIVISORS))
    soft_cap = next(iter(_numbers(config, SOFT_CAPS)), None)
    for scale in dict.fromkeys((factor / divisor, factor * divisor, factor, 1.0)):
        for cap in dict.fromkeys((soft_cap, None)):
            yield Head(None, scale=scale, soft_cap=cap)


def _numbers(config: object, names: Sequence[str]) -> list[float]:
    """The values of those fields that the config has, other than 0."""
    return [float(value) for value in (getattr(config, name, None) for name in names) if value]


def completion_logprobs(
    scorer: Scorer,
    pairs: Sequence[Pair],
    *,
    temperature: float = 1.0,
    micro_batch_size: int = 8,
    micro_batch_tokens: int | None = None,
    chunk_tokens: int | None = None,
) -> list[Tensor]:
    """Log-probability in nats of every completion token: one [len(completion)] tensor per pair, no gradient.

    Logits are divided by `temperature` first. The pairs are shared between the ranks of the model, and on each scored
    by length, as `micro_batches` cuts them.
    """

    def score(some: Sequence[Pair]) -> list[Tensor]:
        cut = micro_batch_size, micro_batch_tokens
        return logprobs_at((temperature,), scorer, some, *cut, chunk_tokens=chunk_tokens)[0]

    if scorer.ranks.size == 1:
        return score(pairs)
    told = scorer.map_sharded(pairs, lambda mine: [row.tolist() for row in score(mine)])
    return [torch.tensor(row, device=scorer.device) for row in told]


@torch.no_grad()
def logprobs_at(
    temperatures: Sequence[float],
    scorer: Scorer,
    pairs: Sequence[Pair],
    micro_batch_size: int = 8,
    micro_batch_tokens: int | None = None,
    chunk_tokens: int | None = None,
) -> list[list[Tensor]]:
    """`completion_logprobs` at each temperature in turn, from one pass over the pairs on this rank alone."""
    found: dict[tuple[int, int], Tensor] = {}
    for indices in micro_batches([pair_length(pair) for pair in pairs], micro_batch_size, micro_batch_tokens):
        batch = [pairs[i] for i in indices]
        hidden, head, tokens = scorer.hidden(batch), scorer.head(), completion_tokens(batch, scorer.device)
        for which, temperature in enumerate(temperatures):
            own = hidden_logprobs(head, hidden, tokens, temperature=temperature, chunk_tokens=chunk_tokens)
            rows = torch.split(own, [len(completion) for _, completion in batch])
            found.update({(which, i): row for i, row in zip(indices, rows, strict=True)})
    return [[found[which, i] for i in range(len(pairs))] for which in range(len(temperatures))]


def hidden_logprobs(
    head: Head,
    hidden: Float[Tensor, "N F"],
    tokens: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Float[Tensor, " N"]:
    """Log-probability in nats of each token, given the hidden state that predicts it; logits of a chunk at a time."""
    ones = torch.ones(len(tokens), device=hidden.device)
    return fused_likelihood(hidden, head, tokens, ones, temperature=temperature, chunk_tokens=chunk_tokens)[1][
        "logprob"
    ]


def completion_tokens(pairs: Sequence[Pair], device: torch.device) -> Int[Tensor, " N"]:
    """The completion tokens of all pairs, rows one after another, as `Scorer.hidden` orders its states."""
    return torch.tensor([token for _, completion in pairs for token in completion], device=device)


def pair_length(pair: Pair) -> int:
    """The tokens that the model reads of a pair: the last one of the completion is only predicted."""
    context, completion = pair
    return len(context) + len(completion) - 1


def micro_batches(lengths: Sequence[int], most_rows: int, most_tokens: int | None = None) -> list[list[int]]:
    """Which rows go through the model together, the longest first, so that little is padded.

    Each micro-batch holds at most `most_rows` rows; with `most_tokens`, as many of any number as fit that many tokens,
    padding included, but at least one.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        batch = batches[-1] if batches else []
        rows = most_rows if most_tokens is None else most_tokens // lengths[batch[0] if batch else i]
        if batch and len(batch) < rows:
            batch.append(i)
        else:
            batches.append([i])
    return batches
