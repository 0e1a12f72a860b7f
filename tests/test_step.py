"""One step: the paper's equation by hand, and a gradient that does not depend on how the step is cut."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from atesd.config import FrozenTeacher, TrainConfig
from atesd.maths.divergence import Objective
from atesd.models.load import LoadedModel
from atesd.models.score import Scorer
from atesd.models.teacher import Teacher
from atesd.models.weights import ReplicatedWeights
from atesd.train.optimiser import Optimiser, learning_rate
from atesd.train.update import Example, StepMeters
from tiny import tiny_model
from updates import distill, maximise_likelihood

ROWS = [
    Example((7, 8), (9, 10, 11), (7, 8, 12, 13)),
    Example((9,), (10,), (9, 20, 21, 22, 23)),
    Example((14, 15, 16), (17, 18, 19, 20, 21, 1), (14, 15, 16, 3)),
    Example((7, 7), (8, 9), (7, 7, 2)),
    Example((11,), (12, 13, 14, 15), (11, 5)),
]
TEMPERATURE = 1.3


def distilled(
    loaded: LoadedModel, micro_batch_size: int, reduction: Literal["sequence", "token"] = "sequence", chunk: int = 4
) -> StepMeters:
    teacher = Teacher(ReplicatedWeights(loaded.model), FrozenTeacher())
    objective = Objective(temperature=TEMPERATURE)
    return distill(
        Scorer(loaded),
        teacher,
        ROWS,
        objective,
        reduction=reduction,
        micro_batch_size=micro_batch_size,
        chunk_tokens=chunk,
    )


def gradients(loaded: LoadedModel) -> list[Tensor]:
    return [p.grad.clone() for p in loaded.model.parameters() if p.grad is not None]


def loss_by_hand(loaded: LoadedModel, reduction: str) -> Tensor:
    """The equation of the paper, row by row through the model's own logits."""
    model, total, tokens = loaded.model, torch.zeros(()), sum(len(row.completion) for row in ROWS)
    for row in ROWS:
        n = len(row.completion)
        student = model(input_ids=torch.tensor([[*row.context, *row.completion]])).logits[0, -n - 1 : -1]
        with torch.no_grad():
            teacher = model(input_ids=torch.tensor([[*row.teacher_context, *row.completion]])).logits[0, -n - 1 : -1]
        log_p, log_q = (teacher / TEMPERATURE).log_softmax(-1), (student / TEMPERATURE).log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        total = total + (divergence.mean() / len(ROWS) if reduction == "sequence" else divergence.sum() / tokens)
    return total


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_loss_and_gradient_are_those_of_the_equation(reduction: Literal["sequence", "token"]) -> None:
    loaded = tiny_model()
    meters = distilled(loaded, 2, reduction)
    found = gradients(loaded)
    loaded.model.zero_grad()
    expected = loss_by_hand(loaded, reduction)
    expected.backward()
    assert meters.loss == pytest.approx(expected.item(), rel=1e-5)
    assert meters.means["kl"] == pytest.approx(meters.loss, rel=1e-5)
    for mine, other in zip(found, gradients(loaded), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_gradient_does_not_depend_on_the_micro_batches(reduction: Literal["sequence", "token"]) -> None:
    whole = tiny_model()
    distilled(whole, len(ROWS), reduction)
    for size in (1, 2, 3):
        cut = tiny_model()
        distilled(cut, size, reduction, chunk=1)
        for a, b in zip(gradients(whole), gradients(cut), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 12, 20, 1000])
