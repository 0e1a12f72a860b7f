"""By which name a model takes its KV cache, on forwards of either name and inside what wraps a model."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from atesd.engine.cache import cache_argument
from atesd.engine.interface import Request, SamplingParams
from atesd.engine.transformers import TransformersEngine
from atesd.errors import ModelError
from atesd.models.load import LoadedModel
from atesd.models.quiet import quiet
from tiny import SIZES, tiny_model

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, completion_tokens=12)
REQUESTS = [Request(f"p{length}", 0, tuple(range(7, 7 + length)), (0, "test")) for length in (3, 9)]


class Newer(torch.nn.Module):
    def forward(self, input_ids, cache=None, **kwargs): ...


class Older(torch.nn.Module):
    def forward(self, input_ids, past_key_values=None, **kwargs): ...


class Between(torch.nn.Module):
    def forward(self, input_ids, past_key_values=None, cache=None): ...


class WithoutCache(torch.nn.Module):
    def forward(self, input_ids, **kwargs): ...


class Renaming(torch.nn.Module):
    """A real model under a forward that knows one of the names only, as code outside transformers may."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.config, self.calls = model, model.config, 0

    def call(self, cache: object, inputs: dict[str, object]) -> object:
        self.calls += 1
        return self.model(**inputs, **{cache_argument(self.model): cache})


class TakesCache(Renaming):
    def forward(self, cache, **inputs):
        return self.call(cache, inputs)


class TakesPastKeyValues(Renaming):
    def forward(self, past_key_values, **inputs):
        return self.call(past_key_values, inputs)


def adapted(model: torch.nn.Module) -> peft.PeftModel:
    with quiet():
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(model, backend="eager")


def completions(loaded: LoadedModel) -> list[tuple[int, ...]]:
    return [rollout.completion_ids for rollout in TransformersEngine(loaded, 8).complete(REQUESTS, GREEDY)]


@pytest.mark.parametrize(
    ("model", "name"), [(Newer(), "cache"), (Older(), "past_key_values"), (Between(), "cache")], ids=str
)
def test_the_name_is_the_one_in_the_signature_and_the_newer_of_two(model, name):
    assert cache_argument(model) == name


@pytest.mark.parametrize(("model", "name"), [(Newer(), "cache"), (Older(), "past_key_values")], ids=str)
def test_a_compiled_model_is_asked_inside_its_wrapper(model, name):
    assert cache_argument(compiled(model)) == name


def test_an_adapted_model_is_asked_inside_its_wrapper_compiled_or_not():
    plain = cache_argument(tiny_model().model)
    model = adapted(tiny_model().model)
    assert {cache_argument(m) for m in (model, compiled(model))} == {plain}
    assert cache_argument(adapted(compiled(tiny_model().model))) == plain


def test_a_forward_that_would_swallow_the_cache_is_refused_by_name():
    with pytest.raises(ModelError, match=r"WithoutCache\.forward takes no KV cache: .*\(input_ids, kwargs\)"):
        cache_argument(WithoutCache())


@pytest.mark.parametrize("renaming", [TakesCache, TakesPastKeyValues])
def test_either_name_gives_the_tokens_of_the_plain_model(renaming):
    loaded = tiny_model()
    wrapped = replace(loaded, model=renaming(loaded.model))
    assert completions(wrapped) == completions(loaded)
    assert wrapped.model.calls > 1


@pytest.mark.parametrize("wrap", [lambda model: model, adapted], ids=["plain", "adapted"])
def test_sampling_warns_of_nothing_and_equals_reading_all_anew_at_each_step(wrap):
    # Warnings are errors here. A new adapter is the identity.
    loaded, expected = tiny_model(), []
    for request in REQUESTS:
        ids = list(request.prompt_ids)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in loaded.end_ids:
                break
        expected.append(tuple(ids[len(request.prompt_ids) :]))
    assert completions(replace(loaded, model=wrap(loaded.model))) == expected


def test_a_model_of_another_architecture_is_sampled_without_a_warning():
    sizes = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, **sizes)).eval()
    assert all(len(ids) > 0 for ids in completions(replace(tiny_model(), model=model)))
