"""The fused losses against the plain forms by autograd in float64, and against themselves at other chunk sizes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from atesd.maths.divergence import Objective
from atesd.maths.fused import chunk_size, divergence_profile, fused_divergence, fused_likelihood
from atesd.maths.head import Head

N, F, V = 7, 5, 13
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")
CLIPS = {"none": float("inf"), "per_token": 0.3, "per_entry": 0.02}
HEADS = {
    "plain": {},
    "scale": {"scale": 0.6},
    "bias": {"bias": True},
    "soft cap": {"scale": 1.5, "bias": True, "soft_cap": 2.0},
}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def head_of(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Head:
    how = dict(HEADS[kind])
    bias = normal(V, seed=seed + 50, dtype=dtype) if how.pop("bias", False) else None
    return Head(normal(V, F, seed=seed, dtype=dtype), bias, **how)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, tokens, weights; one token without weight, one with a negative one."""
    tokens = torch.tensor([0, 3, 12, 5, 5, 1, 7])
    weights = torch.tensor([0.3, 0.1, 0.0, 0.25, -0.4, 1.0, 0.05], dtype=dtype)
    return normal(N, F, seed=1, dtype=dtype), normal(N, F, seed=2, dtype=dtype), tokens, weights


def leaves(student: Tensor, head: Head, trained: bool) -> tuple[Tensor, Head, list[Tensor]]:
    """Fresh leaves of the same values: the student's states and, if trained, the head."""
    student = student.detach().clone().requires_grad_()
    if trained:
        parts = [None if t is None else t.detach().clone().requires_grad_() for t in (head.weight, head.bias)]
        head = replace(head, weight=parts[0], bias=parts[1])
    return student, head, [student, *head.trained]


def by_autograd(
    objective: Objective, student: Tensor, head: Head, teacher: Tensor, teacher_head: Head, tokens: Tensor, w: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    losses, meters = objective(teacher_head.logits(teacher), head.logits(student), tokens)
    return (losses * w).sum(), {**meters, "loss": losses.detach()}


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shared", [False, True], ids=["two heads", "one head"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_meters_and_gradient_are_those_of_the_plain_form(
    divergence: str, clip: str, kind: str, shared: bool, trained: bool, chunk: int | None
) -> None:
    hidden, teacher, tokens, weights = inputs()
    common = head_of(kind)
    for temperature, jsd_weight in ((1.0, 0.5), (0.7, 0.2)):
        parameter = jsd_weight if divergence == "jensen_shannon" else None
        objective = Objective(divergence, clip, CLIPS[clip], temperature, parameter)
        found, expected = [], []
        for function, into, how in ((fused_divergence, found, {"chunk_tokens": chunk}), (by_autograd, expected, {})):
            student, head, wanted = leaves(hidden, common, trained)
            teacher_head = head if shared else head_of("bias", seed=9)
            loss, meters = function(objective, student, head, teacher, teacher_head, tokens, weights, **how)
            into += [loss.detach(), *torch.autograd.grad(loss, wanted), *(meters[name] for name in sorted(meters))]
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", ["top_k", "sampled_token"])
def test_objectives_without_a_closed_form_go_the_plain_way(divergence: str) -> None:
    hidden, teacher, tokens, weights = inputs()
    objective, other_head = (
        Objective(divergence, "per_token", 0.3, 0.7, 4.0 if divergence == "top_k" else None),
        head_of("plain", 3),
    )
    (a, head_a, wanted_a), (b, head_b, wanted_b) = (leaves(hidden, head_of("bias"), True) for _ in range(2))
    found, _ = fused_divergence(objective, a, head_a, teacher, other_head, tokens, weights, chunk_tokens=2)
    expected, _ = by_autograd(objective, b, head_b, teacher, other_head, tokens, weights)
    for mine, other in zip(torch.autograd.grad(found, wanted_a), torch.autograd.grad(expected, wanted_b), strict=True):
        torch.testing.assert_close(mine, other)