def test_the_gradient_does_not_depend_on_the_token_budget(budget: int) -> None:
    whole, cut = tiny_model(), tiny_model()
    distilled(whole, len(ROWS))
    teacher, objective = Teacher(ReplicatedWeights(cut.model), FrozenTeacher()), Objective(temperature=TEMPERATURE)
    distill(Scorer(cut), teacher, ROWS, objective, micro_batch_size=1, micro_batch_tokens=budget, chunk_tokens=4)
    for a, b in zip(gradients(whole), gradients(cut), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_per_token_meters_come_back_row_by_row(size: int) -> None:
    meters = distilled(tiny_model(), size)
    for row, logprobs in zip(ROWS, meters.tokens["logprob"], strict=True):
        ids, n = torch.tensor([[*row.context, *row.completion]]), len(row.completion)
        with torch.no_grad():
            own = (tiny_model().model(input_ids=ids).logits[0, -n - 1 : -1] / TEMPERATURE).log_softmax(-1)
        expected = own.gather(-1, torch.tensor(row.completion)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=1e-5)
    assert [len(row) for row in meters.tokens["kl"]] == [len(row.completion) for row in ROWS]
    mean = sum(sum(row) / len(row) for row in meters.tokens["kl"]) / len(ROWS)
    assert meters.loss == pytest.approx(mean, rel=1e-5)
    confidence = sum(sum(map(math.exp, row)) / len(row) for row in meters.tokens["logprob"]) / len(ROWS)
    assert meters.means["confidence"] == pytest.approx(confidence, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_answers_are_read_under_the_teachers_context_and_change_nothing_else(size: int) -> None:
    answers = [(12,), (3, 4), (5,), (), (6, 7, 8)]
    asked = [dataclasses.replace(row, answer=answer) for row, answer in zip(ROWS, answers, strict=True)]
    plain, measured = tiny_model(), tiny_model()
    without = distilled(plain, size)
    teacher, objective = Teacher(ReplicatedWeights(measured.model), FrozenTeacher()), Objective(temperature=TEMPERATURE)
    meters = distill(Scorer(measured), teacher, asked, objective, micro_batch_size=size, chunk_tokens=4)
    means = []
    for row, found in zip(asked, meters.answers, strict=True):
        assert len(found) == len(row.answer)
        if row.answer:
            n, ids = len(row.answer), torch.tensor([[*row.teacher_context, *row.answer]])
            with torch.no_grad():
                log_p = tiny_model().model(input_ids=ids).logits[0, -n - 1 : -1].log_softmax(-1)
            own = log_p.gather(-1, torch.tensor(row.answer)[:, None]).squeeze(-1)
            assert found == pytest.approx(own.tolist(), rel=1e-4)
            means.append(own.mean().item())
    assert meters.grounding == pytest.approx(sum(means) / 4, rel=1e-4)
    assert without.grounding is None
    assert meters.loss == pytest.approx(without.loss, rel=1e-5)
    for a, b in zip(gradients(plain), gradients(measured), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_grpo_and_sft_follow_the_scaled_log_likelihood() -> None:
    loaded = tiny_model()
    rows = [
        Example(r.context, r.completion, (), scale) for r, scale in zip(ROWS, (1.0, -1.0, 0.5, 0.0, 2.0), strict=True)
    ]
    meters = maximise_likelihood(Scorer(loaded), rows, micro_batch_size=2, chunk_tokens=3)
    found = gradients(loaded)
    loaded.model.zero_grad()
    expected = torch.zeros(())
    for row in rows:
        n, ids = len(row.completion), torch.tensor([[*row.context, *row.completion]])
        log_q = loaded.model(input_ids=ids).logits[0, -n - 1 : -1].log_softmax(-1)
        own = log_q.gather(-1, torch.tensor(row.completion)[:, None])
        expected = expected - row.advantage * own.mean() / len(rows)
    expected.backward()
    assert meters.loss == pytest.approx(expected.item(), rel=1e-4)
    for mine, other in zip(found, gradients(loaded), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


def test_a_non_finite_gradient_leaves_the_weights_alone() -> None:
    loaded = tiny_model()
    before = [p.detach().clone() for p in loaded.model.parameters()]
    optimiser = Optimiser(dict(loaded.model.named_parameters()), TrainConfig(learning_rate=0.1))
    next(iter(loaded.model.parameters())).grad = torch.full_like(before[0], torch.nan)
    step = optimiser.step(0, 1.0)
    assert not step.taken
    assert math.isnan(step.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.model.parameters(), strict=True))
    assert all(p.grad is None for p in loaded.model.parameters())


def test_a_non_finite_loss_is_not_stepped_on_either() -> None:
    loaded = tiny_model()
    next(iter(loaded.model.parameters())).grad = torch.ones_like(next(iter(loaded.model.parameters())))
    assert not Optimiser(dict(loaded.model.named_parameters()), TrainConfig()).step(0, math.inf).taken


def test_the_learning_rate_is_a_function_of_the_update() -> None:
    # Warm-up of 2, then 8 updates of linear decay: 1/2, 1, then 1, 7/8, ...
    config = TrainConfig(learning_rate=1.0, num_updates=10, warmup_updates=2, learning_rate_schedule="linear")
    assert [learning_rate(config, u) for u in (0, 1, 2, 3, 9)] == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 1 / 8])
    cosine = config.model_copy(update={"learning_rate_schedule": "cosine"})
    assert learning_rate(cosine, 6) == pytest.approx(0.5)


def test_the_teacher_keeps_its_own_head_when_the_student_has_moved() -> None:
    # At the weights that the teacher was made from, student and teacher agree on the same context: KL = 0. Once the
    # student has moved, the meter of the teacher's own entropy must still be that of the initial policy.
    loaded = tiny_model()
    teacher, objective = (
        Teacher(ReplicatedWeights(loaded.model), FrozenTeacher()),
        Objective(temperature=TEMPERATURE),
    )
    before = distill(Scorer(loaded), teacher, ROWS, objective, micro_batch_size=2, chunk_tokens=4)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.1)
    after = distill(Scorer(loaded), teacher, ROWS, objective, micro_batch_size=2, chunk_tokens=4)
    assert after.tokens["teacher_entropy"] == before.tokens["teacher_entropy"]
