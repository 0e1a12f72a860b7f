"""Sampling against generate, brute-force distributions, and itself in other batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicLayer

from atesd.config import LoraConfig, ModelConfig
from atesd.engine.cache import RoomyLayer
from atesd.engine.sample import Request, Sampler, draw, sample
from atesd.errors import TrainingError
from atesd.maths.keyed import uniforms
from atesd.models.load import LoadedModel, load_model
from atesd.records import Rollout
from tiny import tiny_folder, tiny_model

PLAIN = Sampler(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, completion_tokens=12, batch_size=8)
GREEDY = replace(PLAIN, temperature=0.0)
both_engines = pytest.mark.parametrize("engine", ["builtin", "transformers"])


def requests_of(lengths: list[int], steps: int = 12) -> list[Request]:
    ids = np.random.default_rng(5).integers(7, 29, size=(len(lengths), max(lengths)))
    return [
        Request(f"p{i}", i, tuple(ids[i, :length].tolist()), uniforms(steps, 0, "test", i))
        for i, length in enumerate(lengths)
    ]


def step_logits(loaded: LoadedModel, rollout: Rollout) -> torch.Tensor:
    """Logits before each completion token, by one forward pass without cache or padding."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(rollout.prompt_ids) - 1 : -1]


def by_hand(logits: list[float], sampler: Sampler) -> np.ndarray:
    """The filtered distribution in float64, token by token, from the definitions."""
    scaled = np.asarray(logits, dtype=np.float64) / sampler.temperature
    p = np.exp(scaled - scaled.max())
    if sampler.top_k:
        p[np.argsort(-p)[sampler.top_k :]] = 0
    p /= p.sum()
    order, mass, kept = np.argsort(-p), 0.0, []
    for token in order:
        if mass < sampler.top_p:
            kept.append(token)
        mass += p[token]
    p[[t for t in range(len(p)) if t not in kept or p[t] < sampler.min_p * p.max()]] = 0
    return p / p.sum()


def tokens_over_the_unit_interval(logits: list[float], sampler: Sampler, count: int) -> np.ndarray:
    """How often each token is drawn when the uniforms are an even grid: within 1/count of its probability."""
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    rows = torch.tensor([logits], dtype=torch.float32).expand(count, -1)
    token, _ = draw(rows, grid, sampler)
    return np.bincount(token.numpy(), minlength=len(logits)) / count


@both_engines
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_greedy_completions_equal_generate_token_for_token(architecture, engine):
    loaded = tiny_model(architecture=architecture)
    requests = requests_of([3, 9, 5, 1, 7])
    for request, rollout in zip(requests, sample(loaded, requests, replace(GREEDY, engine=engine)), strict=True):
        prompt = torch.tensor([request.prompt_ids])
        output = loaded.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12
        )
        assert rollout.completion_ids == tuple(output[0, len(request.prompt_ids) :].tolist())


FILTERS = [
    PLAIN,
    replace(PLAIN, temperature=0.7),
    replace(PLAIN, top_k=3),
    replace(PLAIN, top_p=0.8),
    replace(PLAIN, min_p=0.2),
    replace(PLAIN, temperature=1.3, top_k=5, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("sampler", FILTERS)
def test_tokens_are_drawn_with_their_filtered_probability(sampler):
    logits = [0.3, -1.0, 2.0, 1.9, 0.0, 1.1, -3.0, 0.9]
    frequencies = tokens_over_the_unit_interval(logits, sampler, 20_000)
    np.testing.assert_allclose(frequencies, by_hand(logits, sampler), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-32, 32).map(lambda n: n / 8), min_size=2, max_size=12, unique=True),
    st.integers(0, 12),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
)
def test_filters_follow_their_definitions_for_any_logits(logits, top_k, top_p, min_p):
    sampler = replace(PLAIN, top_k=top_k, top_p=top_p, min_p=min_p)
    frequencies = tokens_over_the_unit_interval(logits, sampler, 2_000)
    np.testing.assert_allclose(frequencies, by_hand(logits, sampler), atol=1.1e-3)


