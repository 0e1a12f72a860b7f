"""One completion as it is asked of a server and as it comes back, in the words of vLLM's `/v1/completions`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Literal, TypedDict, cast

from atesd.engine.interface import Key, Request, SamplingParams
from atesd.errors import EngineError, NonFiniteError
from atesd.models.load import LoadedModel
from atesd.records import Rollout

NOT_FINITE = "Out of range float values"
"""What vLLM says, with code 400, where log-probabilities are not finite: JSON has no such numbers."""


class _Completion(TypedDict):
    """What is read of a choice, once its form has been checked."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


def body_of(
    request: Request, params: SamplingParams, model: str, draws: Literal["seed", "keyed"], end_ids: frozenset[int]
) -> dict[str, object]:
    """The JSON that asks for a request's completion; `model` is the name of an adapter or of the base.

    Everything that a server might else take from the model's folder is written out: its penalties, its own end tokens.
    """
    asked: dict[str, object] = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": params.completion_tokens,
        "ignore_eos": True,
        "stop_token_ids": sorted(end_ids),
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    if draws == "keyed" and params.temperature > 0:
        filters = {name: value for name, value in asdict(params).items() if name != "completion_tokens"}
        told = json.dumps({"key": list(request.key), "params": filters})
        return asked | {"temperature": 0.0, "vllm_xargs": {"atesd": told}}
    filters = {"top_p": params.top_p, "top_k": params.top_k or -1, "min_p": params.min_p}
    return asked | {"temperature": params.temperature, "seed": seed_of(request.key), **filters}


def seed_of(key: Key) -> int:
    """The seed of a request's draws, in [0, 2^63), from its key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


def rollout_of(answer: object, url: str, request: Request, params: SamplingParams, loaded: LoadedModel) -> Rollout:
    """The rollout in a server's answer; its log-probabilities are the server's, before temperature and filters.

    Raises `EngineError` that names server, problem and what of the answer cannot be, and `NonFiniteError`.
    """
    found = _completion(answer)
    if found is None:
        raise EngineError(
            f"{url}: answered {request.problem_id} without token ids, their log-probabilities and a finish reason: "
            "it must be a vLLM whose completions know return_token_ids (0.32 does)"
        )
    ids, logprobs = found["token_ids"], found["logprobs"]
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    fault = next(_faults(found, params.completion_tokens, vocabulary, loaded.end_ids), None)
    if fault is not None:
        raise EngineError(
            f"{url}: answered {request.problem_id} with {fault}; does it serve the model of model.path, started as "
            "`atesd serve RECIPE --print` says?"
        )
    if not all(map(math.isfinite, logprobs)):
        raise NonFiniteError(not_finite(request, url))
    return Rollout(
        problem_id=request.problem_id,
        sample=request.sample,
        prompt_ids=request.prompt_ids,
        completion_ids=tuple(ids),
        logprobs=tuple(map(float, logprobs)),
        truncated=found["finish_reason"] == "length",
    )


def not_finite(request: Request, url: str) -> str:
    """The words of the `NonFiniteError` for a request whose log-probabilities are not finite."""
    return f"the model's logits are not finite while it completes {request.problem_id} ({url})"


def _completion(answer: object) -> _Completion | None:
    """The one choice of an answer; None unless it has the form that it should."""
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        return None
    choice = choices[0]
    logprobs = choice.get("logprobs")
    found = {
        "token_ids": choice.get("token_ids"),
        "logprobs": logprobs.get("token_logprobs") if isinstance(logprobs, Mapping) else None,
        "finish_reason": choice.get("finish_reason"),
    }
    well_formed = (
        _are(int, found["token_ids"]) and _are((int, float), found["logprobs"]) and type(found["finish_reason"]) is str
    )
    return cast(_Completion, found) if well_formed else None


def _are(kind: type | tuple[type, ...], values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _faults(found: _Completion, most: int, vocabulary: int, end_ids: frozenset[int]) -> Iterator[str]:
    """What of a completion cannot be what was asked for, the plainest first."""
    ids, logprobs, reason = found["token_ids"], found["logprobs"], found["finish_reason"]
    stray = next((token for token in ids if not 0 <= token < vocabulary), None)
    if stray is not None:
        yield f"token {stray}, outside the vocabulary of {vocabulary}"
    if not ids or len(ids) > most:
        yield f"{len(ids)} tokens, expected 1 to {most}"
    if len(logprobs) != len(ids):
        yield f"{len(logprobs)} log-probabilities for {len(ids)} tokens"
    yield from _ending_faults(ids, reason, most, end_ids)


def _ending_faults(ids: Sequence[int], reason: str, most: int, end_ids: frozenset[int]) -> Iterator[str]:
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    if end is not None and end < len(ids) - 1:
        yield f"{len(ids) - 1 - end} tokens behind the end token"
    last, expected = ("no end token", "length") if end is None else ("an end token", "stop")
    if reason != expected:
        yield f"finish_reason {reason!r}, expected {expected!r} as the last token is {last}"
    if end is None and len(ids) < most:
        yield f"{len(ids)} tokens and no end token, expected {most}"
