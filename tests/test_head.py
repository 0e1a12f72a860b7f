"""How each architecture makes logits from its last hidden states, against the model's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import atesd.build
from atesd.config import ModelConfig
from atesd.maths.head import Head
from atesd.models.last_layer import last_layer_of
from atesd.models.last_mlp import last_half_of, last_mlp_of
from atesd.models.load import LoadedModel, load_model
from atesd.models.score import Scorer, completion_logprobs
from atesd.session import train
from quick import Ears, quick
from tiny import SIZES, tiny_model

EAGER_EXPERTS = {"experts_implementation": "eager", "decoder_sparse_step": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {},
    "SmolLM3": {},
    "Phi": {"resid_pdrop": 0.0},
    "Phi3": {"resid_pdrop": 0.0},
    "Gemma2": {"final_logit_softcapping": 5.0},
    "Gemma3": {"final_logit_softcapping": 5.0, "sliding_window": 16},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25, "sliding_window": 16},
    "HyperCLOVAX": {"logits_scaling": 4.0},
    # The eager experts have a derivative, but want their tokens by row.
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} | EAGER_EXPERTS,
}
SCALED = ("Gemma2", "Gemma3", "Granite", "Cohere", "Cohere2", "HyperCLOVAX")
# Other norms, parallel blocks, experts.
WITHOUT_LAST_MLP = ("Phi", "Gemma2", "Gemma3", "Cohere", "Cohere2", "HyperCLOVAX", "Qwen3Moe")
WITHOUT_LAST_LAYER = ("Phi",)  # its norm has another name
TEXT_OF = {"Gemma3": "Gemma3Text"}
IDS = (12, 13, 14, 15, 2, 29)


def loaded_model(model: torch.nn.Module) -> LoadedModel:
    tiny = tiny_model()
    return LoadedModel(model.eval(), tiny.tokenizer, torch.device("cpu"), frozenset({1}), 0)


def random_model(name: str) -> torch.nn.Module:
    config = getattr(transformers, f"{TEXT_OF.get(name, name)}Config")(**SIZES, **ARCHITECTURES[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: torch.nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("lm_head.bias"):
                    parameter.normal_()
    return model


def own_logits(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([IDS])).logits[0]
    return logits


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_hidden_states_and_head_give_the_models_own_logits(name: str) -> None:
    model = random_model(name)
    scorer = Scorer(loaded_model(model))
    assert scorer.has_separable_head
    hidden, own = scorer.hidden([(IDS[:1], (*IDS[1:], 3))]), own_logits(model)
    torch.testing.assert_close(scorer.head().logits(hidden), own, atol=2e-5, rtol=2e-5)
    bare = Head(scorer.head().weight).logits(hidden)
    assert ((bare - own).norm() > 0.05 * own.norm()) == (name in (*SCALED, "Phi"))


def test_a_trained_bias_and_a_scale_reach_the_head() -> None:
    assert len(Scorer(loaded_model(random_model("Phi"))).head().trained) == 2
    assert Scorer(loaded_model(random_model("Granite"))).head().scale == 1 / 4
    assert Scorer(loaded_model(random_model("HyperCLOVAX"))).head().scale == 4


@torch.no_grad()
def test_a_scale_that_is_hardly_one_is_not_taken_for_one() -> None:
    model = random_model("Llama")
    model.register_forward_hook(lambda _m, _a, out: setattr(out, "logits", out.logits * 1.002))
    assert not Scorer(loaded_model(model)).has_separable_head


@torch.no_grad()
def test_an_unknown_head_falls_back_to_the_models_own_logits() -> None:
    model = random_model("Llama")
    model.register_forward_hook(lambda _m, _a, out: setattr(out, "logits", out.logits.sinh()))
    scorer = Scorer(loaded_model(model))
    assert not scorer.has_separable_head
    (row,) = completion_logprobs(scorer, [(IDS[:2], IDS[2:])])
    expected = own_logits(model).log_softmax(-1)[1:-1].gather(-1, torch.tensor(IDS[2:])[:, None])
    torch.testing.assert_close(row, expected.squeeze(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("known", [True, False])
def test_training_says_that_it_keeps_the_logits_whole(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_another_head(config: ModelConfig, seed: int, *, divided: bool) -> LoadedModel:
        loaded = load_model(config, seed, divided=divided)
        loaded.model.register_forward_hook(lambda _m, _a, out: setattr(out, "logits", out.logits * 1.5))
        return loaded

    if not known:
        monkeypatch.setattr(atesd.build, "load_model", with_another_head)
    ears = Ears()
    train(quick("train.num_updates=1", "train.evaluate_every=0"), tmp_path / "run", listeners=[ears])
    assert any("so these are kept whole" in text for text in ears.heard) is not known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_gradient_the_logits_are_the_same_and_the_weights_are_cast_a_part_at_a_time(dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=draws).to(dtype) for n in (3, 20_000))
    bias = torch.randn(20_000, generator=draws).to(dtype)
    head = Head(weight, bias, scale=0.5, soft_cap=3.0)
    expected = head.logits(hidden)
    with torch.no_grad(), Casts() as casts:
        torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-6, atol=1e-6)
    assert max(casts.sizes, default=0) < weight.numel()


class Casts(TorchDispatchMode):
    """Notes how many entries every cast has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_the_slope_along_a_change_of_the_states_is_the_derivative_of_the_logits(soft_cap: float | None) -> None:
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, generator=draws, dtype=torch.float64)
    hidden, change = torch.randn(2, 5, 4, generator=draws, dtype=torch.float64)
    head = Head(weight, torch.arange(7, dtype=torch.float64), scale=0.5, soft_cap=soft_cap)

    def along(step: Tensor) -> Tensor:
        return head.logits(hidden + step * change)

    start, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    logits, slope = torch.autograd.functional.jvp(along, start, one)
    torch.testing.assert_close(head.slope(change, logits), slope)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_layer_by_itself_gives_the_backbone_s_output_or_is_not_used(name: str) -> None:
    model: Any = random_model(name)
    backbone = model.eval().get_decoder()
    found = last_layer_of(backbone, torch.tensor([IDS]))
    assert (found is None) == (name in WITHOUT_LAST_LAYER)
    if found is None:
        return
    ids = torch.tensor([IDS, IDS[::-1]])
    with found.heard() as call:
        wanted = backbone(input_ids=ids, use_cache=False).last_hidden_state
    before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    torch.testing.assert_close(found.again(call), wanted)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter *= 1.5 if id(parameter) in found.parameters() else 1
        assert not torch.allclose(found.again(call), wanted)
        torch.testing.assert_close(found.again(call), backbone(input_ids=ids, use_cache=False).last_hidden_state)
    moved = {n for n, p in backbone.named_parameters() if not torch.equal(p, before[n])}
    assert all(f"layers.{len(backbone.layers) - 1}." in n or "norm" in n for n in moved)


