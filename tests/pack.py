"""Benchmarks of three problems, and a run of a tiny model that may think, for tests that evaluate on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atesd.config import Config, config_from_mapping
from atesd.data.benchmarks import Asked, content_hash
from atesd.records import Problem
from tiny import tiny_folder

THREE = ("aime24", "aime25", "hmmt-feb25")


def three_problems(name: str, folder: Path) -> Asked:
    """A file with three problems in the name of a benchmark, and the hash that is expected of it."""
    texts = {f"{number} + 1 = {letter}": "7" for number, letter in enumerate("abc", THREE.index(name))}
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"problem": t, "answer": a}) + "\n" for t, a in texts.items()), "utf-8")
    problems = [Problem(t, t, (), "", a, 0) for t, a in texts.items()]
    return Asked(name, str(path), content_hash(problems))


def words_of(asked: list[Asked]) -> list[str]:
    """The options of the command line for these benchmarks."""
    hashes = [word for one in asked for word in ("--expect-hash", f"{one.name}={one.expected}")]
    return ["--benchmark", ",".join(f"{one.name}={one.file}" for one in asked), *hashes]


def write_rows(path: Path, rows: int = 300) -> Path:
    """A file of problems with references of three segments."""
    lines = [{"problem": f"{n} + 1 = a {n}", "solution": f"{n} + 1\n\n= b\n\n\\boxed{{7}}"} for n in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def thinking_config(folder: Path, updates: int = 2, ratio: float = 0.5) -> Config:
    """A run over a tiny model called as one of Qwen3 is, which is trained without thinking."""
    values: dict[str, Any] = {
        "model": {
            "path": str(tiny_folder(folder / "Qwen3-1.7B")),
            "device": "cpu",
            "lora": {"rank": 2, "alpha": 4},
            "student_template": {"enable_thinking": False},
            "teacher_template": {"enable_thinking": False},
            "max_context_tokens": 120,
        },
        "data": {"source": str(write_rows(folder / "rows.jsonl")), "validation_size": 0, "test_size": 0},
        "sampling": {"completion_tokens": 6},
        "train": {
            "num_updates": updates,
            "batch_size": 4,
            "checkpoint_every": 1,
            "keep_checkpoints": 5,
            "evaluate_every": 0,
        },
        "evaluation": {"samples": 4, "completion_tokens": 8, "temperature": 2.0},
        "exposure": {"kind": "fixed", "reveal_ratio": ratio},
    }
    values["data"] |= {"train_size": 16, "probe_size": 1, "checker": "exact", "on_few_rows": "shrink"}
    values["train"] |= {"learning_rate": 0.05}
    return config_from_mapping(values)
