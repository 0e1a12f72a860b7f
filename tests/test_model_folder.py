"""Model folders of strangers: no code of theirs runs, each fault is one line, and what cannot be right is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from atesd.config import LoraConfig, ModelConfig
from atesd.errors import ModelError
from atesd.models.load import load_model, load_tokenizer, save_model
from atesd.models.weights import ReplicatedWeights
from tiny import SIZES, tiny_folder, tiny_model, tiny_tokenizer

LORA = LoraConfig(rank=4, alpha=8)
IDS = torch.tensor([[7, 8, 9, 10]])
Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "tiny")


@pytest.fixture
def adapter(folder: Path) -> Path:
    save_model(load_model(ModelConfig(path=str(folder), lora=LORA)), folder.with_name("adapter"))
    return folder.with_name("adapter")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(ModelConfig(path=str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


# code

CODE = (
    "import pathlib; pathlib.Path(__file__).with_name('it-ran').touch()\n"
    "from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM\n"
    "class Config(Qwen3Config):\n    model_type = 'theirs'\n"
    "class Model(Qwen3ForCausalLM):\n    config_class = Config\n"
    "class Tokens(PreTrainedTokenizerFast):\n    pass\n"
)
MODEL = {"model_type": "theirs", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
TOKENS = {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": [None, "code.Tokens"]}}


@pytest.mark.parametrize("read", [load_model, load_tokenizer], ids=["model", "tokenizer"])
@pytest.mark.parametrize(
    "changes", [{"config": MODEL}, {"tokenizer_config": TOKENS}, {"config": MODEL, "tokenizer_config": TOKENS}]
)
def test_code_of_a_folder_never_runs_whatever_standard_input_says(folder, changes, read, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    (folder / "code.py").write_text(CODE)
    for name, values in changes.items():
        edit(folder / f"{name}.json", **values)
    with pytest.raises(ModelError, match=r"needs code of its own .* which is never run") as caught:
        read(ModelConfig(path=str(folder)))
    assert "\n" not in str(caught.value)
    assert not (folder / "it-ran").exists()


def test_an_architecture_that_transformers_knows_is_read_without_the_code_beside_it(folder):
    (folder / "code.py").write_text(CODE)
    edit(folder / "config.json", auto_map=MODEL["auto_map"])
    assert torch.equal(logits(load_model(ModelConfig(path=str(folder))).model), logits(tiny_model().model))
    assert not (folder / "it-ran").exists()


def test_the_base_of_an_adapter_runs_no_code_either(folder, adapter):
    (folder / "code.py").write_text(CODE)
    edit(folder / "config.json", **MODEL)
    assert "needs code of its own" in refused(adapter)
    assert not (folder / "it-ran").exists()


def test_no_setting_of_an_adapter_or_config_names_code(folder, adapter, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text("import pathlib; pathlib.Path(__file__).with_name('it-ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    edit(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="theirs")
    assert "megatron_config: {'a': 1} is not allowed; expected null: it names code" in refused(adapter)
    edit(folder / "config.json", attn_implementation="someone/kernel")
    assert "attn_implementation: 'someone/kernel' is not allowed" in refused(folder)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("which", ["model", "adapter"])
def test_pickled_weights_are_never_read(folder, adapter, which):
    path = folder if which == "model" else adapter
    (weights,) = path.glob("*.safetensors")
    name = "pytorch_model.bin" if which == "model" else "adapter_model.bin"
    torch.save(load_file(weights), path / name)
    weights.unlink()
    assert f"only in {name}, a pickle, which can run code and is never read" in refused(path)


# faults of the files


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("config", {"num_hidden_layers": "2"}, "num_hidden_layers: '2' is not allowed; expected an integer from 1"),
        ("config", {"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is not allowed"),
        ("config", {"num_hidden_layers": 9}, "(9) must be equal to"),
        ("config", {"num_hidden_layers": 9, "layer_types": None}, "num_hidden_layers: 9, its weights lack all but 2"),
        ("config", {"hidden_size": 64}, "describes model.embed_tokens.weight as [30, 64], its file holds [30, 32]"),
        ("config", {"vocab_size": 10**7}, "describes model.embed_tokens.weight as [10000000, 32]"),
        ("config", {"intermediate_size": True}, "intermediate_size: True is not allowed"),
        ("config", {"model_type": ["qwen3"]}, "model_type: ['qwen3'] is not allowed; expected text"),
        ("config", {"model_type": "nothing"}, "(in config.json)"),
        ("config", {"hidden_act": "nothing"}, "KeyError: "),
        ("config", {"rms_norm_eps": -100.0}, "not finite on its own end token"),
        ("config", {"attention_bias": "x"}, "Validation error for field 'attention_bias': "),
        ("config", {"rope_parameters": 5}, "rope_parameters: 5 is not allowed; expected an object"),
        ("config", {"eos_token_id": "<end>"}, "eos_token_id: '<end>' is not allowed; expected a token id or a list"),
        ("generation_config", {"eos_token_id": [1, 10**6]}, "eos_token_id: 1000000, the model has 30 tokens"),
        ("generation_config", {"temperature": "hot"}, "temperature: 'hot' is not allowed; expected a finite number"),
        ("generation_config", {"do_sample": False, "temperature": 0.6}, "(in generation_config.json)"),
        ("tokenizer_config", {"eos_token": 5}, "eos_token: 5 is not allowed; expected a token's text"),
        ("tokenizer_config", {"eos_token": {"text": "<end>"}}, "eos_token: {'text': '<end>'} is not allowed"),
        ("tokenizer_config", {"added_tokens_decoder": {"a": {}}}, "added_tokens_decoder: {'a': {}} is not allowed"),
        ("tokenizer_config", {"split_special_tokens": True}, "control tokens of the chat template as text; set false"),
        ("tokenizer", {"model": 5}, "model: 5 is not allowed; expected an object"),
        ("tokenizer", {"model": {"type": "BPE"}}, "(in tokenizer.json and tokenizer_config.json)"),
        ("tokenizer", {"added_tokens": [5]}, "added_tokens: [5] is not allowed"),
    ],
)
def test_a_fault_of_a_field_is_named_with_file_and_value(folder, name, values, said):
    edit(folder / f"{name}.json", **values)
    message = refused(folder)
    assert said in message
    assert str(folder) in message


@pytest.mark.parametrize("name", ["config", "tokenizer_config", "tokenizer", "generation_config"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not valid JSON at line 1"),
        (b'{"a": 1', "not valid JSON at line 1"),
        (b'{"a": "\xe9"}', "not UTF-8 at byte 7"),
        (b"[1]", "holds [1], expected an object"),
        (b'{"a": "\\ud83d"}', "holds half of a character"),
        (b'{"a":' * 10**5, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
    ],
    ids=["empty", "cut", "latin", "list", "half", "deep", "digits"],
)
def test_a_file_that_is_no_object_is_named(folder, name, data, said):
    (folder / f"{name}.json").write_bytes(data)
    message = refused(folder)
    assert message.startswith(f"{folder / name}.json: ")
    assert said in message


def test_a_template_in_another_encoding_is_named(folder):
    (folder / "chat_template.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    assert f"{folder}/chat_template.jinja: not UTF-8 at byte 4" in refused(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_weights_that_are_cut_off_are_named(folder, kept):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    assert f"{folder}/model.safetensors: cannot be loaded: " in refused(folder)


def test_weights_that_are_not_finite_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "not finite on its own end token" in refused(folder)


def test_a_token_beyond_the_rows_of_the_model_is_named(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["a"] = 500
    edit(folder / "tokenizer.json", **values)
    assert "tokenizer.json: 'a' has id 500, the model has 30 rows" in refused(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path is empty"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: 5 is not allowed"),
        ({"peft_type": "NOTHING"}, "(in adapter_config.json and its weights)"),
        ({"r": 10**6}, "r: 1000000 is not allowed; expected an integer from 1 to 65536"),
        ({"r": 512}, "r: 512, its weights have rank 4"),
        ({"lora_dropout": 3.0}, "lora_dropout: 3.0 is not allowed"),
        ({"target_modules": {"a": 1}}, "target_modules: {'a': 1} is not allowed"),
        ({"alpha_pattern": []}, "alpha_pattern: [] is not allowed"),
    ],
)
def test_a_fault_of_an_adapter_is_named(adapter, values, said):
    edit(adapter / "adapter_config.json", **values)
    assert said in refused(adapter)


def test_an_adapter_that_names_itself_or_a_ring_as_its_base_is_refused(folder, adapter):
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    assert "leads back to this adapter" in refused(adapter)
    other = adapter.with_name("other")
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(folder))
    save_model(load_model(ModelConfig(path=str(adapter), lora=LORA)), other)
    edit(adapter / "adapter_config.json", base_model_name_or_path=f"{other}/../other")
    assert "leads back to this adapter" in refused(other)


def test_an_adapter_without_its_weights_is_named(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refused(adapter)


# adapters on tied weights


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head"), ("embed_tokens",), "lm_head"])
def test_a_new_adapter_on_a_tied_weight_is_refused(folder, targets):
    with pytest.raises(ModelError, match=r"model.lora.target_modules: .* shares its weight .* leave lm_head and"):
        load_model(ModelConfig(path=str(folder), lora=LoraConfig(rank=4, alpha=8, target_modules=targets)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": r".*\.embed_tokens"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ],
    ids=["head", "pattern", "saved head", "saved embedding", "tokens"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_saved_adapter_on_a_tied_weight_is_refused(folder, tmp_path, settings, dtype):
    base = load_model(ModelConfig(path=str(folder)))
    get_peft_model(base.model, PeftLora(r=2, task_type="CAUSAL_LM", **settings)).save_pretrained(tmp_path / "theirs")
    base.tokenizer.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelError, match=r"adapter_config.json: target_modules and modules_to_save: .* shares its"):
        load_model(ModelConfig(path=str(tmp_path / "theirs"), dtype=dtype))


@pytest.mark.parametrize(
    "targets", ["all-linear", ("lm_head",), ("embed_tokens",), ("q_proj", "lm_head", "embed_tokens")]
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_weights_of_their_own_is_read_back_equal(tmp_path, targets):
    torch.manual_seed(0)
    untied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    untied.save_pretrained(tmp_path / "untied")
    tiny_tokenizer().save_pretrained(tmp_path / "untied")
    lora = LoraConfig(rank=4, alpha=8, target_modules=targets)
    loaded = load_model(ModelConfig(path=str(tmp_path / "untied"), lora=lora))
    with torch.no_grad():
        for parameter in ReplicatedWeights(loaded.model).trained.values():
            parameter.add_(0.1)
    save_model(loaded, tmp_path / "saved")
    again = load_model(ModelConfig(path=str(tmp_path / "saved")))
    torch.testing.assert_close(logits(again.model), logits(loaded.model), atol=1e-3, rtol=1e-4)


# rotary tables


def longrope(tmp_path: Path) -> Path:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {**SIZES, "max_position_embeddings": 512, "original_max_position_embeddings": 64, "rope_scaling": factors}
    del sizes["head_dim"]
    config = Phi3Config(**sizes, sliding_window=None)
    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def dynamic(tmp_path: Path) -> Path:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=scaling)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("make", "kind"), [(longrope, "longrope"), (dynamic, "dynamic")])
def test_a_rotary_table_that_would_change_within_the_run_is_refused_with_the_length(tmp_path, make, kind):
    path = str(make(tmp_path))
    with pytest.raises(ModelError, match=rf"rope_parameters.rope_type: {kind} .* set model.max_context_tokens: 64"):
        load_model(ModelConfig(path=path, max_context_tokens=65))
    model = load_model(ModelConfig(path=path, max_context_tokens=64)).model
    alone = logits(model)[0]
    rows = torch.stack([torch.cat([IDS[0], torch.full((60,), 9)]), torch.full((64,), 8)])
    with torch.no_grad():
        beside = model(input_ids=rows).logits[0, :4]
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_a_rotary_table_that_is_fixed_is_fine_at_any_length(tmp_path, kind):
    scaling: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    scaling |= {"original_max_position_embeddings": 64} if kind in ("llama3", "yarn") else {}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    config = LlamaConfig(**SIZES, max_position_embeddings=256, rope_parameters=scaling)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load_model(ModelConfig(path=str(tmp_path), max_context_tokens=4096))


# ends


def test_the_token_that_ends_a_turn_ends_a_completion(tmp_path):
    # The generation config knows <end> alone; the template ends a turn with <think>, made a special token here.
    loaded = tiny_model()
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    loaded.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <think> ' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    save_model(loaded, tmp_path)
    assert load_model(ModelConfig(path=str(tmp_path))).end_ids == {1, 6}
    assert load_model(ModelConfig(path=str(tmp_path), chat_template=False)).end_ids == {1}
