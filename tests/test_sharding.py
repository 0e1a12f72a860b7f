"""Weights divided over two real processes (gloo, 127.0.0.1) train as weights that are whole do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from atesd.config import ModelConfig
from atesd.models.load import LoadedModel
from atesd.models.ranks import SINGLE_PROCESS
from atesd.models.sharding import ShardedWeights
from atesd.models.weights import Weights, weights_of
from shard_program import CASES, MODELS, Case, bases, held_bytes, model_of, rollouts_of, states, three_updates
from test_ranks import outputs, start_ranks
from weights_contract import WeightsContract, loaded  # noqa: F401  (a fixture)

PROGRAM = Path(__file__).with_name("shard_program.py")
ROUNDING = 1e-12


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


class TestSharded(WeightsContract):
    def make(self, loaded: LoadedModel) -> Weights:  # noqa: F811
        return ShardedWeights(loaded.model, SINGLE_PROCESS, mesh())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have left all that `shard_program` does."""
    folder = tmp_path_factory.mktemp("sharded")
    bases(folder)
    outputs(start_ranks([str(PROGRAM), str(folder)], [folder / "cwd-0", folder / "cwd-1"]))
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_with_divided_weights_train_as_one_process_does(case: Case, folder: Path):
    expected = three_updates(case, model_of(case, folder), ModelConfig())
    found = load_file(folder / f"{case.name}.safetensors")
    assert found.keys() == expected.keys()
    worst = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    assert max(worst.values()) < ROUNDING, sorted(worst.items(), key=lambda pair: -pair[1])[:5]


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "facts.json").read_text("utf-8"))
    return found


def plain(name: str, folder: Path) -> tuple[LoadedModel, Weights]:
    """The model of these tests with whole weights."""
    model = model_of(Case(name), folder)
    return model, weights_of(model, ModelConfig())


@pytest.mark.parametrize("name", MODELS)
def test_exchanged_displaced_and_gathered_weights_give_the_states_and_logits_of_whole_ones(name: str, folder: Path):
    # Each was once wrong without a word: exchanged `data` is not read, a gathered group keeps the values of before, a
    # head that is not copied becomes another tensor.
    found, expected = load_file(folder / f"{name} states.safetensors"), states(*plain(name, folder))
    assert all(torch.allclose(found[key], expected[key], rtol=0, atol=1e-11) for key in expected)
    assert not torch.allclose(found["hidden exchanged"], found["hidden plain"], atol=0.1)
    assert torch.equal(found["hidden after"], found["hidden plain"])


@pytest.mark.parametrize("name", MODELS)
def test_rollouts_of_gathered_weights_are_those_of_whole_ones(name: str, folder: Path, facts: dict[str, Any]):
    assert facts[name]["builtin"]
    assert [tuple(ids) for ids in facts[name]["rollouts"]] == rollouts_of(*plain(name, folder))


@pytest.mark.parametrize("name", MODELS)
def test_each_of_two_ranks_holds_half_of_what_is_trained(name: str, folder: Path, facts: dict[str, Any]):
    _, weights = plain(name, folder)
    own = facts[name]["bytes"]
    assert sum(own) == held_bytes(weights)
    assert max(own) - min(own) <= 8 * sum(part.tensor[0].numel() for part in weights.parts().values())  # odd rows


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_of_divided_weights_is_the_model(name: str, folder: Path):
    model, weights = plain(name, folder)
    files = list((folder / f"{name} saved").glob("*.safetensors"))
    saved = {key: value for file in files for key, value in load_file(file).items()}
    expected = {n.replace(".default", ""): p for n, p in model.model.named_parameters()}
    if weights.has_adapter:
        expected = {n: p for n, p in expected.items() if "lora_" in n}
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[n], expected[n]) for n in expected)
