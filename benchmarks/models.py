"""Models with random weights in true shapes, and problems to go with them: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from atesd.models.load import LoadedModel, save_model
from atesd.records import Problem

SPECIAL = ("<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<system>")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Qwen3 or Llama architecture."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = True
    family: Literal["qwen3", "llama"] = "qwen3"


def about_12m(vocabulary: int) -> ModelShape:
    """10.3M parameters beside the embedding: 11.9M in all at a vocabulary of 4,096, 22.9M at 32,768."""
    return ModelShape(vocabulary, 384, 1152, 6, 6, 2, 64)


SMOLLM2_135M = ModelShape(49_152, 576, 1536, 30, 9, 3, 64, family="llama")
TOY = ModelShape(64, 32, 48, 2, 4, 2, 8)
FAMILIES: Mapping[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "llama": (LlamaForCausalLM, LlamaConfig),
}
QWEN3: Mapping[str, ModelShape] = {
    "1.7B": ModelShape(151_936, 2048, 6144, 28, 16, 8, 128),
    "8B": ModelShape(151_936, 4096, 12288, 36, 32, 8, 128, tied=False),
}


def random_model(shape: ModelShape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Equal weights at every call. No token ends a completion, so that all have the length asked for."""
    tokenizer, config = word_tokenizer(shape.vocabulary), configured(shape)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model = FAMILIES[shape.family][0]._from_config(config, dtype=dtype)
    never = frozenset({shape.vocabulary})
    return LoadedModel(model.eval(), tokenizer, torch.device(device), never, tokenizer.pad_token_id)


def configured(shape: ModelShape) -> Any:
    """What transformers needs to know of a model of this shape, with `word_tokenizer`."""
    return FAMILIES[shape.family][1](
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=16_384,
        tie_word_embeddings=shape.tied,
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=SPECIAL.index("<end>"),
        bos_token_id=None,
        initializer_range=0.05,
    )


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per word (w6, w7, ...), with a chat template."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocabulary))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", bos_token=None
    )
    fast.chat_template = TEMPLATE
    return fast


def save_random(shape: ModelShape, folder: Path) -> Path:
    """A folder that transformers loads."""
    save_model(random_model(shape), folder)
    return folder


def word_problems(count: int, vocabulary: int, problem_tokens: int, reference_tokens: int) -> tuple[Problem, ...]:
    """Problems of random words; the reference is eight segments and a closing."""
    draws = np.random.default_rng(0)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in draws.integers(len(SPECIAL), vocabulary, n))

    segment = max(1, reference_tokens // 9)
    closing = max(1, reference_tokens - 8 * segment)
    return tuple(
        Problem(
            id=f"p{i}",
            text=words(problem_tokens),
            segments=tuple(f"{words(segment)} " for _ in range(8)),
            closing=words(closing),
            answer="7",
        )
        for i in range(count)
    )
