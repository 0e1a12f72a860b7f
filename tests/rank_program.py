"""What each of two ranks runs for test_ranks.py: python rank_program.py FOLDER, with torchrun's environment."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from atesd.cli.pack import evaluate_benchmarks
from atesd.cli.scores import evaluate_target
from atesd.config import Config
from atesd.errors import AtesdError, DataError
from atesd.models.ranks import Ranks, process_group
from atesd.runs import RunFolder
from atesd.session import train
from atesd.train import loop
from atesd.train.rollouts import GradedRollout, RolloutSampler
from atesd.train.update import StepMeters, accumulate
from pack import three_problems
from quick import cut_after, quick

UNEVEN = ("train.num_updates=6", "train.batch_size=5", "train.micro_batch_size=2")  # rank 0 has three rows, rank 1 two
RUNS: dict[str, tuple[str, ...]] = {
    "learned": (),
    "lora": ("model.lora={rank: 2, alpha: 4}", "exposure.kind=random"),
    "probe KL, EMA teacher, token mean": (
        "credit.progress_signal=probe_kl",
        "teacher.weights=ema",
        "teacher.decay=0.9",
        "loss.reduction=token",
    ),
    "grpo": ("train.method=grpo", "train.group_size=5"),
    "hinted": ("train.method=grpo", "train.group_size=5", "hinted.rollouts=2"),
    "fewer rows than ranks": ("train.method=sft", "train.batch_size=1"),
    "divided": (
        "model.sharding=full",
        "credit.preset=paper",
        "credit.progress_signal=probe_kl",
        "teacher.weights=ema",
        "teacher.decay=0.9",
    ),
    "divided adapter": (
        "model.sharding=full",
        "model.lora={rank: 2, alpha: 4}",
        "model.gradient_checkpointing=true",
        "exposure.kind=random",
    ),
}
STOPPED_IN = 2
CUT = 3
DIVIDED = ("divided", "divided adapter")


def config_of(name: str) -> Config:
    """The config of one of the runs."""
    return quick(*UNEVEN, *RUNS[name])


def error_of(action: Callable[[], object]) -> str:
    """The message that an action fails with, after the error's name."""
    try:
        action()
    except AtesdError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def facts(ranks: Ranks) -> dict[str, Any]:
    """What each primitive gives on this rank."""

    def fail_on_rank_1() -> None:
        if ranks.rank == 1:
            raise DataError("row 7 is unreadable")

    return {
        "shard": ranks.gather(lambda: list(ranks.shard("abcde"))),
        "map_sharded": [ranks.map_sharded(range(count), lambda mine: [n * n for n in mine]) for count in range(6)],
        "broadcast": ranks.broadcast(lambda: f"said by {ranks.rank}"),
        "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        "floats": ranks.gather(lambda: [0.1 + ranks.rank, 1e-300]),
        "failed": error_of(lambda: ranks.gather(fail_on_rank_1)),
        "equal": error_of(lambda: ranks.require_equal(lambda: [1, "one"], "the list")),
        "unequal": error_of(lambda: ranks.require_equal(lambda: ranks.rank, "the number")),
        "gradients": summed_gradients(ranks),
    }


def summed_gradients(ranks: Ranks) -> list[list[float] | None]:
    """Gradients after the sum: one that both ranks have, one of rank 1 alone, one of none, one in bfloat16."""
    both, only_1, none, half = (nn.Parameter(torch.zeros(2)) for _ in range(4))
    half.data = half.data.bfloat16()
    both.grad = torch.tensor([1.0, 2.0]) * (1 + ranks.rank)
    only_1.grad = torch.tensor([5.0, 7.0]) if ranks.rank == 1 else None
    half.grad = torch.full((2,), 0.5, dtype=torch.bfloat16)
    ranks.sum_gradients([both, only_1, none, half])
    return [None if p.grad is None else p.grad.tolist() for p in (both, only_1, none, half)]


def stopped_by_rank_1(ranks: Ranks, out: Path) -> str:
    """Train until rank 1, and only rank 1, gets SIGTERM within update `STOPPED_IN`."""
    drawn = RolloutSampler.rollouts

    def draw_and_ask(sampler: RolloutSampler, update: int, hint_ratio: float | None) -> list[GradedRollout]:
        if ranks.rank == 1 and update == STOPPED_IN:
            signal.raise_signal(signal.SIGTERM)
        return drawn(sampler, update, hint_ratio)

    with mock.patch.object(RolloutSampler, "rollouts", draw_and_ask):
        return train(config_of("learned"), out).status


def never_finite(out: Path) -> str:
    """Train with a loss that is not a number; what stops it."""

    def broken(*arguments: Any, **options: Any) -> StepMeters:
        return replace(accumulate(*arguments, **options), loss=math.nan)

    with mock.patch.object(loop, "accumulate", broken):
        return error_of(lambda: train(config_of("learned"), out))


def left_alone(ranks: Ranks) -> tuple[str, float]:
    """Rank 1 dies; what rank 0 is told, and after how many seconds."""
    if ranks.rank == 1:
        os._exit(0)
    started = time.monotonic()
    return error_of(lambda: ranks.gather(lambda: 0)), time.monotonic() - started


def copied(run: Path, out: Path) -> str:
    """A run of these ranks as a kill would have left it."""
    return str(cut_after(RunFolder.open(run), CUT, out))


def main(folder: Path) -> None:
    """Write facts, runs and what happens at the end into the folder."""
    with process_group("cpu") as ranks:
        found = facts(ranks)
        for name in RUNS:
            train(config_of(name), folder / name)
        found["stopped"] = stopped_by_rank_1(ranks, folder / "stopped")
        found["resumed"] = train(config_of("learned"), folder / "resumed").status
        for name in DIVIDED:
            ranks.broadcast(partial(copied, folder / name, folder / f"{name} again"))
            train(config_of(name), folder / f"{name} again")
            train(config_of(name), folder / f"{name} of one")
        found["skipped"] = never_finite(folder / "skipped")
        scored = evaluate_target(str(folder / "learned"), None, "test", [])
        found["evaluated"] = scored and scored.row
        (folder / f"files-{ranks.rank}").mkdir()
        asked = three_problems("aime24", folder / f"files-{ranks.rank}")
        ignored = shutil.ignore_patterns(".lock", ".owner.json")
        ranks.broadcast(lambda: str(shutil.copytree(folder / "learned", folder / "scored", ignore=ignored)))
        pack = evaluate_benchmarks(str(folder / "scored"), [asked])
        found["benchmark"] = pack and pack[0].row
        (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found), "utf-8")
        (folder / "end.json").write_text(json.dumps(left_alone(ranks)), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
