"""The whole update, rollout included, beside TRL's own SDFT trainer doing the same work.

TRL trains through its own `train()`; after each of its steps, one of ours follows from the same process, so that both
see the same state of the machine. Same architecture and start, prompts, teacher prompts, batch, completion length,
forward KL, float32, no activation checkpointing; what each samples is its own. That both compute the same loss and
gradient from the same completions is what tests/test_peer_trl.py shows.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from atesd.build import build
from atesd.config import (
    Config,
    DataConfig,
    FullSettings,
    LossConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    ViewsConfig,
)
from atesd.data.splits import ProblemSets
from atesd.data.views import TextRenderer
from atesd.models.load import load_model
from atesd.records import Problem
from atesd.rows import MetricsRow
from atesd.runs import RunFolder
from atesd.train.listeners import Listeners
from atesd.train.loop import Trainer
from benchmarks.children import Mark, peak_of
from benchmarks.harness import Case, Goal, Result, Round, Settings, ratio, single
from benchmarks.models import TOY, ModelShape, about_12m, save_random, word_problems
from benchmarks.peers import muted, peer

PEER, OURS = "TRL SDFTTrainer", "ours"


@dataclass(frozen=True, slots=True)
class Work:
    """One shape of step: rows per update, lengths in tokens."""

    model: ModelShape
    rows: int = 16
    problem_tokens: int = 48
    reference_tokens: int = 192
    completion_tokens: int = 128

    @property
    def problems(self) -> tuple[Problem, ...]:
        """As many as there are rows."""
        return word_problems(self.rows, self.model.vocabulary, self.problem_tokens, self.reference_tokens)

    def __str__(self) -> str:
        return (
            f"vocabulary {self.model.vocabulary:,}, batch {self.rows}, problem {self.problem_tokens}, reference "
            f"{self.reference_tokens}, completion {self.completion_tokens} tokens"
        )


def config_of(folder: Path, rows: int, completion_tokens: int, rows_at_a_time: int = 8) -> Config:
    """Full exposure with TRL's wording, everything else by default."""
    return Config(
        model=ModelConfig(path=str(folder), device="cpu"),
        data=DataConfig(source="given.jsonl", checker="none"),
        views=ViewsConfig(
            problem_text="{problem}", instruction="", reference_begin="", reference_end="", transition=""
        ),
        exposure=FullSettings(),
        loss=LossConfig(clip="none"),
        sampling=SamplingConfig(completion_tokens=completion_tokens),
        train=TrainConfig(
            batch_size=rows, micro_batch_size=rows_at_a_time, max_grad_norm=1.0, threads=1, evaluate_every=0
        ),
    )


def our_trainer(work: Work, folder: Path, rows_at_a_time: int = 8) -> Trainer:
    """Our trainer on the model in `folder`; its completions never end before their limit."""
    problems = work.problems
    config = config_of(folder, work.rows, work.completion_tokens, rows_at_a_time)
    endless = replace(load_model(config.model, config.train.seed), end_ids=frozenset({work.model.vocabulary}))
    components = build(config, ProblemSets(problems, (), problems[:1], ()), loaded=endless)
    return Trainer(components, RunFolder(folder / "run", "benchmark"), Listeners(()))


