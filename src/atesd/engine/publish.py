"""The student's weights on their way to rollout servers: files in a folder that trainer and servers share.

    FOLDER/atesd-RUN/            of one trainer, which holds its lock as long as it lives
    FOLDER/atesd-RUN/UPDATE-N/   the adapter, or for a moment all weights, as they were published
    FOLDER/in-use/SERVER/        locked by the one trainer that may give this server all weights

An adapter gets a name that was never used before, since a server that knows a name may keep what it has.
"""

from __future__ import annotations

import copy
import os
import re
import socket
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast, final
from urllib.parse import urlsplit

from torch import Tensor

from atesd.config import ServerSettings
from atesd.engine.wire import Wire, at_once
from atesd.errors import ConfigError, EngineError, RunError
from atesd.models.load import LoadedModel, save_model
from atesd.models.merging import MOST_LOST, swallowed_share
from atesd.refusals import refusals_told, remove
from atesd.runs import held

_MARK = "atesd-"
_ADAPTER_FIX = (
    "it must be started on the model below the adapter, with --enable-lora, --max-lora-rank of at least "
    "model.lora.rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and see sampling.server.folder under the same path "
    "(`atesd serve RECIPE --print` says how)"
)
_WEIGHTS_FIX = (
    "it must be started with VLLM_SERVER_DEV_MODE=1 on a model of the same shape, and see sampling.server.folder "
    "under the same path (`atesd serve RECIPE --print` says how); if it was given weights of another shape before, "
    "start it again"
)


class ModelCard(TypedDict):
    """What a server lists of a model; an adapter names the model that it belongs to as its parent."""

    id: str
    root: NotRequired[str | None]
    parent: NotRequired[str | None]
    max_model_len: NotRequired[int | None]


