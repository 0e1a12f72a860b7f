"""Rollouts from servers: the contract of every engine, stale and failing servers, whole runs. The server is a stub."""

from __future__ import annotations

import errno
import json
import resource
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atesd.config import Config, LoraConfig, ModelConfig, ServerSettings, dump_config
from atesd.engine.builtin import BuiltinEngine
from atesd.engine.completions import seed_of
from atesd.engine.interface import Engine
from atesd.engine.server import ServerEngine
from atesd.engine.wire import Wire
from atesd.errors import ConfigError, EngineError, NonFiniteError
from atesd.models.load import LoadedModel, load_model
from atesd.runs import RunFolder
from atesd.session import train
from atesd_lab.report.alarms import find_alarms
from atesd_lab.report.rows import read_run
from engine_contract import FILTERED, GREEDY, PLAIN, EngineContract, ids_of, requests_of
from quick import cut_after, fingerprint, finished, quick
from stub_server import StubServer
from test_ranks import assert_same_run, outputs, start_ranks
from tiny import tiny_folder, tiny_model

QUICK = {"retries": 1, "retry_wait": 0.0, "timeout": 30.0}
RUNNING: list[StubServer] = []
ENGINES: list[ServerEngine] = []


@pytest.fixture(autouse=True)
def _stop_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
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


def adapted(tmp_path: Path, size: float = 1.0) -> LoadedModel:
    """With an adapter that changes its logits."""
    loaded = load_model(ModelConfig(path=str(tiny_folder(tmp_path / "tiny")), lora=LoraConfig(rank=2)))
    move(loaded, size)
    return loaded


def move(loaded: LoadedModel, size: float = 1.0) -> None:
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * size * torch.randn(parameter.shape, generator=source)


def enlarge(loaded: LoadedModel) -> None:
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.2)


def completions_asked_of(server: StubServer) -> int:
    """Without the single tokens that show whether a server draws by key."""
    return sum(path == "/v1/completions" and body["max_tokens"] > 1 for path, body in server.requests)


class TestServer(EngineContract):
    local = False

    def make(self, loaded: LoadedModel, batch_size: int = 8) -> Engine:  # noqa: ARG002
        return engine_at(loaded, served(loaded))


def test_several_servers_share_the_requests_and_one_that_is_gone_is_an_error_that_names_it():
    loaded, requests = tiny_model(), requests_of([3, 5, 7, 9, 4, 6, 8])
    first, second = served(loaded), served(loaded)
    engine = engine_at(loaded, first, second)
    expected = ids_of(BuiltinEngine(loaded, 8).complete(requests, FILTERED))
    assert ids_of(engine.complete(requests, FILTERED)) == expected
    assert [completions_asked_of(server) for server in (first, second)] == [4, 3]
    second.faults.add("down")
    with pytest.raises(EngineError, match=rf"{second.url}/v1/completions: cannot be used: answers 500"):
        engine.complete(requests, FILTERED)


def test_an_adapter_is_published_under_a_new_name_and_the_last_one_taken_away(tmp_path):
    loaded, requests = adapted(tmp_path), requests_of([4, 7])
    server, shared = served(loaded), tmp_path / "shared"
    engine = engine_at(loaded, server, folder=str(shared))
    names = []
    for update in range(3):
        move(loaded)
        engine.publish(update)
        assert ids_of(engine.complete(requests, PLAIN)) == ids_of(BuiltinEngine(loaded, 8).complete(requests, PLAIN))
        [name] = [name for name in server.models if name != "base"]
        [folder] = [path for path in shared.glob("atesd-*/*") if path.is_dir()]
        assert name == f"{folder.parent.name}-{folder.name}"
        names.append(name)
    assert len(set(names)) == 3
    engine.close()
    assert list(server.models) == ["base"]
    assert list(shared.glob("atesd-*")) == []


