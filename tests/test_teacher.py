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
