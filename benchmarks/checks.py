"""What a GPU computes otherwise than a CPU, each part held against a plain form: rows of figure, tolerance and verdict.

On CUDA decoding replays graphs, attention takes other kernels, products come out of bfloat16 into float32, and the
loss is compiled. In float32 a small model must agree to rounding. In bfloat16 the shape of Qwen3-1.7B must be no
farther from its own float32 copy than transformers' forward is, up to half as much again: both are a few roundings.
"""

from __future__ import annotations

import copy
import gc
import math
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from atesd.config import LoraConfig, ModelConfig, ServerSettings
from atesd.engine.batch import Batch, complete_in_batches
from atesd.engine.captured import CudaGraphDecoder
from atesd.engine.decode import Decoder
from atesd.engine.interface import Request, SamplingParams
from atesd.engine.layers import read_network
from atesd.engine.server import ServerEngine
from atesd.engine.transformers import TransformersEngine
from atesd.maths.fused import fused_likelihood
from atesd.maths.head import Head
from atesd.models.load import LoadedModel, load_model, save_model
from atesd.models.score import Pair, Scorer, logprobs_at
from atesd.models.sharding import sharded_weights
from atesd.models.weights import Weights
from atesd.records import Rollout
from benchmarks import loss, prefix, rollout
from benchmarks.harness import Case, Result, Settings
from benchmarks.models import QWEN3, TOY, ModelShape, random_model
from benchmarks.record import ROOT
from benchmarks.table import cell

ROUNDING = 1e-5
HALF_AS_MUCH_AGAIN = 1.5
GREEDY = SamplingParams(0.0, 1.0, 0, 0.0, completion_tokens=24)
PLAIN = replace(GREEDY, temperature=1.0)
FILTERED = replace(GREEDY, temperature=1.1, top_p=0.95, top_k=20)
LONG = replace(PLAIN, completion_tokens=270)  # beyond one block of the cache, so that a graph is captured anew
SERVED = ModelShape(64, 64, 96, 2, 4, 2, 32, tied=False)  # as small as vLLM takes a head
HEALTHY_WITHIN = 150.0  # seconds that vLLM has


@dataclass(frozen=True, slots=True)
class Check:
    """A figure that may be at most its tolerance; `why` says what was in the way where there is no figure."""

    what: str
    tolerance: float
    measured: float | None = None
    verdict: Literal["passed", "failed", "not run"] = "failed"
    why: str = ""


def at_most(tolerance: float, what: str, measured: float) -> Check:
    """Passed if the figure is a number and no larger."""
    if not math.isfinite(measured):
        return Check(what, tolerance, why=f"measured {measured}")
    return Check(what, tolerance, measured, "passed" if measured <= tolerance else "failed")


def run(settings: Settings) -> Result:
    """All checks. One that raises has failed, and the others are made all the same."""
    rows: list[Check] = []
    for name, group in GROUPS.items():
        try:
            for row in group(settings):
                rows.append(row)
                print(line(row), flush=True)
        except Exception as error:  # whatever went wrong with one group, the others are worth having
            traceback.print_exc()
            rows.append(Check(name, 0.0, why=f"{type(error).__name__}: {error}".splitlines()[0][:200]))
            print(line(rows[-1]), flush=True)
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    return as_result(rows)


def as_result(rows: Sequence[Check]) -> Result:
    """The rows as a record holds them."""
    figures = {
        row.what: {"tolerance": row.tolerance, "measured": row.measured, "verdict": row.verdict, "why": row.why or None}
        for row in rows
    }
    return Result("gpu-checks", [Case("checks", figures=figures)])


def line(row: Check) -> str:
    """For the terminal."""
    figure = row.why if row.measured is None else f"{cell(row.measured)}, at most {cell(row.tolerance)}"
    return f"  {row.verdict:>8}  {row.what}: {figure}"


# Decoding


