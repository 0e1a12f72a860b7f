"""bfloat16 on a processor: SmolLM2's passes with an adapter, an update of 32 rollouts, and the memory of 16 rows.

The weights are SmolLM2's own where they were fetched, else its shape with random ones; the task is that of the recipe
`smollm2-sums`. Loss and gradient of every variant must be float32's up to the rounding of bfloat16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atesd.build import build
from atesd.config import Config, LoraConfig, ModelConfig, load_config
from atesd.errors import AtesdError
from atesd.maths.fused import fused_likelihood
from atesd.models.fetch import smollm2_folder
from atesd.models.load import LoadedModel, load_model, save_model
from atesd.models.processor import computes_in_bfloat16
from atesd.models.score import Pair, Scorer, completion_tokens
from atesd.runs import RunFolder
from atesd.train.listeners import Listeners
from atesd.train.loop import Trainer
from benchmarks.children import peak_of, resident
from benchmarks.harness import Case, Goal, Result, Settings, in_turns, ratio, single, spread
from benchmarks.models import SMOLLM2_135M, TOY, random_model
from benchmarks.rollout import random_prompts

BASE, CHOSEN = "float32, sdpa", "bfloat16, as chosen: eager, adapter in bfloat16"
VARIANTS: Mapping[str, dict[str, Any]] = {
    BASE: {"dtype": "float32"},
    "bfloat16, sdpa": {"dtype": "bfloat16", "attention": "sdpa"},
    "bfloat16, eager": {"dtype": "bfloat16", "attention": "eager"},
    CHOSEN: {"dtype": "bfloat16"},
}
FASTER = 1 / 2.65  # of float32's time: what a pilot on an Intel processor found
LOSS_OFF, GRADIENT_OFF = 1e-3, 0.05  # of float32's
SECONDS, GIGABYTES = 12.0, 3.0  # of an update of 32 rollouts; resident at most with 16 rows together
UPDATE, ROWS = 32, 16


def run(settings: Settings) -> Result:
    """The passes, an update, and its memory in fresh processes."""
    with folder(settings.size == "small") as path:
        parts = [passes(path, settings), updates(path, settings), memory(path, settings)]
    return Result("bfloat16", [case for case, _ in parts], [goal for _, goals in parts for goal in goals])


def passes(path: str, settings: Settings) -> tuple[Case, list[Goal]]:
    """The student's pass, forward and backward, over 48 tokens of context and up to 48 of completion."""
    small = settings.size == "small"
    rows, rounds = {"full": (8, 2), "quick": (2, 1), "small": (2, 1)}[settings.size]
    context, completion = (6, 5) if small else (48, 48)
    models = {name: adapted(path, kind) for name, kind in VARIANTS.items()}
    vocabulary = TOY.vocabulary if small else SMOLLM2_135M.vocabulary
    pairs = [(ids[:context], ids[context:]) for ids in random_prompts(rows, context + completion, vocabulary)]
    works = {name: partial(gradient, one, pairs) for name, one in models.items()}
    loss, exact = works[BASE]()
    off = {}
    for name in [name for name in works if name != BASE]:
        other, found = works[name]()
        off[name] = {"loss off": abs(other / loss - 1), "gradient off": float((found - exact).norm() / exact.norm())}
    taken = in_turns(works, rounds, "cpu", warm_up=False)
    case = Case(f"bfloat16, passes, {rows} rows of up to {context + completion} tokens", taken, figures=off)
    goals = []
    for what, limit in (("loss off", LOSS_OFF), ("gradient off", GRADIENT_OFF)):
        worst = max(row[what] for row in off.values())
        goals.append(Goal(f"bfloat16: {what} float32's, relative", "at most", limit, single(worst), ""))
    if computes_in_bfloat16():
        name = f"bfloat16, passes: time over {BASE}"
        goals.append(Goal(name, "at most", FASTER, ratio(taken, CHOSEN, BASE)))
    return case, goals


