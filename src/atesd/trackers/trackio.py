"""Trackio: a local dashboard, `trackio show`; elsewhere only where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

import trackio

from atesd.trackers.interface import PROJECT


@final
class Trackio:
    """See `Tracker`. Trackio knows a run by its name alone, so the name holds the id."""

    def __init__(self, folder: Path, run_id: str, config: Mapping[str, object]) -> None:
        self._name = f"{folder.name}-{run_id[:8]}"
        trackio.init(
            project=PROJECT,
            name=self._name,
            config={"run_id": run_id, **config},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures at a step."""
        trackio.log(dict(figures), step=step)

    def page(self, path: Path) -> None:
        """An artifact of type report."""
        trackio.log_artifact(str(path), name=f"report-{self._name}", type="report")

    def close(self, status: str) -> None:
        """Write what is held back. Trackio has no word for how a run ended; the page says it."""
        del status
        trackio.finish()