@pytest.mark.parametrize("scale", [0.0, 8.0])
def test_top_p_agrees_with_a_full_sort_on_a_large_vocabulary(scale):
    # Flat logits need more tokens than the first guess of the nucleus holds; steep ones do not.
    logits = (np.random.default_rng(0).normal(size=1000) * scale + np.arange(1000) * 1e-4).tolist()
    sampler = replace(PLAIN, top_p=0.9)
    frequencies = tokens_over_the_unit_interval(logits, sampler, 1_000)
    np.testing.assert_allclose(frequencies, by_hand(logits, sampler), atol=1.1e-3)


def test_without_padding_or_with_it_absolute_positions_start_at_zero():
    # Rotary positions only matter by their differences; a model with a learned table would notice an offset.
    sizes = {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        absolute = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()
    loaded, requests = replace(tiny_model(), model=absolute), requests_of([2, 9, 5])
    together, alone = sample(loaded, requests, PLAIN), [sample(loaded, [request], PLAIN)[0] for request in requests]
    assert [r.completion_ids for r in together] == [r.completion_ids for r in alone]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("sampler", FILTERS)
def test_extreme_uniforms_still_draw_a_possible_token(uniform, sampler):
    logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = logits[:, -1] = -200.0  # probability 0 in float32
    token, logprob = draw(logits, torch.full((500,), uniform, dtype=torch.float64), sampler)
    assert int(token.min()) >= 1
    assert int(token.max()) <= 38
    assert bool(logprob.isfinite().all())


@both_engines
def test_a_request_gives_the_same_tokens_in_any_batch(engine):
    loaded = tiny_model()
    requests = requests_of([3, 12, 7, 7, 1, 5, 9])
    together = sample(loaded, requests, replace(PLAIN, engine=engine))
    alone = [sample(loaded, [request], replace(PLAIN, engine=engine))[0] for request in requests]
    backwards = sample(loaded, requests[::-1], replace(PLAIN, batch_size=3, engine=engine))[::-1]
    assert [r.completion_ids for r in together] == [r.completion_ids for r in alone]
    assert [r.completion_ids for r in together] == [r.completion_ids for r in backwards]


@both_engines
def test_a_longer_limit_only_continues_what_a_shorter_one_began(engine):
    loaded, requests = tiny_model(), requests_of([4, 6, 8], steps=20)
    short, long = (sample(loaded, requests, replace(PLAIN, completion_tokens=n, engine=engine)) for n in (4, 20))
    assert [r.completion_ids for r in short] == [r.completion_ids[:4] for r in long]


@both_engines
def test_results_come_in_the_order_of_the_requests_with_their_names(engine):
    requests = requests_of([9, 2, 5])
    rollouts = sample(tiny_model(), requests, replace(PLAIN, batch_size=2, engine=engine))
    assert [(r.problem_id, r.sample, r.prompt_ids) for r in rollouts] == [
        (r.problem_id, r.sample, r.prompt_ids) for r in requests
    ]


@both_engines
@pytest.mark.parametrize(("temperature", "scored_at"), [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)])
def test_logprobs_are_those_of_the_unfiltered_scaled_distribution(temperature, scored_at, engine):
    loaded = tiny_model()
    sampler = replace(PLAIN, temperature=temperature, top_k=4, top_p=0.9, engine=engine)
    for rollout in sample(loaded, requests_of([3, 8, 5]), sampler):
        logits = step_logits(loaded, rollout).double() / scored_at
        expected = torch.distributions.Categorical(logits=logits).log_prob(torch.tensor(rollout.completion_ids))
        assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


@both_engines
def test_a_completion_ends_with_its_first_end_token_or_is_truncated(engine):
    loaded = replace(tiny_model(), end_ids=frozenset({10, 11, 12, 13}))
    rollouts = sample(loaded, requests_of([3, 5] * 10), replace(PLAIN, engine=engine))
    assert {r.truncated for r in rollouts} == {True, False}
    for rollout in rollouts:
        ends = [i for i, token in enumerate(rollout.completion_ids) if token in loaded.end_ids]
        assert ends == ([] if rollout.truncated else [len(rollout.completion_ids) - 1])
        assert len(rollout.completion_ids) == len(rollout.logprobs)
        assert not rollout.truncated or len(rollout.completion_ids) == 12


