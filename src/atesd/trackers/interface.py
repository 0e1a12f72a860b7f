"""What a tracker is, and which there are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from atesd.errors import ConfigError

TRACKERS = {
    "tensorboard": "atesd.trackers.tensorboard:TensorBoard",
    "trackio": "atesd.trackers.trackio:Trackio",
    "wandb": "atesd.trackers.wandb:WeightsAndBiases",
}
"""Each word of `--track`, which is also the name of the package and of our extra, and what is made of it."""
PROJECT = "atesd"
"""The project that runs are filed under."""


class Tracker(Protocol):
    """Keeps a record of one run. The run's id is the record's, so that a resumed run goes on with it."""

    def __init__(self, folder: Path, run_id: str, config: Mapping[str, object]) -> None:
        """Begin or reopen the record of the run in `folder`; `config` are the settings that act."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures by name after `step` updates. After a resume steps come again from the checkpoint's on."""

    def page(self, path: Path) -> None:
        """The report of the run, one HTML file, at the end."""

    def close(self, status: str) -> None:
        """The session is over: finished, stopped or failed."""


def tracker_named(name: str) -> type[Tracker]:
    """The class of a tracker, its package imported. Raises `ConfigError` for an unknown word, or what is missing."""
    if name not in TRACKERS:
        raise ConfigError(f"--track {name}: expected one of {', '.join(TRACKERS)}")
    module, _, kind = TRACKERS[name].partition(":")
    try:
        found: type[Tracker] = getattr(importlib.import_module(module), kind)
    except ImportError as error:
        raise ConfigError(f'--track {name} needs the extra `{name}`: pip install "atesd[{name}]" ({error})') from error
    return found