def updates(path: str, settings: Settings) -> tuple[Case, list[Goal]]:
    """A whole update, sampling included, in float32 and as chosen: the first of a run."""
    rows = UPDATE if settings.size == "full" else 2
    with tempfile.TemporaryDirectory() as out:
        made = {name: trainer(path, name, rows, 8, out, settings.size) for name in (BASE, CHOSEN)}
        taken = in_turns({name: partial(one.update, 0) for name, one in made.items()}, 1, "cpu", warm_up=False)
    seconds = spread([row[CHOSEN] for row in taken])
    case = Case(f"bfloat16, an update of {rows} rollouts of smollm2-sums, full exposure", taken)
    return case, [Goal(f"{case.name}: CPU seconds", "at most", SECONDS, seconds, "s")]


def memory(path: str, settings: Settings) -> tuple[Case, list[Goal]]:
    """The most that a process holds, libraries included, whose update has all its rows together."""
    rows = ROWS if settings.size == "full" else 2
    peaks = {
        name: peak_of(measure_peak, settings, path=path, name=name, rows=rows, size=settings.size)
        for name in (BASE, CHOSEN)
    }
    case = Case(f"bfloat16, a run of {rows} rows together of smollm2-sums", memory=peaks)
    return case, [Goal(f"{case.name}: resident, GB", "at most", GIGABYTES, single(peaks[CHOSEN] / 1e9), "")]


def measure_peak(device: str, path: str, name: str, rows: int, size: str) -> int:
    """Bytes resident at most in this process until its first update has ended."""
    assert device == "cpu"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        trainer(path, name, rows, rows, out, size).update(0)
    return resident("VmHWM")


def trainer(path: str, name: str, rows: int, together: int, out: str, size: str) -> Trainer:
    """A run of the recipe whose completions never end before their limit."""
    config = config_of(path, name, rows, together, size)
    loaded = load_model(config.model)
    endless = replace(loaded, end_ids=frozenset({len(loaded.tokenizer) + 1}))
    return Trainer(build(config, loaded=endless), RunFolder(Path(out) / name, "benchmark"), Listeners(()))


def config_of(path: str, name: str, rows: int, together: int, size: str) -> Config:
    """The recipe `smollm2-sums` with full exposure, in one of the variants."""
    own = {f"model.{setting}": value for setting, value in VARIANTS[name].items()}
    own |= {"model.path": path, "model.device": "cpu", "train.batch_size": rows, "train.micro_batch_size": together}
    if size == "small":
        own["sampling.completion_tokens"] = 5
    return load_config("smollm2-sums", ["exposure=full", *(f"{setting}={value}" for setting, value in own.items())])


@contextmanager
def folder(small: bool) -> Iterator[str]:
    """A model folder."""
    if not small:
        try:
            yield str(smollm2_folder())
            return
        except AtesdError:
            pass
    with tempfile.TemporaryDirectory() as made:
        save_model(random_model(TOY if small else SMOLLM2_135M), Path(made) / "model")
        yield str(Path(made) / "model")


def adapted(path: str, kind: Mapping[str, Any]) -> LoadedModel:
    """The model with an adapter that changes its logits, the same one in every variant."""
    lora = LoraConfig(rank=16, alpha=32)
    loaded = load_model(ModelConfig(path=path, device="cpu", max_context_tokens=256, lora=lora, **kind))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=source).to(parameter))
    return loaded


def gradient(loaded: LoadedModel, pairs: list[Pair]) -> tuple[float, Tensor]:
    """The loss, nats per token of the completions, and its gradient for the adapter as one vector."""
    scored, tokens = Scorer(loaded).scored(pairs), completion_tokens(pairs, loaded.device)
    value, _ = fused_likelihood(scored.hidden, scored.head, tokens, torch.full((len(tokens),), 1 / len(tokens)))
    loaded.model.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.float().flatten() for p in loaded.model.parameters() if p.grad is not None]
    return float(value.detach()), torch.cat(gradients)
