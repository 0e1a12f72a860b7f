"""Several processes that train one model: who works on what, and how all come to know the same. torchrun starts them.

Every rank holds the whole model and runs the same program on the same numbers. Only work that takes long is sharded
(completions to sample, rows to score, answers to check); its results are gathered on all ranks, so that whatever
follows from them is the same everywhere. What travels is JSON and gradients, never pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atesd.errors import AtesdError, ConfigError, ModelError, TrainingError

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT = timedelta(hours=3)
"""How long a rank waits for another that is alive but silent; one that has died is noticed at once.

Long, because shards differ: one rank's batch of completions of 38,912 tokens may run half an hour past another's.
"""

_FROM_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_BUCKET = 2**24  # gradient entries summed in one message


@final
class Gathered(Generic[R]):
    """What one rank has worked out, and then what all have, by rank."""

    own: R
    all: list[R]


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which process of how many this is. `SINGLE_PROCESS` does all the work and never waits.

    Each method must be called by all ranks in the same order, and the work given to one must not call another. Work
    returns JSON values. If it raises on one rank, every rank raises: that one its own error, the others a
    `TrainingError` that names it. A rank that is gone raises `TrainingError` on the others.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and talks to the user."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this rank works on: every `size`-th, so that long and short ones mix."""
        return items if self.size == 1 else items[self.rank :: self.size]

    def gather(self, work: Callable[[], R]) -> list[R]:
        """The result of every rank's own work, by rank, on all ranks."""
        with self.gathering(Gathered[R]()) as gathered:
            gathered.own = work()
        return gathered.all

    @contextmanager
    def gathering(self, gathered: Gathered[R]) -> Iterator[Gathered[R]]:
        """Inside, set `own` of `gathered`; afterwards `all` has it of every rank.

        What is raised inside reaches the others too.
        """
        if self.size == 1:
            yield gathered
            gathered.all = [gathered.own]
            return
        failure: Exception | None = None
        try:
            yield gathered
            message = json.dumps({"done": gathered.own})
        except Exception as error:  # whatever it is, the others must not wait for a result
            failure, name = error, type(error).__name__
            message = json.dumps({"failed": str(error) if isinstance(error, AtesdError) else f"{name}: {error}"})
        found = [json.loads(content) for content in self._exchange(message.encode())]
        if failure is not None:
            raise failure
        for rank, told in enumerate(found):
            if "failed" in told:
                raise TrainingError(f"rank {rank} of {self.size} failed: {told['failed']}")
        gathered.all = [told["done"] for told in found]

    def map_sharded(self, items: Sequence[T], work: Callable[[Sequence[T]], list[R]]) -> list[R]:
        """One result per item, in the order of the items, each worked out on one rank and known to all."""
        return interleave(self.gather(lambda: work(self.shard(items))))

    def broadcast(self, work: Callable[[], R]) -> R:
        """What rank 0 alone does, and finds, for all: files, locks, whatever must happen once. The others wait."""
        return cast(R, self.gather(lambda: work() if self.first else None)[0])

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return any(self.gather(lambda: flag))

    def require_equal(self, work: Callable[[], object], what: str) -> None:
        """Raise `TrainingError` that names the ranks whose result is not that of rank 0. Alone: no work is done."""
        if self.size == 1:
            return
        found = self.gather(work)
        strays = [str(rank) for rank, other in enumerate(found) if other != found[0]]
        if strays:
            raise TrainingError(
                f"rank {', '.join(strays)} and rank 0 do not agree on {what}: they no longer train the same model. "
                "Start every rank with the same config, data and packages on the same kind of machine; the same "
                "command resumes from the last checkpoint"
            )

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all ranks, added in float32; one that no rank has stays None."""
        if self.size == 1:
            return
        trained = list(parameters)
        present = self.gather(lambda: [parameter.grad is not None for parameter in trained])
        summed = [p for p, *has in zip(trained, *present, strict=True) if any(has)]
        for bucket in _buckets(summed):
            flat = torch.cat([_wide_gradient(parameter).flatten() for parameter in bucket])
            with self._connected():
                dist.all_reduce(flat)
            sizes = [parameter.numel() for parameter in bucket]
            for parameter, total in zip(bucket, torch.split(flat, sizes), strict=True):
                parameter.grad = total.view_as(parameter).to(parameter.dtype)

    def _exchange(self, message: bytes) -> list[bytes]:
        """The message of every rank."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._connected():
            dist.all_gather(lengths, torch.tensor([len(message)]))
        room = int(max(lengths))
        padded = torch.frombuffer(bytearray(message.ljust(room)), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in lengths]
        with self._connected():
            dist.all_gather(found, padded)
        return [content[: int(length)].numpy().tobytes() for content, length in zip(found, lengths, strict=True)]

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise TrainingError(
                f"rank {self.rank} of {self.size} has lost the others; the first message of another rank says why "
                f"({_first_line(error).split('. ')[0]})"
            ) from None


SINGLE_PROCESS = Ranks()


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, this process among them; a process alone without torchrun.

    `device` is the setting model.device: unless it is cpu, each rank takes the card of its LOCAL_RANK. A process group
    that exists already is used and left as it is. Raises `ConfigError`, `ModelError` or `TrainingError`.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks()
        return
    _join(device)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def interleave(shards: Sequence[Sequence[R]]) -> list[R]:
    """The results of every rank's `shard`, by rank, back in the order of the items."""
    return [shards[i % len(shards)][i // len(shards)] for i in range(sum(map(len, shards)))]


def _join(device: str) -> None:
    missing = [name for name in _FROM_TORCHRUN if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set; start the ranks with torchrun"
        )
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        card, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if card >= cards:
            raise ModelError(f"LOCAL_RANK {card} finds {cards} CUDA devices; start at most {cards} ranks on a machine")
        torch.cuda.set_device(card)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"rank {os.environ['RANK']} cannot join the others: {_first_line(error)}") from None


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of at most `_BUCKET` entries together, a larger one by itself."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _wide_gradient(parameter: nn.Parameter) -> Tensor:
    """In float32 at least; zeros where this rank has none."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
