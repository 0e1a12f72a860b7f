"""What is asked of a GPU, one part at a time: `python -m benchmarks gpu`, or one of its names.

First that it computes what it should (`checks`), then how fast, each part beside its plain form. The models have the
shapes of Qwen3 and random weights. `--device cpu --quick` runs the same code at toy shapes.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from atesd.build import build
from atesd.config import Config, LoraConfig, LossConfig, ModelConfig, SamplingConfig, TrainConfig
from atesd.data.splits import ProblemSets
from atesd.models.load import load_model, save_model
from atesd.models.score import Scorer
from atesd.runs import RunFolder
from atesd.train.listeners import Listeners
from atesd.train.loop import Trainer
from benchmarks import checks, loss, prefix, rollout
from benchmarks.children import peak_here
from benchmarks.harness import Case, Goal, Result, Settings, Work, in_turns, ratio, seconds_of, single, spread
from benchmarks.models import QWEN3, TOY, ModelShape, random_model, word_problems
from benchmarks.step import config_of

BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Shapes:
    """Every size of this script."""

    gemm: int
    copy_bytes: int
    divergence: loss.Shape
    long_divergence: loss.Shape
    models: Mapping[str, ModelShape]
    decode_rows: tuple[int, int]
    decoded: int
    rows: int
    problem: int
    reference: int
    completion: int


FULL = Shapes(
    gemm=8192,
    copy_bytes=1 << 30,
    divergence=loss.Shape(8192, 4096, 151_936),
    long_divergence=loss.Shape(32_768, 4096, 151_936),
    models=QWEN3,
    decode_rows=(32, 128),
    decoded=256,
    rows=32,
    problem=200,
    reference=2048,
    completion=1024,
)
SMALL = Shapes(
    gemm=64,
    copy_bytes=1 << 16,
    divergence=loss.Shape(64, 32, 256),
    long_divergence=loss.Shape(128, 32, 256),
    models={"1.7B": TOY, "8B": replace(TOY, tied=False)},
    decode_rows=(2, 3),
    decoded=6,
    rows=2,
    problem=8,
    reference=36,
    completion=6,
)


def shapes(settings: Settings) -> Shapes:
    """Full sizes need a GPU."""
    return FULL if settings.size == "full" else SMALL


def milliseconds(rounds: list[dict[str, float]], name: str) -> list[float]:
    """Of one variant."""
    return [1e3 * row[name] for row in rounds]


def calibrate(settings: Settings) -> Result:
    """What this device does at best: a large product in bfloat16, and a copy of its own memory."""
    size, device = shapes(settings), settings.device
    a = torch.randn(size.gemm, size.gemm, device=device, dtype=BF16)
    source = torch.zeros(size.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rounds = in_turns({"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, 10, device)
    figures = {
        "TFLOP/s, bfloat16": 2 * size.gemm**3 / spread([row["product"] for row in rounds]).median / 1e12,
        "TB/s, read and written": 2 * size.copy_bytes / spread([row["copy"] for row in rounds]).median / 1e12,
    }
    return Result("gpu-calibration", [Case(f"{size.gemm}^3 product and device copy", rounds, figures=figures)])


def time_loss(settings: Settings) -> Result:
    """The loss beside TRL's kernel and Liger, both divergences; then the head trained, then many tokens."""
    size, device = shapes(settings), settings.device
    cases: list[Case] = []
    goals: list[Goal] = []
    for divergence, limit in (("forward_kl", 0.65), ("jensen_shannon", 0.5)):
        kind: loss.Divergence = "forward_kl" if divergence == "forward_kl" else "jensen_shannon"
        accurate = loss.accuracy_case(replace(size.divergence, tokens=64), kind, settings)
        case = _loss_case(size.divergence, kind, settings)
        cases += [accurate, case]
        goals += loss.accuracy_goals({kind: accurate})
        ours = spread(milliseconds(list(case.rounds), loss.OURS))
        goals.append(Goal(f"{case.name}: time", "at most", 60, ours, "ms"))
        if "TRL chunked" in case.rounds[0]:
            beside = ratio(case.rounds, loss.OURS, "TRL chunked")
            goals.append(Goal(f"{case.name}: time over TRL chunked", "at most", limit, beside))
    trained = f"{cases[1].name}, head trained"
    x = loss.make_inputs(size.divergence, device=device, dtype=BF16)
    rounds = in_turns({trained: partial(loss.head_trained, x, "forward_kl")}, settings.rounds, device)
    cases.append(Case(trained, rounds))
    goals.append(Goal(f"{trained}: time", "at most", 80, spread(milliseconds(rounds, trained)), "ms"))
    del x
    long = loss.make_inputs(size.long_divergence, device=device, dtype=BF16)
    peak = peak_here(partial(loss.fused, long, "forward_kl"), device)
    cases.append(Case(f"loss, forward KL, {size.long_divergence}, bfloat16", memory={loss.OURS: peak}))
    goals.append(Goal(f"{cases[-1].name}: peak over the inputs", "at most", 1.5, single(peak / 1e9), "GB"))
    return Result("gpu-loss", cases, goals)


