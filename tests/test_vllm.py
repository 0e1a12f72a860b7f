"""The real vLLM on a CPU, started by `atesd serve`: what the builtin engine writes, and liars found out.

`make test-vllm`: three servers of one tiny Qwen3, and one that is killed and started again.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atesd.config import Config, LoraConfig, ModelConfig, ServerSettings
from atesd.engine.builtin import BuiltinEngine
from atesd.engine.interface import Engine, Request, SamplingParams
from atesd.engine.publish import adapters_on
from atesd.engine.server import ServerEngine
from atesd.engine.wire import Wire
from atesd.errors import EngineError
from atesd.models.load import LoadedModel, load_model
from atesd.records import Rollout
from atesd.session import train
from engine_contract import FILTERED, GREEDY, PLAIN, EngineContract, ids_of, requests_of
from quick import finished, quick
from test_server import enlarge, move, whole_without_drift
from vllm_server import Liar, Served, qwen3_folder

pytestmark = pytest.mark.vllm

NUCLEUS = SamplingParams(temperature=0.7, top_p=0.9, top_k=0, min_p=0.02, completion_tokens=40)
LORA = "model.lora={rank: 4, alpha: 8}"
KEYED = "sampling.server.draws=keyed"
ROUNDING = 1e-5  # nats per token, of float32


def free_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    return qwen3_folder(place / "qwen3")


@pytest.fixture(scope="module")
def both(place: Path, model: Path) -> Iterator[list[Served]]:
    """One server that takes adapters and one that takes all weights, of the same model."""
    path = f"model.path={model}"
    yield from ended(
        [
            Served(place / "adapters", free_url(), path, LORA, KEYED),
            Served(place / "weights", free_url(), path, KEYED),
        ]
    )


def ended(servers: list[Served]) -> Iterator[list[Served]]:
    """The servers once they are healthy; ended whatever happens, as Ctrl-C ends them."""
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        codes = [server.end() for server in servers]
    assert codes == [0] * len(servers)


@pytest.fixture
def adapters(both: list[Served]) -> str:
    """The address of the server that takes adapters."""
    return both[0].url


@pytest.fixture
def weights(both: list[Served]) -> str:
    """The address of the server that takes all weights."""
    return both[1].url


ENGINES: list[ServerEngine] = []
LIARS: list[Liar] = []


@pytest.fixture(autouse=True)
def _closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    while ENGINES:
        ENGINES.pop().close()
    while LIARS:
        LIARS.pop().stop()


def engine_at(loaded: LoadedModel, url: str, **options: Any) -> ServerEngine:
    settings = {"retries": 1, "retry_wait": 0.1, "timeout": 120.0, "draws": "keyed", "urls": (url,), **options}
    ENGINES.append(ServerEngine(loaded, ServerSettings(**settings)))
    return ENGINES[-1]


def loaded_from(model: Path, rank: int | None = None) -> LoadedModel:
    return load_model(ModelConfig(path=str(model), lora=rank and LoraConfig(rank=rank, alpha=8)))


def adapted(model: Path, size: float = 1.0) -> LoadedModel:
    """With an adapter that changes its logits."""
    loaded = loaded_from(model, 4)
    move(loaded, 0.2 * size)
    return loaded


def builtin(loaded: LoadedModel, requests: Sequence[Request], params: SamplingParams) -> list[tuple[int, ...]]:
    return ids_of(BuiltinEngine(loaded, 8).complete(requests, params))


class Taking:
    """An engine that has the server for itself while it completes: all weights of a server belong to one trainer."""

    def __init__(self, engine: ServerEngine) -> None:
        self._engine = engine

    def _alone(self) -> None:
        for other in ENGINES:
            if other is not self._engine:
                other.close()

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        self._alone()
        return self._engine.complete(requests, params)

    def publish(self, update: int) -> None:
        self._alone()
        self._engine.publish(update)

    def close(self) -> None:
        self._engine.close()

    drift = property(lambda self: self._engine.drift)


class TestVllm(EngineContract):
    """The contract, on one server: each engine gives it its weights before it completes."""

    local = False

    @pytest.fixture(autouse=True)
    def _served(self, model: Path, adapters: str, weights: str) -> None:
        self._folder, self._adapters, self._weights = model, adapters, weights

    def make(self, loaded: LoadedModel, batch_size: int = 8) -> Engine:  # noqa: ARG002
        if hasattr(loaded.model, "peft_config"):
            return engine_at(loaded, self._adapters)
        return Taking(engine_at(loaded, self._weights))

    def model(self, architecture: str = "qwen3") -> LoadedModel:
        if architecture != "qwen3":
            pytest.skip(f"a server has one network, and this one has no {architecture}")
        return loaded_from(self._folder)

    def folder(self, path: Path) -> Path:  # noqa: ARG002
        return self._folder


@pytest.mark.parametrize("params", [PLAIN, FILTERED, NUCLEUS, GREEDY], ids=["plain", "top-k", "min-p", "greedy"])
def test_adapters_are_written_with_to_the_token_and_taken_away_again(model, adapters, params):
    loaded, requests = adapted(model), requests_of([3, 9, 5, 12, 1, 7] * 4)
    engine = engine_at(loaded, adapters)
    for update in range(2):
        move(loaded, 0.2)
        engine.publish(update)
        assert ids_of(engine.complete(requests, params)) == builtin(loaded, requests, params)
        assert engine.drift < ROUNDING
        assert len(adapters_on(Wire(adapters, ServerSettings()))) == 1
    engine.close()
    assert adapters_on(Wire(adapters, ServerSettings())) == []


def test_an_adapter_merged_into_all_weights_is_written_with_to_the_token(model, weights):
    loaded, requests = adapted(model), requests_of([3, 9, 5, 12, 1, 7])
    engine = engine_at(loaded, weights, publish="weights")
    assert ids_of(engine.complete(requests, FILTERED)) == builtin(loaded, requests, FILTERED)
    assert engine.drift < ROUNDING


@pytest.mark.parametrize("params", [PLAIN, FILTERED, NUCLEUS], ids=["plain", "top-k", "min-p"])
def test_seeds_repeat_whatever_the_order_and_scores_are_the_trainers(model, adapters, params):
    loaded, requests = adapted(model), requests_of([3, 9, 5, 12, 1, 7])
    engine = engine_at(loaded, adapters, draws="seed")
    found = engine.complete(requests, params)
    assert engine.drift < ROUNDING
    assert ids_of(engine.complete(requests[::-1], params))[::-1] == ids_of(found)
    assert len(set(ids_of(engine.complete([replace(requests[1], key=(0, "x", i)) for i in range(6)], params)))) > 1


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_a_server_that_ignores_the_adapter_is_caught_however_little_it_changes(model, adapters, size):
    loaded = adapted(model, size)
    LIARS.append(Liar(adapters, "/v1/load_lora_adapter"))
    with pytest.raises(EngineError, match=r"ignores the adapter: .* nats per token away"):
        engine_at(loaded, LIARS[-1].url).complete(requests_of([3, 9, 5, 12]), PLAIN)


def test_a_server_that_ignores_the_weights_is_caught(model, weights):
    loaded, requests = loaded_from(model), requests_of([3, 9, 5, 12])
    engine_at(loaded, weights).complete(requests, PLAIN)
    ENGINES.pop().close()
    enlarge(loaded)
    LIARS.append(Liar(weights, "/collective_rpc"))
    with pytest.raises(EngineError, match=r"nats per token away .*it does not have the student's weights"):
        engine_at(loaded, LIARS[-1].url, drift_limit=0.05).complete(requests, PLAIN)


def test_a_server_of_another_shape_is_left_alone(place, weights):
    other = qwen3_folder(place / "other", hidden=32)
    with pytest.raises(EngineError, match=r"qwen3, whose hidden_size is 64, and that of the model in training is 32"):
        engine_at(loaded_from(other), weights)


def test_a_tied_head_that_a_reload_leaves_stale_is_caught(place):
    folder = qwen3_folder(place / "tied", tied=True)
    for _ in ended([tied := Served(place / "tied-server", free_url(), f"model.path={folder}", KEYED)]):
        loaded, requests = loaded_from(folder), requests_of([3, 9, 5, 12])
        engine = engine_at(loaded, tied.url, drift_limit=0.05)
        assert ids_of(engine.complete(requests, PLAIN)) == builtin(loaded, requests, PLAIN)
        with torch.no_grad():
            loaded.model.get_input_embeddings().weight.mul_(1.5)
        engine.publish(1)
        with pytest.raises(EngineError, match=r"nats per token away .*it does not have the student's weights"):
            engine.complete(requests, PLAIN)
        engine.close()


def test_a_server_without_the_logits_processor_is_found_out_before_it_writes(place, model):
    path = f"model.path={model}"
    for _ in ended([server := Served(place / "seeds", free_url(), path, "sampling.server.draws=seed")]):
        engine = engine_at(loaded_from(model), server.url)
        with pytest.raises(EngineError, match="does not draw by key: eight keys gave the same token"):
            engine.publish(0)
        engine.close()


# Whole runs


def config_at(model: Path, *more: str) -> Config:
    lengths = "train.num_updates=4", "train.evaluate_every=2", "train.learning_rate=0.01"
    return quick(*lengths, f"model.path={model}", *more)


def through(url: str, *more: str) -> tuple[str, ...]:
    return ("sampling.engine=server", f"sampling.server={{urls: ['{url}'], draws: keyed, retries: 0}}", *more)


@pytest.mark.parametrize("how", ["adapter", "merged adapter", "all weights"])
def test_a_run_is_that_of_the_builtin_engine(model, adapters, weights, tmp_path, how):
    trained = () if how == "all weights" else (LORA,)
    url, form = (adapters, "adapter") if how == "adapter" else (weights, "weights")
    run = finished(config_at(model, *trained, *through(url, f"sampling.server.publish={form}")), tmp_path / "served")
    plain = finished(config_at(model, *trained, "sampling.engine=builtin"), tmp_path / "plain")
    assert whole_without_drift(run) == {**whole_without_drift(plain), "has_drift": [True] * 4}
    drifts = [row["rollout_drift"] for row in run.rows("metrics")]
    print(f"\n{how}: rollout_drift {min(drifts):.1e} to {max(drifts):.1e} nats per token")
    assert max(drifts) < ROUNDING


def test_a_killed_server_is_named_and_the_run_goes_on_with_one_started_anew(both, model, place, tmp_path):
    # The last test: it takes the server of adapters away.
    killed, url = both[0], both[0].url
    plain = finished(config_at(model, LORA, "sampling.engine=builtin"), tmp_path / "plain")
    config = config_at(model, LORA, *through(url))
    with pytest.raises(EngineError, match=rf"{url}/v1/\S+: cannot be used: "):
        train(config, tmp_path / "run", listeners=[KillsAt(2, killed.vllm)])
    assert killed.process.wait(60) == 1
    assert "the server ended by itself, with exit code -9" in killed.log.read_text("utf-8")
    killed.end()
    both[0] = Served(place / "anew", url, f"model.path={model}", LORA, KEYED).wait()
    run = finished(config, tmp_path / "run")
    assert whole_without_drift(run) == {**whole_without_drift(plain), "has_drift": [True] * 4}


class KillsAt:
    """A listener that kills a process once an update is recorded."""

    def __init__(self, update: int, process: int) -> None:
        self._update, self._process = update, process

    def begin(self, *_: object) -> None: ...

    def message(self, *_: object) -> None: ...

    def end(self, *_: object) -> None: ...

    def row(self, kind: str, row: Any) -> None:
        if kind == "metrics" and row["update"] == self._update:
            os.kill(self._process, signal.SIGKILL)
