"""What writes completions: requests and sampling parameters in, rollouts out, whoever runs the network.

    engine = engine_for(loaded, "auto", batch_size=64)
    request = Request("p1", 0, prompt_ids, (seed, "rollout", update, "p1", 0))
    [rollout] = engine.complete([request], SamplingParams(1.0, 0.95, 20, 0.0, completion_tokens=1024))

`tests/engine_contract.py` is what an implementation must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from atesd.records import Rollout

Key = tuple[int, str, *tuple[int | str, ...]]
"""To whom draws belong: run seed, stream, and whatever else tells them apart (`atesd.maths.keyed`)."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete. Its draws are a function of `key`: equal keys meet the same noise, whatever the prompt."""

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    key: Key


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn: temperature (0: greedy), then top-k (0: off), then top-p (1: off), then min-p (0: off).

    `completion_tokens` is the longest completion, in tokens.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    completion_tokens: int


Whole = Callable[[], AbstractContextManager[None]]
"""`Weights.whole`: inside, ranks may run the model as often as each of them likes."""


class Engine(Protocol):
    """Writes completions with the student's weights.

    A local engine reads the weights that the model has at the call, those of a teacher inside `Weights.exchanged`; one
    that runs elsewhere knows those of the last `publish`.
    """

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        """One rollout for each request, in their order. Called by all ranks of the model with the same requests.

        Completions hold their end token; one that reaches the limit without it is `truncated`. A request gives the same
        tokens in any batch, up to the rounding of the logits. Raises `NonFiniteError` that names the problem if the
        model's logits are not finite, `ValueError` for an empty prompt.
        """
        ...

    @property
    def drift(self) -> float | None:
        """Mean distance between an engine's log-probabilities and the trainer's own, of the last call.

        In nats per token, before temperature; None for an engine that reads the trainer's own weights.
        """
        ...

    def publish(self, update: int) -> None:
        """The student has changed, and has `update` updates behind it: complete with the new weights from now on."""
        ...

    def close(self) -> None:
        """Give up whatever is held outside this process; a second call does nothing."""
        ...


def rollout_from_json(values: Mapping[str, object]) -> Rollout:
    """The inverse of `dataclasses.asdict`, after a way through JSON."""
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Rollout(**fields)