def test_all_weights_may_be_published_of_a_model_with_an_adapter_which_stays_as_it_is(tmp_path):
    loaded, requests = adapted(tmp_path), requests_of([4, 7])
    server = served(loaded)
    engine = engine_at(loaded, server, publish="weights")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    assert ids_of(engine.complete(requests, PLAIN)) == ids_of(BuiltinEngine(loaded, 8).complete(requests, PLAIN))
    assert list(server.models) == ["base"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize(("by", "swallowed"), [(1e-4, True), (0.05, False)])
def test_all_weights_are_not_published_where_rounding_would_swallow_the_adapter(tmp_path, by, swallowed):
    # Of a weight of .1 bfloat16 resolves .0005.
    tiny_folder(tmp_path / "tiny")
    loaded = load_model(ModelConfig(path=str(tmp_path / "tiny"), dtype="bfloat16", lora=LoraConfig(rank=4, alpha=8)))
    shared = tmp_path / "shared"
    engine = engine_at(loaded, served(loaded), publish="weights", folder=str(shared))
    engine.publish(0)  # nothing is learned yet
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(by)
    if not swallowed:
        engine.publish(1)
        return
    with pytest.raises(
        EngineError, match=r"would swallow \d+ % .* set sampling.server.publish: adapter, or model.dtype"
    ):
        engine.publish(1)
    assert [path.name for path in shared.glob("atesd-*/*") if path.is_dir()] == []


def test_an_adapter_cannot_be_published_of_a_model_without_one():
    with pytest.raises(ConfigError, match=r"publish: adapter, but the model has none; set model.lora"):
        engine_at(tiny_model(), served(tiny_model()), publish="adapter")


def test_what_a_trainer_left_that_was_killed_is_cleared_away_and_a_live_ones_is_not(tmp_path):
    loaded = adapted(tmp_path)
    server, shared = served(loaded), tmp_path / "shared"
    killed, live = (engine_at(loaded, server, folder=str(shared)) for _ in range(2))
    killed.publish(3)
    killed._publisher._held.close()  # the operating system lets go of the lock
    live.publish(0)
    assert len(list(shared.glob("atesd-*"))) == 1
    engine_at(loaded, server, folder=str(shared)).publish(0)
    assert len(list(shared.glob("atesd-*"))) == 2
    assert len(server.models) == 3  # the base, and one adapter of each trainer that lives


@pytest.mark.parametrize("draws", ["seed", "keyed"])
def test_drift_is_nothing_where_the_weights_are_the_students(tmp_path, draws):
    loaded = adapted(tmp_path)
    engine = engine_at(loaded, served(loaded), draws=draws)
    for params in (PLAIN, FILTERED, GREEDY):
        engine.complete(requests_of([4, 7, 5]), params)
        assert engine.drift == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_a_server_that_ignores_adapters_is_caught_at_once_however_little_they_change(tmp_path, size):
    loaded = adapted(tmp_path, size)
    server = served(loaded)
    server.faults.add("stale")
    engine = engine_at(loaded, server)
    with pytest.raises(EngineError, match=rf"^{server.url}: ignores the adapter: .* nats per token away"):
        engine.complete(requests_of([4, 7, 5]), PLAIN)


def test_an_adapter_that_changes_nothing_yet_is_not_called_ignored(tmp_path):
    loaded = load_model(ModelConfig(path=str(tiny_folder(tmp_path / "tiny")), lora=LoraConfig(rank=2)))
    engine = engine_at(loaded, served(loaded))
    assert len(engine.complete(requests_of([4, 7, 5]), PLAIN)) == 3


def test_a_server_that_ignores_weights_is_caught_at_once():
    loaded = tiny_model()
    server = served(loaded)
    server.faults.add("stale")
    engine = engine_at(loaded, server, drift_limit=0.05)
    enlarge(loaded)
    with pytest.raises(
        EngineError, match=rf"^{server.url}: .*nats per token away .*drift_limit 0.05: it does not have"
    ):
        engine.complete(requests_of([4, 7, 5]), PLAIN)


def test_one_stale_server_among_many_is_not_lost_in_their_mean():
    loaded, requests = tiny_model(), requests_of([4] * 8)
    servers = [served(loaded) for _ in range(4)]
    servers[2].faults.add("stale")
    enlarge(loaded)
    engine = engine_at(loaded, *servers, drift_limit=1000.0)
    engine.complete(requests, PLAIN)
    engine.close()
    alone = engine_at(loaded, servers[2], drift_limit=1000.0)
    alone.complete(requests[2::4], PLAIN)
    assert engine.drift == pytest.approx(alone.drift, rel=1e-4)
    assert engine.drift > 0.1


def test_a_server_of_another_model_is_told_at_the_start_and_one_that_hides_it_by_its_log_probabilities(tmp_path):
    loaded = adapted(tmp_path)
    other = served(load_model(ModelConfig(path=str(tiny_folder(tmp_path / "other", seed=5)))))
    with pytest.raises(EngineError, match=rf"{other.url}: serves .*other, and an adapter of .*tiny is trained"):
        engine_at(loaded, other)
    hidden = served(tiny_model(seed=5), name="tiny", root="/elsewhere/weights")
    with pytest.raises(EngineError, match=r"drift_limit 0.5: it does not have the student's weights"):
        engine_at(loaded, hidden).complete(requests_of([4, 7, 5]), PLAIN)


def test_all_weights_are_given_to_no_server_of_another_shape_which_could_not_go_on_after_them(tmp_path):
    folder = tiny_folder(tmp_path / "served", vocab=40)
    server = served(load_model(ModelConfig(path=str(folder))))
    with pytest.raises(EngineError, match=r"served, whose vocab_size is 47, and that of the model in training is 30"):
        engine_at(tiny_model(), server)
    assert server.requests == []


def test_a_server_that_does_not_draw_by_key_is_found_out_though_its_log_probabilities_are_right():
    loaded = tiny_model()
    server = served(loaded)
    server.faults.add("greedy")
    with pytest.raises(EngineError, match=r"does not draw by key: .* --logits-processors atesd.engine.keyed_draws"):
        engine_at(loaded, server).publish(0)
    ENGINES.pop().close()
    engine_at(loaded, server, draws="seed").complete(requests_of([4]), PLAIN)


def test_a_copy_of_the_model_in_another_place_is_the_same_model(tmp_path):
    loaded = adapted(tmp_path)
    engine_at(loaded, served(loaded, name="/scratch/copies/tiny", root="/scratch/copies/tiny"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("foreign ids", "token 1000000, outside the vocabulary of 30"),
        ("cut short", "1 tokens and no end token, expected 12"),
        ("too many", "512 tokens, expected 1 to 12"),
        ("goes on", "[1-9][0-9]? tokens behind the end token"),
        ("no ids", "without token ids, their log-probabilities and a finish reason"),
        ("no logprobs", "11 log-probabilities for 12 tokens"),
        ("aborted", "finish_reason 'abort', expected 'length' as the last token is no end token"),
        ("down", r"answers 500: .*out of memory.*, 2 times; "),
    ],
)
def test_what_a_server_answers_is_checked(fault, said):
    loaded = replace(tiny_model(), end_ids=frozenset({1} if fault == "goes on" else ()))
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
    engine_at(loaded, server).publish(0)
    engine = engine_at(loaded, server, timeout=0.2, retries=5)
    engine._published = True
    server.faults.add("slow")
    with pytest.raises(EngineError, match=r"no answer within 0.2 s; .*Raise sampling.server.timeout"):
        engine.complete(requests_of([4]), PLAIN)
    assert completions_asked_of(server) == 1  # it is not asked again


def test_a_long_completion_is_waited_for_as_long_as_its_length_takes(monkeypatch):
    # By hand: 38,912 tokens at 4 a second; 256 of them at 500 a second in all; 1,024 take less than 600 s either way.
    server = ServerSettings()
    assert server.answer_seconds(38_912) == 9_728
    assert server.answer_seconds(38_912, 256) == 256 * 38_912 / 500
    assert server.answer_seconds(1_024, 256) == 600
    assert ServerSettings(timeout=30.0).answer_seconds(38_912, 256) == 30
    loaded, waited = tiny_model(), []
    stub, real = served(loaded), Wire._ask

    def asked(wire, request, timeout, fix):
        waited.append((request.selector, timeout))
        return real(wire, request, timeout, fix)

    monkeypatch.setattr(Wire, "_ask", asked)
    monkeypatch.setattr(ServerSettings, "answer_seconds", lambda _, tokens=0, at_once=1: 7 + 100 * tokens + at_once)
    engine_at(loaded, stub).complete(requests_of([4, 7, 5]), PLAIN)
    completions = [timeout for path, timeout in waited if path == "/v1/completions"]
    assert completions[-3:] == [7 + 100 * PLAIN.completion_tokens + 3] * 3
    assert {timeout for path, timeout in waited if path == "/health"} == {8}


@pytest.mark.parametrize("params", [PLAIN, FILTERED], ids=["temperature 1", "another temperature"])
def test_stale_weights_are_caught_at_any_temperature(params):
    loaded = tiny_model()
    server = served(loaded)
    server.faults.add("stale")
    engine = engine_at(loaded, server, drift_limit=0.05, drift_alarm=0.05)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.2)
    with pytest.raises(EngineError, match="nats per token away from the trainer's own"):
        engine.complete(requests_of([4, 7, 5]), params)


