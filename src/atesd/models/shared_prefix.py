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
from atesd.models.token_tree import TokenTree, token_tree, tree_states

LEAST_SAVING = 0.1
"""Share of the tokens that has to be saved; below it nothing is gained over separate passes."""


@torch.no_grad()
def shared_hidden(
    scorer: Scorer, groups: Sequence[Sequence[Pair]], *, tokens_per_pass: int = 16384
) -> list[list[Float[Tensor, "N F"]]]:
    """What `Scorer.hidden` gives for each pair, without gradient: [completion length, F] by group and pair.

    The pairs of a group may share prefixes; groups share nothing with each other. Whole groups go through the model
    together, up to `tokens_per_pass` tokens. Falls back on separate passes where little is shared, or
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
    states = _states(scorer, trees, tokens_per_pass)
    grown = iter(trees)
    return [_at_completions(group, next(grown), next(states)) if group else [] for group in groups]


def _at_completions(group: Sequence[Pair], tree: TokenTree, states: Tensor) -> list[Tensor]:
    """The states that predict each pair's completion."""
    places = [tree.places(i)[len(context) - 1 :] for i, (context, _) in enumerate(group)]
    return list(torch.split(states[list(chain(*places))], [len(completion) for _, completion in group]))


def _states(scorer: Scorer, trees: Sequence[TokenTree], budget: int) -> Iterator[Tensor]:
    """The states of each tree, as many trees at a time as fit."""
    for some in _filled(trees, budget):
        yield from tree_states(scorer.backbone, some)


def _filled(trees: Sequence[TokenTree], budget: int) -> Iterator[list[TokenTree]]:
    """Consecutive trees whose tokens add up to at most `budget`, at least one."""
    some: list[TokenTree] = []
    room = budget
    for tree in trees:
        if some and len(tree.ids) > room:
            yield some
            some, room = [], budget
        some.append(tree)
        room -= len(tree.ids)
    yield some


def _separate(scorer: Scorer, groups: Sequence[Sequence[Pair]], budget: int) -> list[list[Tensor]]:
    """The same by plain passes, with little padding."""
    pairs = [pair for group in groups for pair in group]
    found: dict[int, Tensor] = {}
    for batch in micro_batches([pair_length(pair) for pair in pairs], len(pairs), budget):
        hidden = scorer.hidden([pairs[i] for i in batch])
        found.update(zip(batch, torch.split(hidden, [len(pairs[i][1]) for i in batch]), strict=True))
    ordered = (found[i] for i in range(len(pairs)))
    return [[next(ordered) for _ in group] for group in groups]
