"""Tokenizer, architecture and folder of the word-problem models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from atesd.records import Problem

PAD, END, ASK, SOLVE = "<pad>", "<end>", "<ask>", "<solve>"
VOCABULARY = 1024
MOST_TOKENS = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message['role'] == 'assistant' %}}{SOLVE}{{{{ message['content'] }}}}{END}"
    f"{{% else %}}{ASK}{{{{ message['content'] }}}}{{% endif %}}"
    f"{{% endfor %}}{{% if add_generation_prompt %}}{SOLVE}{{% endif %}}"
)


def words_tokenizer(problems: Iterable[Problem]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens or fewer, learned from problems and references; every digit is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, ASK, SOLVE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{one.text}\n{one.reference}\n" for one in problems), trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[ASK, SOLVE],
        clean_up_tokenization_spaces=False,
        model_max_length=MOST_TOKENS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def words_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> Qwen3Config:
    """A Qwen3 architecture with heads of 32 channels; 192 and 5 give 2.2 million parameters."""
    heads = hidden_size // 32
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=32,
        max_position_embeddings=MOST_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def save_words_model(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, record: dict[str, Any]
) -> None:
    """Write an ordinary transformers folder in the model's type, with `record` as `gates.json`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "gates.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
