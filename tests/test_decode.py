"""The builtin decoder against `generate` and against the transformers engine, family by family and layout by layout."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import engine_contract as contract
from atesd.config import FrozenTeacher
from atesd.engine import layers
from atesd.engine.batch import Batch
from atesd.engine.builtin import BuiltinEngine
from atesd.engine.captured import CudaGraphDecoder
from atesd.engine.decode import Decoder
from atesd.engine.draw import draw
from atesd.engine.factory import engine_for, engine_note
from atesd.engine.interface import Request, SamplingParams
from atesd.engine.transformers import TransformersEngine
from atesd.errors import ModelError
from atesd.maths.keyed import uniforms
from atesd.models.load import LoadedModel
from atesd.models.processor import adapters_as_their_inputs
from atesd.models.quiet import quiet
from atesd.models.teacher import Teacher
from atesd.models.weights import ReplicatedWeights
from atesd.records import Rollout
from tiny import tiny_model

KEYED = SamplingParams(1.0, 0.95, 20, 0.0, completion_tokens=8)
GREEDY = replace(KEYED, temperature=0.0, top_p=1.0, top_k=0)
SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama with biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, one group": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, llama3 rotary": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": YARN}),
    "qwen2, tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "attention_bias": True}),
    "qwen3, tied": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 6, "tie_word_embeddings": True}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str, dtype: torch.dtype = torch.float32, lora: bool = False, **changes: Any) -> LoadedModel:
    """A random model none of whose tensors is 0 or 1 throughout, as fresh biases, norms and adapters would be."""
    kind, config, own = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(**{**SIZES, **own, **changes}))
        if lora:
            model = adapted(model)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return replace(tiny_model(), model=model.to(dtype).eval(), end_ids=frozenset({1}))


def adapted(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """The model with LoRA adapters."""
    with quiet():
        wrapped: PreTrainedModel = get_peft_model(
            model, LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **changes})
        )
    return wrapped


def requests_of(lengths: list[int]) -> list[Request]:
    return contract.requests_of(lengths, vocabulary=53, lowest=2)


def completed(loaded: LoadedModel, requests: list[Request], params: SamplingParams) -> list[Rollout]:
    return BuiltinEngine(loaded, batch_size=8).complete(requests, params)


@pytest.fixture(params=["as they are", "joined", "packed"])
def layout(request, monkeypatch):
    """The three ways in which weights are read."""
    monkeypatch.setattr(layers, "_COPY_LIMIT", 0 if request.param == "as they are" else 2**30)
    monkeypatch.setattr(layers, "_PACKED_WORK", 0 if request.param == "packed" else 2**60)
    return request.param


def test_weights_are_packed_on_x86_only(monkeypatch):
    monkeypatch.setattr(layers, "_PACKED_WORK", 0)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    with torch.no_grad():
        assert not layers.read_network(make("llama").model, 4).head.packed


def assert_engines_agree(loaded: LoadedModel, requests: list[Request], params: SamplingParams, tolerance: float = 1e-5):
    ours = completed(loaded, requests, params)
    theirs = TransformersEngine(loaded, batch_size=8).complete(requests, params)
    assert [r.completion_ids for r in ours] == [r.completion_ids for r in theirs]
    for own, other in zip(ours, theirs, strict=True):
        assert own.logprobs == pytest.approx(other.logprobs, abs=tolerance)


@every_model
def test_greedy_completions_equal_generate(name):
    loaded, requests = make(name), requests_of([3, 9, 1])
    for request, rollout in zip(requests, completed(loaded, requests, GREEDY), strict=True):
        prompt = torch.tensor([request.prompt_ids])
        output = loaded.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8
        )
        assert rollout.completion_ids == tuple(output[0, len(request.prompt_ids) :].tolist())


@every_model
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.usefixtures("layout")
def test_keyed_draws_and_logprobs_equal_those_of_transformers(name, lora):
    loaded = make(name, lora=lora)
    assert_engines_agree(loaded, requests_of([6, 6, 6]), KEYED)
    assert_engines_agree(loaded, requests_of([3, 17, 8, 1, 30]), KEYED)


@pytest.mark.usefixtures("layout")
def test_an_adapter_that_is_off_is_left_out():
    loaded, requests = make("qwen3", lora=True), requests_of([4, 6])
    with_adapter = completed(loaded, requests, KEYED)
    with loaded.model.disable_adapter():
        assert_engines_agree(loaded, requests, KEYED)
        assert completed(loaded, requests, KEYED) != with_adapter


def test_an_adapter_stays_in_float32_beside_bfloat16_weights():
    loaded = make("llama", torch.bfloat16, lora=True)
    for name, parameter in loaded.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    attention = loaded.model.get_base_model().model.layers[0].self_attn
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        qkv = layers.read_network(loaded.model, 4).layers[0].qkv
        peft = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)
    torch.testing.assert_close(qkv(x), peft, atol=0, rtol=2**-7)  # PEFT too adds in float32 and rounds once
    assert qkv.up is not None
    assert qkv.up.dtype == torch.float32
    assert torch.equal(qkv.parts[0][0][:32], attention.q_proj.base_layer.weight)


def test_an_adapter_that_computes_in_bfloat16_does_so_in_decoding():
    loaded = make("llama", torch.bfloat16, lora=True)
    for name, parameter in loaded.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    adapters_as_their_inputs(loaded.model)
    out = loaded.model.get_base_model().model.layers[0].self_attn.o_proj
    x = torch.randn(1, out.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        projection = layers.read_network(loaded.model, 4).layers[0].attention_out
        torch.testing.assert_close(projection(x), out(x), atol=2**-9, rtol=2**-7)
    assert projection.up is not None
    assert projection.up.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_logits_are_those_of_transformers_up_to_rounding(name):
    loaded = make(name, torch.bfloat16)
    ids = torch.tensor([[5, 9, 3, 12, 30, 7]])
    with torch.no_grad():
        decoder = Decoder(layers.read_network(loaded.model, 1), [5], steps=2)
        ours = torch.cat([decoder.logits(ids[:, :5]), decoder.logits(ids[:, 5:])])
        theirs = loaded.model(input_ids=ids).logits[0, -2:].float()
    # A bfloat16 product is off by up to 2^-9 of itself; a dozen of them follow one another.
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_weights_are_packed_where_plain_ones_are_multiplied_alike(lora, monkeypatch):
    x = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = {}
    for work in (0, 2**60):
        monkeypatch.setattr(layers, "_PACKED_WORK", work)
        with torch.no_grad():
            qkv = layers.read_network(make("llama with biases", torch.bfloat16, lora).model, 3).layers[0].qkv
            assert (qkv.up is not None) == lora
            found[qkv.packed] = qkv(x)
    assert layers._has_products(torch.bfloat16) == (True in found)
    # A bfloat16 result is off by up to 2^-9 of itself; an adapter's is added and rounded once more.
    torch.testing.assert_close(found.get(True, found[False]), found[False], atol=2**-8, rtol=2**-7)


@pytest.mark.parametrize("lengths", [[6, 6], [3, 8]])
def test_keys_that_are_stored_by_column_give_the_same_logits(lengths):
    # The prompts, a step that makes the buffers grow, and one after a row has left.
    network = layers.read_network(make("qwen3", torch.bfloat16).model, 2)
    ids = torch.randint(2, 53, (2, 264), generator=torch.Generator().manual_seed(0))
    found = []
    for by_column in (True, False):
        with torch.no_grad():
            decoder = Decoder(network, lengths, steps=256)
            assert decoder._keys_by_column
            decoder._keys_by_column = by_column
            width = max(lengths)
            parts = [decoder.logits(ids[:, :width]), decoder.logits(ids[:, width : width + 1])]
            decoder.length = 255  # the columns between are zeros to both
            parts += [decoder.logits(ids[:, 9:10]), decoder.logits(ids[:, 10:11])]
            decoder.keep(torch.tensor([1]))
            assert {keys.mT.is_contiguous() for keys, _ in decoder._cache} == {by_column}
            found.append([*parts, decoder.logits(ids[1:, 11:12])])
    for own, plain in zip(*found, strict=True):
        assert float((own - plain).norm() / plain.norm()) < 0.02


@pytest.mark.usefixtures("layout")
def test_weights_are_read_anew_by_every_call():
    loaded, requests = make("qwen3, tied"), requests_of([4, 7])
    before = completed(loaded, requests, KEYED)
    saved = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.1)  # as an optimiser does, in place
    assert_engines_agree(loaded, requests, KEYED)
    assert completed(loaded, requests, KEYED) != before
    loaded.model.load_state_dict(saved)
    assert completed(loaded, requests, KEYED) == before


@pytest.mark.usefixtures("layout")
def test_inside_the_teachers_weights_the_teacher_is_sampled():
    loaded, requests = make("llama"), requests_of([4, 7])
    teacher, before = (
        Teacher(ReplicatedWeights(loaded.model), FrozenTeacher()),
        completed(make("llama"), requests, KEYED),
    )
    with torch.no_grad():
        loaded.model.lm_head.weight.neg_()
    assert completed(loaded, requests, KEYED) != before
    with teacher.weights():
        assert completed(loaded, requests, KEYED) == before
    assert_engines_agree(loaded, requests, KEYED)


def test_room_for_more_than_one_block_is_made_as_it_is_needed():
    loaded = replace(make("qwen3"), end_ids=frozenset())
    assert_engines_agree(loaded, requests_of([250, 3]), replace(KEYED, completion_tokens=20))


UNSUPPORTED = {
    "sliding window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "rotary type dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}}),
    "activation gelu": ("llama", {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_what_is_not_exactly_supported_goes_to_transformers(reason):
    name, changes = UNSUPPORTED[reason]
    loaded = make(name, **changes)
    assert reason in (layers.unsupported(loaded.model) or "")
    assert type(engine_for(loaded, "auto", 8)) is TransformersEngine
    assert reason in (engine_note(loaded, "auto") or "")
    assert engine_note(loaded, "transformers") is None


def test_another_architecture_or_an_unusual_module_is_refused_by_name():
    absolute = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2))
    loaded = replace(tiny_model(), model=absolute.eval())
    with pytest.raises(ModelError, match=r"builtin.*GPT2LMHeadModel.*set sampling.engine: auto"):
        engine_for(loaded, "builtin", 8)
    hooked = make("qwen3")
    engine = BuiltinEngine(hooked, 8)
    hooked.model.model.layers[0].register_forward_hook(lambda *_: None)
    assert layers.unsupported(hooked.model) == "hooks on its modules"
    with pytest.raises(ModelError, match="hooks on its modules"):
        engine.complete(requests_of([3]), KEYED)
    dora = adapted(make("qwen3").model, use_dora=True)
    assert layers.unsupported(dora.eval()) == "an adapter that is not plain LoRA"


def test_every_family_is_decoded_by_the_builtin_engine():
    assert {name: layers.unsupported(make(name, lora=lora).model) for name in MODELS for lora in (False, True)} == (
        dict.fromkeys(MODELS)
    )


@pytest.mark.parametrize("lengths", [[6, 6, 6], [3, 17, 8, 1, 250]])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_steps_of_static_shape_draw_the_same_tokens(name, lengths):
    # What a CUDA graph captures, without the graph; with the longest prompt the cache grows on the way.
    loaded, requests = replace(make(name), end_ids=frozenset()), requests_of(lengths)
    expected = completed(loaded, requests, KEYED)
    padded = torch.tensor([(0,) * (max(lengths) - len(r.prompt_ids)) + r.prompt_ids for r in requests])
    drawn = torch.from_numpy(np.stack([uniforms(8, *request.key) for request in requests]))

    def choose(logits: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return draw(logits, u, KEYED)

    with torch.no_grad():
        decoder = Decoder(layers.read_network(loaded.model, len(requests)), lengths, steps=8)
        first, _ = choose(decoder.logits(padded), drawn[:, 0])
        static = CudaGraphDecoder(decoder, choose, first[:, None], drawn[:, 1:8].contiguous())
        tokens, logprobs = (torch.cat(parts, 1) for parts in zip(static.advance(3), static.advance(4), strict=True))
    assert tokens.tolist() == [list(r.completion_ids[1:]) for r in expected]
    for row, rollout in zip(logprobs.tolist(), expected, strict=True):
        assert row == pytest.approx(rollout.logprobs[1:], abs=1e-5)


def test_padding_sees_something_and_masked_prompts_repeat_their_keys(monkeypatch):
    # On CUDA a row that sees nothing may become NaN, and grouped keys with a mask mean a kernel that holds all scores.
    loaded, requests = replace(make("llama"), end_ids=frozenset()), requests_of([3, 17, 8, 1, 25])
    expected = completed(loaded, requests, KEYED)
    attention, masked = torch.nn.functional.scaled_dot_product_attention, []

    def as_on_cuda(query, keys, values, mask=None, **options):
        mixed = attention(query, keys, values, mask, **options)
        if mask is None:
            return mixed
        masked.append(options["enable_gqa"])
        return mixed.masked_fill((mask <= torch.finfo(mask.dtype).min).all(-1, keepdim=True), torch.nan)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", as_on_cuda)
    assert completed(loaded, requests, KEYED) == expected
    assert masked == [False, False]  # one prompt pass, two layers


def test_a_batch_with_captured_steps_is_freed_without_the_garbage_collector():
    # Its graphs and KV cache are the largest things on a GPU beside the weights.
    loaded = replace(make("llama"), end_ids=frozenset())
    with torch.no_grad():
        decoder = Decoder(layers.read_network(loaded.model, 2), [3, 4], KEYED.completion_tokens)
        batch = Batch(loaded, requests_of([3, 4]), KEYED, decoder, partial(CudaGraphDecoder, decoder))
        del decoder
        assert all(rollout.truncated for rollout in batch.complete())
    alive = weakref.ref(batch)
    gc.disable()
    try:
        del batch
        assert alive() is None
    finally:
        gc.enable()
