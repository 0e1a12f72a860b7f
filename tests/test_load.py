"""Loading, saving, adapters and checkpointing of tiny models, and what is said when something is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atesd.config import LoraConfig, ModelConfig
from atesd.engine.cache import cache_argument, preallocated_cache
from atesd.errors import ModelError
from atesd.models import load
from atesd.models.load import LoadedModel, load_model, save_model, without_checkpointing
from atesd.models.weights import ReplicatedWeights
from tiny import tiny_folder, tiny_model

IDS = torch.tensor([[7, 8, 9, 10]])
LORA = LoraConfig(rank=4, alpha=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=IDS).logits


@pytest.mark.usefixtures("no_network")
def test_a_folder_is_loaded_as_it_was_saved_without_the_network(folder):
    loaded = load_model(ModelConfig(path=str(folder)))
    assert torch.equal(logits(loaded), logits(tiny_model()))
    assert (loaded.end_ids, loaded.pad_id, loaded.model.training) == (frozenset({1}), 0, False)
    assert loaded.tokenizer.chat_template == tiny_model().tokenizer.chat_template


def test_weights_have_the_dtype_that_was_asked_for(folder):
    loaded = load_model(ModelConfig(path=str(folder), dtype="bfloat16"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_eager_and_sdpa_attention_agree(folder):
    eager, sdpa = (load_model(ModelConfig(path=str(folder), attention=kind)) for kind in ("eager", "sdpa"))
    torch.testing.assert_close(logits(eager), logits(sdpa), atol=1e-5, rtol=1e-5)


def test_every_end_token_of_the_generation_config_counts(tmp_path):
    loaded = tiny_model()
    loaded.model.generation_config.eos_token_id = [5, 9]
    save_model(loaded, tmp_path)
    assert load_model(ModelConfig(path=str(tmp_path))).end_ids == {1, 5, 9}


def test_without_a_pad_token_the_end_token_fills(tmp_path):
    loaded = tiny_model()
    loaded.tokenizer.pad_token = None
    save_model(loaded, tmp_path)
    assert load_model(ModelConfig(path=str(tmp_path))).pad_id == 1


def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains(folder):
    loaded = load_model(ModelConfig(path=str(folder), lora=LORA))
    assert torch.equal(logits(loaded), logits(tiny_model()))
    assert all("lora_" in name for name in ReplicatedWeights(loaded.model).trained)
    # 7 linear layers in each of 2 blocks, two matrices each; the tied head is left alone.
    assert len(ReplicatedWeights(loaded.model).trained) == 28


def test_an_adapter_is_a_function_of_the_seed_alone(folder):
    config = ModelConfig(path=str(folder), lora=LORA)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, again, other = (ReplicatedWeights(load_model(config, seed=seed).model).trained for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "q_proj"])
def test_an_adapter_sits_on_the_named_modules(folder, targets):
    config = ModelConfig(path=str(folder), lora=LoraConfig(target_modules=targets))
    names = ReplicatedWeights(load_model(config).model).trained
    found = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    assert found == {targets} if isinstance(targets, str) else set(targets)


def test_dropout_never_acts_while_gradients_flow(folder):
    loaded = load_model(ModelConfig(path=str(folder), lora=LoraConfig(rank=4)))
    with torch.no_grad():
        for parameter in ReplicatedWeights(loaded.model).trained.values():
            parameter.add_(0.1)
    once, twice = loaded.model(input_ids=IDS).logits, loaded.model(input_ids=IDS).logits
    assert torch.equal(once, twice)
    once.sum().backward()
    assert all(p.grad is not None for p in ReplicatedWeights(loaded.model).trained.values())


@pytest.mark.parametrize("lora", [None, LORA])
def test_checkpointing_recomputes_layers_and_changes_no_gradient(folder, lora):
    gradients, calls = [], []
    for checkpointing in (False, True):
        config = ModelConfig(path=str(folder), lora=lora, gradient_checkpointing=checkpointing)
        loaded = load_model(config)
        count: list[int] = []
        attention = next(m for name, m in loaded.model.named_modules() if name.endswith("layers.0.self_attn"))
        attention.register_forward_hook(lambda *_, count=count: count.append(1))
        loaded.model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
        calls.append(len(count))
        gradients.append([p.grad for p in ReplicatedWeights(loaded.model).trained.values()])
        assert not loaded.model.get_input_embeddings()._forward_hooks  # which would take the builtin engine away
    assert calls == [1, 2]
    assert all(gradient is not None for gradient in gradients[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_cache_works_inside_without_checkpointing_only(folder):
    loaded = load_model(ModelConfig(path=str(folder), gradient_checkpointing=True))
    with torch.no_grad(), without_checkpointing(loaded.model):
        cache = preallocated_cache(loaded.model.config)
        loaded.model(input_ids=IDS, use_cache=True, **{cache_argument(loaded.model): cache})
    assert cache.get_seq_length() == 4
    assert loaded.model.model.layers[0].training
    assert not loaded.model.model.layers[0].mlp.training


def moved(loaded: LoadedModel) -> LoadedModel:
    with torch.no_grad():
        for parameter in ReplicatedWeights(loaded.model).trained.values():
            parameter.add_(0.05)
    return loaded


def test_a_saved_model_loads_through_transformers_with_tied_weights(folder, tmp_path):
    loaded = moved(load_model(ModelConfig(path=str(folder))))
    save_model(loaded, tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".safetensors", ".json", ".jinja"}
    assert torch.equal(logits(load_model(ModelConfig(path=str(tmp_path)))), logits(loaded))


@pytest.mark.usefixtures("no_network")
def test_a_saved_adapter_loads_merged_into_the_base_it_names(folder, tmp_path):
    loaded = moved(load_model(ModelConfig(path=str(folder), lora=LORA)))
    save_model(loaded, tmp_path)
    merged = load_model(ModelConfig(path=str(tmp_path)))
    torch.testing.assert_close(logits(merged), logits(loaded), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(merged), logits(tiny_model()))
    assert not any("lora" in name for name, _ in merged.model.named_parameters())


def test_an_adapter_trained_on_top_of_a_saved_one_is_read_back_with_both(folder, tmp_path):
    first = moved(load_model(ModelConfig(path=str(folder), lora=LORA)))
    save_model(first, tmp_path / "first")
    second = moved(load_model(ModelConfig(path=str(tmp_path / "first"), lora=LORA)))
    save_model(second, tmp_path / "second")
    again = load_model(ModelConfig(path=str(tmp_path / "second")))
    torch.testing.assert_close(logits(again), logits(second), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(again), logits(first))


def test_an_adapter_on_a_bfloat16_base_is_read_back_bit_for_bit(folder, tmp_path):
    # What training changes is smaller than the rounding of bfloat16 weights: merged, most of it would be lost.
    half = ModelConfig(path=str(folder), dtype="bfloat16")
    loaded = raised(load_model(half.model_copy(update={"lora": LORA})), 1e-3)
    save_model(loaded, tmp_path)
    again = load_model(half.model_copy(update={"path": str(tmp_path)}))
    assert torch.equal(logits(again), logits(loaded))
    assert not torch.equal(logits(again), logits(load_model(half)))
    assert ReplicatedWeights(again.model).trained == {}


def raised(loaded: LoadedModel, by: float) -> LoadedModel:
    """With an adapter that adds something."""
    with torch.no_grad():
        for name, parameter in ReplicatedWeights(loaded.model).trained.items():
            if "lora_B" in name:
                parameter.add_(by)
    return loaded


def test_an_adapter_on_top_of_a_saved_one_in_bfloat16_is_read_back_with_both_bit_for_bit(folder, tmp_path):
    half = ModelConfig(path=str(folder), dtype="bfloat16", lora=LORA)
    stages, path = [], str(folder)
    for number in range(3):  # each on top of the one before
        stages.append(raised(load_model(half.model_copy(update={"path": path})), 0.02))
        path = str(tmp_path / str(number))
        save_model(stages[-1], Path(path))
        again = load_model(ModelConfig(path=path, dtype="bfloat16"))
        assert torch.equal(logits(again), logits(stages[-1]))
    assert len({tuple(logits(stage).flatten().tolist()) for stage in stages}) == 3


def test_a_new_adapter_on_a_saved_one_in_bfloat16_says_what_is_lost(folder, tmp_path):
    config = ModelConfig(path=str(folder), dtype="bfloat16", lora=LORA)
    save_model(load_model(config), tmp_path)
    onto = config.model_copy(update={"path": str(tmp_path)})
    assert "with model.dtype: float32 nothing is" in str(load.merging_note(onto))
    for kept in (config, onto.model_copy(update={"dtype": "float32"}), onto.model_copy(update={"lora": None})):
        assert load.merging_note(kept) is None


@pytest.mark.filterwarnings("default:Found missing adapter keys")
def test_an_adapter_whose_file_lacks_weights_is_refused(folder, tmp_path):
    save_model(load_model(ModelConfig(path=str(folder), lora=LORA)), tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    del held[next(name for name in held if "lora_B" in name)]
    save_file(held, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"adapter_model.safetensors: Found missing adapter keys .*; fetch the adapter"
    ):
        load_model(ModelConfig(path=str(tmp_path)))


def test_an_adapter_of_a_base_by_a_relative_path_is_read_from_elsewhere(tmp_path, monkeypatch):
    tiny_folder(tmp_path / "here" / "base")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in ("base", "./base", "../here/base"):
        loaded = raised(load_model(ModelConfig(path=path, lora=LORA)), 0.02)
        save_model(loaded, tmp_path / "adapter")
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path / "there")
            again = load_model(ModelConfig(path=str(tmp_path / "adapter")))
        torch.testing.assert_close(logits(again), logits(loaded), atol=1e-4, rtol=1e-4)


def test_an_adapter_without_its_base_says_so(folder, tmp_path):
    save_model(load_model(ModelConfig(path=str(folder), lora=LORA)), tmp_path)
    settings = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(settings.replace(str(folder), str(folder) + "-gone"))
    with pytest.raises(ModelError, match=r"there is no folder .*-gone"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_cuda_is_never_replaced_by_the_cpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"model.device: cuda was asked for"):
        load_model(ModelConfig(path=str(folder), device="cuda"))
    assert load_model(ModelConfig(path=str(folder), device="auto")).device.type == "cpu"


def test_a_missing_chat_template_names_the_setting(tmp_path):
    tiny_folder(tmp_path, chat_template=False)
    with pytest.raises(ModelError, match=r"set model.chat_template: false"):
        load_model(ModelConfig(path=str(tmp_path)))
    assert load_model(ModelConfig(path=str(tmp_path), chat_template=False)).pad_id == 0


def test_a_missing_end_token_is_refused(tmp_path):
    loaded = tiny_model()
    loaded.tokenizer.eos_token = None
    save_model(loaded, tmp_path)
    with pytest.raises(ModelError, match=r"no end token; set eos_token in tokenizer_config.json"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_missing_peft_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r'pip install "atesd\[lora\]"'):
        load_model(ModelConfig(path=str(folder), lora=LORA))


def test_target_modules_that_do_not_exist_are_named(folder):
    with pytest.raises(ModelError, match=r"model.lora.target_modules: \('nothing',\)"):
        load_model(ModelConfig(path=str(folder), lora=LoraConfig(target_modules=("nothing",))))


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(path):
    with pytest.raises(ModelError, match=f"there is no folder {path}"):
        load_model(ModelConfig(path=path))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"neither config.json nor adapter_config.json"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_a_damaged_weight_file_is_one_line(tmp_path):
    tiny_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_model(ModelConfig(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fill_the_model_are_named(tmp_path):
    tiny_folder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its weights lack model\.norm\.weight"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    tiny_folder(tmp_path)
    tiny_model(vocab=40).tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"47 tokens, the model has 30"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_an_unreachable_hub_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="the hub cannot be reached") as caught:
        load_model(ModelConfig(path="someone/some-model-that-is-not-cached"))
    assert "\n" not in str(caught.value)


def test_an_unknown_world_lists_the_ones_there_are(monkeypatch, tmp_path):
    monkeypatch.setattr(load.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(ModelError, match=r"no embedded model world:zz; there are: none"):
        load_model(ModelConfig(path="world:zz"))
    tiny_folder(tmp_path / "world_models" / "a")
    with pytest.raises(ModelError, match=r"world:zz; there are: a"):
        load_model(ModelConfig(path="world:zz"))
    assert torch.equal(logits(load_model(ModelConfig(path="world:a"))), logits(tiny_model()))


def test_the_models_of_word_problems_come_with_a_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(load.importlib.resources, "files", lambda _: tmp_path / "src" / "atesd")
    with pytest.raises(ModelError, match=r"no words:a; there are: none.*checkpoints/words.*atesd world pretrain words"):
        load_model(ModelConfig(path="words:a"))
    tiny_folder(tmp_path / "checkpoints" / "words" / "a")
    assert torch.equal(logits(load_model(ModelConfig(path="words:a"))), logits(tiny_model()))