def train_trl(work: Work, folder: Path, steps: int, callback: TrainerCallback, rows_at_a_time: int) -> None:
    """TRL's trainer on the model in `folder`, with the same work."""
    from datasets import Dataset

    sdft = peer("trl.experimental.sdft")
    views = config_of(folder, work.rows, work.completion_tokens).views
    rows = [
        {
            "prompt": [{"role": "user", "content": TextRenderer(views).student(problem)}],
            "privileged_context": problem.reference,
        }
        for problem in work.problems
    ]
    with muted():
        arguments = sdft.SDFTConfig(
            distillation_mode="full_logits",
            distillation_alpha=0.0,
            distillation_is_clip=None,
            teacher_model_kind="base",
            max_prompt_length=None,
            max_completion_length=work.completion_tokens,
            generation_kwargs={"min_new_tokens": work.completion_tokens},
            num_generations=1,
            shuffle_dataset=False,
            per_device_train_batch_size=rows_at_a_time,
            gradient_accumulation_steps=work.rows // rows_at_a_time,
            gradient_checkpointing=False,
            max_steps=steps,
            learning_rate=5e-6,
            max_grad_norm=1.0,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            output_dir=str(folder / "trl"),
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        given = Dataset.from_list(rows)
        sdft.SDFTTrainer(model=str(folder), args=arguments, train_dataset=given, callbacks=[callback]).train()


class Turns(TrainerCallback):
    """Times each of TRL's steps, and after it one of ours; the first of each warms up."""

    def __init__(self, ours: Callable[[int], MetricsRow]) -> None:
        self.rounds: list[Round] = []
        self.losses: dict[str, list[float]] = {PEER: [], OURS: []}
        self._ours = ours
        self._begun = self._sampled = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """TRL's step begins with its batch in hand, before it generates."""
        self._begun = time.process_time()

    def on_self_distillation_batch_prepared(self, *_: Any, **__: Any) -> None:
        """TRL has generated."""
        self._sampled = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """TRL's optimiser has stepped; our turn."""
        ended = time.process_time()
        row = self._ours(len(self.rounds))
        taken = time.process_time() - ended
        seconds = row["seconds"]
        sampling = taken * seconds["sample"] / sum(seconds.values())
        self.rounds.append(
            {
                PEER: ended - self._begun,
                OURS: taken,
                f"{PEER}: rollout": self._sampled - self._begun,
                f"{OURS}: rollout": sampling,
                f"{PEER}: the rest": ended - self._sampled,
                f"{OURS}: the rest": taken - sampling,
            }
        )
        self.losses[OURS].append(row["loss"] or math.nan)

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """TRL's loss of the step."""
        if logs and "loss" in logs:
            self.losses[PEER].append(logs["loss"])


class PeakOfSecondStep(TrainerCallback):
    """The peak of TRL's second step, when gradients and moments have been there before."""

    def __init__(self) -> None:
        self.found = 0
        self._mark: Mark | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin to watch."""
        gc.collect()
        self._mark = Mark("cpu")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The last step's peak stays."""
        if self._mark is not None:
            self.found = self._mark.rise()


def measure_peak(device: str, variant: str, rows_at_a_time: int, folder: str, work: dict[str, Any]) -> int:
    """Bytes by which the second step of a trainer rises above what was resident before it."""
    assert device == "cpu"
    asked = Work(**{**work, "model": ModelShape(**work["model"])})
    if variant == PEER:
        callback = PeakOfSecondStep()
        train_trl(asked, Path(folder), 2, callback, rows_at_a_time)
        return callback.found
    trainer = our_trainer(asked, Path(folder), rows_at_a_time)
    trainer.update(0)
    gc.collect()
    mark = Mark("cpu")
    trainer.update(1)
    return mark.rise()


def memory_variants(work: Work) -> list[tuple[str, str, int]]:
    """Who, a name's end, and how many rows are backpropagated at a time: the timed ones, then both with fewer."""
    few = max(1, work.rows // 8)
    named = [(who, f", {few} rows at a time", few) for who in (PEER, OURS)]
    return [(PEER, "", work.rows), (OURS, "", 8), *named]


def run_case(work: Work, settings: Settings) -> tuple[Case, list[Goal]]:
    """Times in turns, then a fresh process each for the peaks."""
    with tempfile.TemporaryDirectory() as name:
        folder = save_random(work.model, Path(name))
        trainer = our_trainer(work, folder)
        turns = Turns(lambda update: trainer.update(update).row)
        train_trl(work, folder, settings.rounds + 1, turns, work.rows)
        asked = {"folder": name, "work": asdict(work)}
        memory = {
            f"{variant}{words}": peak_of(measure_peak, settings, variant=variant, rows_at_a_time=rows, **asked)
            for variant, words, rows in memory_variants(work)
        }
    rounds = turns.rounds[1:]
    case = Case(f"step, {work}", rounds, memory, {"first loss": {k: v[0] for k, v in turns.losses.items()}})
    goals = [
        Goal(f"{case.name}: time over {PEER}", "at most", 0.75, ratio(rounds, OURS, PEER)),
        Goal(f"{case.name}: peak over {PEER}", "at most", 0.25, single(memory[OURS] / memory[PEER])),
    ]
    return case, goals


def run(settings: Settings) -> Result:
    """Both vocabularies."""
    works = {
        "full": [Work(about_12m(4096)), Work(about_12m(32_768))],
        "quick": [Work(about_12m(4096), rows=8, completion_tokens=64)],
        "small": [Work(TOY, rows=2, problem_tokens=8, reference_tokens=18, completion_tokens=8)],
    }[settings.size]
    found = [run_case(work, settings) for work in works]
    return Result("step", [case for case, _ in found], [goal for _, goals in found for goal in goals])
