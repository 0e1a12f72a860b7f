"""Sampling completions with the filters of real runs: the builtin engine beside transformers' `generate`.

Equal prompts, top-k 20 and top-p 0.95, every completion of full length. Before anything is timed the builtin engine has
to write, greedily, what `generate` writes; in bfloat16, where rounding decides between near ties, its logits have to be
as close to those of float32 as transformers' are.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from atesd.engine.decode import Decoder
from atesd.engine.factory import LocalKind, engine_for
from atesd.engine.interface import Request, SamplingParams
from atesd.engine.layers import read_network
from atesd.models.load import LoadedModel
from benchmarks.harness import Case, Goal, Result, Settings, Work, in_turns, spread
from benchmarks.models import SMOLLM2_135M, SPECIAL, TOY, ModelShape, about_12m, random_model

GENERATE = "generate"
OURS = "ours, builtin"
THROUGH = "ours, through transformers"
WORTH_ITS_CODE = 1.25  # times our own loop over transformers' forward: below it everywhere, the builtin engine goes
ROUNDED_WORSE = (
    1.5  # times the rounding errors of transformers' own forward; both are a handful of draws of the same size
)
FILTERS: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "top_p": 0.95}


def random_prompts(rows: int, tokens: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Prompts of random tokens between three quarters of `tokens` and `tokens` long."""
    draws = np.random.default_rng(0)
    lengths = draws.integers(max(1, tokens * 3 // 4), tokens + 1, rows)
    return [tuple(draws.integers(len(SPECIAL), vocabulary, n).tolist()) for n in lengths]


def generate(loaded: LoadedModel, prompts: list[tuple[int, ...]], tokens: int, **filters: Any) -> list[tuple[int, ...]]:
    """What `generate` writes after each prompt, left-padded; without filters the most likely tokens."""
    width = max(map(len, prompts))
    ids = torch.tensor([(loaded.pad_id,) * (width - len(prompt)) + prompt for prompt in prompts], device=loaded.device)
    mask = torch.tensor([(0,) * (width - len(prompt)) + (1,) * len(prompt) for prompt in prompts], device=loaded.device)
    drawing: dict[str, Any] = {"do_sample": True, **filters} if filters else {"do_sample": False}
    model: Any = loaded.model
    with torch.no_grad():
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            eos_token_id=sorted(loaded.end_ids),
            pad_token_id=loaded.pad_id,
            **drawing,
        )
    return [tuple(row) for row in written[:, width:].tolist()]


def ours(
    loaded: LoadedModel, requests: list[Request], kind: LocalKind, tokens: int, **filters: Any
) -> list[tuple[int, ...]]:
    """What an engine of ours writes; without filters the most likely tokens."""
    drawing = filters or {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    params = SamplingParams(**drawing, min_p=0.0, completion_tokens=tokens)
    engine = engine_for(loaded, kind, batch_size=len(requests))
    return [rollout.completion_ids for rollout in engine.complete(requests, params)]


def requests_for(prompts: list[tuple[int, ...]]) -> list[Request]:
    """The prompts, each with draws of its own."""
    return [Request(f"p{i}", 0, ids, (0, "benchmark", i)) for i, ids in enumerate(prompts)]


def agreement(loaded: LoadedModel, prompts: list[tuple[int, ...]], tokens: int) -> float:
    """Share of greedy completions that both write token for token alike."""
    theirs, mine = generate(loaded, prompts, tokens), ours(loaded, requests_for(prompts), "builtin", tokens)
    return sum(a == b for a, b in zip(theirs, mine, strict=True)) / len(prompts)


def require_agreement(loaded: LoadedModel, prompt_tokens: int, tokens: int) -> None:
    """Raise `ValueError` unless the builtin engine writes greedily what `generate` writes."""
    prompts = random_prompts(4, prompt_tokens, int(loaded.model.config.vocab_size))
    same = agreement(loaded, prompts, tokens)
    if same < 1:
        raise ValueError(f"builtin and generate differ in {1 - same:.0%} of greedy completions")


def require_close_logits(loaded: LoadedModel, prompt_tokens: int) -> None:
    """Raise `ValueError` if the builtin engine's rounding errors exceed those of the model's own forward.

    They are the distances of the logits after a prompt from those of the same weights in float32.
    """
    (prompt,) = random_prompts(1, prompt_tokens, int(loaded.model.config.vocab_size))
    ids, model = torch.tensor([prompt], device=loaded.device), cast(Any, loaded.model)
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(input_ids=ids, logits_to_keep=1).logits[:, -1]
        theirs = model(input_ids=ids, logits_to_keep=1).logits[:, -1].float()
        mine = Decoder(read_network(loaded.model, 1), [len(prompt)], steps=1).logits(ids)
    own, others = (float((logits - exact).norm() / exact.norm()) for logits in (mine, theirs))
    if own > ROUNDED_WORSE * others:
        raise ValueError(f"builtin logits are {own:.1%} off those of float32, those of transformers {others:.1%}")


def run_case(
    loaded: LoadedModel,
    rows: int,
    prompt_tokens: int,
    tokens: int,
    settings: Settings,
    limit: float = 1.5,
    rounds: int | None = None,
    model: str | None = None,
    warm_up: bool = True,
) -> tuple[Case, Goal]:
    """One batch size."""
    vocabulary = int(loaded.model.config.vocab_size)
    prompts = random_prompts(rows, prompt_tokens, vocabulary)
    requests = requests_for(prompts)
    work: dict[str, Work] = {GENERATE: partial(generate, loaded, prompts, tokens, **FILTERS)}
    kinds: dict[str, LocalKind] = {OURS: "builtin", THROUGH: "transformers"}
    for name, kind in kinds.items():
        work[name] = partial(ours, loaded, requests, kind, tokens, **FILTERS)
    taken = in_turns(work, rounds or settings.rounds, settings.device, warm_up)
    rates = {name: {"tokens per second": rows * tokens / spread([row[name] for row in taken]).median} for name in work}
    name = f"rollout, {model or f'vocabulary {vocabulary:,}'}, batch {rows}, {tokens} tokens, top-k 20, top-p 0.95"
    return Case(name, taken, figures=rates), faster(Case(name, taken), GENERATE, limit)


def faster(case: Case, other: str, limit: float) -> Goal:
    """By how much the builtin engine is to be faster than another variant."""
    gain = spread([row[other] / row[OURS] for row in case.rounds])
    beside = "our loop through transformers" if other == THROUGH else other
    return Goal(f"{case.name}: speed over {beside}", "at least", limit, gain)


def run(settings: Settings) -> Result:
    """Batches of 16 and 64."""
    shape, batches, prompt_tokens, tokens = shapes(settings)
    loaded = random_model(shape)
    require_agreement(loaded, prompt_tokens, min(tokens, 32))
    found = [run_case(loaded, rows, prompt_tokens, tokens, settings) for rows in batches]
    return with_goals("rollout", found)


def shapes(settings: Settings) -> tuple[ModelShape, tuple[int, ...], int, int]:
    """Model, batch sizes, prompt and completion tokens."""
    if settings.size == "small":
        return TOY, (3,), 6, 5
    return about_12m(4096), ((16, 64) if settings.size == "full" else (16,)), 64, 128


def run_smollm2(settings: Settings) -> Result:
    """SmolLM2's shape with random weights, in float32 and bfloat16: the size that a user trains on a CPU.

    Two rounds and no warm-up, since a call takes many seconds.
    """
    toy = settings.size == "small"
    shape, batches, tokens = (TOY, (3,), 5) if toy else (SMOLLM2_135M, (16, 64), 64)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        loaded = random_model(shape, dtype=dtype)
        if dtype == torch.float32:
            require_agreement(loaded, 8, min(tokens, 16))
        else:
            require_close_logits(loaded, 8)
        model = f"SmolLM2-135M shape, {str(dtype).removeprefix('torch.')}"
        for rows in batches:
            found.append(run_case(loaded, rows, 32, tokens, settings, rounds=2, model=model, warm_up=toy))
    return with_goals("rollout-smollm2", found)


def with_goals(name: str, found: list[tuple[Case, Goal]]) -> Result:
    """Beside the goal of each case, that the builtin engine is worth its code."""
    goals = [goal for case, over_generate in found for goal in (over_generate, faster(case, THROUGH, WORTH_ITS_CODE))]
    return Result(name, [case for case, _ in found], goals)
