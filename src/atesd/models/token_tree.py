"""Sequences that begin alike as a tree of token ids, and a causal model's forward over it: every token computed once.

A token attends to its ancestors and to itself, at the position that it has in its own sequence, so that its hidden
state is the one of a pass over that sequence alone. Trees lie end to end in one row, without padding; what treats each
token by itself treats them together, and attention is worked out branch by branch, so that nothing is visited that a
token cannot see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


@runtime_checkable
class States(Protocol):
    """What a backbone gives."""

    @property
    def last_hidden_state(self) -> Float[Tensor, "B T F"]:
        """After the last norm, as the head reads it."""


@runtime_checkable
class Backbone(Protocol):
    """A causal model of transformers without its head."""

    @property
    def config(self) -> PreTrainedConfig:
        """Its sizes, and the attention that it uses."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""

    def __call__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool,
    ) -> States:
        """The states of tokens [B, T]."""


Run = tuple[int, int]
"""First place and the place after the last."""

_INTERFACE = "atesd_branches"
_Ids = Sequence[int] | npt.NDArray[np.int64]
_HARMLESS = {"is_causal", "use_cache", "position_ids", "cache_position", "output_attentions", "position_embeddings"}
# Their frequencies depend on the longest position in the pass, which a tree changes for its shorter sequences.
_ROPE_BY_LENGTH = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Token ids with their positions; where each sequence lies, as runs of places; and the runs that were new.

    The last run of a branch holds its own tokens, the runs before it what they can see of others, in order.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    paths: tuple[tuple[Run, ...], ...]
    branches: tuple[tuple[Run, ...], ...]

    def places(self, sequence: int) -> list[int]:
        """The place of every token of a sequence."""
        return [place for start, stop in self.paths[sequence] for place in range(start, stop)]


def token_tree(sequences: Sequence[Sequence[int]]) -> TokenTree:
    """Lay the sequences out, the longest first; each shares the longest beginning that it has with one before it."""
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    order = sorted(range(len(arrays)), key=lambda i: -len(arrays[i]))
    ids: list[int] = []
    positions: list[int] = []
    branches: list[tuple[Run, ...]] = []
    paths: dict[int, tuple[Run, ...]] = {}
    for i in order:
        shared = 0
        runs: tuple[Run, ...] = ()
        for j, path in paths.items():
            common = common_prefix(arrays[i], arrays[j])
            if common > shared:
                shared, runs = common, _beginning(path, common)
        if shared < len(arrays[i]):
            runs = (*runs, (len(ids), len(ids) + len(arrays[i]) - shared))
            branches.append(runs)
            ids += arrays[i][shared:].tolist()
            positions += range(shared, len(arrays[i]))
        paths[i] = _joined(runs)
    return TokenTree(tuple(ids), tuple(positions), tuple(paths[i] for i in range(len(arrays))), tuple(branches))


def common_prefix(one: _Ids, other: _Ids) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    differ = np.asarray(one)[:length] != np.asarray(other)[:length]
    return int(differ.argmax()) if differ.any() else length


def tree_states(backbone: Backbone, trees: Sequence[TokenTree]) -> list[Float[Tensor, "N F"]]:
    """The last hidden state at every place of each tree, all trees in one row."""
    device = backbone.device
    starts = np.cumsum([0, *(len(tree.ids) for tree in trees)]).tolist()
    branches = [
        _Branch([(start + offset, stop + offset) for start, stop in runs])
        for tree, offset in zip(trees, starts, strict=False)
        for runs in tree.branches
    ]
    with _attention(backbone.config, branches):
        states: Tensor = backbone(
            input_ids=torch.tensor([[token for tree in trees for token in tree.ids]], device=device),
            position_ids=torch.tensor([[place for tree in trees for place in tree.positions]], device=device),
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=backbone.dtype, device=device),  # unread: four dimensions
            use_cache=False,
        ).last_hidden_state[0]
    return [states[start:stop] for start, stop in pairwise(starts)]


@torch.no_grad()
def follows_trees(backbone: Backbone) -> bool:
    """Whether passes over a tree give this model's own hidden states, as a few tokens show.

    False without trying where a few tokens cannot show it: windows, recurrent layers, frequencies that depend on the
    longest position of the pass.
    """
    config = backbone.config
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {p.get("rope_type") for p in (parameters, *parameters.values()) if isinstance(p, dict)}
    everywhere = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    if kinds & _ROPE_BY_LENGTH or not everywhere:
        return False
    one, other, third = ([place * step % config.vocab_size for place in range(1, 13)] for step in (1, 1, 5))
    other[6:] = [(token + 3) % config.vocab_size for token in other[6:9]]
    tree = token_tree([one, other, third, one[:4]])
    try:
        states = tree_states(backbone, [tree])[0]
    except (ValueError, TypeError, RuntimeError):  # an attention of its own
        return False
    places = [place for sequence in range(3) for place in tree.places(sequence)]
    alone = [torch.tensor([sequence], device=backbone.device) for sequence in (one, other, third)]
    own = torch.cat([backbone(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in alone])
    near = 1e-4 if torch.finfo(own.dtype).eps < 1e-5 else 2e-2
    return bool((states[places] - own).norm() <= near * own.norm())


class _Branch:
    """A run of queries, and the runs that they see, the last of which is their own."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.own, self.seen = slice(*runs[-1]), _joined(runs)
        queries, keys = runs[-1][1] - runs[-1][0], sum(stop - start for start, stop in runs)
        self.mask = None if queries == keys else causal_lower_right(queries, keys)


_branches: ContextVar[Sequence[_Branch]] = ContextVar("branches of the pass that is running")


@contextmanager
def _attention(config: PreTrainedConfig, branches: Sequence[_Branch]) -> Iterator[None]:
    """Within it the model attends along these branches; transformers looks the implementation up in every layer."""
    usual, token = config._attn_implementation, _branches.set(branches)
    config._attn_implementation = _INTERFACE
    try:
        yield
    finally:
        config._attn_implementation = usual
        _branches.reset(token)


def _attend(
    _module: object,
    query: Float[Tensor, "1 heads N D"],
    key: Float[Tensor, "1 groups N D"],
    value: Float[Tensor, "1 groups N D"],
    _mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention of each branch to what it can see; `ValueError` for an option that would change it."""
    unknown = [name for name, option in options.items() if option is not None and name not in _HARMLESS]
    if unknown or dropout:
        raise ValueError(f"attention along branches knows no {', '.join(unknown) or 'dropout'}")
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out = [
        F.scaled_dot_product_attention(
            query[:, :, branch.own],
            _gather(key, branch.seen),
            _gather(value, branch.seen),
            attn_mask=branch.mask,
            is_causal=branch.mask is None,
            scale=scaling,
        )
        for branch in _branches.get()
    ]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_INTERFACE, _attend)


def _gather(states: Tensor, runs: Sequence[Run]) -> Tensor:
    parts = [states[:, :, start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _beginning(runs: Sequence[Run], length: int) -> tuple[Run, ...]:
    """The first `length` places of a path."""
    kept: list[Run] = []
    for start, stop in runs:
        if length > 0:
            kept.append((start, min(stop, start + length)))
            length -= stop - start
    return tuple(kept)


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same places, with runs that touch made one."""
    joined: list[Run] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)
