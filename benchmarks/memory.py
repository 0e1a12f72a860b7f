"""The memory that `atesd train --dry-run` foretells, beside the peak of real updates: three shapes, one rank and two.

Every rank is a fresh process. It first trains a toy model, so that libraries, their tables and gloo's buffers are
there; what is resident then is the baseline. Above it is measured the highest point of a second update: by then all
state exists, and what loading took has been given back. Freed blocks go back to the system at once (`GIVES_BACK`), so
that the peak is of tensors that live at the same time; glibc by itself keeps up to a third more.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atesd.config import Config
from atesd.data.splits import ProblemSets
from atesd.forecast.arithmetic import Lengths, Phase, Work, memory, peak
from atesd.forecast.devices import DeviceKind
from benchmarks.children import Mark, forget_peak, in_ranks
from benchmarks.harness import Case, Goal, Ratio, Result, Settings, single
from benchmarks.models import TOY, ModelShape, about_12m, configured, save_random, word_problems

RANKS = (1, 2)
MOST = 0.15
CPU = DeviceKind("cpu", 24e9)
GIVES_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    # In bfloat16 oneDNN makes kernels for every length of a decoded row, and keeps 1,024 of them.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One run whose peak is foretold and measured."""

    model: ModelShape
    settings: Mapping[str, Any]
    rows: int = 16
    rows_at_a_time: int = 8
    problem_tokens: int = 48
    reference_tokens: int = 192
    completion_tokens: int = 128
    model_settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self, folder: str) -> Config:
        """Full exposure and plain texts, whose lengths in tokens are known."""
        return Config.model_validate(
            {
                "model": {"path": folder, "device": "cpu", **self.model_settings},
                "data": {"source": "given.jsonl", "checker": "none"},
                "views": {
                    "problem_text": "{problem}",
                    "instruction": "",
                    "reference_begin": "",
                    "reference_end": "",
                    "transition": "",
                },
                "exposure": "full",
                "sampling": {"completion_tokens": self.completion_tokens},
                "train": {
                    "batch_size": self.rows,
                    "micro_batch_size": self.rows_at_a_time,
                    "threads": 1,
                    "evaluate_every": 0,
                },
                **self.settings,
            }
        )

    @property
    def problems(self) -> ProblemSets:
        """As many as there are rows."""
        made = word_problems(self.rows, self.model.vocabulary, self.problem_tokens, self.reference_tokens)
        return ProblemSets(made, (), made[:1], ())


CASES: Mapping[str, Measured] = {
    "12M, vocabulary 4,096, all weights, frozen teacher": Measured(about_12m(4096), {}),
    "23M, vocabulary 32,768, all weights, EMA teacher, checkpointing": Measured(
        about_12m(32_768), {"teacher": "ema"}, model_settings={"gradient_checkpointing": True}
    ),
    "Llama of 66M, untied, bfloat16, LoRA of rank 16, live teacher": Measured(
        ModelShape(16_384, 640, 1728, 10, 10, 5, 64, tied=False, family="llama"),
        {"teacher": "live"},
        rows_at_a_time=16,
        problem_tokens=128,
        completion_tokens=48,
        model_settings={"dtype": "bfloat16", "attention": "sdpa", "lora": {"rank": 16, "alpha": 32}},
    ),
}
TOYS: Mapping[str, Measured] = {
    "toy": Measured(TOY, {}, rows=4, rows_at_a_time=2, problem_tokens=8, reference_tokens=18, completion_tokens=8)
}


def case_named(name: str) -> Measured:
    """One of the cases, or the toy."""
    return {**CASES, **TOYS}[name]


def foretold(name: str, ranks: int) -> Work:
    """What the arithmetic is asked for a case: its shape from config.json, its contexts as the tokenizer cuts them."""
    from atesd.models.shape import described_shape

    case = case_named(name)
    with tempfile.TemporaryDirectory() as folder:
        save_description(case.model, Path(folder))
        config = case.config(folder)
        shape = described_shape(config.model)
    # `<user>` and `<assistant>` of the template stand around the words.
    student = case.problem_tokens + 2
    teacher = student + case.reference_tokens
    lengths = Lengths(student, student, teacher, teacher, case.reference_tokens, case.reference_tokens)
    return Work(config, shape, lengths, CPU, ranks)


def save_description(shape: ModelShape, folder: Path) -> None:
    """The config.json of a model of this shape, and nothing else."""
    configured(shape).save_pretrained(folder)


def measure(device: str, name: str, folder: str, toy: str) -> int:
    """Bytes by which this rank's second update rises above what was resident before the model was loaded."""
    from atesd.models.load import load_model, load_tokenizer
    from atesd.models.ranks import process_group

    assert device == "cpu"
    case = case_named(name)
    with process_group("cpu") as ranks:
        alike = replace(TOYS["toy"], settings=case.settings, model_settings=case.model_settings)
        _update(alike, toy, load_model(alike.config(toy).model), ranks)
        config = case.config(folder)
        tokenizer = load_tokenizer(config.model)
        gc.collect()
        mark = Mark("cpu")
        loaded = replace(load_model(config.model), tokenizer=tokenizer)
        trainer = _update(case, folder, loaded, ranks)
        gc.collect()
        forget_peak()
        trainer.update(1)
        return mark.rise()


def _update(case: Measured, folder: str, loaded: Any, ranks: Any) -> Any:
    """A trainer that has made one update; no completion ends before its limit."""
    from atesd.build import build
    from atesd.runs import RunFolder
    from atesd.train.listeners import Listeners
    from atesd.train.loop import Trainer

    endless = replace(loaded, end_ids=frozenset({case.model.vocabulary}))
    components = build(case.config(folder), case.problems, loaded=endless, ranks=ranks)
    trainer = Trainer(components, RunFolder(Path(folder) / "run", "benchmark"), Listeners(()))
    trainer.update(0)
    return trainer


def run(settings: Settings) -> Result:
    """Every case with every number of ranks; the largest of the ranks counts."""
    cases, goals = [], []
    for name in CASES if settings.size == "full" else TOYS:
        with tempfile.TemporaryDirectory() as folder:
            for ranks in RANKS:
                found, told = measured_now(name, ranks, Path(folder)), peak(memory(foretold(name, ranks)))
                peaks = {"measured": found, "foretold": round(told.total)}
                title = title_of(name, ranks)
                cases.append(Case(title, memory=peaks, figures={"phase that was foretold to need most": told.name}))
                goals.append(Goal(f"memory, {title}: foretold, off by", "at most", MOST, off(told, found), unit=""))
    return Result("memory", cases, goals)


def measured_now(name: str, ranks: int, folder: Path) -> int:
    """The peak of the largest rank, bytes, measured in fresh processes; models are written into `folder`."""
    model, toy = save_random(case_named(name).model, folder / "model"), save_random(TOY, folder / "toy")
    asked = {"device": "cpu", "name": name, "folder": str(model), "toy": str(toy)}
    found: list[int] = in_ranks(measure, ranks, GIVES_BACK, **asked)
    return max(found)


def title_of(name: str, ranks: int) -> str:
    """What a case with so many ranks is called in the record."""
    return f"{name}, {ranks} rank{'s' * (ranks > 1)}"


def off(told: Phase, found: int) -> Ratio:
    """How far what was foretold is from what was found, as a share of it."""
    return single(abs(told.total / found - 1))
