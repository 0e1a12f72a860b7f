"""What is chosen for bfloat16 on a processor that computes in it, where no attention is set."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from atesd.config import ModelConfig
from atesd.models import processor
from atesd.models.load import load_model
from atesd.models.processor import RoundedLinear, adapters_as_their_inputs, attention_note, attention_of
from atesd.models.quiet import quiet


@pytest.mark.parametrize(
    ("settings", "able", "chosen"),
    [
        ({}, True, "sdpa"),
        ({"dtype": "bfloat16"}, True, "eager"),
        ({"dtype": "bfloat16"}, False, "sdpa"),
        ({"dtype": "bfloat16", "max_context_tokens": 1025}, True, "sdpa"),
        ({"dtype": "bfloat16", "attention": "sdpa"}, True, "sdpa"),
        ({"dtype": "bfloat16", "attention": "eager"}, True, "eager"),
        ({"attention": "eager"}, False, "eager"),
    ],
)
def test_eager_is_chosen_in_bfloat16_on_a_processor_that_computes_in_it(monkeypatch, settings, able, chosen):
    monkeypatch.setattr(processor, "computes_in_bfloat16", lambda: able)
    config = ModelConfig(**{"device": "cpu", "max_context_tokens": 1024, **settings})
    assert attention_of(config) == chosen
    told = attention_note(config)
    assert (told is not None) == (chosen == "eager" and config.attention is None)
    assert told is None or told.startswith("model.attention: eager: the faster way")


def test_on_a_gpu_it_stays_sdpa(monkeypatch):
    monkeypatch.setattr(processor, "computes_in_bfloat16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention_of(ModelConfig(dtype="bfloat16", max_context_tokens=1024)) == "sdpa"
    assert attention_of(ModelConfig(dtype="bfloat16", max_context_tokens=1024, device="cpu")) == "eager"


def test_the_adapter_is_told_of_too(monkeypatch):
    monkeypatch.setattr(processor, "computes_in_bfloat16", lambda: True)
    told = attention_note(ModelConfig(dtype="bfloat16", max_context_tokens=1024, device="cpu", lora={"rank": 8}))
    assert told is not None
    assert "the adapter computes in bfloat16 (its weights stay float32)" in told


@pytest.mark.parametrize(("able", "attention"), [(True, "eager"), (False, "sdpa")])
def test_a_model_is_loaded_as_chosen(monkeypatch, able, attention):
    monkeypatch.setattr(processor, "computes_in_bfloat16", lambda: able)
    model = load_model(ModelConfig(dtype="bfloat16", max_context_tokens=1024, device="cpu", lora={"rank": 2})).model
    matrices = {type(module) for name, module in model.named_modules() if name.endswith("lora_A.default")}
    assert matrices == ({RoundedLinear} if able else {nn.Linear})
    assert model.config._attn_implementation == attention
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_in_float32_the_former_default_and_none_are_one_setting():
    assert ModelConfig(attention="sdpa") == ModelConfig()
    assert ModelConfig(attention="sdpa", dtype="bfloat16", max_context_tokens=1024) != ModelConfig(
        dtype="bfloat16", max_context_tokens=1024
    )


def adapted() -> nn.Module:
    import peft

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
    model = LlamaForCausalLM._from_config(LlamaConfig(**sizes, num_attention_heads=4), dtype=torch.bfloat16)
    with quiet():
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def loss_and_gradient(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(24).reshape(2, 12)
    loss = model(input_ids=ids, labels=ids).loss.float()
    model.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_an_adapter_in_bfloat16_over_float32_weights_has_float32s_loss_and_gradient():
    model = adapted()
    loss, exact = loss_and_gradient(model.float())
    kept = {name: p.dtype for name, p in model.bfloat16().named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if name in kept:
            p.data = p.data.float()
    adapters_as_their_inputs(model)
    rounded, gradient = loss_and_gradient(model)
    assert gradient.dtype == torch.float32
    assert abs(rounded - loss) < 0.005 * loss  # a rounding to 8 bits is off by at most 2^-9
    assert 0 < (gradient - exact).norm() < 0.05 * exact.norm()
    query = model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(query.lora_A["default"], RoundedLinear)
    x = torch.randn(3, 32).bfloat16()
    low = x @ query.lora_A["default"].weight.bfloat16().T @ query.lora_B["default"].weight.bfloat16().T
    assert torch.equal(query(x), query.base_layer(x) + low * query.scaling["default"])
