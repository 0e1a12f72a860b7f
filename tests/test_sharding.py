"""Weights divided over two real processes (gloo, 127.0.0.1) train as weights that are whole do."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from atesd.config import LoraConfig, ModelConfig, TrainConfig, load_config
from atesd.errors import ConfigError
from atesd.models.load import DTYPES, LoadedModel, load_model
from atesd.models.ranks import SINGLE_PROCESS, Ranks
from atesd.models.score import Scorer
from atesd.models.sharding import ShardedWeights, sharded_weights
from atesd.models.weights import ReplicatedWeights, Weights, weights_of
from atesd.train.optimiser import Optimiser
from atesd.train.update import BatchPlan, accumulate
from shard_program import (
    CASES,
    CASES_OF_NODES,
    MODELS,
    Case,
    bases,
    examples_of,
    held_bytes,
    method_of,
    model_of,
    rollouts_of,
    states,
    three_updates,
)
from test_ranks import outputs, start_ranks
from tiny import tiny_folder, tiny_model
from weights_contract import WeightsContract, loaded, untied  # noqa: F401  (a fixture)

PROGRAM = Path(__file__).with_name("shard_program.py")
FAILING = Path(__file__).with_name("failing_program.py")
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


def assert_trains_as_one_process(case: Case, folder: Path) -> None:
    expected = three_updates(case, model_of(case, folder), ModelConfig())
    found = load_file(folder / f"{case.name}.safetensors")
    assert found.keys() == expected.keys()
    worst = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    assert max(worst.values()) < ROUNDING, sorted(worst.items(), key=lambda pair: -pair[1])[:5]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_with_divided_weights_train_as_one_process_does(case: Case, folder: Path):
    assert_trains_as_one_process(case, folder)


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
def test_each_of_two_ranks_holds_half_of_weights_gradients_moments_and_teacher(
    name: str, folder: Path, facts: dict[str, Any]
):
    model, weights = plain(name, folder)
    first, second = facts[name]["bytes"]
    assert [a + b for a, b in zip(first, second, strict=True)] == held_bytes(model, weights)
    assert first == second  # every tensor of these models has an even number of rows


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


# Nodes


@pytest.mark.slow
def test_two_nodes_of_two_ranks_train_as_one_process_does(tmp_path: Path):
    # Two torchrun agents that meet on the loopback; the model is divided within each and held by both.
    bases(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two"]
    command = [*launch, *meet, str(PROGRAM), str(tmp_path), "hybrid"]
    agents = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    for case in CASES_OF_NODES:
        assert_trains_as_one_process(case, tmp_path)
    found = json.loads((tmp_path / "facts.json").read_text("utf-8"))
    assert len(set(found["agree"])) == 1
    assert found["differ"][0] == found["differ"][1] != found["differ"][2] == found["differ"][3]
    assert found["rows"][0] == found["rows"][2] == [0, found["rows"][1][0], found["rows"][0][2]]
    assert found["rows"][1] == found["rows"][3]


def test_hybrid_without_nodes_of_one_size_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    model = replace(tiny_model(), ranks=Ranks(0, 3))
    monkeypatch.setattr(Ranks, "_exchange", lambda ranks, message: [message] * ranks.size)
    with pytest.raises(ConfigError, match="the 3 ranks say that their nodes have 0 each; start torchrun with the same"):
        weights_of(model, ModelConfig(sharding="hybrid"))


# Loading


def held_in_memory(model: LoadedModel) -> int:
    """Bytes of all parameters that are not an adapter's."""
    kept = {p.untyped_storage().data_ptr(): p for n, p in model.model.named_parameters() if "lora_" not in n}
    return sum(p.untyped_storage().nbytes() for p in kept.values())


@pytest.mark.parametrize("name", ["tied", "untied", "several files"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "adapter"])
def test_weights_about_to_be_divided_stay_in_their_files_and_are_those_of_the_folder(
    name: str, lora: LoraConfig | None, tmp_path: Path
):
    source = untied() if name == "untied" else tiny_model()
    source.model.save_pretrained(tmp_path, max_shard_size="20KB" if name == "several files" else "1GB")
    source.tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), device="cpu", sharding="full", lora=lora)
    expected, found = load_model(config, 3), load_model(config, 3, divided=True)
    assert held_in_memory(found) < 500 < held_in_memory(expected) / 20
    weights = sharded_weights(found, config)
    same = ReplicatedWeights(expected.model).parts()
    assert weights.parts().keys() == same.keys()
    assert all(torch.equal(part.tensor, same[n].tensor) for n, part in weights.parts().items())
    assert rollouts_of(found, weights) == rollouts_of(expected, weights_of(expected, ModelConfig()))
    assert found.model.generation_config.to_dict() == expected.model.generation_config.to_dict()