@final
class Publisher:
    """Gives all servers the student's adapter or weights; used by one rank."""

    def __init__(self, loaded: LoadedModel, options: ServerSettings, wires: Sequence[Wire]) -> None:
        """Raises `ConfigError` if an adapter is to be published and the model has none."""
        self._loaded, self._options, self._wires = loaded, options, wires
        self.adapts = publishes_adapter(loaded, options)
        self._run, self._count = uuid.uuid4().hex[:8], 0
        self._adapter: tuple[str, Path] | None = None
        self._held = ExitStack()
        self._own: Path | None = None

    def publish(self, update: int, tensors: Mapping[str, Tensor] | None = None) -> str | None:
        """Bring the weights of this moment to every server; returns the adapter's name, None for all weights.

        `tensors`: `Weights.saved`. Raises `EngineError` that names the folder or the server that refuses, or for a
        merge that rounding would swallow, and leaves no half of it on the disk.
        """
        own = self._own = self._own or self._opened()
        self._count += 1
        folder = own / f"{update:06d}-{self._count}"
        try:
            with refusals_told(folder, "written", EngineError):
                save_model(self._loaded if self.adapts else _whole(self._loaded), folder, tensors)
            if not self.adapts:
                self._each(_reload(folder))
                remove(folder)
                return None
            name = f"{own.name}-{folder.name}"
            self._each(_load(name, folder))
        except BaseException:
            with suppress(OSError):
                remove(folder)
            raise
        before, self._adapter = self._adapter, (name, folder)
        if before is not None:
            self._retire(*before)
        return name

    def close(self) -> None:
        """Take what was published off servers and disk; a server that is gone has forgotten it already."""
        with suppress(EngineError, OSError):
            if self._adapter is not None:
                self._retire(*self._adapter)
            if self._own is not None:
                remove(self._own)
        self._adapter = self._own = None
        self._held.close()

    def _retire(self, name: str, folder: Path) -> None:
        self._each(_unload(name))
        with refusals_told(folder, "removed", EngineError):
            remove(folder)

    def _each(self, tell: Callable[[Wire], object]) -> None:
        """Tell all servers at the same time; the first that refuses is the error."""
        at_once(tell, self._wires, len(self._wires))

    def _opened(self) -> Path:
        """The trainer's own part of the shared folder, locked; what trainers left that died is cleared away."""
        machine = Path(tempfile.gettempdir()) / f"atesd-servers-{os.getuid()}"
        shared = Path(self._options.folder).expanduser().absolute() if self._options.folder else machine
        with refusals_told(shared, "used as the folder of servers", EngineError):
            if not self.adapts:
                for place, wire in {(p, w) for p in (machine, shared) for w in self._wires}:
                    self._hold(place / "in-use" / _address(wire.url), _taken(wire.url))
            own = shared / f"{_MARK}{self._run}"
            self._hold(own, f"{own} is in use by {{owner}}; give the same command again")
            for left in sorted(shared.glob(f"{_MARK}*/.lock")):  # a folder without one is being made
                if left.parent != own:
                    self._clear(left.parent)
        return own

    def _hold(self, folder: Path, taken: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._held.enter_context(held(folder, taken, "sampling.server.folder"))
        except RunError as error:
            self._held.close()
            raise EngineError(str(error)) from None

    def _clear(self, left: Path) -> None:
        """Take away what a trainer left behind whose lock nobody holds."""
        try:
            with held(left, "{owner}", "sampling.server.folder"):
                names = [name for wire in self._wires for name in adapters_on(wire) if name.startswith(f"{left.name}-")]
                for name in dict.fromkeys(names) if self.adapts else ():
                    self._each(_unload(name))
                remove(left)
        except (RunError, OSError):
            return  # it is alive, or of another user


def publishes_adapter(loaded: LoadedModel, options: ServerSettings) -> bool:
    """Whether an adapter is published, beside a base that the servers already have; `ConfigError` if there is none."""
    has_adapter = hasattr(loaded.model, "peft_config")
    if options.publish == "adapter" and not has_adapter:
        raise ConfigError(
            "sampling.server.publish: adapter, but the model has none; set model.lora, or publish: weights"
        )
    return has_adapter and options.publish != "weights"


def adapters_on(wire: Wire) -> list[str]:
    """Names of the adapters that a server lists."""
    return [card["id"] for card in cards_of(wire) if card.get("parent")]


def cards_of(wire: Wire) -> list[ModelCard]:
    """What a server lists under `/v1/models`: its base model and its adapters; nothing where it answers otherwise."""
    listed = wire.get("/v1/models")
    cards = listed.get("data") if isinstance(listed, dict) else None
    found = cards if isinstance(cards, list) else []
    return [cast(ModelCard, card) for card in found if isinstance(card, dict) and isinstance(card.get("id"), str)]


def _whole(loaded: LoadedModel) -> LoadedModel:
    """The model as one without adapters; a copy where it has one, so that no weight of the student is rounded.

    Raises `EngineError` where rounding would swallow so much of the adapter that servers sampled from its base.
    """
    if not hasattr(loaded.model, "peft_config"):
        return loaded
    lost = swallowed_share(loaded.model, loaded.model.dtype)
    if lost > MOST_LOST:
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        raise EngineError(
            f"sampling.server.publish: weights merges the adapter into {dtype} weights, and their rounding would "
            f"swallow {100 * lost:.0f} % of what it changes, allowed are {100 * MOST_LOST:.0f} %; set "
            "sampling.server.publish: adapter, or model.dtype: float32"
        )
    copied: Any = copy.deepcopy(loaded.model)
    return replace(loaded, model=copied.merge_and_unload())


def _load(name: str, folder: Path) -> Callable[[Wire], object]:
    body: dict[str, object] = {"lora_name": name, "lora_path": str(folder)}
    return lambda wire: wire.post("/v1/load_lora_adapter", body, fix=_ADAPTER_FIX)


def _unload(name: str) -> Callable[[Wire], object]:
    """Forget an adapter; a server that does not list it has nothing to forget."""

    def tell(wire: Wire) -> None:
        if name in adapters_on(wire):
            wire.post("/v1/unload_lora_adapter", {"lora_name": name}, fix=_ADAPTER_FIX)

    return tell


def _reload(folder: Path) -> Callable[[Wire], object]:
    def tell(wire: Wire) -> None:
        body: dict[str, object] = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        wire.post("/collective_rpc", body, fix=_WEIGHTS_FIX)
        wire.post("/reset_prefix_cache", fix=_WEIGHTS_FIX)

    return tell


def _address(url: str) -> str:
    """A file's name for a server, the same whether it was called localhost or 127.0.0.1."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    with suppress(OSError, UnicodeError):  # a name that nobody knows is told when it is asked
        host = socket.gethostbyname(host)
    return re.sub(r"\W+", "-", f"{parts.scheme} {host} {parts.port or ''}").strip("-")


def _taken(url: str) -> str:
    return (
        f"{url}: {{owner}} gives this server all its weights, which would mix with these; start another server for "
        "this run and name it in sampling.server.urls, wait until that one ends, or train adapters (model.lora), which "
        "share a server"
    )
