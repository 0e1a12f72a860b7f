"""How a token is drawn, against brute-force distributions; positions and the cache under it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicLayer

from atesd.engine.cache import PreallocatedLayer
from atesd.engine.draw import draw
from atesd.engine.interface import SamplingParams
from atesd.engine.transformers import TransformersEngine
from engine_contract import PLAIN, requests_of
from tiny import tiny_model


def by_hand(logits: list[float], params: SamplingParams) -> np.ndarray:
    """The filtered distribution in float64, token by token, from the definitions."""
    scaled = np.asarray(logits, dtype=np.float64) / params.temperature
    p = np.exp(scaled - scaled.max())
    if params.top_k:
        p[np.argsort(-p)[params.top_k :]] = 0
    p /= p.sum()
    order, mass, kept = np.argsort(-p), 0.0, []
    for token in order:
        if mass < params.top_p:
            kept.append(token)
        mass += p[token]
    p[[t for t in range(len(p)) if t not in kept or p[t] < params.min_p * p.max()]] = 0
    return p / p.sum()


def tokens_over_the_unit_interval(logits: list[float], params: SamplingParams, count: int) -> np.ndarray:
    """How often each token is drawn when the uniforms are an even grid: within 1/count of its probability."""
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    rows = torch.tensor([logits], dtype=torch.float32).expand(count, -1)
    token, _ = draw(rows, grid, params)
    return np.bincount(token.numpy(), minlength=len(logits)) / count


FILTERS = [
    PLAIN,
    replace(PLAIN, temperature=0.7),
    replace(PLAIN, top_k=3),
    replace(PLAIN, top_p=0.8),
    replace(PLAIN, min_p=0.2),
    replace(PLAIN, temperature=1.3, top_k=5, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("params", FILTERS)
def test_tokens_are_drawn_with_their_filtered_probability(params):
    logits = [0.3, -1.0, 2.0, 1.9, 0.0, 1.1, -3.0, 0.9]
    frequencies = tokens_over_the_unit_interval(logits, params, 20_000)
    np.testing.assert_allclose(frequencies, by_hand(logits, params), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-32, 32).map(lambda n: n / 8), min_size=2, max_size=12, unique=True),
    st.integers(0, 12),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
)
def test_filters_follow_their_definitions_for_any_logits(logits, top_k, top_p, min_p):
    params = replace(PLAIN, top_k=top_k, top_p=top_p, min_p=min_p)
    frequencies = tokens_over_the_unit_interval(logits, params, 2_000)
    np.testing.assert_allclose(frequencies, by_hand(logits, params), atol=1.1e-3)


@pytest.mark.parametrize("scale", [0.0, 8.0])
def test_top_p_agrees_with_a_full_sort_on_a_large_vocabulary(scale):
    # Flat logits need more tokens than the first guess of the nucleus holds; steep ones do not.
    logits = (np.random.default_rng(0).normal(size=1000) * scale + np.arange(1000) * 1e-4).tolist()
    params = replace(PLAIN, top_p=0.9)
    frequencies = tokens_over_the_unit_interval(logits, params, 1_000)
    np.testing.assert_allclose(frequencies, by_hand(logits, params), atol=1.1e-3)


def test_without_padding_or_with_it_absolute_positions_start_at_zero():
    # Rotary positions only matter by their differences; a model with a learned table would notice an offset.
    sizes = {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        absolute = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()
    loaded, requests = replace(tiny_model(), model=absolute), requests_of([2, 9, 5])
    engine = TransformersEngine(loaded, 8)
    together, alone = engine.complete(requests, PLAIN), [engine.complete([one], PLAIN)[0] for one in requests]
    assert [r.completion_ids for r in together] == [r.completion_ids for r in alone]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("params", FILTERS)
def test_extreme_uniforms_still_draw_a_possible_token(uniform, params):
    logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = logits[:, -1] = -200.0  # probability 0 in float32
    token, logprob = draw(logits, torch.full((500,), uniform, dtype=torch.float64), params)
    assert int(token.min()) >= 1
    assert int(token.max()) <= 38
    assert bool(logprob.isfinite().all())


def test_the_preallocated_cache_holds_what_the_plain_one_holds_across_blocks_and_dropped_rows():
    generator = np.random.default_rng(0)
    preallocated, plain = PreallocatedLayer(), DynamicLayer()
    rows = 8
    for length in (250, 3, 1, 4, 300, 1):  # the room of 256 is passed twice
        new = torch.from_numpy(generator.normal(size=(2, rows, 2, length, 8)))
        for layer in (preallocated, plain):
            layer.update(new[0], new[1])
        assert torch.equal(preallocated.keys, plain.keys)
        assert torch.equal(preallocated.values, plain.values)
        assert preallocated.get_seq_length() == plain.get_seq_length()
        rows -= 1
        for layer in (preallocated, plain):
            layer.batch_select_indices(torch.arange(rows) + 1)
