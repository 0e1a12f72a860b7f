"""Two models with random weights and files of problems for the text cases: made once, read by both sides.

It imports nothing of atesd. `python -m benchmarks.same.material FOLDER` writes qwen3/, llama/, text.yaml and *.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

SPECIAL = ("<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<system>", "<think>")
ANSWERS = tuple(rf"\boxed{{{digit}}}" for digit in range(4))
WORDS = (*"0123456789+-=;abcdefgh", *ANSWERS, "Problem:", "Reference", "solution:", "<<<", ">>>", "Final", "answer:")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is true %} <think>{% endif %}{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.3,
}


def write(folder: Path) -> None:
    """Everything, into a new folder."""
    folder.mkdir(parents=True)
    write_models(folder)
    rows = [problem(number) for number in range(800)]
    write_rows(folder / "problems.jsonl", rows)
    write_rows(folder / "test.jsonl", [problem(number) for number in range(1000, 1012)])
    names = {"problem": "question", "solution": "rationale", "answer": "final", "id": "name", "difficulty": "level"}
    renamed: list[dict[str, Any]] = [{names[key]: value for key, value in row.items()} for row in rows]
    del renamed[5]["question"]
    write_rows(folder / "columns.jsonl", renamed)
    for row in rows:
        del row["id"], row["answer"], row["difficulty"]
    write_rows(folder / "problems.jsonl", rows)
    (folder / "text.yaml").write_text("loss: {clip: none}\n", "utf-8")


def problem(number: int) -> dict[str, Any]:
    """A sum of digits with a line, of two sentences, per step."""
    draw = random.Random(number)
    digits = [draw.randrange(10) for _ in range(draw.randrange(2, 6))]
    lines = [f"Step {i + 1}: {' + '.join(map(str, digits[: i + 1]))} ; a. Then b c = d." for i in range(len(digits))]
    answer = sum(digits) % 4
    solution = "\n".join([*lines, rf"Final answer: \boxed{{{answer}}}"])
    text = f"{' + '.join(map(str, digits))} = {draw.choice('abcdefgh')} ; {number}"
    return {"id": f"p{number}", "problem": text, "solution": solution, "answer": str(answer), "difficulty": len(digits)}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_models(folder: Path) -> None:
    """The models with their tokenizer, in transformers' format."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **named)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = TEMPLATE
    sizes = {**SIZES, "vocab_size": len(vocabulary)}
    torch.manual_seed(0)
    for name, model in (
        ("qwen3", Qwen3ForCausalLM(Qwen3Config(**sizes))),
        ("llama", LlamaForCausalLM(LlamaConfig(**sizes))),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
