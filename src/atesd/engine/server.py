"""The engine behind HTTP: servers that speak vLLM's completions on token ids write the rollouts.

A server is never believed. Each answer is checked (`completions`), and the log-probabilities of every call are held
against the trainer's own on the same tokens, server by server: one with other weights, with an adapter that it
ignored or of another model is an error at its first rollouts, and no wrong number later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict, final

from atesd.config import ServerSettings
from atesd.engine.completions import NOT_FINITE, body_of, not_finite, rollout_of
from atesd.engine.interface import Request, SamplingParams, rollout_from_json
from atesd.engine.publish import ModelCard, Publisher, cards_of, publishes_adapter
from atesd.engine.wire import Wire, at_once
from atesd.errors import EngineError, NonFiniteError
from atesd.models.load import LoadedModel
from atesd.models.model_folder import CONFIG, read_object
from atesd.models.ranks import SINGLE_PROCESS, interleave
from atesd.models.score import Pair, Scorer, logprobs_at
from atesd.models.weights import ReplicatedWeights, Weights
from atesd.records import Rollout

_AT_ONCE = 256  # requests on their way to one server, which batches them itself
_SHAPE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings"),
)
_MEASURED = 16  # rollouts of each server and call whose drift is measured


class _Gap(TypedDict):
    """Sums over tokens of what lies between a server's log-probabilities and ours, with the adapter and without it."""

    own: float
    below: float
    tokens: int


class _Share(TypedDict):
    """What one rank has of a call: its rollouts, and the gap of each server."""

    rollouts: list[dict[str, object]]
    gaps: dict[str, _Gap]