@pytest.mark.parametrize("end", [last_mlp_of, last_half_of])
def test_a_block_that_mixes_tokens_is_not_taken_for_the_last_mlp(end: Any) -> None:
    backbone: Any = cast(Any, random_model("Llama")).eval().get_decoder()
    mlp = backbone.layers[-1].mlp

    class Mixing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, states: Tensor) -> Tensor:
            mixed: Tensor = self.mlp(states) + states.cumsum(-2)
            return mixed

    assert end(backbone, torch.tensor([IDS])) is not None
    backbone.layers[-1].mlp = Mixing()
    assert end(backbone, torch.tensor([IDS])) is None


@pytest.mark.parametrize("end", [last_mlp_of, last_half_of])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_mlp_gives_the_backbone_s_output_and_its_derivative_or_is_not_used(name: str, end: Any) -> None:
    """Against a central difference of the whole backbone, whose norms are computed in float32."""
    model: Any = random_model(name)
    backbone = model.eval().double().get_decoder()
    found = end(backbone, torch.tensor([IDS]))
    assert (found is None) == (name in WITHOUT_LAST_MLP)
    if found is None:
        return
    ids = torch.tensor([IDS, IDS[::-1]])
    draws = torch.Generator().manual_seed(0)
    own = [p for p in backbone.parameters() if id(p) in found.parameters()]
    along = {id(p): torch.randn(p.shape, generator=draws, dtype=p.dtype) for p in own}
    sides = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            for parameter in own:
                parameter += step * along[id(parameter)]
            sides.append(backbone(input_ids=ids, use_cache=False).last_hidden_state)
        for parameter in own:
            parameter += 1e-3 * along[id(parameter)]
        with found.heard() as read:
            wanted = backbone(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(found.output(read.at()), wanted)
        torch.testing.assert_close(found.change(read.at(), along), (sides[0] - sides[1]) / 2e-3, rtol=0.01, atol=5e-3)