def test_weights_whose_names_are_not_the_models_are_read_by_transformers(tmp_path: Path):
    folder = tiny_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = ModelConfig(path=str(folder), device="cpu", sharding="full")
    found = load_model(config, divided=True)
    assert found.deferred is None
    assert torch.equal(found.model.model.norm.weight, tensors["model.norm.weight"])


# Passes in bfloat16, weights in float32


def moved_by_small_steps(dtype: Literal["float32", "bfloat16"], compute: Literal["bfloat16"] | None) -> list[float]:
    """The share of entries that three updates at a rate of 1e-6 change, of each trained tensor."""
    model = tiny_model()
    model.model.to(DTYPES[dtype])
    config = ModelConfig(dtype=dtype, sharding="full" if compute else "none", compute_dtype=compute)
    weights = weights_of(model, config)
    scorer = Scorer(model, weights)
    method, _ = method_of(Case("tied"), scorer, weights)
    optimiser = Optimiser(weights.trained, TrainConfig(learning_rate=1e-6, num_updates=4))
    before = {name: part.tensor.clone() for name, part in weights.parts().items()}
    for update in range(3):
        meters = accumulate(method, examples_of(update, 5), BatchPlan("sequence", 2))
        weights.add_up_gradients()
        assert optimiser.step(update, meters.loss).taken
    assert scorer.hidden([examples_of(0, 1)[0].student_pair]).dtype == torch.bfloat16
    return [float((part.tensor != before[name]).float().mean()) for name, part in weights.parts().items()]


def test_with_weights_in_float32_small_steps_of_bfloat16_passes_are_kept():
    rounded = moved_by_small_steps("bfloat16", None)
    kept = moved_by_small_steps("float32", "bfloat16")
    assert max(rounded) < 0.05
    assert min(kept) > 0.5


def test_the_engine_decodes_with_the_weights_in_which_the_passes_are_made():
    model, low = tiny_model(), tiny_model()
    for parameter in low.model.parameters():  # and no buffer, as transformers loads it
        parameter.data = parameter.data.bfloat16()
    weights = weights_of(model, ModelConfig(sharding="full", compute_dtype="bfloat16"))
    assert rollouts_of(model, weights) == rollouts_of(low, weights_of(low, ModelConfig()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["exposure.kind=aligned"], "model.sharding: full does not go with exposure.kind: aligned or loss.gate"),
        (["loss.gate=aligned"], "model.sharding: full does not go with exposure.kind: aligned or loss.gate"),
        (
            ["model.lora={rank: 2, alpha: 4}", "sampling.engine=server", "sampling.server.publish=weights"],
            "sampling.server.publish: weights merges the adapter in a copy",
        ),
        (
            ["model.lora={rank: 2, alpha: 4}", "model.compute_dtype=bfloat16"],
            "model.compute_dtype: 'bfloat16' has no effect",
        ),
        (["model.dtype=bfloat16", "model.compute_dtype=bfloat16"], "model.compute_dtype: 'bfloat16' has no effect"),
    ],
)
def test_what_does_not_go_with_divided_weights_is_refused(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config("micro", ["model.sharding=full", *settings])


# Ranks that fail

LOST = "LostRankError: rank 0 of 2 has lost the others: rank 1 gave no sign any more"
RAISES = ("teacher raises", "student raises", "backward raises", "between raises")


def failed(folder: Path, failures: Sequence[str]) -> None:
    """Let two ranks fail in these ways; what each says is in a file of that name and the rank's number."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in failures]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in sockets]
    asked = [f"{port}:{how}" for port, how in zip(ports, failures, strict=True)]
    outputs(start_ranks([str(FAILING), str(folder), *asked], [folder / "0", folder / "1"]))


def test_the_reason_of_a_rank_that_fails_reaches_the_others_and_one_that_is_gone_is_named(tmp_path: Path):
    failed(tmp_path, [*RAISES, "student dies"])
    for how in RAISES:
        told = [(tmp_path / f"{how} {rank}").read_text("utf-8") for rank in range(2)]
        assert told == [
            "LostRankError: rank 1 of 2 failed: row 7 is unreadable",
            "DataError: row 7 is unreadable",
        ]
    assert (tmp_path / "student dies 0").read_text("utf-8").startswith(LOST)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path: Path):
    failed(tmp_path, ["student hangs"])
    assert (tmp_path / "student hangs 0").read_text("utf-8").startswith(LOST)
