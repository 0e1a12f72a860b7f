"""Weights split over the ranks (FSDP2): each holds its rows of every tensor, and a pass gathers a layer at a time.

A pass, forward or backward, is one of all ranks: each must make as many, in the same order, except inside `whole`.
Values are changed in place and what was gathered of them is given up at once: FSDP2 reads its own reference to a
shard, so that a parameter whose `data` was exchanged would stay what it was, without a word.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from atesd.config import ModelConfig
from atesd.errors import ConfigError, ModelError
from atesd.maths.head import Head
from atesd.models.load import DTYPES, Deferred, LoadedModel
from atesd.models.model_checks import require_forward
from atesd.models.ranks import Ranks
from atesd.models.weights import Part, adapter_off, digest_of, overwrite, require_trained


def sharded_weights(loaded: LoadedModel, config: ModelConfig) -> ShardedWeights:
    """The weights of a model divided as `model.sharding` says; `ConfigError` or `ModelError` where they cannot be."""
    compute = None if config.compute_dtype is None else DTYPES[config.compute_dtype]
    mesh = _mesh(loaded.ranks, config, loaded.device)
    weights = ShardedWeights(loaded.model, loaded.ranks, mesh, compute, loaded.deferred)
    if loaded.deferred is not None:
        require_forward(config.path, loaded.model, min(loaded.end_ids))
    return weights


@final
class ShardedWeights:
    """Each rank holds its rows of every tensor, its gradient and its moments; only a frozen output head is left whole.

    A tensor of n rows is cut into pieces of ceil(n / ranks), the last ones shorter or empty.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        mesh: DeviceMesh,
        compute: torch.dtype | None = None,
        deferred: Deferred | None = None,
    ) -> None:
        """Divide the model, for good. `compute`: what gathered tensors are cast to, while the rows stay as they are.

        What is `deferred` is read a layer at a time, and each layer divided before the next is read.
        """
        self._model = cast(Any, model)
        self._ranks, self._mesh = ranks, mesh
        self._causal_lm: Any = self._model.get_base_model() if self.has_adapter else self._model
        self._head: Any = self._causal_lm.get_output_embeddings()
        self._groups = _divided(self._causal_lm, mesh, compute, deferred)
        self._depth = 0
        with torch.no_grad():  # the first pass decides which module is the root of all others
            self._causal_lm(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self._device), use_cache=False)
        self._settle()
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}  # while they are divided

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
        """See `Weights`."""
        return self._depth == 0

    @contextmanager
    def exchanged(self, values: MutableMapping[str, Tensor]) -> Iterator[None]:
        """See `Weights`. The entries change places in memory; all ranks call it."""
        own = self._own(values)
        with torch.no_grad():
            self._swap(own, values)
            try:
                yield
            finally:
                self._swap(own, values)

    @contextmanager
    def moved(self, unit: Mapping[str, Tensor], distance: float) -> Iterator[None]:
        """See `Weights`. All ranks call it."""
        own = self._own(unit)
        with torch.no_grad():
            kept = {name: mine.clone() for name, mine in own.items()}
            try:
                for name, mine in own.items():
                    mine.copy_(kept[name] + distance * unit[name])
                self._settle()
                yield
            finally:
                overwrite(own, kept)
                self._settle()

    def without_adapter(self) -> AbstractContextManager[None]:
        """See `Weights`."""
        return adapter_off(self._model)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See `Weights`: everything is gathered once. All ranks call it; exchanges inside gather again."""
        self._depth += 1
        if self._depth == 1:
            for group in self._groups:
                group.set_reshard_after_forward(False, recurse=False)
                group.unshard()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for group in self._groups:
                    group.set_reshard_after_forward(True, recurse=False)
                self._settle()

    def head(self, reading: Head, *, keep: bool) -> Head:
        """See `Weights`. A copy where it is kept and trained: the memory of what is gathered is used again.

        One that is frozen is the same tensor at any time, so that teacher and student are seen to share it.
        """
        if isinstance(self._head, FSDPModule):
            self._head.unshard()
        weight, bias = self._head.weight, self._head.bias
        if not keep:
            return replace(reading, weight=weight, bias=bias)
        return replace(reading, weight=_kept(weight), bias=None if bias is None else _kept(bias))

    def saved(self) -> dict[str, Tensor] | None:
        """See `Weights`. Tied tensors are one."""
        found: dict[str, Tensor] = {}
        first: dict[int, str] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if self.has_adapter and name not in self._trained:
                continue
            if id(parameter) in first:
                found |= {name: found[first[id(parameter)]]} if self._ranks.first else {}
                continue
            first[id(parameter)] = name
            held = parameter.detach()
            whole = held.full_tensor() if isinstance(held, DTensor) else held
            if self._ranks.first:
                found[name] = whole.cpu()
        return found

    def add_up_gradients(self) -> None:
        """See `Weights`: each backward pass has added them up already. What is gathered is given up before a step."""
        self._settle()

    def agreement(self) -> str:
        """See `Weights`. The hash of all rows that the ranks hold together; in hybrid sharding each node has its own.

        All ranks call it.
        """
        own = digest_of(self._own(self._trained))
        found = self._ranks.gather(lambda: own)
        together = self._mesh.mesh.reshape(-1, self._mesh.size(self._mesh.ndim - 1))
        mine = next(ranks for ranks in together.tolist() if self._ranks.rank in ranks)
        return hashlib.sha256("".join(found[rank] for rank in mine).encode()).hexdigest()

    def parts(self) -> dict[str, Part]:
        """See `Weights`."""
        return {name: part_of(p) for name, p in self._trained.items()}

    def part(self, tensor: Tensor) -> Part:
        """See `Weights`."""
        return part_of(tensor)

    def beside(self, name: str, held: Tensor) -> Tensor:
        """See `Weights`."""
        like = self._trained[name]
        if not isinstance(like, DTensor) or not held.ndim:
            return held
        mesh, placements = like.device_mesh, like.placements
        return DTensor.from_local(held.to(like.device), mesh, placements, shape=like.shape, stride=like.stride())

    def rows(self, count: int) -> slice:
        """See `Weights`."""
        return _rows(count, self._mesh)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """See `Weights`."""
        require_trained(self._trained, values)
        overwrite(self._own(values), values)
        self._settle()

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    def _own(self, names: Mapping[str, object]) -> dict[str, Tensor]:
        """The rows that this rank holds of the named tensors, in the memory of the parameters."""
        return {name: part_of(self._trained[name]).tensor for name in names}

    def _swap(self, own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        for name, mine in own.items():
            kept = mine.clone()
            mine.copy_(values[name])
            values[name].copy_(kept)
        self._settle()

    def _settle(self) -> None:
        """Give up what is gathered, which may be of other values; inside `whole` it is gathered anew."""
        self._causal_lm.reset_iter_state()
        if self._depth:
            for group in self._groups:
                group.unshard()


@torch.no_grad()
def part_of(tensor: Tensor) -> Part:
    """What this rank holds of a tensor, in the same memory: all of it, unless it is divided."""
    held = tensor.detach()
    if not isinstance(held, DTensor):
        return Part(held, 0, tuple(held.shape))
    return Part(held.to_local(), _rows(held.shape[0], held.device_mesh).start, tuple(held.shape))


def _rows(count: int, mesh: DeviceMesh) -> slice:
    """Which of `count` rows this rank holds: the last dimension of the mesh divides them."""
    size = -(-count // mesh.size(mesh.ndim - 1))
    first = min(count, mesh.get_local_rank(mesh.ndim - 1) * size)
    return slice(first, min(count, first + size))


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.requires_grad else tensor.detach()


def _mesh(ranks: Ranks, config: ModelConfig, device: torch.device) -> DeviceMesh:
    """All ranks in a line, or, hybrid, a line of nodes by the ranks of each."""
    if not dist.is_initialized():  # one process, for the sake of `compute_dtype`
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    if config.sharding == "full" or ranks.size == 1:
        return init_device_mesh(device.type, (ranks.size,))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    counts = ranks.gather(lambda: here)
    if here < 1 or len(set(counts)) > 1 or ranks.size % here:
        raise ConfigError(
            f"model.sharding: hybrid divides the model within a node, and the {ranks.size} ranks say that their nodes "
            f"have {', '.join(map(str, sorted(set(counts))))} each; start torchrun with the same --nproc-per-node on "
            "every node, or set model.sharding: full"
        )
    return init_device_mesh(device.type, (ranks.size // here, here), mesh_dim_names=("node", "rank"))


def _divided(
    causal_lm: nn.Module, mesh: DeviceMesh, compute: torch.dtype | None, deferred: Deferred | None
) -> list[FSDPModule]:
    """Divide each layer by itself, then what lies outside them, then the head; the modules that gather each group.

    Gradients are summed, not averaged. A head that shares its weight with the embedding is in the group of that.
    """
    backbone: nn.Module = cast(Any, causal_lm).get_decoder()
    head: nn.Module = cast(Any, causal_lm).get_output_embeddings()
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [m for m in backbone.children() if any(True for _ in m.parameters()) and not _holds(m, inside)]
    whole = set() if any(p.requires_grad for p in head.parameters()) else set(head.parameters())
    tied = {id(p) for p in head.parameters()} & {id(p) for module in outside for p in module.parameters()}
    groups: list[list[nn.Module]] = [[layer] for layer in layers]
    if tied and not whole:
        groups.append([*outside, head])
    else:
        groups += [outside, *([] if whole else [[head]])]
    _require_all(causal_lm, groups, whole)
    cuda = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device(mesh.device_type)
    policy = MixedPrecisionPolicy() if compute is None else MixedPrecisionPolicy(compute, torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": whole}
    for parameter in whole:  # which FSDP2 leaves where they are
        parameter.data = (_values(parameter, deferred)).to(device)
    for group in groups:
        for parameter in {p for module in group for p in module.parameters()} - whole:
            parameter.data = _values(parameter, deferred)
        fully_shard(group if len(group) > 1 else group[0], reshard_after_forward=True, **options)
    fully_shard(causal_lm, **options)
    for module in causal_lm.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    return [group[0] for group in groups if isinstance(group[0], FSDPModule)]


def _values(parameter: nn.Parameter, deferred: Deferred | None) -> Tensor:
    read = None if deferred is None else deferred.read(parameter)
    return parameter.data if read is None else read


def _holds(module: nn.Module, inside: set[int]) -> bool:
    return any(id(inner) in inside for inner in module.modules())


def _require_all(causal_lm: nn.Module, groups: list[list[nn.Module]], whole: set[nn.Parameter]) -> None:
    """Every parameter is in a group that is gathered when its module runs."""
    grouped = {id(p) for group in groups for module in group for p in module.parameters()} | {id(p) for p in whole}
    stray = next((name for name, p in causal_lm.named_parameters() if id(p) not in grouped), None)
    if stray is not None or len(groups) < 2:
        raise ModelError(
            f"{type(causal_lm).__name__}: its weights cannot be divided by layers ({stray or 'it has none'} is in no "
            "layer, embedding, norm or head); set model.sharding: none"
        )
