"""Rollouts from servers: the contract of every engine, stale and failing servers, whole runs. The server is a stub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atesd.config import LoraConfig, ModelConfig, ServerSettings
from atesd.engine.builtin import BuiltinEngine
from atesd.engine.interface import Engine
from atesd.engine.server import ServerEngine, seed_of
from atesd.errors import ConfigError, EngineError, NonFiniteError
from atesd.models.load import LoadedModel, load_model
from atesd.session import train
from engine_contract import FILTERED, GREEDY, PLAIN, EngineContract, ids_of, requests_of
from quick import quick
from stub_server import StubServer
from tiny import tiny_folder, tiny_model

QUICK = {"retries": 1, "retry_wait": 0.0, "timeout": 30.0}
RUNNING: list[StubServer] = []
ENGINES: list[ServerEngine] = []


@pytest.fixture(autouse=True)
def _stop_servers() -> Iterator[None]:
    yield
    while ENGINES:
        ENGINES.pop().close()
    while RUNNING:
        RUNNING.pop().stop()


def served(loaded: LoadedModel, **options: object) -> StubServer:
    RUNNING.append(StubServer(loaded, **options))  # type: ignore[arg-type]
    return RUNNING[-1]


def engine_at(loaded: LoadedModel, *servers: StubServer, **options: object) -> ServerEngine:
    settings = {**QUICK, "draws": "keyed", "urls": tuple(server.url for server in servers), **options}
    ENGINES.append(ServerEngine(loaded, ServerSettings(**settings)))  # type: ignore[arg-type]
    return ENGINES[-1]


def adapted(tmp_path: Path) -> LoadedModel:
    """With an adapter that changes its logits."""
    loaded = load_model(ModelConfig(path=str(tiny_folder(tmp_path / "tiny")), lora=LoraConfig(rank=2)))
    move(loaded)
    return loaded


def move(loaded: LoadedModel) -> None:
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=source)


class TestServer(EngineContract):
    local = False

    def make(self, loaded: LoadedModel, batch_size: int = 8) -> Engine:  # noqa: ARG002
        return engine_at(loaded, served(loaded))


def test_several_servers_share_the_requests_and_one_that_is_gone_is_replaced():
    loaded, requests = tiny_model(), requests_of([3, 5, 7, 9, 4, 6, 8, 2])
    first, second = served(loaded), served(loaded)
    engine = engine_at(loaded, first, second)
    expected = ids_of(BuiltinEngine(loaded, 8).complete(requests, FILTERED))
    assert ids_of(engine.complete(requests, FILTERED)) == expected
    assert all(any(path == "/v1/completions" for path, _ in server.requests) for server in (first, second))
    first.faults.add("down")
    assert ids_of(engine.complete(requests, FILTERED)) == expected


def test_an_adapter_is_published_under_a_new_name_and_the_last_one_taken_away(tmp_path):
    loaded, requests = adapted(tmp_path), requests_of([4, 7])
    server, shared = served(loaded), tmp_path / "shared"
    engine = engine_at(loaded, server, folder=str(shared))
    for update in range(3):
        move(loaded)
        engine.publish(update)
        assert ids_of(engine.complete(requests, PLAIN)) == ids_of(BuiltinEngine(loaded, 8).complete(requests, PLAIN))
    [name] = [name for name in server.models if name != "base"]
    assert [path.name for path in shared.iterdir()] == [name]
    assert name.split("-")[2] == "2"
    engine.close()
    assert list(server.models) == ["base"]
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("draws", ["seed", "keyed"])
def test_drift_is_nothing_where_the_weights_are_the_students(tmp_path, draws):
    loaded = adapted(tmp_path)
    engine = engine_at(loaded, served(loaded), draws=draws)
    for params in (PLAIN, FILTERED, GREEDY):
        engine.complete(requests_of([4, 7, 5]), params)
        assert engine.drift == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("kind", ["adapter", "weights"])
def test_a_server_that_ignores_what_it_is_told_to_load_is_caught_at_once(tmp_path, kind):
    loaded = adapted(tmp_path) if kind == "adapter" else tiny_model()
    server = served(loaded)
    server.faults.add("stale")
    engine = engine_at(loaded, server, drift_limit=0.05)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.2)
    with pytest.raises(EngineError, match=r"http://127.*nats per token away .*limit 0.05: the server does not have"):
        engine.complete(requests_of([4, 7, 5]), PLAIN)


def test_a_server_of_another_model_is_caught_by_its_log_probabilities():
    engine = engine_at(tiny_model(), served(tiny_model(seed=5)), publish="adapter")
    engine._published = "base"
    with pytest.raises(EngineError, match="serve another model"):
        engine.complete(requests_of([4, 7, 5]), PLAIN)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("foreign ids", "token ids outside the vocabulary of 30"),
        ("cut short", "fewer tokens than asked for|one log-probability"),
        ("too many", "more than the 12 asked for"),
        ("goes on", "tokens behind the end token"),
        ("no ids", "without token ids and log-probabilities"),
        ("no logprobs", "not one log-probability per token"),
        ("down", r"answers 500: .*out of memory.*2 times; is it running"),
    ],
)
def test_what_a_server_answers_is_checked(fault, said):
    loaded = tiny_model()
    server = served(loaded)
    engine = engine_at(loaded, server)
    engine.publish(0)
    server.faults.add(fault)
    with pytest.raises(EngineError, match=said) as error:
        engine.complete(requests_of([4, 7]), replace(PLAIN, completion_tokens=12))
    assert server.url in str(error.value)


def test_log_probabilities_that_are_not_finite_name_the_problem_and_the_server():
    loaded = tiny_model()
    server = served(loaded)
    engine = engine_at(loaded, server)
    server.faults.add("nan")
    with pytest.raises(NonFiniteError, match=r"completes p0 \(http://127"):
        engine.complete(requests_of([4]), PLAIN)


def test_a_busy_server_is_asked_again():
    loaded, requests = tiny_model(), requests_of([4, 7])
    server = served(loaded)
    server.faults.add("busy")
    engine = engine_at(loaded, server, retries=8)
    assert ids_of(engine.complete(requests, PLAIN)) == ids_of(BuiltinEngine(loaded, 8).complete(requests, PLAIN))


def test_a_server_that_never_answers_is_given_up_after_its_time():
    loaded = tiny_model()
    server = served(loaded)
    engine = engine_at(loaded, server, timeout=0.2, retries=0)
    engine.publish(0)
    server.faults.add("slow")
    with pytest.raises(EngineError, match=r"gave no answer within 0.2 s \(sampling.server.timeout\)"):
        engine.complete(requests_of([4]), PLAIN)


def test_a_server_that_is_not_there_is_named_with_what_to_do():
    loaded = tiny_model()
    gone = served(loaded)
    gone.stop()
    RUNNING.remove(gone)
    with pytest.raises(EngineError, match=rf"{gone.url}/health: cannot be reached: .*atesd serve RECIPE"):
        engine_at(loaded, gone)


def test_a_web_server_that_is_no_rollout_server_is_refused():
    server = served(tiny_model())
    server.get = lambda path: (200, {"data": []} if path == "/v1/models" else {})  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="lists 0 models where one is expected"):
        engine_at(tiny_model(), server)


def test_servers_that_name_their_model_differently_are_refused():
    loaded = tiny_model()
    with pytest.raises(EngineError, match=r"different names \(base, other\)"):
        engine_at(loaded, served(loaded), served(loaded, name="other"))


def test_a_server_without_room_for_prompt_and_completion_is_refused_before_anything_is_asked():
    loaded = tiny_model()
    server = served(loaded, room=15)
    with pytest.raises(EngineError, match=r"sequences of 15 tokens, and p0 needs 16 \(4 of prompt, 12 of completion\)"):
        engine_at(loaded, server).complete(requests_of([4]), PLAIN)
    assert server.requests == []


def test_a_restarted_server_has_forgotten_the_adapter_and_says_so(tmp_path):
    loaded = adapted(tmp_path)
    server = served(loaded)
    engine = engine_at(loaded, server)
    engine.publish(0)
    server.models = {"base": server.models["base"]}
    with pytest.raises(EngineError, match=r"answers 404: .*no model atesd-.*--enable-lora"):
        engine.complete(requests_of([4]), PLAIN)


def test_two_trainers_of_all_weights_do_not_share_a_folder_and_two_of_adapters_may(tmp_path):
    loaded = tiny_model()
    first, second = (engine_at(loaded, served(loaded), folder=str(tmp_path / "shared")) for _ in range(2))
    first.publish(0)
    with pytest.raises(EngineError, match="in use by another trainer"):
        second.publish(0)
    model = adapted(tmp_path)
    server = served(model)
    for engine in [engine_at(model, server, folder=str(tmp_path / "adapters")) for _ in range(2)]:
        engine.complete(requests_of([4]), PLAIN)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    engine = engine_at(tiny_model(), served(tiny_model()), folder=str(tmp_path / "file" / "below"))
    with pytest.raises(EngineError, match=r"file/below: cannot be made"):
        engine.complete(requests_of([4]), PLAIN)


def test_everything_that_a_models_folder_could_change_is_written_out():
    loaded = tiny_model()
    server = served(loaded)
    request = requests_of([4])[0]
    engine_at(loaded, server, draws="seed").complete([request], FILTERED)
    body = next(body for path, body in server.requests if path == "/v1/completions")
    assert (body["temperature"], body["top_k"], body["top_p"], body["min_p"]) == (1.3, 20, 0.9, 0.02)
    assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
    assert body["stop_token_ids"] == sorted(loaded.end_ids)
    assert body["seed"] == seed_of(request.key)


def test_seeds_belong_to_keys():
    seeds = [seed_of((0, "rollout", update, f"p{problem}", 0)) for update in range(20) for problem in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of((0, "rollout", 3, "p1", 0)) == seed_of((0, "rollout", 3, "p1", 0))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "no address of a server; write it as http://HOST:PORT"),
        ("http://host:8000/v1", "no address of a server"),
        ("ftp://host:8000", "no address of a server"),
    ],
)
def test_an_address_that_is_none_is_refused_with_how_to_write_it(url, said):
    with pytest.raises(ConfigError, match=said):
        quick("sampling.engine=server", f'sampling.server.urls=["{url}"]')


def test_settings_of_servers_are_idle_without_them():
    with pytest.raises(ConfigError, match=r"sampling.server.* sampling.engine: server"):
        quick("sampling.server.timeout=5")


# Whole runs

RUN = ("train.num_updates=3", "train.evaluate_every=2", "model.lora={rank: 4, alpha: 8}", "train.learning_rate=0.01")


def rows_without_times(run) -> list[dict[str, object]]:
    rows = [*run.rows("metrics"), *run.rows("evaluations"), *run.rows("decisions")]
    return [{k: v for k, v in row.items() if k not in ("seconds", "rollout_drift")} for row in rows]


def test_a_run_through_a_server_is_that_of_the_builtin_engine_and_says_its_drift(tmp_path):
    plain = train(quick(*RUN, "sampling.engine=builtin"), tmp_path / "plain").run
    loaded = load_model(quick(*RUN).model, 0)
    server = served(loaded)
    address = f"sampling.server={{urls: ['{server.url}'], draws: keyed, retries: 0}}"
    config = quick(*RUN, "sampling.engine=server", address)
    run = train(config, tmp_path / "served").run
    assert rows_without_times(run) == rows_without_times(plain)
    assert all(row["rollout_drift"] < 1e-3 for row in run.rows("metrics"))
    assert not any("rollout_drift" in row for row in plain.rows("metrics"))


def test_a_run_whose_server_dies_resumes_with_another_and_ends_the_same(tmp_path):
    loaded = load_model(quick(*RUN).model, 0)
    whole = train(quick(*RUN, "sampling.engine=builtin"), tmp_path / "whole").run

    def config(server: StubServer):
        address = f"sampling.server={{urls: ['{server.url}'], draws: keyed, retries: 0}}"
        return quick(*RUN, "sampling.engine=server", address)

    server = served(loaded)
    loads = 0

    def post(path, body, answer=server.post):
        nonlocal loads
        loads += path == "/v1/load_lora_adapter"
        if loads > 2:
            server.faults.add("down")
        return answer(path, body)

    server.post = post  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="out of memory"):
        train(config(server), tmp_path / "cut")
    run = train(config(served(loaded)), tmp_path / "cut").run
    assert rows_without_times(run) == rows_without_times(whole)
