"""Alignment against autograd, forward-mode derivatives, and the true change after one small step."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jvp
from torch.func import functional_call

from atesd.maths.alignment import Displaced, alignments, logit_gradient, token_alignment
from atesd.maths.divergence import Objective

OBJECTIVES = [
    Objective(
        divergence=name,
        clip=clip,
        threshold=threshold,
        temperature=temperature,
        parameter={"jensen_shannon": 0.3, "top_k": 3.0}.get(name),
    )
    for (name, temperature), (clip, threshold) in itertools.product(
        [
            ("forward_kl", 1.0),
            ("forward_kl", 0.7),
            ("reverse_kl", 1.3),
            ("jensen_shannon", 1.0),
            ("top_k", 1.0),
            ("sampled_token", 1.0),
        ],
        [("none", float("inf")), ("per_token", 0.1)],
    )
] + [Objective(divergence="forward_kl", clip="per_entry", threshold=0.05)]
NAMES = [f"{o.divergence}-{o.clip}-{o.temperature}" for o in OBJECTIVES]


class Student(torch.nn.Module):
    """Two layers with a nonlinearity: features of a token to logits, float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = torch.nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64))
        self.second = torch.nn.Parameter(torch.randn(9, 6, generator=generator, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return torch.tanh(features @ self.first.T) @ self.second.T


def case() -> tuple[Student, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """A student, eight tokens' features, their teacher logits and ids, and a unit direction in parameter space."""
    generator = torch.Generator().manual_seed(4)
    student = Student()
    features = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    teacher = torch.randn(8, 9, generator=generator, dtype=torch.float64)
    tokens = torch.randint(9, (8,), generator=generator)
    direction = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in student.named_parameters()
    }
    length = sum(float(value.square().sum()) for value in direction.values()) ** 0.5
    return student, features, teacher, tokens, {name: value / length for name, value in direction.items()}


def displaced_by(student: Student, features: Tensor, direction: dict[str, Tensor], epsilon: float) -> Displaced:
    """The student's logits on both sides of where it stands."""
    here = {name: p.detach() for name, p in student.named_parameters()}
    plus, minus = (
        functional_call(student, {n: p + side * epsilon * direction[n] for n, p in here.items()}, (features,))
        for side in (1, -1)
    )
    return Displaced(plus, minus, epsilon)


def exact_slope(student: Student, features: Tensor, direction: dict[str, Tensor]) -> Tensor:
    """The derivative of the logits along the direction, by autograd."""
    names, values = zip(*((n, p.detach()) for n, p in student.named_parameters()), strict=True)

    def logits(*parameters: Tensor) -> Tensor:
        return functional_call(student, dict(zip(names, parameters, strict=True)), (features,))

    return jvp(logits, values, tuple(direction[name] for name in names))[1]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_alignment_is_minus_the_parameter_gradient_along_the_direction(objective: Objective) -> None:
    student, features, teacher, tokens, direction = case()
    losses, _ = objective(teacher, student(features), tokens)
    slope = exact_slope(student, features, direction)
    found = token_alignment(objective, teacher, student(features).detach(), slope, tokens)
    for token, loss in enumerate(losses):
        gradients = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)
        along = sum((g * direction[n]).sum() for g, (n, _) in zip(gradients, student.named_parameters(), strict=True))
        torch.testing.assert_close(found[token], -along, rtol=1e-9, atol=1e-12)


def test_two_points_give_the_forward_mode_derivative_with_an_error_that_falls_with_epsilon_squared() -> None:
    student, features, _, _, direction = case()
    exact = exact_slope(student, features, direction)
    errors = [
        float((displaced_by(student, features, direction, epsilon).slope - exact).norm()) for epsilon in (1e-1, 1e-2)
    ]
    assert errors[1] < errors[0] / 50
    torch.testing.assert_close(displaced_by(student, features, direction, 1e-5).slope, exact, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES[:4], ids=NAMES[:4])
def test_it_predicts_the_change_of_a_smooth_success_after_one_small_step_for_each_of_five_teachers(
    objective: Objective,
) -> None:
    student, features, teacher, tokens, _ = case()

    def success() -> Tensor:
        return student(features).log_softmax(-1)[:, 2].sum()

    gradient = torch.autograd.grad(success(), list(student.parameters()))
    length = float(torch.cat([g.flatten() for g in gradient]).norm())
    direction = {n: g / length for (n, _), g in zip(student.named_parameters(), gradient, strict=True)}
    teachers = [teacher * scale for scale in (-1.0, -0.3, 0.2, 0.6, 1.0)]
    displaced = displaced_by(student, features, direction, 1e-4)
    profile = alignments(objective, teachers, displaced.middle, displaced.slope, tokens)
    predicted = profile.sum(1) * length
    eta, before = 1e-5, float(success().detach())
    for chosen, value in zip(teachers, predicted, strict=True):
        losses, _ = objective(chosen, student(features), tokens)
        steps = torch.autograd.grad(losses.sum(), list(student.parameters()))
        with torch.no_grad():
            for parameter, step in zip(student.parameters(), steps, strict=True):
                parameter -= eta * step
            change = (float(success().detach()) - before) / eta
            for parameter, step in zip(student.parameters(), steps, strict=True):
                parameter += eta * step
        assert change == pytest.approx(float(value), rel=2e-3, abs=1e-4)


def test_forward_kl_has_the_gradient_student_minus_teacher_over_the_temperature() -> None:
    student, features, teacher, tokens, _ = case()
    logits = student(features).detach()
    objective = Objective(temperature=0.5)
    by_hand = ((logits / 0.5).softmax(-1) - (teacher / 0.5).softmax(-1)) / 0.5
    torch.testing.assert_close(logit_gradient(objective, teacher, logits, tokens), by_hand)


def test_a_teacher_that_is_the_student_is_aligned_with_nothing() -> None:
    student, features, _, tokens, direction = case()
    displaced = displaced_by(student, features, direction, 1e-4)
    logits = student(features).detach()
    found = alignments(Objective(), [logits], logits, displaced.slope, tokens)
    assert found.abs().max() < 1e-12


def test_curvature_is_zero_on_a_line_and_grows_with_the_step() -> None:
    student, features, _, _, direction = case()
    logits = student(features).detach()
    line = Displaced(logits + 3.0, logits - 3.0, 1.0)
    assert Displaced(line.plus + torch.eye(9)[:8], line.minus - torch.eye(9)[:8], 1.0).curvature(logits).max() < 1e-12
    small, large = (float(displaced_by(student, features, direction, e).curvature(logits).mean()) for e in (1e-3, 1e-1))
    assert 0 < small < large / 30
