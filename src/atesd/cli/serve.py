"""`atesd serve`: the vLLM servers of a recipe, printed or started, watched until they are healthy, and ended."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import urlsplit

from atesd.config import Config
from atesd.errors import ConfigError, EngineError

_PATIENCE = 30.0  # seconds between asking a server to end and ending it


@dataclass(frozen=True, slots=True)
class Command:
    """How one server is started: its address, the words of the command, and what it needs in its environment."""

    url: str
    words: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def line(self) -> str:
        """As one would type it."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.words)])


def commands_of(config: Config, gpus: Sequence[str], tensor_parallel: int) -> list[Command]:
    """One command per address of `sampling.server.urls`; `gpus` are dealt out between them, in order.

    Raises `ConfigError` where the recipe asks for no server, or the GPUs do not go round.
    """
    if config.sampling.engine != "server":
        raise ConfigError(
            f"sampling.engine: {config.sampling.engine} needs no server; add --set sampling.engine=server, and give "
            "the same to atesd train"
        )
    server = config.sampling.server
    if gpus and len(gpus) != tensor_parallel * len(server.urls):
        raise ConfigError(
            f"--gpus: {len(gpus)} for {len(server.urls)} servers of {tensor_parallel} GPUs each; name "
            f"{tensor_parallel * len(server.urls)}, or change --tensor-parallel or sampling.server.urls"
        )
    shares = [list(gpus[i * tensor_parallel : (i + 1) * tensor_parallel]) for i in range(len(server.urls))]
    return [_command(config, url, share, tensor_parallel) for url, share in zip(server.urls, shares, strict=True)]


def _command(config: Config, url: str, gpus: Sequence[str], tensor_parallel: int) -> Command:
    model, server, parts = config.model, config.sampling.server, urlsplit(url)
    room = model.max_context_tokens
    words = ["vllm", "serve", model.path, "--served-model-name", "base", "--host", parts.hostname or "127.0.0.1"]
    words += ["--port", str(parts.port or 8000), "--dtype", model.dtype, "--max-model-len", str(room)]
    # Whatever else the model's folder says of sampling must not act, and log-probabilities are compared before it does.
    words += ["--generation-config", "vllm", "--logprobs-mode", "raw_logprobs", "--skip-tokenizer-init"]
    environment = {}
    if model.lora is not None and server.publish != "weights":
        words += ["--enable-lora", "--max-lora-rank", str(model.lora.rank), "--max-loras", "2"]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    else:
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    if model.revision is not None:
        words += ["--revision", model.revision]
    if server.draws == "keyed":
        words += ["--logits-processors", "atesd.engine.keyed_draws:KeyedDraws"]
    if tensor_parallel > 1:
        words += ["--tensor-parallel-size", str(tensor_parallel)]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return Command(url, tuple(words), environment)


def serve(commands: Sequence[Command], healthy_within: float, say: Callable[[str], None]) -> None:
    """Start all servers, wait until they are healthy, and then until one ends or an interrupt comes; end them all.

    Raises `EngineError` if vLLM is not installed, if a server ends by itself, or is not healthy in time.
    """
    if shutil.which(commands[0].words[0]) is None:
        raise EngineError(
            "vllm is not installed where this runs; install it in an environment of its own (docs/scale.md); run\n  "
            + "\n  ".join(command.line for command in commands)
        )
    with ExitStack() as held:
        children = [held.enter_context(_Child(command)) for command in commands]
        for child in children:
            child.wait_until_healthy(healthy_within)
            say(f"healthy: {child.command.url} (process {child.process.pid})")
        say("Ctrl-C ends them.")
        while all(child.process.poll() is None for child in children):
            time.sleep(0.2)
        ended = next(child for child in children if child.process.poll() is not None)
        raise EngineError(f"{ended.command.url}: the server ended by itself, with exit code {ended.process.returncode}")


class _Child:
    """A server as a child process: started on entering, ended by its id on leaving, whatever happened in between."""

    def __init__(self, command: Command) -> None:
        self.command = command

    def __enter__(self) -> _Child:
        self.process = subprocess.Popen(self.command.words, env={**os.environ, **self.command.environment})
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_healthy(self, seconds: float) -> None:
        """Raises `EngineError` if it ends, or is not healthy within so many seconds."""
        from atesd.engine.wire import Wire, WireError

        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise EngineError(
                    f"{self.command.url}: the server ended while it started, with exit code {self.process.returncode}; "
                    "its own words stand above"
                )
            try:
                Wire(self.command.url, 2.0, 0, 0.0).get("/health")
            except WireError:
                time.sleep(0.2)
            else:
                return
        raise EngineError(f"{self.command.url}: not healthy after {seconds:g} s; raise --wait, or look into its log")
