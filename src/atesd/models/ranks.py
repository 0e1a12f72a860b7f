"""Several processes that train one model: who works on what, and how all come to know the same. torchrun starts them.

Every rank runs the same program on the same numbers. Only work that takes long is sharded
(completions to sample, rows to score, answers to check); its results are gathered on all ranks, so that whatever
follows from them is the same everywhere. What travels is JSON and gradients, never pickle.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import Store

from atesd.errors import AtesdError, ConfigError, LostRankError, ModelError, TrainingError

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT = timedelta(hours=3)
"""How long a rank waits for another that is alive but silent; one that has died is noticed at once.

Long, because shards differ: one rank's batch of completions of 38,912 tokens may run half an hour past another's.
"""

GRACE = 5.0
"""Seconds in which the others may say that they too miss a rank: whoever says nothing is the one that is missed."""

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

    def gather(self, work: Callable[[], R], *, in_step: bool = False) -> list[R]:
        """The result of every rank's own work, by rank, on all ranks; `in_step`: see `gathering`."""
        with self.gathering(Gathered[R](), in_step=in_step) as gathered:
            gathered.own = work()
        return gathered.all

    @contextmanager
    def gathering(self, gathered: Gathered[R], *, in_step: bool = False) -> Iterator[Gathered[R]]:
        """Inside, set `own` of `gathered`; afterwards `all` has it of every rank.

        What is raised inside reaches the others too. With `in_step` the work itself speaks to the other ranks, whose
        answer a message would be taken for: then they learn of a failure once this process has ended.
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
            if in_step and _of_connection(error):
                raise self.lost(error) from None
            if in_step:
                self.leave_reason(error)
                raise
            failure, message = error, json.dumps({"failed": _in_words(error)})
        found = [json.loads(content) for content in self._exchange(message.encode())]
        if failure is not None:
            raise failure
        for rank, told in enumerate(found):
            if "failed" in told:
                raise TrainingError(f"rank {rank} of {self.size} failed: {told['failed']}")
        gathered.all = [told["done"] for told in found]

    def map_sharded(
        self, items: Sequence[T], work: Callable[[Sequence[T]], list[R]], *, in_step: bool = False
    ) -> list[R]:
        """One result per item, in the order of the items, each worked out on one rank and known to all."""
        return interleave(self.gather(lambda: work(self.shard(items)), in_step=in_step))

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
            raise self.lost(error) from None

    def leave_reason(self, error: Exception) -> None:
        """Leave for the other ranks why this one ends; they find it when they miss this one."""
        if self.size > 1 and not isinstance(error, LostRankError) and _store_answers():
            with suppress(RuntimeError):
                _store().set(f"atesd/failed/{self.rank}", _in_words(error))

    def lost(self, error: Exception) -> LostRankError:
        """What to say where another rank no longer answers: its own reason, or else which ranks are gone or hang."""
        cause = _first_line(error).split(". ")[0]
        others = [rank for rank in range(self.size) if rank != self.rank]
        if not _store_answers():
            return LostRankError(
                f"rank {self.rank} of {self.size} has lost the others; the first message of another rank says why "
                f"({cause})"
            )
        store, left = _store(), GRACE
        store.set(f"atesd/missed/{self.rank}", cause)
        while True:
            for rank in others:
                if store.check([f"atesd/failed/{rank}"]):
                    reason = store.get(f"atesd/failed/{rank}").decode()
                    return LostRankError(f"rank {rank} of {self.size} failed: {reason}")
            silent = [str(rank) for rank in others if not store.check([f"atesd/missed/{rank}"])]
            if not silent or left <= 0:
                break
            time.sleep(0.1)
            left -= 0.1
        who = f"rank {', '.join(silent)} gave no sign any more" if silent else "each still answers"
        return LostRankError(
            f"rank {self.rank} of {self.size} has lost the others: {who} ({cause}). It was killed, hangs, or its "
            "machine cannot be reached: look at its output; the same command resumes from the last checkpoint"
        )


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
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    try:
        yield ranks
    except Exception as error:
        if _of_connection(error) and not isinstance(error, LostRankError):
            raise ranks.lost(error) from None
        ranks.leave_reason(error)
        raise
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


def _of_connection(error: Exception) -> bool:
    """Whether this rank found another gone or silent, and did not fail itself."""
    return isinstance(error, LostRankError | dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _store() -> Store:
    """Where ranks meet: torchrun's own, which outlives them, or rank 0's."""
    return distributed_c10d._get_default_store()


def _store_answers() -> bool:
    """Whether whoever holds the store is alive; asked of a dead one, it writes pages to stderr."""
    try:
        with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5):
            return True
    except (OSError, KeyError, ValueError):
        return False


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, AtesdError) else f"{type(error).__name__}: {error}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
