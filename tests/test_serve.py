"""`atesd serve` and the logits processor of vLLM: the command of a recipe, children that end, keyed draws."""

from __future__ import annotations

import http.server
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Iterator
from enum import Enum

import pytest
import torch

from atesd.cli.serve import Command, commands_of, serve
from atesd.config import Config, load_config
from atesd.engine.draw import draw
from atesd.engine.interface import SamplingParams
from atesd.errors import ConfigError, EngineError
from atesd.maths.keyed import uniforms


def recipe(*overrides: str) -> Config:
    return load_config("qwen3-8b", ["sampling.engine=server", *overrides])


def test_the_command_says_what_the_recipe_needs():
    [command] = commands_of(recipe(), ["4", "5"], 2)
    words = " ".join(command.words)
    assert words.startswith("vllm serve Qwen/Qwen3-8B --served-model-name base --host 127.0.0.1 --port 8000")
    for part in (
        "--dtype bfloat16",
        "--max-model-len 40960",
        "--enable-lora --max-lora-rank 64",
        "--tensor-parallel-size 2",
    ):
        assert part in words
    assert command.environment == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "CUDA_VISIBLE_DEVICES": "4,5"}
    assert command.line.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 CUDA_VISIBLE_DEVICES=4,5 vllm serve")


def test_without_an_adapter_all_weights_are_reloaded_and_keyed_draws_need_the_processor():
    [command] = commands_of(recipe("model.lora=null", "model.dtype=float32", "sampling.server.draws=keyed"), [], 1)
    assert command.environment == {"VLLM_SERVER_DEV_MODE": "1"}
    assert "--enable-lora" not in command.words
    assert command.words[-2:] == ("--logits-processors", "atesd.engine.keyed_draws:KeyedDraws")


def test_each_address_is_a_server_with_its_share_of_the_gpus():
    urls = 'sampling.server.urls=["http://a:1", "http://b:2"]'
    commands = commands_of(recipe(urls), ["0", "1", "2", "3"], 2)
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in commands] == ["0,1", "2,3"]
    with pytest.raises(ConfigError, match=r"--gpus: 3 for 2 servers of 2 GPUs each; name 4"):
        commands_of(recipe(urls), ["0", "1", "2"], 2)


def test_a_recipe_without_servers_says_how_to_ask_for_them():
    with pytest.raises(ConfigError, match=r"add --set sampling.engine=server"):
        commands_of(load_config("qwen3-8b"), [], 1)


def test_the_printed_command_needs_no_vllm():
    command = [sys.executable, "-m", "atesd.cli", "serve", "qwen3-8b", "--print", "--set", "sampling.engine=server"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve Qwen/Qwen3-8B")


def test_without_vllm_the_error_holds_the_command():
    with pytest.raises(EngineError, match=r"vllm is not installed[^$]*vllm-that-is-not-there serve x"):
        serve([Command("http://127.0.0.1:1", ("vllm-that-is-not-there", "serve", "x"), {})], 1.0, print)


@pytest.fixture
def healthy() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def child(url: str, program: str) -> Command:
    return Command(url, (sys.executable, "-c", textwrap.dedent(program)), {})


def test_a_server_that_ends_by_itself_ends_the_others_too(healthy, tmp_path):
    mark = tmp_path / "ended"
    stays = child(
        healthy,
        f"""
        import signal, sys, time
        def end(*_):
            open({str(mark)!r}, "w").close()
            sys.exit()
        signal.signal(signal.SIGTERM, end)
        open({str(tmp_path / "began")!r}, "w").close()
        time.sleep(60)
    """,
    )
    leaves = child(
        healthy,
        f"""
        import os, sys, time
        while not os.path.exists({str(tmp_path / "began")!r}):
            time.sleep(0.01)
        time.sleep(0.5)
        sys.exit(5)
    """,
    )
    said: list[str] = []
    with pytest.raises(EngineError, match="ended by itself, with exit code 5"):
        serve([stays, leaves], 10.0, said.append)
    assert mark.exists()
    assert len([line for line in said if line.startswith("healthy: http://127")]) == 2


def test_a_server_that_ends_while_it_starts_is_told_with_its_code():
    with pytest.raises(EngineError, match="ended while it started, with exit code 3"):
        serve([child("http://127.0.0.1:9", "import sys; sys.exit(3)")], 10.0, print)


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