def _loss_case(shape: loss.Shape, divergence: loss.Divergence, settings: Settings) -> Case:
    """Times in turns and peaks, in one process: CUDA's own count of its memory is exact."""
    device = settings.device
    variants, absent = loss.usable(loss.AT_FULL_SIZE)
    x = loss.make_inputs(shape, device=device, dtype=BF16)
    work: dict[str, Work] = {"floor": loss.gemm_floor(x)}
    work |= {name: partial(variant, x, divergence) for name, variant in variants.items()}
    if device == "cuda" and "Liger chunked" in work:
        work["Liger chunked, compiled"] = partial(loss.liger_chunked, x, divergence, compiled=True)
    memory: dict[str, int] = {}
    for name in list(work)[1:]:
        try:
            memory[name] = peak_here(work[name], device)
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
            del work[name]
    rounds = in_turns(work, settings.rounds, device)
    return Case(f"loss, {loss.TITLES[divergence]}, {shape}, bfloat16", rounds, memory, peers_absent=absent)


def time_decode(settings: Settings) -> Result:
    """The builtin engine beside `generate` on the 1.7B shape; greedy equality first, in float32 on a small model."""
    size, device = shapes(settings), settings.device
    rollout.require_agreement(random_model(TOY, device), 6, 16)
    loaded = random_model(size.models["1.7B"], device, BF16)
    cases: list[Case] = []
    goals: list[Goal] = []
    for rows, least in zip(size.decode_rows, (9_000, 18_000), strict=True):
        case, faster = rollout.run_case(loaded, rows, size.problem, size.decoded, settings, 6.0, rounds=1)
        cases.append(case)
        rate = rows * size.decoded / case.rounds[0][rollout.OURS]
        goals += [Goal(f"{case.name}: tokens per second", "at least", least, single(rate), ""), faster]
    return Result("gpu-decode", cases, goals)


def time_step(name: str, most_seconds: float, most_gb: float, settings: Settings) -> Result:
    """A whole update with LoRA, its rollout included; the peak counts weights and all."""
    size, device = shapes(settings), settings.device
    with tempfile.TemporaryDirectory() as folder:
        saved = random_model(size.models[name], device, BF16)
        save_model(saved, Path(folder))
        del saved
        gc.collect()
        trainer = lora_trainer(size, Path(folder), device, size.models[name].vocabulary)
        trainer.update(0)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rows = []
        rounds = [
            {"update": seconds_of(lambda u=update: rows.append(trainer.update(u).row), device)}  # type: ignore[misc]
            for update in range(1, 1 + min(3, settings.rounds))
        ]
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    seconds = {phase: float(value) for phase, value in rows[-1]["seconds"].items()}
    what = f"update, {name} shape, {size.rows} rows, {size.completion} new tokens, reference {size.reference}, LoRA"
    goals = [Goal(f"{what}: time", "at most", most_seconds, spread([row["update"] for row in rounds]), "s")]
    if device == "cuda":
        goals.append(Goal(f"{what}: peak", "at most", most_gb, single(peak / 1e9), "GB"))
    return Result(f"gpu-step-{name}", [Case(what, rounds, figures=seconds)], goals)


def lora_trainer(size: Shapes, folder: Path, device: Literal["cpu", "cuda"], vocabulary: int) -> Trainer:
    """Our trainer with an adapter on the bfloat16 model in `folder`; its completions never end before their limit."""
    problems = word_problems(size.rows, vocabulary, size.problem, size.reference)
    config = config_of_lengths(size, folder, device)
    endless = replace(load_model(config.model, config.train.seed), end_ids=frozenset({vocabulary}))
    components = build(config, ProblemSets(problems, (), problems[:1], ()), loaded=endless)
    return Trainer(components, RunFolder(folder / "run", "benchmark"), Listeners(()))


def config_of_lengths(size: Shapes, folder: Path, device: Literal["cpu", "cuda"]) -> Config:
    """Full exposure, LoRA on bfloat16 weights, activation checkpointing, the filters of real runs."""
    plain = config_of(folder, size.rows, size.completion)
    return plain.model_copy(
        update={
            "model": ModelConfig(
                path=str(folder),
                dtype="bfloat16",
                device=device,
                lora=LoraConfig(),
                gradient_checkpointing=True,
                max_context_tokens=8192,
            ),
            "loss": LossConfig(clip="none"),
            "sampling": SamplingConfig(top_k=20, top_p=0.95, completion_tokens=size.completion, batch_size=size.rows),
            "train": TrainConfig(batch_size=size.rows, evaluate_every=0),
        }
    )


def time_prefix(settings: Settings) -> Result:
    """Five ratios and answers on the 1.7B shape; equality first, in float32 on a small model."""
    size, device = shapes(settings), settings.device
    prefix.require_same(Scorer(random_model(TOY, device)), prefix.Lengths(40, 10, 4, 3, 2), TOY.vocabulary)
    shape = size.models["1.7B"]
    lengths = prefix.Lengths(size.reference, size.completion, problem=size.problem)
    scorer = Scorer(random_model(shape, device, BF16))
    case, goals = prefix.run_case(scorer, lengths, shape.vocabulary, settings, limit=1.8)
    return Result("gpu-prefix", [case], goals[:1])


PARTS: dict[str, Callable[[Settings], Result]] = {
    "gpu-checks": checks.run,
    "gpu-calibration": calibrate,
    "gpu-loss": time_loss,
    "gpu-decode": time_decode,
    "gpu-step-1.7B": partial(time_step, "1.7B", 6.0, 40.0),
    "gpu-step-8B": partial(time_step, "8B", 20.0, 90.0),
    "gpu-prefix": time_prefix,
}
