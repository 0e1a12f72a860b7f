"""What each rank runs for the failures of test_sharding.py: python failing_program.py FOLDER PORT:HOW .."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn
from unittest import mock

import torch

from atesd.config import ModelConfig
from atesd.errors import AtesdError, DataError
from atesd.models import ranks as ranks_module
from atesd.models.ranks import Ranks, process_group
from atesd.models.score import Scorer
from atesd.models.weights import weights_of
from atesd.train.update import BatchPlan, accumulate
from shard_program import Case, examples_of, method_of, model_of

FAILING = 1


def fail(how: str) -> NoReturn:
    """End as a rank may: with an error of its own, without a word, or not at all."""
    if how.endswith("dies"):
        os._exit(7)
    if how.endswith("hangs"):
        time.sleep(30)
    raise DataError("row 7 is unreadable")


def train(how: str, ranks: Ranks, folder: Path) -> None:
    """Two updates; rank 1 ends in the second: in its teacher's pass, its student's, its backward pass, or between."""
    loaded = replace(model_of(Case("tied"), folder), ranks=ranks)
    weights = weights_of(loaded, ModelConfig(sharding="full"))
    scorer = Scorer(loaded, weights)
    method, _ = method_of(Case("tied", "ema"), scorer, weights)
    calls, hidden, backward = 0, Scorer.hidden, torch.Tensor.backward
    at = {"teacher": 5, "student": 6}.get(how.split()[0])

    def hidden_or_end(self: Scorer, pairs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at and ranks.rank == FAILING:
            fail(how)
        return hidden(self, pairs)  # type: ignore[arg-type]

    def backward_or_end(self: torch.Tensor, *arguments: object) -> None:
        if how.startswith("backward") and ranks.rank == FAILING and calls > 4:
            fail(how)
        backward(self, *arguments)

    tensor = mock.patch.object(torch.Tensor, "backward", backward_or_end)
    with mock.patch.object(Scorer, "hidden", hidden_or_end), tensor:
        for update in range(2):
            accumulate(method, examples_of(update, 7), BatchPlan("sequence", 2))
            if update == 1 and how.startswith("between") and ranks.rank == FAILING:
                fail(how)
            weights.add_up_gradients()
            weights.agreement()


def said(how: str, folder: Path) -> str:
    """What a rank has to say in the end."""
    if how.endswith("hangs"):
        ranks_module.TIMEOUT = timedelta(seconds=10)
    ranks_module.GRACE = 2.0
    try:
        with process_group("cpu") as ranks:
            train(how, ranks, folder)
    except AtesdError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing failed"


def main(folder: Path, failures: list[str]) -> None:
    """Each failure, given as PORT:HOW, in a process of its own, forked so that torch is imported once."""
    for port, _, how in (failure.partition(":") for failure in failures):
        child = os.fork()
        if not child:
            os.environ["MASTER_PORT"] = port
            told = said(how, folder)
            (folder / f"{how} {os.environ['RANK']}").write_text(told, "utf-8")
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
