"""Very small real runs on the embedded world: seconds each, the real trainer throughout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from atesd.config import Config, load_config, shared_overrides
from atesd.engine.builtin import BuiltinEngine
from atesd.rows import Row, RowKind
from atesd.runs import EndStatus, RunFolder
from atesd.session import train
from atesd.train.checkpoint import digest, load_newest
from atesd.train.listeners import RunInfo

SMALL = (
    "data.train_size=24",
    "data.validation_size=4",
    "data.test_size=4",
    "data.probe_size=4",
    "data.max_difficulty=3",
    "train.num_updates=8",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "train.evaluate_every=3",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=100",
    "train.log_samples=1",
    "evaluation.samples=1",
)
HOLDS = ("credit.hold_updates=2", "credit.lookahead_updates=2", "exposure.policy.decisions_per_policy_update=2")
SMALL_LEARNED = (*SMALL, *HOLDS)
"""For commands that train with the learned exposure."""

SWEPT_ARMS = {
    "full": {"exposure.kind": "full"},
    "sound": {"exposure.kind": "learned"},
    "replay": {
        "exposure.kind": "replay",
        "exposure.replay_run": {"cell": {"arm": "sound"}},
        "exposure.replay_order": "shuffled",
    },
}
"""Arms of a plan; the last needs the run of the one before it."""


def quick(*overrides: str, recipe: str = "micro") -> Config:
    """A recipe cut down to eight updates of four rollouts."""
    shared = (*SMALL, *HOLDS)
    return load_config(recipe, [*shared_overrides(recipe, shared, overrides), *overrides])


def finished(config: Config, out: Path) -> RunFolder:
    """Train to the end."""
    outcome = train(config, out)
    assert outcome.status == "finished"
    return outcome.run


def cut_after(run: RunFolder, update: int, out: Path) -> Path:
    """A copy of the run as a kill right after the checkpoint of `update` would have left it, later rows included."""
    shutil.copytree(run.path, out, ignore=shutil.ignore_patterns(".lock", ".owner.json"))
    for folder in out.glob("checkpoints/update-*"):
        if int(folder.name.removeprefix("update-")) > update:
            shutil.rmtree(folder)
    return out


def fingerprint(run: RunFolder) -> dict[str, Any]:
    """Everything that an exact resume must reproduce: all tensors, and all rows without their times."""
    newest = load_newest(run.checkpoints, run.run_id)
    assert newest is not None
    rows = {kind: run.rows(kind) for kind in ("metrics", "decisions", "evaluations", "samples")}
    for row in rows["metrics"]:
        del row["seconds"]
    return {"state": digest(newest.state), "updates": newest.updates_done, "rows": json.dumps(rows, sort_keys=True)}


class Ears:
    """A listener that keeps the messages, and everything else in the order in which it came."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.events: list[tuple[Any, ...]] = []

    def begin(self, config: Config, info: RunInfo) -> None:
        self.events.append(("begin", config, info))

    def row(self, kind: RowKind, row: Row) -> None:
        self.events.append(("row", kind, row))

    def message(self, text: str) -> None:
        self.heard.append(text)

    def end(self, status: EndStatus) -> None:
        self.events.append(("end", status))


def heard_by_the_engine(
    monkeypatch: pytest.MonkeyPatch, calls: int = 99, killed_by: type[BaseException] = KeyboardInterrupt
) -> list[int]:
    """The sizes of what the builtin engine is asked for; the call after so many is killed."""
    whole, asked = BuiltinEngine.complete, []

    def complete(engine: BuiltinEngine, requests: Any, params: Any) -> Any:
        asked.append(len(requests))
        if len(asked) > calls:
            raise killed_by
        return whole(engine, requests, params)

    monkeypatch.setattr(BuiltinEngine, "complete", complete)
    return asked
