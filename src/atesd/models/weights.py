"""The values of a model's parameters, and the only module that changes them outside an optimiser.

Every rank may hold all values (`ReplicatedWeights`) or its own rows of each. Whoever needs other values for a while (a
teacher, a look-ahead) asks for a context; whoever writes a checkpoint asks for the parts. Inside a context no
gradient is recorded. `tests/weights_contract.py` is what an implementation must pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, final, runtime_checkable

import torch
from torch import Tensor, nn

from atesd.config import ModelConfig
from atesd.errors import CheckpointError
from atesd.maths.head import Head
from atesd.models.load import LoadedModel
from atesd.models.ranks import SINGLE_PROCESS, Ranks


@dataclass(frozen=True, slots=True)
class Part:
    """A trained tensor, or those of its rows that this rank holds: `tensor` is [rows, *shape[1:]].

    It shares its memory with the parameter, so that it always shows the values of the moment.
    """

    tensor: Tensor
    first_row: int
    shape: tuple[int, ...]


@runtime_checkable
class Weights(Protocol):
    """The parameters of one model, whole on every rank or split between them.

    What takes or gives values by name (`exchanged`, `moved`, `load`) means this rank's part of each.
    """

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """The parameters that training moves, by name, listed once: all of them, or with LoRA the adapter's alone."""
        ...

    @property
    def has_adapter(self) -> bool:
        """Whether the trained parameters are an adapter beside a model that stays as it is."""
        ...

    @property
    def in_step(self) -> bool:
        """Whether a pass of the model is one of all ranks now, so that each must make as many."""
        ...

    def exchanged(self, values: MutableMapping[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, the named parameters have these values and `values` holds theirs; afterwards both are as before.

        Back bit for bit, also after an exception. Raises `KeyError` for a name that is not trained.
        """
        ...

    def moved(self, unit: Mapping[str, Tensor], distance: float) -> AbstractContextManager[None]:
        """Inside, the named parameters p are at p + distance * unit; afterwards they are p again, bit for bit."""
        ...

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside, the model is the one below its adapter. Raises `ValueError` if it has none."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Inside, forward passes exchange nothing between ranks, which may then make different numbers of them."""
        ...

    def head(self, reading: Head, *, keep: bool) -> Head:
        """`reading` with the tensors of the output head at this moment.

        `keep`: tensors without gradient that stay what they are after the context in which they were read; otherwise
        those that the optimiser trains, to be used before anything is exchanged.
        """
        ...

    def saved(self) -> dict[str, Tensor] | None:
        """The tensors of the trained model, or of its adapter, on rank 0 and its CPU; None where the model has them.

        Gathered one at a time; nothing on the other ranks. Called by all of them.
        """
        ...

    def add_up_gradients(self) -> None:
        """Let each rank's trained parameters have the sum of the gradients of all ranks. Called by all of them."""
        ...

    def agreement(self) -> str:
        """What must be equal on all ranks, as a hash: it differs as soon as one bit of their values does."""
        ...

    def parts(self) -> dict[str, Part]:
        """What this rank holds of every trained tensor, by name: over all ranks each row of each tensor once."""
        ...

    def part(self, tensor: Tensor) -> Part:
        """What this rank holds of a tensor that belongs to a trained one, such as its moments."""
        ...

    def beside(self, name: str, held: Tensor) -> Tensor:
        """A tensor that belongs to the trained one of a name, of what this rank holds of it: the inverse of `part`."""
        ...

    def rows(self, count: int) -> slice:
        """Which rows this rank holds of a trained tensor, or of a moment of one, that has `count` of them."""
        ...

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite this rank's parts. Raises `CheckpointError` unless the names are exactly the trained ones."""
        ...


@final
class ReplicatedWeights:
    """Every rank holds all values. Exchanged tensors change places and nothing is copied: no memory beside them."""

    def __init__(self, model: nn.Module, ranks: Ranks = SINGLE_PROCESS) -> None:
        self._model: Any = model
        self._ranks = ranks
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """See `Weights`."""
        return self._trained

    @property
    def has_adapter(self) -> bool:
        """See `Weights`."""
        return hasattr(self._model, "peft_config")

    @property
    def in_step(self) -> bool:
        """See `Weights`: never."""
        return False

    @contextmanager
    def exchanged(self, values: MutableMapping[str, Tensor]) -> Iterator[None]:
        """See `Weights`."""
        with torch.no_grad(), self._kept(values) as student:
            given = dict(values)
            try:
                for name, tensor in given.items():
                    self._trained[name].data = tensor
                values.update(student)
                yield
            finally:
                values.update(given)

    @contextmanager
    def moved(self, unit: Mapping[str, Tensor], distance: float) -> Iterator[None]:
        """See `Weights`."""
        with torch.no_grad(), self._kept(unit) as kept:
            for name, value in unit.items():
                self._trained[name].data = kept[name] + distance * value
            yield

    def without_adapter(self) -> AbstractContextManager[None]:
        """See `Weights`."""
        return adapter_off(self._model)

    def whole(self) -> AbstractContextManager[None]:
        """See `Weights`: they always are."""
        return nullcontext()

    def head(self, reading: Head, *, keep: bool) -> Head:
        """See `Weights`. Tensors that are kept are those of the moment: an exchange gives the parameters others."""
        causal_lm = self._model.get_base_model() if self.has_adapter else self._model
        layer = causal_lm.get_output_embeddings()
        head = replace(reading, weight=layer.weight, bias=layer.bias)
        return head.detached() if keep else head

    def saved(self) -> dict[str, Tensor] | None:
        """See `Weights`."""
        return None

    def add_up_gradients(self) -> None:
        """See `Weights`."""
        self._ranks.sum_gradients(self._trained.values())

    def agreement(self) -> str:
        """See `Weights`. One tensor at a time goes to the CPU."""
        return digest_of(self._trained)

    def parts(self) -> dict[str, Part]:
        """See `Weights`."""
        return {name: self.part(p) for name, p in self._trained.items()}

    def part(self, tensor: Tensor) -> Part:
        """See `Weights`."""
        return Part(tensor.detach(), 0, tuple(tensor.shape))

    def beside(self, name: str, held: Tensor) -> Tensor:  # noqa: ARG002
        """See `Weights`."""
        return held

    def rows(self, count: int) -> slice:
        """See `Weights`."""
        return slice(0, count)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """See `Weights`."""
        require_trained(self._trained, values)
        overwrite(self._trained, values)

    @contextmanager
    def _kept(self, names: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The tensors of the named parameters, which come back at the end."""
        kept = {name: self._trained[name].data for name in names}
        try:
            yield kept
        finally:
            for name, tensor in kept.items():
                self._trained[name].data = tensor


def is_divided(config: ModelConfig, ranks: Ranks) -> bool:
    """Whether no rank has all weights; a single one divides them only to keep them in float32 beside its passes."""
    return config.sharding != "none" and (ranks.size > 1 or config.compute_dtype is not None)


def weights_of(loaded: LoadedModel, config: ModelConfig) -> Weights:
    """Who owns the values of a model: every rank all of them, or, as `model.sharding` says, each its rows.

    Raises `ConfigError` or `ModelError` where model or ranks cannot be divided like that.
    """
    if not is_divided(config, loaded.ranks):
        return ReplicatedWeights(loaded.model, loaded.ranks)
    from atesd.models.sharding import sharded_weights  # half a second of imports

    return sharded_weights(loaded, config)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is without its adapter and without gradient. Raises `ValueError` if it has none."""
    if not hasattr(model, "peft_config"):
        raise ValueError("the model has no adapter that could be left out")
    with torch.no_grad(), cast(Any, model).disable_adapter():
        yield


@contextmanager
def fixed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, nothing is differentiated with respect to these parameters, nor passed on below the lowest other one."""
    held = list(parameters)
    for parameter in held:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad = True


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and bits, one tensor at a time on the CPU."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def require_trained(trained: Mapping[str, object], values: Mapping[str, object]) -> None:
    """Raise `CheckpointError` unless the values bear exactly the trained names."""
    if values.keys() != trained.keys():
        stray = min(values.keys() ^ trained.keys())
        raise CheckpointError(
            f"{len(trained)} tensors are trained, the checkpoint has {len(values)}, and {stray} is only on "
            "one side; resume with the model settings of the run"
        )


@torch.no_grad()
def overwrite(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of the same names, which stay where they are in memory."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