def test_an_interrupt_waits_for_no_server():
    loaded = tiny_model()
    server = served(loaded)
    engine = engine_at(loaded, server)
    engine.publish(0)
    server.faults.add("slow")
    before = set(threading.enumerate())
    main = threading.main_thread().ident
    answer = server.post

    def post(path: str, body: dict[str, object]) -> tuple[int, object]:
        signal.pthread_kill(main, signal.SIGINT)
        return answer(path, body)

    server.post = post  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.complete(requests_of([4]), PLAIN)
    asking = set(threading.enumerate()) - before
    assert asking  # for it is not answered yet
    assert all(thread.daemon for thread in asking)  # and holds up no end of the program


def test_a_broken_connection_is_tried_again_unless_the_server_may_have_lost_its_weights(tmp_path):
    loaded, requests = adapted(tmp_path), requests_of([4])
    server = served(loaded)
    adapter = engine_at(loaded, server)
    adapter.publish(0)
    server.faults.add("breaks")
    assert ids_of(adapter.complete(requests, PLAIN)) == ids_of(BuiltinEngine(loaded, 8).complete(requests, PLAIN))
    weights = engine_at(loaded, server, publish="weights")
    weights.publish(0)
    server.faults.add("breaks")
    with pytest.raises(EngineError, match=r"cannot be used: .*, 1 time; "):
        weights.complete(requests, PLAIN)


