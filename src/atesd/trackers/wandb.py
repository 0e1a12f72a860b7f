"""Weights & Biases: a record in the run folder, sent only where WANDB_MODE says so; else `wandb sync` sends it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import final

MODE = os.environ.setdefault("WANDB_MODE", "offline")
if MODE == "offline":
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when the package is imported

import wandb  # noqa: E402

from atesd.trackers.interface import PROJECT  # noqa: E402

STEP = "updates"


@final
class WeightsAndBiases:
    """See `Tracker`. Every session has the run's id; offline each is a folder, and synced they are one run."""

    def __init__(self, folder: Path, run_id: str, config: Mapping[str, object]) -> None:
        self._run = wandb.init(
            project=PROJECT,
            id=run_id,
            name=folder.name,
            dir=str(folder),
            config=dict(config),
            mode=MODE,
            resume=None if MODE == "offline" else "allow",
            settings=wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True),
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures over the updates: wandb's own step only ever rises, ours goes back when a run resumes."""
        self._run.log({STEP: step, **figures})

    def page(self, path: Path) -> None:
        """An artifact of type report."""
        artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self, status: str) -> None:
        """Say how it ended."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=int(status == "failed"))
