"""What shares a beginning is computed once, and nobody can tell by the numbers: separate passes are the oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from atesd.config import FrozenTeacher, LoraConfig
from atesd.models import shared_prefix
from atesd.models.load import LoadedModel, _with_adapter
from atesd.models.score import Pair, Scorer
from atesd.models.shared_prefix import shared_hidden
from atesd.models.teacher import Teacher
from atesd.models.token_tree import common_prefix, token_tree
from atesd.models.weights import ReplicatedWeights
from tiny import SIZES, tiny_model

Groups = Sequence[Sequence[Pair]]

VIEW = (7, 8, 9, 10, 11, 12, 13, 14)
GROUPS: dict[str, Groups] = {
    "nested views with a tail": [[((*VIEW[:n], 20, 21), (3, 4, 5)) for n in (0, 2, 4, 6, 8)]],
    "rollout and answer under one view": [[(VIEW, (15, 16, 17, 18)), (VIEW, (19,))]],
    "several rollouts, one twice": [[(VIEW, (15, 16)), (VIEW, (15, 17, 18)), (VIEW, (15, 16))]],
    "identical contexts, one token each": [[(VIEW, (15,)), (VIEW, (16,)), (VIEW, (17,))]],
    "one token differs at the boundary": [[((*VIEW, 20), (5, 6)), ((*VIEW, 21), (5, 6)), ((*VIEW[:-1], 20), (5, 6))]],
    "nothing in common": [[((7, 8, 9), (10, 11)), ((12,), (13, 14, 15)), ((9,) * 6, (1,))]],
    "a context that ends inside another's completion": [[((7, 8), (9, 10, 11, 12)), ((7, 8, 9, 10), (11, 3))]],
    "uneven groups, one empty": [[(VIEW, (15, 16)), (VIEW[:3], (4,))], [], [((5,), (6,))], [(VIEW * 3, (1, 2))] * 2],
}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees also where little or nothing is shared."""
    monkeypatch.setattr(shared_prefix, "LEAST_SAVING", -1.0)


@torch.no_grad()
def separately(scorer: Scorer, groups: Groups) -> list[list[Tensor]]:
    return [[scorer.hidden([pair]) for pair in group] for group in groups]


