"""The divergence between given hidden states: time, memory and accuracy, beside dense logits, TRL and Liger.

Forward and backward together, the head frozen, gradient for the student's hidden states. Every variant must first give
the dense loss and gradient, so that nothing is timed that computes something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from atesd.maths.divergence import Objective, chunked_loss
from atesd.maths.fused import fused_divergence
from atesd.maths.head import Head
from benchmarks.children import peak_here, peak_of
from benchmarks.harness import Case, Goal, Result, Round, Settings, Work, in_turns, ratio, single
from benchmarks.peers import peer

Divergence = Literal["forward_kl", "jensen_shannon"]
TITLES: dict[Divergence, str] = {"forward_kl": "forward KL", "jensen_shannon": "Jensen-Shannon"}
SMALL_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Inputs:
    """Hidden states [N, H] of both sides, their head [V, H], a copy of it elsewhere in memory, and the tokens [N]."""

    student: Tensor
    teacher: Tensor
    head: Tensor
    head_copy: Tensor
    tokens: Tensor

    @property
    def weights(self) -> Tensor:
        """1 / N for every token."""
        return torch.full((len(self.tokens),), 1 / len(self.tokens), device=self.tokens.device)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another format."""
        head = self.head.to(dtype)
        return Inputs(self.student.to(dtype), self.teacher.to(dtype), head, head.clone(), self.tokens)

    def first(self, tokens: int) -> Inputs:
        """The same heads, fewer tokens."""
        return replace(self, student=self.student[:tokens], teacher=self.teacher[:tokens], tokens=self.tokens[:tokens])


LossAndGrad = tuple[Tensor, Tensor]
Variant = Callable[[Inputs, Divergence], LossAndGrad]


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens, hidden size, vocabulary."""

    tokens: int
    hidden: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, hidden {self.hidden:,}, vocabulary {self.vocabulary:,}"


def make_inputs(shape: Shape, kl: float = 0.1, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    """Gaussian hidden states whose logits have standard deviation 2, and the student's off by about `kl` nats.

    Two Gaussian logit vectors whose difference has variance s^2 are s^2 / 2 nats apart, to first order.
    """
    source = torch.Generator(device).manual_seed(0)
    spread = 2.0
    head = torch.randn(shape.vocabulary, shape.hidden, generator=source, device=device) * (spread / shape.hidden**0.5)
    teacher = torch.randn(shape.tokens, shape.hidden, generator=source, device=device)
    noise = torch.randn(shape.tokens, shape.hidden, generator=source, device=device)
    student = teacher + noise * ((2 * kl) ** 0.5 / spread)
    tokens = torch.randint(shape.vocabulary, (shape.tokens,), generator=source, device=device)
    return Inputs(student, teacher, head, head, tokens).to(dtype)


def dense(x: Inputs, divergence: Divergence) -> LossAndGrad:
    """Both logit matrices whole, softmax in float32 or better, autograd: what most code does."""
    student = x.student.detach().requires_grad_()
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = F.linear(student, x.head).to(wide).log_softmax(-1)
    log_p = F.linear(x.teacher, x.head).to(wide).log_softmax(-1)
    if divergence == "forward_kl":
        entries = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    else:
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=wide))
        to_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        entries = (to_teacher + F.kl_div(log_m, log_q, reduction="none", log_target=True)) / 2
    return _backward((entries.sum(-1) * x.weights).sum(), student)


def trl_chunked(x: Inputs, divergence: Divergence) -> LossAndGrad:
    """TRL's chunked divergence (trl.kernels.chunked_divergence)."""
    divergence_of = peer("trl.kernels.chunked_divergence").ChunkedDivergenceFunction.apply
    student = x.student.detach().requires_grad_()
    beta = 0.0 if divergence == "forward_kl" else 0.5
    per_token, _ = divergence_of(student, x.head, None, x.teacher, x.head, None, beta)
    return _backward((per_token * x.weights).sum(), student)