def test_logits_can_take_the_place_of_hidden_states() -> None:
    _, _, tokens, weights = inputs()
    objective, head = Objective("reverse_kl"), Head(None)
    student, teacher = normal(N, V, seed=1).requires_grad_(), normal(N, V, seed=2)
    before = student.detach().clone()
    loss, _ = fused_divergence(objective, student, head, teacher, head, tokens, weights)
    expected, _ = by_autograd(objective, student, head, teacher, head, tokens, weights)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))
    assert torch.equal(student.detach(), before)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_likelihood_equals_that_of_a_categorical(kind: str, chunk: int | None) -> None:
    hidden, _, tokens, weights = inputs()
    student, head, wanted = leaves(hidden, head_of(kind), True)
    loss, meters = fused_likelihood(student, head, tokens, weights, temperature=0.7, chunk_tokens=chunk)
    found = torch.autograd.grad(loss, wanted)
    q = torch.distributions.Categorical(logits=head.logits(student) / 0.7)
    expected = -(weights * q.log_prob(tokens)).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(meters["logprob"], q.log_prob(tokens).detach())
    torch.testing.assert_close(meters["loss"], -q.log_prob(tokens).detach())
    torch.testing.assert_close(meters["student_entropy"], q.entropy().detach())
    for mine, other in zip(found, torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("objective", [Objective("forward_kl"), Objective("sampled_token")], ids=["closed", "plain"])
def test_a_profile_is_one_measurement_per_teacher(objective: Objective) -> None:
    hidden, teacher, tokens, _ = inputs()
    head, ones = head_of("bias"), torch.ones(N, dtype=torch.float64)
    teachers = [teacher, 2 * teacher, hidden]
    profile = divergence_profile(objective, hidden, head, teachers, head, tokens, chunk_tokens=3)
    for meters, one in zip(profile, teachers, strict=True):
        _, expected = fused_divergence(objective, hidden, head, one, head, tokens, ones)
        torch.testing.assert_close(meters, expected)
    assert profile[2]["kl"].abs().max() < 1e-12


def test_nothing_needs_a_gradient_under_no_grad() -> None:
    hidden, teacher, tokens, weights = inputs()
    student, head, _ = leaves(hidden, head_of("plain"), True)
    with torch.no_grad():
        loss, _ = fused_divergence(Objective(), student, head, teacher, head, tokens, weights)
    assert not loss.requires_grad


def test_a_scaled_loss_scales_the_gradient_and_a_second_backward_is_refused() -> None:
    hidden, teacher, tokens, weights = inputs()
    head = head_of("plain")
    grads = []
    for factor in (1.0, -3.0):
        student, _, _ = leaves(hidden, head, False)
        loss, _ = fused_divergence(Objective(), student, head, teacher, head, tokens, weights)
        (factor * loss).backward()
        grads.append(student.grad)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    torch.testing.assert_close(-3.0 * grads[0], grads[1])


def test_vocabularies_of_different_size_and_no_tokens_are_refused() -> None:
    hidden, teacher, tokens, weights = inputs()
    small = Head(normal(V - 1, F, seed=0))
    with pytest.raises(ValueError, match="13 logits"):
        fused_divergence(Objective(), hidden, head_of("plain"), teacher, small, tokens, weights)
    with pytest.raises(ValueError, match="no tokens"):
        fused_likelihood(hidden[:0], small, tokens[:0], weights[:0])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_teacher_and_student_give_exactly_nothing(divergence: str) -> None:
    hidden, _, tokens, weights = inputs(torch.float32)
    student, head, _ = leaves(hidden, head_of("bias", dtype=torch.float32), False)
    loss, meters = fused_divergence(Objective(divergence), student, head, hidden, head, tokens, weights)
    loss.backward()
    assert float(meters["loss"].abs().max()) == 0
    assert student.grad is not None
    assert float(student.grad.abs().max()) == 0


@settings(max_examples=60, deadline=None)
@example(("forward_kl", "per_entry"), 33.625, 0.5, 3391)
@given(
    st.sampled_from(list(itertools.product(DIVERGENCES, CLIPS))),
    st.floats(0.01, 60.0),
    st.floats(0.05, 0.95),
    st.integers(0, 10_000),
)
def test_distributions_far_apart_neither_overflow_nor_lose_the_value(
    which: tuple[str, str], spread: float, jsd_weight: float, seed: int
) -> None:
    # Logits up to a few hundred nats apart, in float32: one model is certain of what the other excludes.
    divergence, clip = which
    objective = Objective(divergence, clip, CLIPS[clip], 1.0, jsd_weight if divergence == "jensen_shannon" else None)
    student = (spread * normal(4, V, seed=seed, dtype=torch.float32)).requires_grad_()
    teacher, tokens, ones = spread * normal(4, V, seed=seed + 1, dtype=torch.float32), torch.arange(4), torch.ones(4)
    loss, meters = fused_divergence(objective, student, Head(None), teacher, Head(None), tokens, ones)
    exact = student.detach().double().requires_grad_()
    expected, plain = by_autograd(objective, exact, Head(None), teacher.double(), Head(None), tokens, ones.double())
    (grad,), (exact_grad,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, exact)
    # A clipped loss is the unclipped one less what is cut off: as exact as the larger of the two.
    torch.testing.assert_close(
        meters["loss"].double(), plain["loss"], rtol=1e-4, atol=1e-6 * max(10.0, float(plain["clipped_mass"].max()))
    )
    torch.testing.assert_close(meters["kl"].double(), plain["kl"], rtol=1e-4, atol=1e-5)
    if clip == "none":  # an entry on the other side of the threshold by a rounding has another gradient
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-3, atol=1e-5 * max(1.0, spread))