def assert_equal(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for mine, other in zip(found, expected, strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def loaded_as(model: Any) -> LoadedModel:
    return dataclasses.replace(tiny_model(), model=model.eval(), pad_id=0)


def smollm_like() -> LoadedModel:
    """Odd head counts and a tied head, as in SmolLM2-135M (9 query heads on 3)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {**SIZES, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4}
        return loaded_as(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)))


MODELS = {
    "qwen3": tiny_model,
    "llama": lambda: tiny_model(architecture="llama"),
    "smollm": smollm_like,
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_shared_states_are_those_of_separate_passes(make: Any, groups: Groups) -> None:
    scorer = Scorer(make())
    assert scorer.follows_trees
    assert_equal(shared_hidden(scorer, groups), separately(scorer, groups))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("budget", [1, 14, 40])
def test_the_tokens_per_pass_change_nothing(budget: int) -> None:
    scorer, groups = Scorer(tiny_model()), [group for groups in GROUPS.values() for group in groups]
    assert_equal(shared_hidden(scorer, groups, tokens_per_pass=budget), separately(scorer, groups))


@pytest.mark.usefixtures("always")
def test_with_an_adapter_the_teacher_is_the_teacher() -> None:
    loaded = tiny_model()
    model = _with_adapter(loaded.model, LoraConfig(rank=2), seed=0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    scorer, teacher = (
        Scorer(dataclasses.replace(loaded, model=model)),
        Teacher(ReplicatedWeights(model), FrozenTeacher()),
    )
    groups = GROUPS["nested views with a tail"]
    student = shared_hidden(scorer, groups)
    assert_equal(student, separately(scorer, groups))
    with teacher.weights():
        frozen = shared_hidden(scorer, groups)
        assert_equal(frozen, separately(scorer, groups))
    assert (student[0][0] - frozen[0][0]).abs().max() > 1e-2
    assert_equal(frozen, separately(Scorer(tiny_model()), groups))


@pytest.mark.usefixtures("always")
def test_a_corrupted_prefix_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # One token of the shared beginning differs from what the pairs say: the comparison with separate passes must fail.
    def corrupted(sequences: Sequence[Sequence[int]]) -> Any:
        tree = token_tree(sequences)
        return dataclasses.replace(tree, ids=(tree.ids[0] + 1, *tree.ids[1:]))

    scorer, groups = Scorer(tiny_model()), GROUPS["nested views with a tail"]
    monkeypatch.setattr(shared_prefix, "token_tree", corrupted)
    with pytest.raises(AssertionError):
        assert_equal(shared_hidden(scorer, groups), separately(scorer, groups))


@pytest.mark.parametrize("broken", ["positions", "branches"])
def test_a_model_that_reads_positions_or_masks_otherwise_is_found_out(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(sequences: Sequence[Sequence[int]]) -> Any:
        tree = token_tree(sequences)
        places = tuple(range(len(tree.ids)))
        everything = tuple(((0, runs[-1][0]), runs[-1]) for runs in tree.branches)
        return dataclasses.replace(tree, **{broken: places if broken == "positions" else everything})

    monkeypatch.setattr("atesd.models.token_tree.token_tree", wrong)
    assert not Scorer(tiny_model()).follows_trees


ROPE_BY_LENGTH = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
NOT_SHARED = {
    "soft-capped attention and windows": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)),
    "a sliding window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "frequencies by length": lambda: Phi3ForCausalLM(
        Phi3Config(**SIZES, original_max_position_embeddings=16, rope_parameters=ROPE_BY_LENGTH)
    ),
}


@pytest.mark.parametrize("make", NOT_SHARED.values(), ids=NOT_SHARED.keys())
def test_a_model_that_a_tree_would_mislead_is_scored_in_separate_passes(make: Any) -> None:
    scorer = Scorer(loaded_as(make()))
    assert not scorer.follows_trees
    groups = GROUPS["nested views with a tail"]
    assert_equal(shared_hidden(scorer, groups), separately(scorer, groups))


def test_a_head_that_cannot_be_taken_apart_is_scored_in_separate_passes() -> None:
    loaded = tiny_model()
    loaded.model.register_forward_hook(lambda _m, _a, out: setattr(out, "logits", out.logits * 3))
    scorer, groups = Scorer(loaded), GROUPS["nested views with a tail"]
    assert not scorer.follows_trees
    assert_equal(shared_hidden(scorer, groups), separately(scorer, groups))


def test_no_gradient_and_the_models_own_attention_afterwards() -> None:
    loaded = tiny_model()
    scorer = Scorer(loaded)
    found = shared_hidden(scorer, GROUPS["rollout and answer under one view"])
    assert not found[0][0].requires_grad
    assert loaded.model.config._attn_implementation == "sdpa"


def test_an_empty_completion_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        shared_hidden(Scorer(tiny_model()), [[((7,), ())]])


def test_a_tree_by_hand() -> None:
    # Longest first: 1 2 3 4 5 at places 0-4; then 1 2 9 shares two and adds 9 at place 5; 1 2 9 lies there already.
    tree = token_tree([(1, 2, 9), (1, 2, 3, 4, 5), (1, 2, 9)])
    assert tree.ids == (1, 2, 3, 4, 5, 9)
    assert tree.positions == (0, 1, 2, 3, 4, 2)
    assert tree.paths == (((0, 2), (5, 6)), ((0, 5),), ((0, 2), (5, 6)))
    assert tree.branches == (((0, 5),), ((0, 2), (5, 6)))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=6))
def test_a_tree_holds_every_sequence_and_every_distinct_beginning_once(sequences: list[list[int]]) -> None:
    tree = token_tree(sequences)
    for i, sequence in enumerate(sequences):
        assert [tree.ids[place] for place in tree.places(i)] == sequence
        assert [tree.positions[place] for place in tree.places(i)] == list(range(len(sequence)))
    assert len(tree.ids) == len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})


@given(st.lists(st.integers(0, 1), max_size=6), st.lists(st.integers(0, 1), max_size=6))
def test_common_prefix_counts_tokens_until_the_first_difference(one: list[int], other: list[int]) -> None:
    expected = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert common_prefix(one, other) == expected


@torch.no_grad()
@pytest.mark.usefixtures("always")
def test_a_bfloat16_model_is_followed_to_its_rounding() -> None:
    scorer = Scorer(dataclasses.replace(tiny_model(), model=tiny_model().model.bfloat16()))
    assert scorer.follows_trees
    for groups in GROUPS.values():
        for found, expected in zip(shared_hidden(scorer, groups), separately(scorer, groups), strict=True):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, atol=0.1, rtol=0.05)


def test_separate_passes_are_taken_where_little_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    # 20 tokens in all; a shared beginning of one token saves 1 of 20, of ten tokens 10 of 20.
    taken: list[int] = []
    usual = shared_prefix.tree_states
    monkeypatch.setattr(shared_prefix, "tree_states", lambda b, trees: taken.append(len(trees)) or usual(b, trees))
    scorer = Scorer(tiny_model())
    shared_hidden(scorer, [[((3, *[4] * 9), (1,)), ((3, *[5] * 9), (1,))]])
    assert taken == []
    shared_hidden(scorer, [[((4,) * 10, (1,)), ((4,) * 10, (2,))]])
    assert taken == [1]
