"""Scoring of completions whose contexts begin alike: what they share is computed once.

The views of a problem are nested prefixes, up to where the tokenizer merges across a boundary; several rollouts, or a
rollout and the reference answer, share a whole context. What is shared is found in the token ids alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from atesd.models.score import Pair, Scorer, micro_batches, pair_length
from atesd.models.token_tree import TokenTree, batch_states, row_states, takes_masks, token_tree

LONGEST_DENSE = 128
"""Tokens up to which a tree is scored under a dense mask: one kernel for all trees, but it visits every pair."""

LEAST_SAVING = 0.1
"""Share of the tokens that has to be saved; below it nothing is gained over separate passes."""


@torch.no_grad()
def shared_hidden(
    scorer: Scorer, groups: Sequence[Sequence[Pair]], *, tokens_per_pass: int = 16384
) -> list[list[Float[Tensor, "N F"]]]:
    """What `Scorer.hidden` gives for each pair, without gradient: [completion length, F] by group and pair.

    The pairs of a group may share prefixes; groups share nothing with each other. Whole groups go through the model
    together, up to `tokens_per_pass` tokens, padding included. Falls back on separate passes where little is shared, or
    where the model does not give a tree the hidden states of separate passes (`Scorer.follows_trees`).

    Raises `ValueError` for an empty context or completion.
    """
    if any(not context or not completion for group in groups for context, completion in group):
        raise ValueError("every context and every completion needs at least one token")
    if not any(groups) or not scorer.follows_trees:
        return _separate(scorer, groups, tokens_per_pass)
    trees = [token_tree([(*context, *completion[:-1]) for context, completion in group]) for group in groups if group]
    apart = sum(pair_length(pair) for group in groups for pair in group)
    if sum(len(tree.ids) for tree in trees) > (1 - LEAST_SAVING) * apart:
        return _separate(scorer, groups, tokens_per_pass)
    states = iter(_states(scorer, trees, tokens_per_pass))
    grown = iter(trees)
    return [_at_completions(group, next(grown), next(states)) if group else [] for group in groups]


def _at_completions(group: Sequence[Pair], tree: TokenTree, states: Tensor) -> list[Tensor]:
    """The states that predict each pair's completion."""
    places = [tree.places(i)[len(context) - 1 :] for i, (context, _) in enumerate(group)]
    return list(torch.split(states[list(chain(*places))], [len(completion) for _, completion in group]))


def _states(scorer: Scorer, trees: Sequence[TokenTree], budget: int) -> list[Tensor]:
    """The states of each tree: short ones padded to a batch, long ones laid end to end."""
    lengths = [len(tree.ids) for tree in trees]
    by_length = sorted(range(len(trees)), key=lambda i: lengths[i])
    dense = [i for i in by_length if lengths[i] <= LONGEST_DENSE and takes_masks(scorer.backbone.config)]
    rows = by_length[len(dense) :]
    found: dict[int, Tensor] = {}
    for batch in micro_batches([lengths[i] for i in dense], len(dense), budget):
        taken = [dense[i] for i in batch]
        states = batch_states(scorer.backbone, [trees[i] for i in taken], scorer.pad_id)
        found.update(zip(taken, states, strict=True))
    for row in _filled([lengths[i] for i in rows], budget):
        taken = [rows[i] for i in row]
        found.update(zip(taken, row_states(scorer.backbone, [trees[i] for i in taken]), strict=True))
    return [found[i] for i in range(len(trees))]


def _filled(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive indices whose lengths sum up to at most `budget`, at least one."""
    batch: list[int] = []
    room = budget
    for i, length in enumerate(lengths):
        if batch and length > room:
            yield batch
            batch, room = [], budget
        batch.append(i)
        room -= length
    if batch:
        yield batch


def _separate(scorer: Scorer, groups: Sequence[Sequence[Pair]], budget: int) -> list[list[Tensor]]:
    """The same by plain passes, with little padding."""
    pairs = [pair for group in groups for pair in group]
    found: dict[int, Tensor] = {}
    for batch in micro_batches([pair_length(pair) for pair in pairs], len(pairs), budget):
        hidden = scorer.hidden([pairs[i] for i in batch])
        found.update(zip(batch, torch.split(hidden, [len(pairs[i][1]) for i in batch]), strict=True))
    ordered = (found[i] for i in range(len(pairs)))
    return [[next(ordered) for _ in group] for group in groups]
