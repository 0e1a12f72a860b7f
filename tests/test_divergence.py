"""The divergences against brute force, autograd, torch.distributions and float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from atesd import build
from atesd.config import Config
from atesd.maths import divergence as d
from atesd.maths import divergences
from atesd.maths.fused import fused_divergence
from atesd.maths.head import Head


def logits(n: int = 5, v: int = 11, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, v, generator=source, dtype=dtype), 2 * torch.randn(n, v, generator=source, dtype=dtype)


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, student)
    return grad


def test_both_kls_equal_torch_distributions() -> None:
    teacher, student = logits()
    p, q = Categorical(logits=teacher), Categorical(logits=student)
    torch.testing.assert_close(d.forward_kl(teacher, student), kl_divergence(p, q))
    torch.testing.assert_close(d.reverse_kl(teacher, student), kl_divergence(q, p))


def test_forward_kl_of_two_coins_by_hand() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2)
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert d.forward_kl(teacher, student).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_the_weighted_kl_to_the_mixture(weight: float) -> None:
    teacher, student = logits()
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = Categorical(probs=weight * p + (1 - weight) * q)
    expected = weight * kl_divergence(Categorical(p), m) + (1 - weight) * kl_divergence(Categorical(q), m)
    torch.testing.assert_close(d.jensen_shannon(teacher, student, weight), expected)


def test_jensen_shannon_tends_to_forward_kl_as_the_teachers_share_vanishes() -> None:
    teacher, student = logits()
    small = 1e-6
    torch.testing.assert_close(
        d.jensen_shannon(teacher, student, small) / small, d.forward_kl(teacher, student), rtol=1e-3, atol=1e-4
    )


def test_the_forward_kl_gradient_is_student_minus_teacher() -> None:
    teacher, student = logits()
    student.requires_grad_()
    grad = gradient(d.forward_kl(teacher, student).sum(), student)
    torch.testing.assert_close(grad, student.softmax(-1) - teacher.softmax(-1))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "top_k", "sampled_token"])
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    teacher, student = logits()
    teacher.requires_grad_()
    student.requires_grad_()
    losses, meters = d.Objective(name, parameter=3.0 if name == "top_k" else None)(teacher, student, torch.arange(5))
    losses.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert not any(meter.requires_grad for meter in meters.values())


def test_top_k_equals_a_brute_force_bucket_and_bounds_the_kl_from_below() -> None:
    teacher, student = logits()
    for k in (1, 3, 10, 11, 50):
        values = divergences.top_k_kl(teacher, student, float(k))
        for row in range(len(teacher)):
            p, q = teacher[row].softmax(-1).tolist(), student[row].softmax(-1).tolist()
            order = sorted(range(len(p)), key=lambda v: -p[v])
            pairs = [(p[v], q[v]) for v in order[:k]] + [(sum(p[v] for v in order[k:]), sum(q[v] for v in order[k:]))]
            expected = sum(a * math.log(a / b) for a, b in pairs if a > 0)
            assert values[row].item() == pytest.approx(expected)
        assert (values <= d.forward_kl(teacher, student) + 1e-12).all()


def test_the_sampled_token_estimate_and_its_gradient_are_unbiased_for_the_reverse_kl() -> None:
    # The expectation over the student's tokens, by enumeration of the vocabulary.
    teacher, student = logits(n=1, v=7)
    student.requires_grad_()
    q = student.detach().softmax(-1)[0]
    tokens = torch.arange(7)
    rows = divergences.sampled_token(teacher.expand(7, -1), student.expand(7, -1), tokens)
    exact = d.reverse_kl(teacher, student).sum()
    torch.testing.assert_close((q * rows.detach()).sum(), exact.detach())
    torch.testing.assert_close(gradient((q * rows).sum(), student), gradient(exact, student))


def test_a_clip_biases_the_sampled_token_so_that_none_is_the_default() -> None:
    # Expectations over the student's tokens, by enumeration of the vocabulary; the truth is the reverse KL's gradient.
    teacher, student = logits(n=1, v=7)
    student.requires_grad_()
    q, tokens = student.detach().softmax(-1)[0], torch.arange(7)
    exact = gradient(d.reverse_kl(3 * teacher, student), student).flatten()

    def cosine(config: Config) -> float:
        rows, _ = build.objective(config)(3 * teacher.expand(7, -1), student.expand(7, -1), tokens)
        return float(torch.cosine_similarity(gradient((q * rows).sum(), student).flatten(), exact, dim=0))

    written = {"clip": "per_token", "clip_threshold": 0.5}
    assert cosine(loss_config()) == pytest.approx(1.0, abs=1e-6)
    assert cosine(loss_config(**written)) < 0.95
    assert loss_config(**written).loss.clip == "per_token"
    assert loss_config(divergence="reverse_kl").loss.clip == "per_token"


def loss_config(divergence: str = "sampled_token", **loss: object) -> Config:
    return Config.model_validate({"loss": {"divergence": divergence, **loss}})


def test_one_entry_of_the_registry_makes_a_divergence_that_trains_by_its_name(tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from atesd.maths.divergences import DIVERGENCES, Divergence, Parameter, log_softmax

        def half_squares(teacher, student, power):
            return (log_softmax(teacher.detach()) - log_softmax(student)).abs() ** power / 2

        power = Parameter("power", 2.0, "of the difference of the log-probabilities", above=1.0)
        DIVERGENCES["powers"] = Divergence("powers", "half the powers", entries=half_squares, parameter=power)

        from atesd.session import train
        from quick import quick

        wanted = ["loss.divergence.kind=powers", "loss.divergence.power=3", "train.num_updates=2"]
        run = train(quick(*wanted), Path(sys.argv[1])).run
        print(run.config.loss.divergence, *[row["loss"] > 0 for row in run.rows("metrics")])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[-1:] == ["kind='powers' power=3.0 True True"], done.stderr[-2000:]


def test_the_per_entry_clip_is_a_clamp_of_each_vocabulary_term() -> None:
    teacher, student = logits()
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = torch.tensor(
        [
            sum(min(a * math.log(a / b), 0.05) for a, b in zip(x, y, strict=True))
            for x, y in zip(p.tolist(), q.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    losses, meters = d.Objective(clip="per_entry", threshold=0.05)(teacher, student, torch.arange(5))
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(meters["clipped_mass"], d.forward_kl(teacher, student) - expected)


def test_the_per_token_clip_bounds_the_value_and_keeps_the_direction_of_the_gradient() -> None:
    teacher, student = logits()
    student.requires_grad_()
    plain = d.forward_kl(teacher, student)
    clipped = d.clip_per_token(plain, 0.5)
    torch.testing.assert_close(clipped, plain.clamp(max=0.5))
    scaled = gradient(plain.sum(), student) * (0.5 / plain.detach()).clamp(max=1)[:, None]
    torch.testing.assert_close(gradient(d.clip_per_token(d.forward_kl(teacher, student), 0.5).sum(), student), scaled)


def test_the_reversed_mass_of_the_forward_kl_is_that_of_its_formula() -> None:
    # With C the clipped entries and P the teacher's mass outside C: clipped q P - p [not in C], unclipped q - p.
    teacher, student = logits(n=20)
    p, q, threshold = teacher.softmax(-1), student.softmax(-1), 0.05
    outside = p.masked_fill(p * (p / q).log() > threshold, 0.0)
    clipped, plain = q * outside.sum(-1, keepdim=True) - outside, q - p
    expected = (clipped.abs() * (clipped * plain < 0)).sum(-1) / clipped.abs().sum(-1)
    _, meters = d.Objective(clip="per_entry", threshold=threshold)(teacher, student, torch.zeros(20, dtype=torch.long))
    torch.testing.assert_close(meters["reversed_mass"], expected)
    assert (expected > 0.1).any(), "the case must really have reversed gradients"


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon"])
def test_what_the_entry_clip_reverses_is_measured_for_every_divergence_with_entries(name: str) -> None:
    teacher, student = logits(n=30)
    objective = d.Objective(name, clip="per_entry", threshold=0.02)
    _, meters = objective(teacher, student, torch.zeros(30, dtype=torch.long))
    step = 1e-6  # the gradients by differences, entry by entry
    share = []
    for row in range(30):
        slopes = []
        for most in (torch.inf, 0.02):
            moved = student[row] + step * torch.cat([torch.eye(11), -torch.eye(11)]).double()
            entries = objective.kind.entries(teacher[row].expand(22, -1), moved, 0.5).clamp(max=most).sum(-1)
            slopes.append((entries[:11] - entries[11:]) / (2 * step))
        plain, clipped = slopes
        share.append(float(clipped.abs()[clipped * plain < 0].sum() / clipped.abs().sum()))
    assert meters["reversed_mass"].tolist() == pytest.approx(share, abs=1e-4)
    assert max(share) > 0.1


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "top_k"])
def test_a_token_that_both_rule_out_counts_nothing(name: str) -> None:
    # The same as without that token: 0 log 0 = 0.
    teacher, student = logits(n=4, v=6)
    masked = [torch.cat([side, torch.full((4, 2), -torch.inf)], dim=-1).float() for side in (teacher, student)]
    tokens = torch.zeros(4, dtype=torch.long)
    for objective in (d.Objective(name), d.Objective(name, clip="per_token", threshold=0.3)):
        expected, _ = objective(teacher.float(), student.float(), tokens)
        found, meters = objective(*masked, tokens)
        torch.testing.assert_close(found, expected)
        assert all(bool(meter.isfinite().all()) for meter in meters.values())
        student_side = masked[1].clone().requires_grad_()
        loss, measured = fused_divergence(
            objective, student_side, Head(None), masked[0], Head(None), tokens, torch.ones(4)
        )
        loss.backward()
        torch.testing.assert_close(measured["loss"], expected, rtol=1e-4, atol=1e-5)
        assert student_side.grad is not None
        assert bool(student_side.grad.isfinite().all())


def test_without_clipped_entries_nothing_is_reversed() -> None:
    teacher, student = logits()
    _, meters = d.Objective(clip="per_entry", threshold=100.0)(teacher, student, torch.arange(5))
    assert meters["reversed_mass"].eq(0).all()
    assert meters["clipped_mass"].abs().max() < 1e-12


def test_the_meters_by_an_independent_route() -> None:
    teacher, student = logits()
    tokens = torch.tensor([3, 0, 10, 2, 2])
    _, meters = d.Objective("reverse_kl", temperature=1.5)(teacher, student, tokens)
    p, q = Categorical(logits=teacher / 1.5), Categorical(logits=student / 1.5)
    torch.testing.assert_close(meters["kl"], kl_divergence(p, q))
    torch.testing.assert_close(meters["logprob"], q.log_prob(tokens))
    torch.testing.assert_close(meters["teacher_entropy"], p.entropy())
    torch.testing.assert_close(meters["student_entropy"], q.entropy())
    torch.testing.assert_close(meters["top1_disagreement"].bool(), teacher.argmax(-1) != student.argmax(-1))


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    teacher, student = logits(dtype=torch.float32)
    low = d.forward_kl(teacher.bfloat16(), student.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, d.forward_kl(teacher.bfloat16().float(), student.bfloat16().float()))


def projected(objective: d.Objective, head: Tensor, teacher: Tensor, tokens: Tensor) -> d.BlockLoss:
    return lambda h, block: objective(teacher[block], F.linear(h, head), tokens[block])


@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "top_k", "sampled_token"])
def test_chunks_change_neither_value_nor_gradient(name: str, chunk: int) -> None:
    teacher, _ = logits(n=8)
    source = torch.Generator().manual_seed(1)
    hidden = torch.randn(8, 4, generator=source, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 4, generator=source, dtype=torch.float64, requires_grad=True)
    weights, tokens = torch.rand(8, generator=source, dtype=torch.float64), torch.arange(8)
    objective = d.Objective(name, temperature=1.1, parameter=3.0 if name == "top_k" else None)
    losses, _ = objective(teacher, F.linear(hidden, head), tokens)
    expected = torch.autograd.grad((weights * losses).sum(), [hidden, head])
    block_loss = projected(objective, head, teacher, tokens)
    value, meters = d.chunked_loss(block_loss, hidden, weights, [head], chunk)
    found = torch.autograd.grad(value, [hidden, head])
    torch.testing.assert_close(value, (weights * losses).sum())
    torch.testing.assert_close(meters["loss"], losses.detach())
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_frozen_head_receives_no_gradient_and_no_grad_mode_makes_none() -> None:
    teacher, _ = logits(n=8)
    hidden, head = torch.randn(8, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    block_loss = projected(d.Objective(), head, teacher, torch.arange(8))
    with torch.no_grad():
        value, _ = d.chunked_loss(block_loss, hidden, torch.ones(8, dtype=torch.float64), [head], 3)
    assert not value.requires_grad


@pytest.mark.parametrize("name", ["forward_lk", "renyi", ""])
def test_an_unknown_divergence_is_refused_in_both_forms(name: str) -> None:
    teacher, student = logits(dtype=torch.float32)
    tokens, weights = torch.arange(5), torch.ones(5)
    with pytest.raises(ValueError, match="unknown divergence"):
        d.Objective(name)(teacher, student, tokens)
    unchecked = d.Objective()
    object.__setattr__(unchecked, "divergence", name)
    with pytest.raises(ValueError, match="there are: forward_kl, reverse_kl"):
        fused_divergence(unchecked, student, Head(None), teacher, Head(None), tokens, weights)


def test_the_nearest_name_is_offered_and_what_has_no_entries_is_not_clipped_by_entry() -> None:
    with pytest.raises(ValueError, match="did you mean forward_kl"):
        d.Objective("forward_lk")
    with pytest.raises(ValueError, match="no entries to clip"):
        d.Objective("top_k", clip="per_entry")
    with pytest.raises(ValueError, match="has no parameter"):
        d.Objective("forward_kl", parameter=0.5)


def test_the_registry_is_read_without_torch() -> None:
    code = "import sys; from atesd.maths.divergences import DIVERGENCES; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