@both_engines
def test_dropping_finished_rows_changes_nothing(engine):
    # 20 rows with many end tokens: rows finish early and leave in several steps. Alone, no row ever leaves a batch.
    loaded = replace(tiny_model(), end_ids=frozenset(range(10, 14)))
    requests = requests_of([3, 5, 8, 2] * 5)
    alone = [sample(loaded, [request], replace(PLAIN, engine=engine))[0] for request in requests]
    for together, single in zip(
        sample(loaded, requests, replace(PLAIN, batch_size=20, engine=engine)), alone, strict=True
    ):
        assert together.completion_ids == single.completion_ids
        assert together.logprobs == pytest.approx(single.logprobs, abs=1e-5)


def test_no_step_is_spent_after_all_rows_have_ended():
    loaded = replace(tiny_model(), end_ids=frozenset(range(30)))
    steps = []
    handle = loaded.model.register_forward_hook(lambda *_: steps.append(1))
    rollouts = sample(loaded, requests_of([3, 5]), replace(PLAIN, engine="transformers"))
    handle.remove()
    assert [len(r.completion_ids) for r in rollouts] == [1, 1]
    assert len(steps) == 1


@both_engines
def test_unusable_logits_name_the_problem(engine):
    loaded = tiny_model()
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[20] = float("nan")
    # The vocabulary is tied, so a NaN row spoils every logit vector of every row.
    with pytest.raises(TrainingError, match=r"not finite while it completes p1"):
        sample(loaded, requests_of([3, 5])[1:], replace(PLAIN, engine=engine))


@both_engines
def test_too_few_uniforms_and_empty_prompts_are_refused(engine):
    loaded, request = tiny_model(), requests_of([3], steps=5)[0]
    with pytest.raises(ValueError, match="5 uniforms, 12 steps"):
        sample(loaded, [request], replace(PLAIN, engine=engine))
    with pytest.raises(ValueError, match="prompt of p0 is empty"):
        sample(loaded, [replace(request, prompt_ids=())], replace(PLAIN, engine=engine))
    assert sample(loaded, [], replace(PLAIN, engine=engine)) == []
    assert len(sample(loaded, [request], replace(GREEDY, engine=engine))) == 1


@both_engines
def test_sampling_leaves_the_model_trainable_and_the_global_generator_alone(engine):
    loaded = tiny_model()
    before = torch.random.get_rng_state()
    rollout = sample(loaded, requests_of([4]), replace(PLAIN, engine=engine))[0]
    assert torch.equal(before, torch.random.get_rng_state())
    loaded.model(input_ids=torch.tensor([rollout.completion_ids])).logits.sum().backward()
    assert all(p.grad is not None for p in loaded.model.parameters())


def test_the_roomy_cache_holds_what_the_plain_one_holds_across_blocks_and_dropped_rows():
    generator = np.random.default_rng(0)
    roomy, plain = RoomyLayer(), DynamicLayer()
    rows = 8
    for length in (250, 3, 1, 4, 300, 1):  # the room of 256 is passed twice
        new = torch.from_numpy(generator.normal(size=(2, rows, 2, length, 8)))
        for layer in (roomy, plain):
            layer.update(new[0], new[1])
        assert torch.equal(roomy.keys, plain.keys)
        assert torch.equal(roomy.values, plain.values)
        assert roomy.get_seq_length() == plain.get_seq_length()
        rows -= 1
        for layer in (roomy, plain):
            layer.batch_select_indices(torch.arange(rows) + 1)


@both_engines
def test_completions_longer_than_a_block_of_the_cache_equal_generate(engine):
    loaded, request = replace(tiny_model(), end_ids=frozenset()), requests_of([6])[0]
    rollout = sample(loaded, [request], replace(GREEDY, completion_tokens=270, engine=engine))[0]
    prompt = torch.tensor([request.prompt_ids])
    output = loaded.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=270, eos_token_id=[]
    )
    assert rollout.completion_ids == tuple(output[0, 6:].tolist())


def test_adapters_and_checkpointing_do_not_change_a_draw(tmp_path):
    config = ModelConfig(path=str(tiny_folder(tmp_path)), lora=LoraConfig(rank=2), gradient_checkpointing=True)
    requests = requests_of([3, 6, 2])
    with_adapter, plain = sample(load_model(config), requests, PLAIN), sample(tiny_model(), requests, PLAIN)
    assert [r.completion_ids for r in with_adapter] == [r.completion_ids for r in plain]
