"""From a loaded model and a setting to the engine that writes its completions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Literal, final

from atesd.config import Config
from atesd.engine.builtin import BuiltinEngine
from atesd.engine.interface import Engine, Request, SamplingParams, Whole, rollout_from_json
from atesd.engine.layers import unsupported
from atesd.engine.server import ServerEngine
from atesd.engine.transformers import TransformersEngine
from atesd.models.load import LoadedModel
from atesd.models.ranks import Ranks
from atesd.models.weights import Weights
from atesd.records import Rollout

LocalKind = Literal["auto", "builtin", "transformers"]


def configured_engine(loaded: LoadedModel, config: Config, weights: Weights | None = None) -> Engine:
    """The engine of `sampling.engine`, its work shared between the ranks of the model; `weights` are the run's.

    Raises `ModelError` if `builtin` is asked for and cannot decode the model, `EngineError` if a server is not there.
    """
    sampling, train = config.sampling, config.train
    if sampling.engine == "server":
        return ServerEngine(
            loaded,
            sampling.server,
            weights,
            micro_batch_size=train.micro_batch_size,
            micro_batch_tokens=train.micro_batch_tokens,
        )
    whole = weights.whole if weights is not None and weights.in_step else None
    return engine_for(loaded, sampling.engine, sampling.batch_size, whole)


def engine_for(loaded: LoadedModel, kind: LocalKind, batch_size: int, whole: Whole | None = None) -> Engine:
    """An engine of this process, its work shared between the ranks of the model; `whole` where those divide it.

    `auto` is builtin where the architecture allows it. Raises `ModelError` if `builtin` is asked for and it does not.
    """
    builtin = engine_word(loaded, kind) == "builtin"
    engine: Engine = (BuiltinEngine if builtin else TransformersEngine)(loaded, batch_size)
    if loaded.ranks.size == 1 and whole is None:
        return engine
    return ShardedEngine(engine, loaded.ranks, whole or nullcontext)


def engine_word(loaded: LoadedModel, kind: str) -> str:
    """Which engine `sampling.engine` comes to: `auto` is builtin or transformers."""
    return kind if kind != "auto" else "builtin" if unsupported(loaded.model) is None else "transformers"


def engine_note(loaded: LoadedModel, kind: str) -> str | None:
    """What to tell the user of the choice that `auto` makes; None: nothing."""
    why_not = unsupported(loaded.model) if kind == "auto" else None
    return None if why_not is None else f"sampling goes through transformers, which is slower: {why_not}"


@final
class ShardedEngine:
    """Each rank completes its shard of the requests with an engine of its own, and learns all rollouts."""

    def __init__(self, engine: Engine, ranks: Ranks, whole: Whole = nullcontext) -> None:
        self._engine, self._ranks, self._whole = engine, ranks, whole

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        """See `Engine`. What fails on one rank is raised on all."""

        def work(own: Sequence[Request]) -> list[dict[str, object]]:
            return [asdict(rollout) for rollout in self._engine.complete(own, params)]

        with self._whole():
            told = self._ranks.map_sharded(requests, work)
        return [rollout_from_json(rollout) for rollout in told]

    @property
    def drift(self) -> float | None:
        """See `Engine`: that of this rank's share."""
        return self._engine.drift

    def publish(self, update: int) -> None:
        """Tell the engine of this rank."""
        self._engine.publish(update)

    def close(self) -> None:
        """Close the engine of this rank."""
        self._engine.close()
