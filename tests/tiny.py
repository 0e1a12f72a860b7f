"""A tiny model with a word-level tokenizer, made on the fly: for tests that need a model but no checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from atesd.models.load import LoadedModel, save_model

SPECIAL = ("<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<system>", "<think>")
WORDS = (*"0123456789+-=;abcdefgh", r"\boxed{7}")
SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
"""Of a model of any architecture, as small as it gets; no padding but token 0."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is true %} <think>{% endif %}{% endif %}"
)


def tiny_model(
    vocab: int | Sequence[str] = WORDS,
    seed: int = 0,
    chat_template: bool = True,
    architecture: Literal["qwen3", "llama"] = "qwen3",
) -> LoadedModel:
    """About 16,000 random float32 weights on the CPU. `vocab`: the words it knows, or how many (w0, w1, ...).

    Token ids 0..6 are `SPECIAL`; words follow. Weights are drawn large enough that next-token distributions are far
    from uniform. Two calls with the same arguments give equal models.
    """
    words = [f"w{i}" for i in range(vocab)] if isinstance(vocab, int) else list(vocab)
    tokenizer = tiny_tokenizer(words, chat_template)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (
            Qwen3ForCausalLM(Qwen3Config(**sizes))
            if architecture == "qwen3"
            else LlamaForCausalLM(LlamaConfig(**sizes))
        )
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        end_ids=frozenset({tokenizer.eos_token_id}),
        pad_id=tokenizer.pad_token_id,
    )


def tiny_tokenizer(words: Sequence[str] = WORDS, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """One token per word; text is words with single spaces between them."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", bos_token=None
    )
    fast.chat_template = CHAT_TEMPLATE if chat_template else None
    return fast


def tiny_folder(path: Path, **arguments: object) -> Path:
    """Save `tiny_model(**arguments)` as an ordinary transformers folder and return `path`."""
    save_model(tiny_model(**arguments), path)
    return path