def test_a_server_that_is_not_there_is_named_with_what_to_do():
    loaded = tiny_model()
    gone = served(loaded)
    gone.stop()
    RUNNING.remove(gone)
    with pytest.raises(EngineError, match=rf"{gone.url}/health: cannot be used: .*refused.*urls spelt right"):
        engine_at(loaded, gone)


def test_an_address_of_https_where_http_is_spoken_is_told():
    server = served(tiny_model())
    server.url = server.url.replace("http:", "https:")
    with pytest.raises(EngineError, match="does it speak https"):
        engine_at(tiny_model(), server)


def test_a_web_server_that_is_no_rollout_server_is_refused():
    server = served(tiny_model())
    server.get = lambda path: (200, {"data": []} if path == "/v1/models" else {})  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="lists no model; is it a vLLM server"):
        engine_at(tiny_model(), server)


def test_no_proxy_comes_between(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    engine_at(tiny_model(), served(tiny_model())).complete(requests_of([4]), PLAIN)


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
    with pytest.raises(EngineError, match=r"answers 404: The model `atesd-.* does not exist.*, and have forgotten"):
        engine.complete(requests_of([4]), PLAIN)
    engine.publish(1)
    assert len(engine.complete(requests_of([4]), PLAIN)) == 1


def test_a_restarted_server_with_old_weights_is_caught_before_a_rollout_is_used():
    loaded = tiny_model()
    server = served(loaded)
    before = server.models["base"]
    enlarge(loaded)
    engine = engine_at(loaded, server, drift_limit=0.1)
    engine.complete(requests_of([4]), PLAIN)
    server.models["base"] = before
    with pytest.raises(EngineError, match="the same command then resumes the run and publishes anew"):
        engine.complete(requests_of([4, 7, 5]), PLAIN)


@pytest.mark.parametrize("folders", [("a", "a"), ("a", "b"), (None, None)], ids=["same", "other", "none"])
def test_two_trainers_of_all_weights_do_not_share_a_server(tmp_path, folders):
    loaded = tiny_model()
    server = served(loaded)
    named = [str(tmp_path / name) if name else None for name in folders]
    first, second = (engine_at(loaded, server, folder=folder) for folder in named)
    first.publish(0)
    said = rf"{server.url}: process \d+ on .* since .* gives this server all its weights"
    with pytest.raises(EngineError, match=said):
        second.publish(0)
    first.close()
    second.publish(0)


def test_two_names_of_one_server_are_one_server():
    loaded = tiny_model()
    server = served(loaded)
    engine_at(loaded, server).publish(0)
    server.url = server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(EngineError, match="gives this server all its weights"):
        engine_at(loaded, server).publish(0)


def test_two_trainers_of_adapters_share_a_server(tmp_path):
    loaded, other = adapted(tmp_path), adapted(tmp_path)
    move(other)
    server, requests = served(loaded), requests_of([4, 7])
    engines = [engine_at(model, server, folder=str(tmp_path / "shared")) for model in (loaded, other)]
    for engine in engines:
        engine.publish(0)
    for engine, model in zip(engines, (loaded, other), strict=True):
        assert ids_of(engine.complete(requests, PLAIN)) == ids_of(BuiltinEngine(model, 8).complete(requests, PLAIN))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    engine = engine_at(tiny_model(), served(tiny_model()), folder=str(tmp_path / "file" / "below"))
    with pytest.raises(EngineError, match=r"file/below: cannot be used as the folder of servers: Not a directory"):
        engine.complete(requests_of([4]), PLAIN)


def test_a_disk_that_refuses_a_file_midway_is_told_with_the_fix_for_it(tmp_path):
    loaded, limits = adapted(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    engine = engine_at(loaded, served(loaded), folder=str(tmp_path / "shared"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(EngineError, match=r"cannot be written: File too large; free some space"):
            engine.publish(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_folder_is_named_and_keeps_nothing_of_what_did_not_fit(tmp_path, monkeypatch):
    loaded, shared = adapted(tmp_path), tmp_path / "shared"
    engine = engine_at(loaded, served(loaded), folder=str(shared))
    engine.publish(0)
    kept = sorted(path.name for path in shared.glob("atesd-*/*"))

    def full(folder: Path, **_: object) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loaded.model, "save_pretrained", full)
    with pytest.raises(
        EngineError, match=r"shared/atesd-.*cannot be written: No space left on device; free some space"
    ):
        engine.publish(1)
    assert sorted(path.name for path in shared.glob("atesd-*/*")) == kept


def test_a_server_that_cannot_read_the_folder_says_so_and_the_error_names_the_setting():
    server = served(tiny_model())
    server.faults.add("blind")
    with pytest.raises(EngineError) as error:
        engine_at(tiny_model(), server, publish="weights").publish(0)
    assert str(error.value).startswith(
        f"{server.url}/collective_rpc: cannot be used: answers 500: Call to collective_rpc method failed: Worker failed"
    )
    assert "see sampling.server.folder under the same path" in str(error.value)
    assert "spelt right" not in str(error.value)


def test_a_server_without_adapters_is_told_how_to_start(tmp_path):
    loaded = adapted(tmp_path)
    server = served(loaded)
    answer = server.post
    server.post = lambda path, body: (  # type: ignore[method-assign]
        (404, {"detail": "Not Found"}) if "lora" in path else answer(path, body)
    )
    with pytest.raises(EngineError, match=r"answers 404: Not Found; it must be started on .* with --enable-lora"):
        engine_at(loaded, server).publish(0)


def test_servers_that_sleep_are_woken_for_rollouts_and_weights_alone(tmp_path):
    loaded, requests = adapted(tmp_path), requests_of([4, 7])
    server = served(loaded)
    engine = engine_at(loaded, server, sleep=True)
    for update in range(2):
        engine.publish(update)
        assert server.asleep
        assert ids_of(engine.complete(requests, PLAIN)) == ids_of(BuiltinEngine(loaded, 8).complete(requests, PLAIN))
        assert server.asleep


def test_everything_that_a_models_folder_could_change_is_written_out():
    loaded = tiny_model()
    server = served(loaded)
    request = requests_of([4])[0]
    engine_at(loaded, server, draws="seed").complete([request], FILTERED)
    body = next(body for path, body in server.requests if path == "/v1/completions")
    assert (body["temperature"], body["top_k"], body["top_p"], body["min_p"]) == (1.3, 20, 0.9, 0.02)
    assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
    assert (body["stop_token_ids"], body["ignore_eos"]) == (sorted(loaded.end_ids), True)
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
        ("http:/host:8000", "no address of a server"),
        ("http://host:80000", "no address of a server"),
        ("http://me:secret@host:8000", "no address of a server"),
    ],
)
def test_an_address_that_is_none_is_refused_with_how_to_write_it(url, said):
    with pytest.raises(ConfigError, match=said):
        quick("sampling.engine=server", f'sampling.server.urls=["{url}"]')


def test_one_address_needs_no_list():
    settings = "sampling.engine=server", "sampling.server.urls=http://host:8000"
    assert quick(*settings).sampling.server.urls == ("http://host:8000",)


def test_settings_of_servers_are_idle_without_them():
    with pytest.raises(ConfigError, match=r"sampling.server.* sampling.engine: server"):
        quick("sampling.server.timeout=5")


def test_an_alarm_that_could_never_be_seen_is_refused():
    with pytest.raises(ConfigError, match=r"drift_alarm 0.6 is above drift_limit 0.5"):
        quick("sampling.engine=server", "sampling.server.drift_alarm=0.6")


# Whole runs

RUN = ("train.num_updates=4", "train.evaluate_every=2", "model.lora={rank: 4, alpha: 8}", "train.learning_rate=0.01")


def through(server: StubServer, *more: str) -> Config:
    address = f"sampling.server={{urls: ['{server.url}'], draws: keyed, retries: 0}}"
    return quick(*RUN, "sampling.engine=server", address, *more)


def whole_without_drift(run: RunFolder) -> dict[str, object]:
    """`fingerprint`, with the digest of the whole state, without the one key that only a run with servers has."""
    found = fingerprint(run)
    rows = json.loads(found["rows"])
    drifts = [row.pop("rollout_drift", None) for row in rows["metrics"]]
    return {**found, "rows": rows} | {"has_drift": [drift is not None for drift in drifts]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the builtin engine's run holds."""
    return whole_without_drift(
        finished(quick(*RUN, "sampling.engine=builtin"), tmp_path_factory.mktemp("plain") / "run")
    )


@pytest.mark.parametrize("how", ["adapter", "weights"])
def test_a_run_through_a_server_is_that_of_the_builtin_engine_and_says_its_drift(plain, tmp_path, how):
    server = served(load_model(quick(*RUN).model, 0))
    run = finished(through(server, f"sampling.server.publish={how}"), tmp_path / "served")
    assert whole_without_drift(run) == {**plain, "has_drift": [True] * 4}
    assert plain["has_drift"] == [False] * 4
    assert all(row["rollout_drift"] < 1e-4 for row in run.rows("metrics"))


@pytest.mark.parametrize("how", ["adapter", "weights"])
def test_a_run_whose_server_dies_goes_on_with_another_of_old_weights_and_ends_the_same(plain, tmp_path, how):
    loaded = load_model(quick(*RUN).model, 0)
    server, published = served(loaded), 0

    def post(path: str, body: dict[str, object], answer=server.post) -> tuple[int, object]:
        nonlocal published
        published += path in ("/v1/load_lora_adapter", "/collective_rpc")
        if published > 2:
            server.faults.add("down")
        return answer(path, body)

    server.post = post  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=f"{server.url}/.*out of memory"):
        train(through(server, f"sampling.server.publish={how}"), tmp_path / "cut")
    run = finished(through(served(loaded), f"sampling.server.publish={how}"), tmp_path / "cut")
    assert whole_without_drift(run) == {**plain, "has_drift": [True] * 4}


WAYS = {
    "an adapter": ((), "/v1/load_lora_adapter"),
    "an adapter of a divided model": (("model.sharding=full",), "/v1/load_lora_adapter"),
    "divided weights": (("model.sharding=full", "model.lora=null"), "/collective_rpc"),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_share_a_server_and_are_the_run_of_one_process(way, tmp_path):
    settings, publishes = WAYS[way]
    server = served(load_model(quick(*RUN, *settings).model, 0))
    folder = f"sampling.server.folder={tmp_path / 'shared'}"
    config = through(server, "train.num_updates=2", "train.batch_size=5", folder, *settings)
    alone = finished(config, tmp_path / "alone")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(dump_config(config))
    before = len(server.requests)
    outputs(start_ranks(["-m", "atesd.cli", "train", str(recipe), "--out", str(out)], [tmp_path / "0", tmp_path / "1"]))
    together = RunFolder.open(out)
    assert_same_run(together, alone)
    assert all(row["rollout_drift"] < 1e-4 for row in together.rows("metrics"))
    published = [path for path, _ in server.requests[before:] if path == publishes]
    assert len(published) == 3  # what it began with, and once after each update, by one rank
    assert list(server.models) == ["base"]


def test_a_killed_trainer_goes_on_beside_the_server_that_it_left(plain, tmp_path):
    server = served(load_model(quick(*RUN).model, 0))
    config = through(server, f"sampling.server.folder={tmp_path / 'shared'}")
    whole = finished(config, tmp_path / "whole")
    resumed = finished(config, cut_after(whole, 2, tmp_path / "cut"))
    assert whole_without_drift(resumed) == {**plain, "has_drift": [True] * 4}


def test_a_run_with_a_server_that_ignores_adapters_stops_at_the_first_update_that_would_use_one(tmp_path):
    server = served(load_model(quick(*RUN).model, 0))
    server.faults.add("stale")
    with pytest.raises(EngineError, match="ignores the adapter"):
        train(through(server), tmp_path / "run")
    assert len(RunFolder.open(tmp_path / "run").rows("metrics")) == 1  # before it the adapter was still nothing


def test_rows_of_sft_have_no_drift_since_no_server_wrote_what_they_train_on(tmp_path):
    server = served(load_model(quick(*RUN).model, 0))
    run = finished(through(server, "train.method=sft", "train.evaluate_every=1"), tmp_path / "run")
    assert any(path == "/v1/completions" for path, _ in server.requests)  # by the evaluations
    assert [row for row in run.rows("metrics") if "rollout_drift" in row] == []


def test_a_drift_above_the_alarm_is_in_the_report(tmp_path):
    server = served(load_model(quick(*RUN).model, 0))
    run = finished(through(server, "sampling.server.drift_alarm=1e-12"), tmp_path / "run")
    [alarm] = [alarm for alarm in find_alarms(read_run(run.path)) if alarm.title == "Rollouts drift"]
    assert "above 1e-12 nats per token" in alarm.detail
