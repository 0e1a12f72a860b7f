"""The teacher's weights: four clocks, and the student back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from atesd.build import build, close
from atesd.config import EmaTeacher, FrozenTeacher, LiveTeacher, LoraConfig, ModelConfig, RefreshedTeacher
from atesd.errors import CheckpointError
from atesd.models.load import load_model
from atesd.models.teacher import Teacher
from atesd.models.weights import ReplicatedWeights
from quick import quick
from tiny import tiny_folder, tiny_model

IDS = torch.tensor([[7, 8, 9, 10]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def as_teacher(model: nn.Module, teacher: Teacher) -> Tensor:
    with teacher.weights():
        return logits(model)


def move(model: nn.Module, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))


def test_a_frozen_teacher_stays_the_initial_policy_and_the_student_comes_back_bit_for_bit() -> None:
    model = tiny_model().model
    teacher, initial = Teacher(ReplicatedWeights(model), FrozenTeacher()), logits(model)
    move(model, 1)
    moved = logits(model)
    assert torch.equal(as_teacher(model, teacher), initial)
    assert torch.equal(logits(model), moved)
    assert not torch.equal(moved, initial)


def test_a_live_teacher_is_the_student() -> None:
    model = tiny_model().model
    teacher = Teacher(ReplicatedWeights(model), LiveTeacher())
    move(model, 1)
    assert torch.equal(as_teacher(model, teacher), logits(model))
    assert teacher.state_dict() == {"values": {}}


def test_the_ema_is_the_recursion_by_hand() -> None:
    model = tiny_model().model
    teacher = Teacher(ReplicatedWeights(model), EmaTeacher(decay=0.75))
    name, parameter = next(iter(model.named_parameters()))
    expected = parameter.detach().clone()
    for update in range(3):
        move(model, update)
        teacher.after_update(update + 1)
        expected = 0.75 * expected + 0.25 * parameter.detach()
    torch.testing.assert_close(teacher.state_dict()["values"][name], expected)


def test_the_ema_of_bfloat16_weights_moves_with_each_update_and_is_rounded_for_the_pass_alone() -> None:
    # Of a weight near 1, bfloat16 resolves .0078: a hundredth of a move of .01 was lost at every update.
    model = tiny_model().model.to(torch.bfloat16)
    teacher, reference = Teacher(ReplicatedWeights(model), EmaTeacher(decay=0.99)), {}
    for name, parameter in model.named_parameters():
        reference[name] = parameter.detach().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    student = logits(model)
    for update in range(100):
        teacher.after_update(update + 1)
    for name, parameter in model.named_parameters():
        wanted = 0.99**100 * reference[name] + (1 - 0.99**100) * parameter.detach().double()
        torch.testing.assert_close(teacher.state_dict()["values"][name].double(), wanted, atol=1e-5, rtol=1e-5)
        with teacher.weights():
            assert parameter.dtype == torch.bfloat16
            torch.testing.assert_close(parameter.double(), wanted, atol=1e-5, rtol=2**-8)
    assert torch.equal(logits(model), student)


def test_the_ema_goes_on_from_a_checkpoint_that_kept_it_in_bfloat16() -> None:
    model = tiny_model().model.to(torch.bfloat16)
    weights = ReplicatedWeights(model)
    earlier = {"values": {name: part.tensor.clone() for name, part in weights.parts().items()}}
    teacher = Teacher(weights, EmaTeacher(decay=0.99))
    move(model, 1)
    teacher.load_state_dict(earlier)
    assert all(torch.equal(value, earlier["values"][name]) for name, value in teacher.state_dict()["values"].items())
    teacher.after_update(1)
    assert all(value.dtype == torch.float32 for value in teacher.state_dict()["values"].values())


def test_a_refreshed_teacher_copies_the_student_every_n_updates() -> None:
    model = tiny_model().model
    teacher, initial = (
        Teacher(ReplicatedWeights(model), RefreshedTeacher(every=2)),
        logits(model),
    )
    move(model, 1)
    teacher.after_update(1)
    assert torch.equal(as_teacher(model, teacher), initial)
    move(model, 2)
    teacher.after_update(2)
    copied = logits(model)
    move(model, 3)
    assert torch.equal(as_teacher(model, teacher), copied)


def test_with_lora_the_frozen_teacher_is_the_base_model_and_keeps_no_copy(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    base = logits(load_model(ModelConfig(path=str(folder))).model)
    model = load_model(ModelConfig(path=str(folder), lora=LoraConfig(rank=2, alpha=4))).model
    teacher = Teacher(ReplicatedWeights(model), FrozenTeacher())
    move(model, 1)
    assert torch.equal(as_teacher(model, teacher), base)
    assert not torch.equal(logits(model), base)
    assert teacher.state_dict() == {"values": {}}


def test_an_error_inside_still_gives_the_student_back() -> None:
    model = tiny_model().model
    teacher = Teacher(ReplicatedWeights(model), FrozenTeacher())
    move(model, 1)
    moved = logits(model)
    with pytest.raises(RuntimeError, match="inside"), teacher.weights():
        raise RuntimeError("inside")
    assert torch.equal(logits(model), moved)


def test_the_state_restores_the_teacher_and_refuses_another_kinds() -> None:
    model = tiny_model().model
    first = Teacher(ReplicatedWeights(model), EmaTeacher(decay=0.5))
    move(model, 1)
    first.after_update(1)
    second = Teacher(ReplicatedWeights(model), EmaTeacher(decay=0.5))
    second.load_state_dict(first.state_dict())
    assert torch.equal(as_teacher(model, first), as_teacher(model, second))
    with pytest.raises(CheckpointError, match=r"teacher\.weights"):
        Teacher(ReplicatedWeights(model), LiveTeacher()).load_state_dict(first.state_dict())


@pytest.mark.parametrize(("method", "copies"), [("distill", True), ("sft", False), ("grpo", False)])
def test_only_distillation_pays_for_a_copy_of_the_teacher(method: str, copies: bool) -> None:
    groups = ["train.group_size=2"] if method == "grpo" else []
    parts = build(quick(f"train.method={method}", *groups))
    values = parts.teacher.state_dict()["values"]
    assert isinstance(values, dict)
    assert bool(values) == copies
    close(parts)
