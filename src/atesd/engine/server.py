"""The engine behind HTTP: servers that speak vLLM's completions on token ids write the rollouts.

Nothing but the standard library talks to them. A server is never believed: what it answers is checked field by field,
and its log-probabilities are held against the trainer's own on the same tokens, so that one with other weights, an
adapter that it ignored or another model is an error at the first rollout and no wrong number later.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypedDict, final

from filelock import FileLock, Timeout

from atesd.config import ServerSettings
from atesd.engine.interface import Key, Request, SamplingParams, Whole, rollout_from_json
from atesd.engine.wire import Wire, WireError
from atesd.errors import EngineError, NonFiniteError
from atesd.models.load import LoadedModel, save_model
from atesd.models.ranks import SINGLE_PROCESS, interleave
from atesd.models.score import Scorer, completion_logprobs
from atesd.records import Rollout
from atesd.refusals import refusals_told, remove

_AT_ONCE = 64  # requests on their way to one server; it batches them itself
_SCORED = 64  # rollouts of a call on which drift is measured where nothing else asks for scores


class _Served(TypedDict):
    """What a server says of itself: the name of its base model, and its longest sequence."""

    name: str
    room: float


class _Share(TypedDict):
    """What one rank has of a call: its rollouts as JSON, and the sum of the gaps over so many scored tokens."""

    gap: float
    scored: int
    rollouts: list[dict[str, object]]


@final
class ServerEngine:
    """Completes through `/v1/completions`; after each update the servers are given the new adapter, or all weights.

    With several ranks each completes its own requests, and rank 0 publishes for all.
    """

    def __init__(self, loaded: LoadedModel, options: ServerSettings, whole: Whole = nullcontext) -> None:
        """Raises `EngineError` if a server is not there, not healthy, or serves no model of that name."""
        self._loaded, self._options, self._whole = loaded, options, whole
        self._wires = [Wire(url, options.timeout, options.retries, options.retry_wait) for url in options.urls]
        self._run = uuid.uuid4().hex[:8]
        self._published: str | None = None
        self._drift: float | None = None
        self._held = ExitStack()
        self._folder: Path | None = None
        served = loaded.ranks.broadcast(self._served)
        self._base, self._room = served["name"], served["room"]

    @property
    def drift(self) -> float | None:
        """See `Engine`."""
        return self._drift

    @cached_property
    def _scorer(self) -> Scorer:
        """Reads this rank's own model, whatever the others do."""
        return Scorer(replace(self._loaded, ranks=SINGLE_PROCESS))

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        """See `Engine`. Raises `EngineError` for a server that fails, answers nonsense, or drifts beyond the limit."""
        for request in requests:
            if not request.prompt_ids:
                raise ValueError(f"the prompt of {request.problem_id} is empty")
            self._require_room(request, params)
        if not requests:
            return []
        if self._published is None:
            self.publish(0)
        ranks = self._loaded.ranks
        with self._whole():
            shares = ranks.gather(lambda: self._completed(ranks.shard(requests), params))
        count = sum(share["scored"] for share in shares)
        self._drift = sum(share["gap"] for share in shares) / count
        self._require_near(self._drift)
        return [rollout_from_json(values) for values in interleave([share["rollouts"] for share in shares])]

    def publish(self, update: int) -> None:
        """See `Engine`. Written to the shared folder under a name that was never used, then loaded by every server."""
        name = f"atesd-{self._run}-{update}-{uuid.uuid4().hex[:4]}"
        self._published = self._loaded.ranks.broadcast(lambda: self._publish(name))

    def close(self) -> None:
        """Take what was published off servers and disk."""
        if self._loaded.ranks.first and self._published is not None:
            with suppress(EngineError):  # a server that is gone has forgotten it already
                self._retire(self._published)
        self._published = None
        self._held.close()

    # What the servers are

    def _served(self) -> _Served:
        """The name of the base model on all servers and the longest sequence that all of them take."""
        found = [self._served_by(wire) for wire in self._wires]
        names = {one["name"] for one in found}
        if len(names) > 1:
            raise EngineError(
                f"sampling.server.urls: the servers call their model by different names ({', '.join(sorted(names))}); "
                "start all of them with the same --served-model-name"
            )
        return {"name": found[0]["name"], "room": min(one["room"] for one in found)}

    def _served_by(self, wire: Wire) -> _Served:
        wire.get("/health")
        listed = wire.get("/v1/models")
        cards = listed.get("data") if isinstance(listed, dict) else None
        bases = [card for card in cards or [] if isinstance(card, dict) and not card.get("parent")]
        if len(bases) != 1 or not isinstance(bases[0].get("id"), str):
            raise EngineError(
                f"{wire.url}: /v1/models lists {len(bases)} models where one is expected; is it a vLLM server "
                "(atesd serve RECIPE --print says how to start one)?"
            )
        room = bases[0].get("max_model_len")
        return {"name": bases[0]["id"], "room": room if isinstance(room, int) else math.inf}

    def _require_room(self, request: Request, params: SamplingParams) -> None:
        asked = len(request.prompt_ids) + params.completion_tokens
        if asked > self._room:
            raise EngineError(
                f"{self._wires[0].url}: takes sequences of {self._room} tokens, and {request.problem_id} needs {asked} "
                f"({len(request.prompt_ids)} of prompt, {params.completion_tokens} of completion); start it with "
                f"--max-model-len {asked} or more, or lower sampling.completion_tokens"
            )

    # Weights

    @property
    def _adapts(self) -> bool:
        """Whether an adapter is published, beside a base model that the servers already have."""
        has_adapter = hasattr(self._loaded.model, "peft_config")
        return has_adapter if self._options.publish == "auto" else self._options.publish == "adapter"

    def _publish(self, name: str) -> str:
        folder = self._shared() / name
        with refusals_told(folder, "written", EngineError):
            save_model(self._loaded, folder)
        for wire in self._wires:
            if self._adapts:
                wire.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            else:
                wire.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
                wire.post("/reset_prefix_cache", {})
        if self._published is not None:
            self._retire(self._published)
        return name

    def _retire(self, name: str) -> None:
        """Take what was published before off the servers and the disk."""
        with refusals_told(self._shared() / name, "removed", EngineError):
            remove(self._shared() / name)
        for wire in self._wires if self._adapts else []:
            wire.post("/v1/unload_lora_adapter", {"lora_name": name})

    def _shared(self) -> Path:
        """The folder that trainer and servers share; without adapters this trainer's alone, as the servers are."""
        if self._folder is None:
            named = self._options.folder
            folder = named or self._held.enter_context(tempfile.TemporaryDirectory(prefix="atesd-weights-"))
            self._folder = Path(folder).absolute()
            with refusals_told(self._folder, "made", EngineError):
                self._folder.mkdir(parents=True, exist_ok=True)
            if not self._adapts:
                self._hold_alone(self._folder)
        return self._folder

    def _hold_alone(self, folder: Path) -> None:
        lock = FileLock(folder / ".atesd-lock", timeout=0)
        try:
            self._held.enter_context(lock)
        except Timeout:
            raise EngineError(
                f"sampling.server.folder: {folder} is in use by another trainer, whose weights the servers would mix "
                "up with these; give each trainer servers and a folder of its own, or train adapters (model.lora), "
                "which share a server"
            ) from None

    # Rollouts

    def _asking(self, request: Request, params: SamplingParams) -> Callable[[], Rollout]:
        """The call that completes one request, on a server of its own and, if that fails, on the next ones."""
        first = int.from_bytes(hashlib.blake2b(repr(request.key).encode(), digest_size=4).digest()) % len(self._wires)
        wires = list(islice(cycle(self._wires), first, first + len(self._wires)))
        name = self._published if self._adapts and self._published else self._base
        body = {"model": name, "prompt": list(request.prompt_ids), **self._how(request.key, params)}

        def ask() -> Rollout:
            for place, wire in enumerate(wires):
                try:
                    return self._rollout(wire.url, wire.post("/v1/completions", body), request, params)
                except WireError:
                    if place == len(wires) - 1:
                        raise
            raise AssertionError("there is at least one server")

        return ask

    def _how(self, key: Key, params: SamplingParams) -> dict[str, object]:
        """Everything that a server might otherwise take from the model's folder is written out."""
        asked: dict[str, object] = {
            "max_tokens": params.completion_tokens,
            "stop_token_ids": sorted(self._loaded.end_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        if self._options.draws == "keyed" and params.temperature > 0:
            filters = {k: v for k, v in asdict(params).items() if k != "completion_tokens"}
            told = json.dumps({"key": list(key), "params": filters})
            return asked | {"temperature": 0.0, "vllm_xargs": {"atesd": told}}
        filters = {"top_p": params.top_p, "top_k": params.top_k or -1, "min_p": params.min_p}
        return asked | {"temperature": params.temperature, "seed": seed_of(key), **filters}

    def _rollout(self, url: str, answer: object, request: Request, params: SamplingParams) -> Rollout:
        """The rollout that a server's answer holds. Raises `EngineError` that says what of it cannot be."""
        try:
            choice: Any = answer["choices"][0]  # type: ignore[index]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            reason = choice["finish_reason"]
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"{url}: answered {request.problem_id} without token ids and log-probabilities ({error!r}); it must be "
                "vLLM 0.20 or newer, whose completions take return_token_ids"
            ) from None
        vocabulary = self._loaded.model.config.get_text_config().vocab_size
        is_ids = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocabulary for i in ids)
        end = next((n for n, i in enumerate(ids) if i in self._loaded.end_ids), None) if is_ids else None
        faults = {
            f"token ids outside the vocabulary of {vocabulary}": not is_ids,
            "no token": ids == [],
            f"{len(ids) if is_ids else 0} tokens, more than the {params.completion_tokens} asked for": is_ids
            and len(ids) > params.completion_tokens,
            "tokens behind the end token": end is not None and end < len(ids) - 1,
            f"fewer tokens than asked for, and no end token of this run among them (it says {reason!r})": is_ids
            and end is None
            and len(ids) < params.completion_tokens,
            "not one log-probability per token": not isinstance(logprobs, list) or len(logprobs) != len(ids),
        }
        for fault, is_so in faults.items():
            if is_so:
                raise EngineError(
                    f"{url}: answered {request.problem_id} with {fault}; does it serve the model and tokenizer of "
                    "model.path, with a --max-model-len that has room?"
                )
        if not all(isinstance(p, float | int) and math.isfinite(p) for p in logprobs):
            raise NonFiniteError(f"the model's logits are not finite while it completes {request.problem_id} ({url})")
        return Rollout(
            problem_id=request.problem_id,
            sample=request.sample,
            prompt_ids=request.prompt_ids,
            completion_ids=tuple(ids),
            logprobs=tuple(map(float, logprobs)),
            truncated=end is None,
        )

    # Drift

    def _completed(self, requests: Sequence[Request], params: SamplingParams) -> _Share:
        """The rollouts of one rank, as JSON, with how far their log-probabilities are from its own, over how many.

        A server's are those before temperature and filters; at another temperature all rollouts are scored here.
        """
        asked = [self._asking(request, params) for request in requests]
        with ThreadPoolExecutor(max(1, min(len(asked), _AT_ONCE * len(self._wires)))) as pool:
            rollouts = list(pool.map(lambda ask: ask(), asked))
        scaled = params.temperature not in (0, 1)
        pairs = [(r.prompt_ids, r.completion_ids) for r in (rollouts if scaled else rollouts[:_SCORED])]
        raw = [row.tolist() for row in completion_logprobs(self._scorer, pairs)]
        gaps = [
            abs(own - told)
            for row, r in zip(raw, rollouts, strict=False)
            for own, told in zip(row, r.logprobs, strict=True)
        ]
        if scaled:
            own_rows = completion_logprobs(self._scorer, pairs, temperature=params.temperature)
            rollouts = [replace(r, logprobs=tuple(row.tolist())) for r, row in zip(rollouts, own_rows, strict=True)]
        return {"gap": math.fsum(gaps), "scored": len(gaps), "rollouts": [asdict(rollout) for rollout in rollouts]}

    def _require_near(self, drift: float) -> None:
        if not drift <= self._options.drift_limit:
            raise EngineError(
                f"{', '.join(self._options.urls)}: the rollouts' log-probabilities are {drift:.3g} nats per token away "
                f"from the trainer's own, above sampling.server.drift_limit {self._options.drift_limit:g}: the server "
                "does not have the student's weights. It may serve another model, have ignored the adapter or the new "
                "weights, or take those of another trainer; restart it as atesd serve prints, and give the same "
                "command again"
            )


def seed_of(key: Key) -> int:
    """The seed of a request's draws, in [0, 2^63), from its key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1
