"""Attention in bfloat16 on a processor: the student's forward and backward pass with an adapter, beside float32's.

SmolLM2's own weights, where they were fetched, else its shape with random ones. The gradient of the adapter must be
float32's up to the rounding of bfloat16, the same with both kinds of attention.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from atesd.config import LoraConfig, ModelConfig
from atesd.errors import AtesdError
from atesd.maths.fused import fused_likelihood
from atesd.models.fetch import smollm2_folder
from atesd.models.load import LoadedModel, load_model, save_model
from atesd.models.processor import computes_in_bfloat16
from atesd.models.score import Scorer
from benchmarks import rollout
from benchmarks.harness import Case, Goal, Result, Settings, in_turns, ratio, single
from benchmarks.models import TOY, random_model

Kind = tuple[Literal["float32", "bfloat16"], Literal["sdpa", "eager"]]
BASE = "float32, sdpa"
CHOSEN = "bfloat16, eager"
FUSED = "bfloat16, sdpa"
VARIANTS: dict[str, Kind] = {BASE: ("float32", "sdpa"), FUSED: ("bfloat16", "sdpa"), CHOSEN: ("bfloat16", "eager")}
FASTER = 0.65  # of float32's time
NEAR = 0.05  # of the size of float32's gradient


def run(settings: Settings) -> Result:
    """Rows of 48 tokens of context and up to 48 of completion."""
    small = settings.size == "small"
    rows, repeats = {"full": (8, 3), "quick": (2, 1), "small": (2, 1)}[settings.size]
    context, completion = (6, 5) if small else (48, 48)
    with folder(small) as path:
        models = {name: adapted(path, kind) for name, kind in VARIANTS.items()}
    vocabulary = TOY.vocabulary if small else 49152
    pairs = [(ids[:context], ids[context:]) for ids in rollout.random_prompts(rows, context + completion, vocabulary)]
    works: dict[str, Callable[[], Tensor]] = {name: partial(gradient, one, pairs) for name, one in models.items()}
    exact = works[BASE]()
    apart = {name: float((work() - exact).norm() / exact.norm()) for name, work in works.items() if name != BASE}
    rounds = in_turns(works, repeats, settings.device, warm_up=False)
    case = Case(f"bfloat16, {rows} rows of {context + completion} tokens", rounds, figures={"gradient off": apart})
    return Result("bfloat16", [case], list(goals(case, apart)))


def goals(case: Case, apart: dict[str, float]) -> Iterator[Goal]:
    """The gradient is float32's; on a processor that computes in bfloat16 the chosen attention is the faster one."""
    for name, off in apart.items():
        yield Goal(f"{name}: gradient off float32's, relative", "at most", NEAR, single(off), "")
    if computes_in_bfloat16():
        yield Goal(f"{CHOSEN}: time beside {BASE}", "at most", FASTER, ratio(case.rounds, CHOSEN, BASE))
        yield Goal(f"{CHOSEN}: time beside {FUSED}", "at most", 1.0, ratio(case.rounds, CHOSEN, FUSED))


@contextmanager
def folder(small: bool) -> Iterator[str]:
    """A model folder, or `smollm2`."""
    if not small:
        try:
            yield str(smollm2_folder())
            return
        except AtesdError:
            pass
    with tempfile.TemporaryDirectory() as made:
        save_model(random_model(TOY if small else rollout.SMOLLM2_135M), Path(made) / "model")
        yield str(Path(made) / "model")


def adapted(path: str, kind: Kind) -> LoadedModel:
    """The model with an adapter that changes its logits, the same one in every type."""
    lora = LoraConfig(rank=16, alpha=32)
    loaded = load_model(ModelConfig(path=path, dtype=kind[0], attention=kind[1], device="cpu", lora=lora))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=source).to(parameter))
    return loaded


def gradient(loaded: LoadedModel, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
    """Of the adapter, for the likelihood of the completions: one vector."""
    scored = Scorer(loaded).scored(pairs)
    tokens = torch.tensor([token for _, completion in pairs for token in completion])
    value, _ = fused_likelihood(scored.hidden, scored.head, tokens, torch.full((len(tokens),), 1 / len(tokens)))
    loaded.model.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.float().flatten() for p in loaded.model.parameters() if p.grad is not None])