def captured(loaded: LoadedModel, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
    """The builtin engine with the steps that CUDA replays as graphs; on a CPU the same steps without a graph."""

    def open_batch(rows: Sequence[Request]) -> Batch:
        with torch.no_grad():
            network = read_network(loaded.model, len(rows))
        decoder = Decoder(network, [len(row.prompt_ids) for row in rows], params.completion_tokens)
        return Batch(loaded, rows, params, decoder, partial(CudaGraphDecoder, decoder))

    return complete_in_batches(loaded, requests, len(requests), open_batch)


def requests_of(rows: int, tokens: int, vocabulary: int) -> list[Request]:
    """Prompts of uneven lengths, each with draws of its own."""
    return rollout.requests_for(rollout.random_prompts(rows, tokens, vocabulary))


def share_that_differs(one: Sequence[Rollout], other: Sequence[Rollout]) -> float:
    """Of completions, token for token."""
    return sum(a.completion_ids != b.completion_ids for a, b in zip(one, other, strict=True)) / len(one)


def decoding(settings: Settings) -> Iterator[Check]:
    """In float32 the same tokens as transformers' forward and the same draws give; in bfloat16 the same scores."""
    small = random_model(TOY, settings.device)
    requests = requests_of(6, 24, TOY.vocabulary)
    ways = {"greedy": GREEDY, "drawn": PLAIN, "drawn with top-k and top-p": FILTERED, "drawn, 270 tokens": LONG}
    for name, params in ways.items():
        theirs = TransformersEngine(small, 8).complete(requests, params)
        differing = share_that_differs(captured(small, requests, params), theirs)
        yield at_most(0, f"decoding, float32, {name}: completions unlike transformers'", differing)
    alone = [rollout for request in requests for rollout in captured(small, [request], PLAIN)]
    differing = share_that_differs(captured(small, requests, PLAIN), alone)
    yield at_most(0, "decoding, float32: completions that padding changes", differing)
    ending = replace(small, end_ids=frozenset(range(10, 20)))
    theirs = TransformersEngine(ending, 8).complete(requests, PLAIN)
    differing = share_that_differs(captured(ending, requests, PLAIN), theirs)
    yield at_most(0, "decoding, float32: completions that change where rows end early", differing)
    large = random_model(large_shape(settings), settings.device, torch.bfloat16)
    yield decoded_scores(large, "decoding, bfloat16")


def decoded_scores(loaded: LoadedModel, what: str) -> Check:
    """Log-probabilities that decoding gives of its own tokens, by their distance from those of a float32 copy.

    Over that of transformers' forward in the model's own type.
    """
    requests = requests_of(8, 64, int(loaded.model.config.vocab_size))
    written = captured(loaded, requests, PLAIN)
    pairs = [(rollout.prompt_ids, rollout.completion_ids) for rollout in written]
    theirs = scores(loaded, pairs)
    exact = scores(replace(loaded, model=copy.deepcopy(cast(Any, loaded.model)).float()), pairs)
    ours = torch.tensor([value for rollout in written for value in rollout.logprobs], device=exact.device)
    found = float((ours - exact).norm() / (theirs - exact).norm())
    return at_most(HALF_AS_MUCH_AGAIN, f"{what}: error of log-probabilities over that of transformers'", found)


def scores(loaded: LoadedModel, pairs: Sequence[Pair], rows: int = 8) -> Tensor:
    """Log-probabilities of the completions, one row after another, `rows` read together."""
    with torch.no_grad():
        [found] = logprobs_at([1.0], Scorer(loaded), pairs, rows)
    return torch.cat(found)


def large_shape(settings: Settings) -> ModelShape:
    """That of Qwen3-1.7B, where the machine is meant to hold it."""
    return QWEN3["1.7B"] if settings.size == "full" else TOY


# Scoring


def padded_attention(settings: Settings) -> Iterator[Check]:
    """Rows that are read together, padded, and each by itself; contexts that share their beginning."""
    pairs = [(ids, ids[::-1][: 3 + place]) for place, ids in enumerate(rollout.random_prompts(6, 48, TOY.vocabulary))]
    scorer = Scorer(random_model(TOY, settings.device))
    with torch.no_grad():
        together, alone = scorer.hidden(pairs), torch.cat([scorer.hidden([pair]) for pair in pairs])
    yield at_most(ROUNDING, "padded attention, float32: hidden states, relative", relative(together, alone))
    large = random_model(large_shape(settings), settings.device, torch.bfloat16)
    exact = scores(replace(large, model=copy.deepcopy(cast(Any, large.model)).float()), pairs)
    errors = [float((scores(large, pairs, rows) - exact).norm()) for rows in (8, 1)]
    what = "padded attention, bfloat16: error of log-probabilities over that of rows by themselves"
    yield at_most(HALF_AS_MUCH_AGAIN, what, errors[0] / errors[1])
    lengths = prefix.Lengths(40, 10, 4, 3, 2)
    found = prefix.difference(scorer, prefix.pairs_of(lengths, TOY.vocabulary))
    yield at_most(ROUNDING, "shared prefix, float32: hidden states, relative", found)


def relative(found: Tensor, exact: Tensor) -> float:
    """The distance over the length."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


# The loss


def fused_loss(settings: Settings) -> Iterator[Check]:
    """Against dense logits in float64, both divergences, three regimes; the head's gradient; the likelihood."""
    shape = loss.Shape(256, 1024, 32_768) if settings.size == "full" else loss.Shape(64, 32, 1024)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind in loss.TITLES:
            case = loss.accuracy_case(shape, kind, settings)
            for goal in loss.accuracy_goals({kind: case}):
                yield at_most(goal.limit, f"loss, {goal.what}", goal.measured.median)
        x = loss.make_inputs(shape, device=settings.device)
        exact_loss, exact_grad, exact_head = dense_with_head(x.to(torch.float64))
        found = loss.head_trained(x, "forward_kl")
        yield at_most(1e-4, "loss, head trained, float32: gradient of the head", relative(found[2], exact_head))
        yield at_most(1e-4, "loss, head trained, float32: gradient", relative(found[1], exact_grad))
        yield at_most(ROUNDING, "loss, head trained, float32: loss", relative(found[0], exact_loss))
        yield from likelihood(x)
    uncompiled = [str(warning.message) for warning in caught if "uncompiled" in str(warning.message)]
    what = "loss: parts that the compiler could not take"
    if settings.device == "cuda":
        yield replace(at_most(0, what, len(uncompiled)), why="; ".join(uncompiled)[:200])
    else:
        yield Check(what, 0, verdict="not run", why="only CUDA compiles them")


def dense_with_head(x: loss.Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The forward KL by autograd, with the gradients of states and head."""
    student, head = x.student.detach().requires_grad_(), x.head.detach().requires_grad_()
    log_q, log_p = (student @ head.mT).log_softmax(-1), (x.teacher @ x.head_copy.mT).log_softmax(-1)
    value = ((log_p.exp() * (log_p - log_q)).sum(-1) * x.weights.double()).sum()
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach(), cast(Tensor, student.grad), cast(Tensor, head.grad)


def likelihood(x: loss.Inputs) -> Iterator[Check]:
    """That of SFT and GRPO, some of whose weights are negative."""
    weights = x.weights * torch.linspace(-1, 2, len(x.tokens), device=x.tokens.device)
    found, wide = x.student.detach().requires_grad_(), x.student.double().requires_grad_()
    value, _ = fused_likelihood(found, Head(x.head), x.tokens, weights)
    value.backward()  # type: ignore[no-untyped-call]
    log_q = (wide @ x.head.double().mT).log_softmax(-1).gather(-1, x.tokens[:, None]).squeeze(-1)
    exact = -(log_q * weights.double()).sum()
    exact.backward()  # type: ignore[no-untyped-call]
    yield at_most(ROUNDING, "likelihood, float32: sum", relative(value.detach(), exact.detach()))
    yield at_most(1e-4, "likelihood, float32: gradient", relative(cast(Tensor, found.grad), cast(Tensor, wide.grad)))


# Adapters


def adapters(settings: Settings) -> Iterator[Check]:
    """Decoding and scoring with one; an update that moves it and nothing below it."""
    from benchmarks.gpu import lora_trainer, shapes

    with adapted(TOY, settings, "float32") as small:
        requests = requests_of(6, 24, TOY.vocabulary)
        theirs = TransformersEngine(small, 8).complete(requests, FILTERED)
        differing = share_that_differs(captured(small, requests, FILTERED), theirs)
        yield at_most(0, "LoRA, float32: completions unlike transformers'", differing)
        found, plain = gradients(small), gradients(replace(small, model=on_cpu(small), device=torch.device("cpu")))
        yield at_most(1e-4, "LoRA, float32: gradients beside those of the processor, relative", relative(found, plain))
    with adapted(large_shape(settings), settings, "bfloat16") as large:
        yield decoded_scores(large, "LoRA on bfloat16")
    size = shapes(Settings("small", settings.device))
    with tempfile.TemporaryDirectory() as folder:
        save_model(random_model(TOY, settings.device, torch.bfloat16), Path(folder))
        trainer = lora_trainer(size, Path(folder), settings.device, TOY.vocabulary)
        model: Any = trainer.components.loaded.model
        before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        trainer.update(0)
        moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    below = sum("lora_" not in name for name in moved)
    yield at_most(0, "LoRA on bfloat16, an update: tensors below the adapter that moved", below)
    yield at_most(0, "LoRA on bfloat16, an update: adapters that did not move", int(not moved))


@contextmanager
def adapted(shape: ModelShape, settings: Settings, dtype: Literal["float32", "bfloat16"]) -> Iterator[LoadedModel]:
    """A random model with an adapter that changes its logits."""
    with tempfile.TemporaryDirectory() as folder:
        plain = random_model(shape, settings.device, getattr(torch, dtype))
        save_model(plain, Path(folder) / "model")
        ends = plain.end_ids
        del plain
        path = str(Path(folder) / "model")
        lora = LoraConfig(rank=8, alpha=8)
        loaded = load_model(ModelConfig(path=path, dtype=dtype, device=settings.device, lora=lora))
        source = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in loaded.model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=source).to(parameter))
        yield replace(loaded, end_ids=ends)


def on_cpu(loaded: LoadedModel) -> Any:
    """A copy of the model on the processor."""
    return copy.deepcopy(cast(Any, loaded.model)).cpu()


def gradients(loaded: LoadedModel, weights: Weights | None = None) -> Tensor:
    """Of the likelihood of random completions, over all trained parameters, on the CPU; `weights` where divided."""
    pairs = [(ids, ids[::-1][:8]) for ids in rollout.random_prompts(4, 24, TOY.vocabulary)]
    scored = Scorer(loaded, weights).scored(pairs)
    tokens = torch.tensor([token for _, completion in pairs for token in completion], device=loaded.device)
    value, _ = fused_likelihood(scored.hidden, scored.head, tokens, torch.ones(len(tokens), device=loaded.device))
    loaded.model.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    found = [p.grad for p in loaded.model.parameters() if p.grad is not None]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).float().flatten().cpu() for g in found])


# Divided weights


def divided(settings: Settings) -> Iterator[Check]:
    """FSDP2 of one rank: the gradients of the undivided model, and those of passes in bfloat16 on float32 weights."""
    exact = gradients(random_model(TOY, settings.device, torch.float32))
    tolerances: dict[Literal["bfloat16"] | None, float] = {None: ROUNDING, "bfloat16": 5e-2}
    for compute, tolerance in tolerances.items():
        loaded = random_model(TOY, settings.device, torch.float32)
        config = ModelConfig(path="random", device=settings.device, sharding="full", compute_dtype=compute)
        try:
            found = gradients(loaded, sharded_weights(loaded, config))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        what = f"FSDP2 of one rank, passes in {compute or 'float32'}: gradients, relative"
        yield at_most(tolerance, what, relative(found, exact))


# A server


def server_drift(settings: Settings) -> Iterator[Check]:
    """vLLM, where it is installed, beside this process: with an adapter, `rollout_drift` as a run would have it."""
    what = "server: drift in nats per token, LoRA"
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if settings.size == "full" else "float32"
    tolerance = ServerSettings().drift_alarm if dtype == "bfloat16" else 1e-4
    beside = str(Path(sys.executable).parent)
    if not (shutil.which("vllm") or shutil.which("vllm", path=beside)):
        yield Check(f"{what}, {dtype}", tolerance, verdict="not run", why="vLLM is installed neither on PATH nor here")
        return
    shape = QWEN3["1.7B"] if settings.size == "full" else SERVED
    with adapted(shape, settings, dtype) as loaded, serving(loaded, dtype) as url:
        options = ServerSettings(urls=(url,), timeout=120.0)
        # vLLM refuses an end token beyond the vocabulary, which is how models of random weights never end.
        engine = ServerEngine(replace(loaded, end_ids=frozenset()), options)
        try:
            engine.complete(requests_of(8, 64, shape.vocabulary), PLAIN)
            yield at_most(tolerance, f"{what}, {dtype}", cast(float, engine.drift))
        finally:
            engine.close()


@contextmanager
def serving(loaded: LoadedModel, dtype: str) -> Iterator[str]:
    """`atesd serve` of this model, on a share of the same GPU; ended by its process id."""
    model: Any = loaded.model
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    given = {
        "sampling.engine": "server",
        "sampling.server.urls": url,
        "model.path": model.get_base_model().name_or_path,
        "model.dtype": dtype,
        "model.lora": "{rank: 8, alpha: 8}",
        "model.max_context_tokens": "512",
        "sampling.completion_tokens": "64",
    }
    words = [sys.executable, "-m", "atesd.cli", "serve", "micro"]
    words += [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    words += ["--wait", str(HEALTHY_WITHIN), "--", "--enforce-eager", "--max-num-seqs", "16"]
    if loaded.device.type == "cuda":
        words += ["--gpu-memory-utilization", "0.3"]
    said: list[str] = []
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        reading = threading.Thread(target=lambda: said.extend(child.stdout or ()), daemon=True)
        reading.start()
        try:
            until = time.monotonic() + HEALTHY_WITHIN + 30
            while not any("Ctrl-C ends them" in text for text in said):
                if child.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("vLLM did not start: " + " / ".join(text.strip() for text in said[-3:]))
                time.sleep(0.2)
            yield url
        finally:
            child.terminate()
            child.wait()
            reading.join(10)  # before its pipe is closed


GROUPS: dict[str, Callable[[Settings], Iterator[Check]]] = {
    "decoding": decoding,
    "padded attention": padded_attention,
    "fused loss": fused_loss,
    "adapters": adapters,
    "divided weights": divided,
    "server": server_drift,
}