def trl_gkd(x: Inputs, divergence: Divergence) -> LossAndGrad:
    """The function of TRL's GKD trainer, on whole logits."""
    divergence_of = peer("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    student = x.student.detach().requires_grad_()
    beta = 0.0 if divergence == "forward_kl" else 0.5
    with torch.no_grad():
        teacher_logits = F.linear(x.teacher, x.head)
    return _backward(divergence_of(F.linear(student, x.head), teacher_logits, beta=beta), student)


def liger_chunked(x: Inputs, divergence: Divergence, compiled: bool = False) -> LossAndGrad:
    """Liger's chunked loss, plain torch, without its cross-entropy; it makes the head's gradient, needed or not."""
    make = peer("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDLoss
    student = x.student.detach().requires_grad_()
    beta = 0.0 if divergence == "forward_kl" else 0.5
    loss = make(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
    return _backward(loss(student, x.head, x.teacher, x.head, x.tokens), student)


def plain_chunks(x: Inputs, divergence: Divergence, chunk_tokens: int = 256) -> LossAndGrad:
    """Our readable form: the reference divergence, a block of tokens at a time."""
    student = x.student.detach().requires_grad_()
    measure = Objective(divergence)

    def block_loss(part: Tensor, block: slice) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            teacher_logits = F.linear(x.teacher[block].float(), x.head.float())
        return measure(teacher_logits, F.linear(part.float(), x.head.float()), x.tokens[block])

    return _backward(chunked_loss(block_loss, student, x.weights, chunk_tokens=chunk_tokens)[0], student)


def fused(x: Inputs, divergence: Divergence, chunk_tokens: int | None = None) -> LossAndGrad:
    """Ours, teacher and student with one head, as with LoRA or a live teacher."""
    return _fused(x, Head(x.head), divergence, chunk_tokens)


def two_heads(x: Inputs, divergence: Divergence, chunk_tokens: int | None = None) -> LossAndGrad:
    """Ours when the teacher's head is another tensor, as in full training against a frozen copy."""
    return _fused(x, Head(x.head_copy), divergence, chunk_tokens)


def head_trained(x: Inputs, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
    """Ours with a gradient for the head too."""
    weight = x.head.detach().requires_grad_()
    loss, grad = _fused(replace(x, head=weight), Head(x.head_copy), divergence, None)
    assert weight.grad is not None
    return loss, grad, weight.grad


def _fused(x: Inputs, teacher_head: Head, divergence: Divergence, chunk_tokens: int | None) -> LossAndGrad:
    student = x.student.detach().requires_grad_()
    given = (student, Head(x.head), x.teacher, teacher_head, x.tokens, x.weights)
    loss, _ = fused_divergence(Objective(divergence), *given, chunk_tokens=chunk_tokens)
    return _backward(loss, student)


def _backward(loss: Tensor, student: Tensor) -> LossAndGrad:
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    return loss.detach(), student.grad


OURS = "ours"
VARIANTS: dict[str, Variant] = {
    "dense": dense,
    "TRL chunked": trl_chunked,
    "TRL GKD": trl_gkd,
    "Liger chunked": liger_chunked,
    "ours, plain": plain_chunks,
    OURS: fused,
    "ours, two heads": two_heads,
}
AT_FULL_SIZE = ("dense", "TRL chunked", "Liger chunked", OURS)
IN_MEMORY = (*AT_FULL_SIZE, "ours, two heads")


def gemm_floor(x: Inputs) -> Work:
    """The three matrix products that no frozen-head variant can do without, into buffers made beforehand."""
    logits = x.head.new_empty(len(x.student), len(x.head))
    grad = torch.empty_like(x.student)

    def work() -> None:
        torch.mm(x.teacher, x.head.t(), out=logits)
        torch.mm(x.student, x.head.t(), out=logits)
        torch.mm(logits, x.head, out=grad)

    return work


def usable(names: tuple[str, ...] | None = None) -> tuple[dict[str, Variant], dict[str, str]]:
    """The variants that can run here, and why the others cannot."""
    chosen = {name: variant for name, variant in VARIANTS.items() if names is None or name in names}
    toy = make_inputs(Shape(4, 8, 16))
    absent: dict[str, str] = {}
    for name, variant in chosen.items():
        try:
            variant(toy, "forward_kl")
        except ImportError as error:
            absent[name] = f"{error}; install the extra `bench`"
    return {name: variant for name, variant in chosen.items() if name not in absent}, absent


def relative_errors(found: LossAndGrad, exact: LossAndGrad) -> tuple[float, float]:
    """Errors of loss and gradient, relative to the exact ones."""
    loss = float((found[0].double() - exact[0].double()).abs() / exact[0].double().abs())
    return loss, float((found[1].double() - exact[1].double()).norm() / exact[1].double().norm())


def require_same(variants: Mapping[str, Variant], x: Inputs, divergence: Divergence, tolerance: float = 1e-3) -> None:
    """Raise `ValueError` for a variant whose loss or gradient is not the dense one."""
    exact = dense(x, divergence)
    for name, variant in variants.items():
        errors = relative_errors(variant(x, divergence), exact)
        if max(errors) > tolerance:
            raise ValueError(f"{name}: {divergence} is off by {errors[0]:.1e} (loss) and {errors[1]:.1e} (gradient)")


def time_case(shape: Shape, divergence: Divergence, names: tuple[str, ...] | None, settings: Settings) -> Case:
    """Interleaved times at a shape; the first variant, `floor`, is the calibration unit."""
    variants, absent = usable(names)
    x = make_inputs(shape, device=settings.device)
    require_same(variants, x.first(32), divergence)
    work: dict[str, Work] = {"floor": gemm_floor(x)}
    work |= {name: partial(variant, x, divergence) for name, variant in variants.items()}
    rounds = in_turns(work, settings.rounds, settings.device)
    return Case(f"loss, {TITLES[divergence]}, {shape}", rounds, peers_absent=absent)


def measure_peak(
    device: str, variant: str, divergence: Divergence, tokens: int, hidden: int, vocabulary: int, chunk_tokens: int = 0
) -> int:
    """Bytes of one call at a shape beyond its inputs, after a tiny call that loads what is loaded once."""
    call = VARIANTS[variant]
    if chunk_tokens:
        call = partial(call, chunk_tokens=chunk_tokens)  # type: ignore[call-arg]
    call(make_inputs(Shape(4, 8, 16), device=device), divergence)
    return peak_here(partial(call, make_inputs(Shape(tokens, hidden, vocabulary), device=device), divergence), device)


def memory_case(shape: Shape, divergence: Divergence, settings: Settings) -> Case:
    """Peak memory beyond the inputs, a fresh process for each variant."""
    variants, absent = usable(IN_MEMORY)
    at: dict[str, str | int] = {"divergence": divergence, "tokens": shape.tokens, "hidden": shape.hidden}
    at["vocabulary"] = shape.vocabulary
    found = {name: peak_of(measure_peak, settings, variant=name, **at) for name in variants}
    if OURS in variants:
        small = peak_of(measure_peak, settings, variant=OURS, chunk_tokens=SMALL_CHUNK, **at)
        found[f"{OURS}, chunks of {SMALL_CHUNK}"] = small
    return Case(f"loss memory, {TITLES[divergence]}, {shape}", memory=found, peers_absent=absent)


REGIMES: dict[str, tuple[float, torch.dtype]] = {
    "float32, KL 0.1": (0.1, torch.float32),
    "float32, KL 3e-6": (3e-6, torch.float32),
    "bfloat16, KL 1e-3": (1e-3, torch.bfloat16),
}


def accuracy_case(shape: Shape, divergence: Divergence, settings: Settings) -> Case:
    """Errors against the dense form in float64 on the same inputs, whatever their format."""
    variants, absent = usable(IN_MEMORY)
    figures: dict[str, dict[str, float]] = {}
    for regime, (kl, dtype) in REGIMES.items():
        x = make_inputs(shape, kl, settings.device, dtype)
        exact = dense(x.to(torch.float64), divergence)
        for name, variant in variants.items():
            loss, grad = relative_errors(variant(x, divergence), exact)
            row = figures.setdefault(name, {})
            row |= {f"{regime}: loss": loss, f"{regime}: gradient": grad}
    return Case(f"loss accuracy, {TITLES[divergence]}, {shape}", figures=figures, peers_absent=absent)


def run(settings: Settings) -> Result:
    """All of it, and the goals."""
    timed, remembered, accurate = {
        "full": (Shape(512, 1024, 151_936), Shape(1024, 1024, 151_936), Shape(256, 1024, 32_768)),
        "quick": (Shape(256, 512, 65_536), Shape(512, 512, 65_536), Shape(64, 512, 32_768)),
        "small": (Shape(64, 32, 1024), Shape(64, 32, 1024), Shape(64, 32, 1024)),
    }[settings.size]
    cases: list[Case] = []
    goals: list[Goal] = []
    for divergence in TITLES:
        case = time_case(timed, divergence, AT_FULL_SIZE, settings)
        cases.append(case)
        goals += time_goals(case.name, case.rounds[0], list(case.rounds), divergence)
    if settings.size != "small":
        cases += [time_case(Shape(512, 1024, 32_768), divergence, None, settings) for divergence in TITLES]
    memory = {divergence: memory_case(remembered, divergence, settings) for divergence in TITLES}
    accuracy = {divergence: accuracy_case(accurate, divergence, settings) for divergence in TITLES}
    goals += memory_goals(memory) + accuracy_goals(accuracy)
    return Result("loss", [*cases, *memory.values(), *accuracy.values()], goals)


LIMITS: dict[Divergence, dict[str, float]] = {
    "forward_kl": {"TRL chunked": 0.50, "dense": 0.95, "floor": 1.35},
    "jensen_shannon": {"TRL chunked": 0.45, "dense": 0.60, "floor": 1.60},
}


def time_goals(name: str, first: Round, rounds: list[Round], divergence: Divergence) -> list[Goal]:
    """Our time over each peer's."""
    limits = {base: limit for base, limit in LIMITS[divergence].items() if base in first and OURS in first}
    return [Goal(f"{name}: time over {base}", "at most", n, ratio(rounds, OURS, base)) for base, n in limits.items()]


def memory_goals(cases: Mapping[Divergence, Case]) -> list[Goal]:
    """Small chunks against dense and TRL, the default against dense, Jensen-Shannon against KL."""
    goals: list[Goal] = []
    small = f"{OURS}, chunks of {SMALL_CHUNK}"
    kl, js = (dict(cases[divergence].memory or {}) for divergence in TITLES)
    for variant, base, limit in ((small, "dense", 1 / 20), (small, "TRL chunked", 1 / 8), (OURS, "dense", 1 / 8)):
        if variant in kl and base in kl:
            what = f"{cases['forward_kl'].name}: {variant} over {base}"
            goals.append(Goal(what, "at most", limit, single(kl[variant] / kl[base])))
    if OURS in js:
        what = f"{cases['jensen_shannon'].name}: {OURS} over forward KL"
        goals.append(Goal(what, "at most", 1.5, single(js[OURS] / max(kl[OURS], 1))))
    return goals


ACCURACY: dict[str, float] = {
    "float32, KL 0.1: loss": 1e-5,
    "float32, KL 0.1: gradient": 1e-4,
    "float32, KL 3e-6: gradient": 1e-5,
    "bfloat16, KL 1e-3: gradient": 5e-3,
}


def accuracy_goals(cases: Mapping[Divergence, Case]) -> list[Goal]:
    """Relative errors of ours, for both divergences."""
    goals = []
    for divergence, case in cases.items():
        errors = (case.figures or {}).get(OURS, {})
        for key, limit in ACCURACY.items():
            if key in errors:
                what = f"{TITLES[divergence]}, relative error, {key}"
                goals.append(Goal(what, "at most", limit, single(errors[key]), ""))
    return goals