def close_pair(kl: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Head, Tensor, Tensor]:
    """A teacher at about `kl` nats from the student, over 2,000 entries, with values that `dtype` can hold."""
    student, weight = normal(24, 64, seed=1), normal(2000, 64, seed=3) * 0.25
    teacher = student + normal(24, 64, seed=2) * (2 * kl) ** 0.5 / 2
    student, teacher, weight = (t.to(dtype) for t in (student, teacher, weight))
    return student, teacher, Head(weight), torch.arange(24), torch.full((24,), 1 / 24)


def errors(
    objective: Objective, kl: float, dtype: torch.dtype, other_memory: bool, measured: Callable[[float], bool]
) -> tuple[float, float]:
    """Relative errors of loss and gradient against float64."""
    hidden, teacher, head, tokens, weights = close_pair(kl, dtype)
    assert head.weight is not None
    teacher_head = replace(head, weight=head.weight.clone()) if other_memory else head
    student = hidden.clone().requires_grad_()
    loss, meters = fused_divergence(objective, student, head, teacher, teacher_head, tokens, weights)
    assert measured(float(meters["kl"].mean()))
    exact, exact_head = hidden.double().requires_grad_(), Head(head.weight.double())
    expected, _ = by_autograd(objective, exact, exact_head, teacher.double(), exact_head, tokens, weights.double())
    (grad,), (exact_grad,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, exact)
    return abs(float((loss / expected).detach()) - 1), float((grad.double() - exact_grad).norm() / exact_grad.norm())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_is_exact_at_a_usual_divergence(divergence: str) -> None:
    found = errors(Objective(divergence), 0.1, torch.float32, True, lambda kl: 0.05 < kl < 0.2)
    assert found[0] < 1e-5
    assert found[1] < 1e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gap_form_is_exact_at_a_tiny_divergence_where_two_logits_are_not(divergence: str) -> None:
    objective, tiny = Objective(divergence), lambda kl: 1e-6 < kl < 6e-6
    gap = errors(objective, 3e-6, torch.float32, False, tiny)
    assert gap[0] < 1e-5
    assert gap[1] < 1e-5
    two_logits = errors(objective, 3e-6, torch.float32, True, tiny)
    assert two_logits[0] < 1e-3
    assert two_logits[1] > 1e-5


@pytest.mark.parametrize("other_memory", [True, False], ids=["two logits", "gap form"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_inputs_keep_a_small_divergence(divergence: str, other_memory: bool) -> None:
    found = errors(Objective(divergence), 1e-3, torch.bfloat16, other_memory, lambda kl: 2e-4 < kl < 2e-3)
    assert found[0] < 1e-4
    assert found[1] < 5e-3


def test_chunks_fit_the_byte_budget_but_are_not_too_small_for_a_matrix_product() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chunk_size(151_936, cpu) == 256
    assert chunk_size(4096, cpu) == 1792  # 28 MiB / (4 B x 4,096)
    assert chunk_size(151_936, cuda) == 640  # 384 MiB / (4 B x 151,936) = 662, down to a multiple of 64
    assert chunk_size(40, cpu, 7) == 7


COMPILED = """
import torch
from atesd.maths.closed_forms import divergence_rows, likelihood_rows
from atesd.maths.divergence import Objective
from atesd.maths.fused import _compiled
from atesd.maths.head import Head

def both(function, *arguments):
    for n in (6, 9):
        matrices = [torch.randn(n, 513) for _ in range(1 + (function is divergence_rows))]
        found = []
        for this in (function, _compiled(function)):
            copies = [m.clone() for m in matrices]
            meters = this(*arguments, *copies, torch.arange(n), torch.linspace(0.1, 1, n))
            found.append((copies[0], meters))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)

torch.manual_seed(0)
with torch.no_grad():
    capped, plain = Head(None, torch.randn(513), 0.7, 3.0), Head(None)
    both(divergence_rows, Objective("forward_kl", "per_token", 0.3, 0.7), plain, plain, True)
    both(divergence_rows, Objective("jensen_shannon", "per_entry", 0.02, 1.0, 0.3), capped, plain, False)
    both(likelihood_rows, capped, 0.7)
"""


@pytest.mark.slow
def test_the_compiled_rows_equal_the_plain_ones() -> None:
    # As on CUDA; in a process of its own, without the shape checks that the tests put on every function.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
