"""Replicated weights under the contract of all weights, and that nobody else changes a parameter's values."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import atesd
from atesd.engine.builtin import BuiltinEngine
from atesd.engine.interface import Engine
from atesd.engine.transformers import TransformersEngine
from atesd.models.load import LoadedModel
from atesd.models.weights import ReplicatedWeights, Weights
from engine_contract import PLAIN, ids_of, requests_of
from tiny import tiny_model
from weights_contract import WeightsContract, loaded, others  # noqa: F401  (a fixture)

SOURCE = Path(atesd.__file__).parent
OWNERS = {
    "models/weights.py",
    "models/sharding.py",
    "engine/captured.py",  # buffers of a CUDA graph
    "control/policy.py",  # the controller's own policy
}


class TestReplicated(WeightsContract):
    def make(self, loaded: LoadedModel) -> Weights:  # noqa: F811
        return ReplicatedWeights(loaded.model)


def changes_of_values(path: Path) -> list[str]:
    """Where a file assigns `.data`, copies into a tensor, or switches its gradient on or off."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else []
        flat = [one for t in targets for one in (t.elts if isinstance(t, ast.Tuple) else [t])]
        flat += [node.target] if isinstance(node, ast.AugAssign) else []
        found += [f"{path}:{t.lineno}" for t in flat if isinstance(t, ast.Attribute) and t.attr == "data"]
        found += [f"{path}:{t.lineno}" for t in flat if isinstance(t, ast.Attribute) and t.attr == "requires_grad"]
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr in ("copy_", "set_", "requires_grad_"):
            found.append(f"{path}:{called.lineno}")
    return found


def test_only_the_weights_module_changes_the_values_of_a_parameter():
    # The formulas (maths) hold no model: what they write to are buffers and gradients of their own.
    files = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).as_posix() not in OWNERS]
    files = [path for path in files if path.parent != SOURCE / "maths"]
    assert [place for path in files for place in changes_of_values(path)] == []


def test_the_search_finds_what_it_looks_for():
    assert len(changes_of_values(SOURCE / "models" / "weights.py")) >= 4


@pytest.mark.parametrize("make", [BuiltinEngine, TransformersEngine])
def test_a_local_engine_writes_with_the_weights_of_the_exchange_it_is_called_in(make: type):
    model, requests = tiny_model(), requests_of([4, 7])
    weights, engine = ReplicatedWeights(model.model), make(model, 8)
    student, teacher = engine.complete(requests, PLAIN), others(weights)
    another = tiny_model()
    ReplicatedWeights(another.model).load(teacher)
    expected: Engine = make(another, 8)
    with weights.exchanged(teacher):
        assert engine.complete(requests, PLAIN) == expected.complete(requests, PLAIN)
    assert engine.complete(requests, PLAIN) == student
    assert ids_of(student) != ids_of(expected.complete(requests, PLAIN))


def test_exchanged_tensors_change_places_and_are_not_copied():
    weights = ReplicatedWeights(tiny_model().model)
    teacher = others(weights)
    places = {name: value.data_ptr() for name, value in teacher.items()}
    student = {name: p.data_ptr() for name, p in weights.trained.items()}
    with weights.exchanged(teacher):
        assert {name: p.data_ptr() for name, p in weights.trained.items()} == places
        assert {name: value.data_ptr() for name, value in teacher.items()} == student
    assert {name: p.data_ptr() for name, p in weights.trained.items()} == student


def test_bfloat16_weights_have_an_agreement_too():
    model = tiny_model().model.bfloat16()
    before = ReplicatedWeights(model).agreement()
    with torch.no_grad():
        model.model.norm.weight[3] *= 2
    assert ReplicatedWeights(model).agreement() != before