@final
class ServerEngine:
    """Completes through `/v1/completions`; after each update the servers are given the new adapter, or all weights.

    With several ranks each completes its own requests, and rank 0 publishes for all.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: ServerSettings,
        weights: Weights | None = None,
        *,
        micro_batch_size: int = 8,
        micro_batch_tokens: int | None = None,
    ) -> None:
        """The micro-batch is that in which rollouts are scored. Raises `EngineError` for a server that is not there."""
        self._loaded, self._options = loaded, options
        self._weights = weights or ReplicatedWeights(loaded.model, loaded.ranks)
        self._micro_batch = micro_batch_size, micro_batch_tokens
        self._adapts = adapts = publishes_adapter(loaded, options)
        self._wires = [Wire(url, options, forgets=not adapts) for url in options.urls]
        self._publisher = Publisher(loaded, options, self._wires)
        self._published, self._proven, self._adapter = False, False, ""
        self._drift: float | None = None
        served = loaded.ranks.broadcast(lambda: [self._served(wire) for wire in self._wires])
        self._names = [card["id"] for card in served]
        self._rooms = [card.get("max_model_len") or math.inf for card in served]

    @property
    def drift(self) -> float | None:
        """See `Engine`: that of the server which is farthest away."""
        return self._drift

    @cached_property
    def _scorer(self) -> Scorer:
        """Reads this rank's own model, whatever the others do."""
        return Scorer(replace(self._loaded, ranks=SINGLE_PROCESS), self._weights)

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        """See `Engine`. Raises `EngineError` for a server that fails, answers nonsense, or drifts beyond the limit."""
        self._require_possible(requests, params)
        if not requests:
            return []
        if not self._published:
            self.publish(0)
        ranks = self._loaded.ranks
        with self._awake(), self._weights.whole():
            shares = ranks.gather(lambda: self._share(ranks.shard(requests), params))
        self._drift = self._farthest([share["gaps"] for share in shares])
        self._proven = True
        return [rollout_from_json(values) for values in interleave([share["rollouts"] for share in shares])]

    def publish(self, update: int) -> None:
        """See `Engine`. Raises `EngineError` that names the folder or the server that refuses."""
        with self._awake():
            tensors = self._weights.saved()
            self._adapter = self._loaded.ranks.broadcast(lambda: self._publisher.publish(update, tensors)) or ""
            if self._options.draws == "keyed":
                self._loaded.ranks.broadcast(self._require_keyed_draws)
        self._published, self._proven = True, not self._adapts

    def close(self) -> None:
        """Take what was published off servers and disk."""
        if self._loaded.ranks.first:
            self._publisher.close()
        self._published = False

    def _served(self, wire: Wire) -> ModelCard:
        """The card of a server's base model, which must be that of the trainer."""
        wire.get("/health")
        bases = [card for card in cards_of(wire) if not card.get("parent")]
        if not bases:
            raise EngineError(
                f"{wire.url}: /v1/models lists no model; is it a vLLM server? `atesd serve RECIPE` starts one"
            )
        own, card = _base_path(self._loaded), bases[0]
        if not self._adapts:
            _require_same_shape(wire, self._loaded, Path(card.get("root") or card["id"]))
        names = {Path(name).name for name in (card["id"], card.get("root") or "")}
        if self._adapts and own and Path(own).name not in names:
            raise EngineError(
                f"{wire.url}: serves {card.get('root') or card['id']}, and an adapter of {own} is trained; correct "
                "sampling.server.urls, start it as `atesd serve RECIPE --print` says, or, if both are the same model, "
                f"start it with --served-model-name {Path(own).name}"
            )
        return card

    def _require_possible(self, requests: Sequence[Request], params: SamplingParams) -> None:
        """No empty prompt (`ValueError`), and room for each sequence on every server (`EngineError`)."""
        for request in requests:
            if not request.prompt_ids:
                raise ValueError(f"the prompt of {request.problem_id} is empty")
            asked = len(request.prompt_ids) + params.completion_tokens
            for wire, room in zip(self._wires, self._rooms, strict=True):
                if asked > room:
                    raise EngineError(
                        f"{wire.url}: takes sequences of {room} tokens, and {request.problem_id} needs {asked} "
                        f"({len(request.prompt_ids)} of prompt, {params.completion_tokens} of completion); start it "
                        f"with --max-model-len {asked} or more, or lower the completion_tokens of sampling or "
                        "evaluation"
                    )

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """With `sampling.server.sleep` the servers have their memory inside only."""
        if not self._options.sleep:
            yield
            return
        self._loaded.ranks.broadcast(lambda: self._tell_all("/wake_up"))
        yield
        self._loaded.ranks.broadcast(lambda: self._tell_all("/sleep?level=1"))

    def _tell_all(self, path: str) -> None:
        for wire in self._wires:
            wire.post(path, fix="it must be started with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1")

    def _require_keyed_draws(self) -> None:
        """The servers know our logits processor; one that does not would take the likeliest token, whatever the key.

        So hot that all tokens are as likely, eight keys do not draw the same one.
        """
        hot = SamplingParams(temperature=1e6, top_p=1.0, top_k=0, min_p=0.0, completion_tokens=1)
        requests = [Request("(a draw of its own)", key, (self._loaded.pad_id,), (0, "keyed", key)) for key in range(8)]
        for place, wire in enumerate(self._wires):
            with suppress(NonFiniteError):  # the rollouts will say of which problem
                drawn = at_once(partial(self._completed, place, params=hot), requests, len(requests))
                if len({rollout.completion_ids for rollout in drawn}) == 1:
                    raise EngineError(
                        f"{wire.url}: does not draw by key: eight keys gave the same token; sampling.server.draws: "
                        "keyed needs a server with --logits-processors atesd.engine.keyed_draws:KeyedDraws, as `atesd "
                        "serve RECIPE --print` says; or set sampling.server.draws: seed"
                    )

    def _share(self, requests: Sequence[Request], params: SamplingParams) -> _Share:
        """The rollouts of one rank, every n-th from each server, and how far their log-probabilities are from ours."""
        count = len(self._wires)
        places = range(len(requests))
        waiting = min(len(requests) / count, _AT_ONCE) * self._loaded.ranks.size
        seconds = self._options.answer_seconds(params.completion_tokens, waiting)
        rollouts = at_once(lambda i: self._completed(i % count, requests[i], params, seconds), places, _AT_ONCE * count)
        pairs = [(rollout.prompt_ids, rollout.completion_ids) for rollout in rollouts]
        measured = rollouts[: _MEASURED * count]  # with the log-probabilities of the servers
        if params.temperature in (0, 1):
            [raw] = self._scores(pairs[: len(measured)], 1.0)
        else:
            raw, scaled = self._scores(pairs, 1.0, params.temperature)
            rollouts = [replace(r, logprobs=tuple(own)) for r, own in zip(rollouts, scaled, strict=True)]
        gaps = self._gaps(measured, raw)
        return {"rollouts": [asdict(rollout) for rollout in rollouts], "gaps": gaps}

    def _gaps(self, rollouts: Sequence[Rollout], own: Sequence[Sequence[float]]) -> dict[str, _Gap]:
        """How far each server is from our scores `own`, and on the first call with an adapter from those below it.

        `own` may go on beyond these rollouts.
        """
        below = own
        if not self._proven:
            model: Any = self._loaded.model
            with model.disable_adapter():
                [below] = self._scores([(r.prompt_ids, r.completion_ids) for r in rollouts], 1.0)
        gaps: dict[str, _Gap] = {wire.url: {"own": 0.0, "below": 0.0, "tokens": 0} for wire in self._wires}
        for place, rollout in enumerate(rollouts):
            gap = gaps[self._wires[place % len(self._wires)].url]
            gap["own"] += _distance(own[place], rollout.logprobs)
            gap["below"] += _distance(below[place], rollout.logprobs)
            gap["tokens"] += len(rollout.logprobs)
        return gaps

    def _completed(
        self, server: int, request: Request, params: SamplingParams, seconds: float | None = None
    ) -> Rollout:
        wire, model = self._wires[server], self._adapter or self._names[server]
        body = body_of(request, params, model, self._options.draws, self._loaded.end_ids)
        fix = (
            "it may have been started again, and have forgotten what was published: the same command resumes the run "
            "and publishes anew"
        )
        try:
            answer = wire.post("/v1/completions", body, fix=fix, seconds=seconds)
        except EngineError as error:
            if NOT_FINITE in str(error):
                raise NonFiniteError(not_finite(request, wire.url)) from None
            raise
        return rollout_of(answer, wire.url, request, params, self._loaded)

    def _scores(self, pairs: Sequence[Pair], *temperatures: float) -> list[list[list[float]]]:
        """The trainer's own log-probabilities of each pair's completion, at each temperature."""
        found = logprobs_at(temperatures, self._scorer, pairs, *self._micro_batch)
        return [[row.tolist() for row in rows] for rows in found]

    def _farthest(self, shares: Sequence[dict[str, _Gap]]) -> float:
        """The drift of the server that is farthest away. Raises `EngineError` for one without the student's weights."""
        drifts = []
        for wire in self._wires:
            parts = [share[wire.url] for share in shares]
            tokens = sum(part["tokens"] for part in parts)
            if tokens:
                own, below = (math.fsum(part[kind] for part in parts) / tokens for kind in ("own", "below"))
                self._require_near(wire.url, own, below)
                drifts.append(own)
        return max(drifts)

    def _require_near(self, url: str, own: float, below: float) -> None:
        """What a server gave is near to what the student gives, and not nearer to what it gives without its adapter."""
        advice = (
            "start it again as `atesd serve RECIPE --print` says; the same command then resumes the run and publishes "
            "anew"
        )
        if below < own / 2:
            raise EngineError(
                f"{url}: ignores the adapter: the log-probabilities of its rollouts are {own:.3g} nats per token away "
                f"from the student's, and only {below:.3g} from those of the model without the adapter; {advice}"
            )
        if not own <= self._options.drift_limit:
            raise EngineError(
                f"{url}: the log-probabilities of its rollouts are {own:.3g} nats per token away from the trainer's "
                f"own, above sampling.server.drift_limit {self._options.drift_limit:g}: it does not have the student's "
                "weights. It may serve another model, have ignored the adapter or the weights it was given, or have "
                f"been given those of another trainer; {advice}"
            )


def _distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The sum of the absolute differences."""
    return math.fsum(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def _require_same_shape(wire: Wire, loaded: LoadedModel, served: Path) -> None:
    """All weights can take the place of those in a served folder, as far as it can be seen from here.

    A vLLM that was given weights of another shape cannot go on, also not for those to whom it belongs.
    """
    if not (served / CONFIG).is_file():
        return
    own: Any = loaded.model.config
    for name, value in read_object(served / CONFIG).items():
        if name in _SHAPE and value != getattr(own, name, value):
            raise EngineError(
                f"{wire.url}: serves {served}, whose {name} is {value}, and that of the model in training is "
                f"{getattr(own, name)}: it cannot take its weights; correct sampling.server.urls, or start a server as "
                "`atesd serve RECIPE --print` says"
            )


def _base_path(loaded: LoadedModel) -> str:
    """From where the model below the adapter was loaded; empty where nobody knows."""
    model: Any = loaded.model
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return str(getattr(base, "name_or_path", "") or "")
