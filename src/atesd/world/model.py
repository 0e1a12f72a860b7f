"""Architecture, tokenizer and folder of the embedded world models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from atesd.world.problems import END, PAD, UNKNOWN, VOCABULARY

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def world_config() -> Qwen3Config:
    """The architecture of every world model: Qwen3 with about 100,000 parameters."""
    ids = {word: place for place, word in enumerate(VOCABULARY)}
    return Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        eos_token_id=ids[END],
        bos_token_id=None,
    )


def world_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; the chat template emits the message and nothing else."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: place for place, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_world_model(model: Qwen3ForCausalLM, folder: Path, record: dict[str, Any]) -> None:
    """Write an ordinary transformers folder (safetensors, tokenizer, chat template), with `record` as `gates.json`."""
    model.save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    (folder / "gates.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
