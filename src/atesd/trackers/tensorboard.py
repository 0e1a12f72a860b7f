"""TensorBoard: event files in the run folder. `tensorboard --logdir runs` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

from torch.utils.tensorboard import SummaryWriter

from atesd.config.yaml import dump_yaml

FOLDER = "tensorboard"


@final
class TensorBoard:
    """See `Tracker`. The files lie in the run's folder, so that they are the record of its id."""

    def __init__(self, folder: Path, run_id: str, config: Mapping[str, object]) -> None:
        self._folder, self._run_id, self._config = folder / FOLDER, run_id, config
        self._writer: SummaryWriter | None = None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Scalars; the first of a session hides what an earlier one had logged from that step on."""
        for name, value in figures.items():
            self._opened(step).add_scalar(name, value, step)

    def page(self, path: Path) -> None:
        """TensorBoard keeps no files: where the page lies."""
        self._opened(0).add_text("report", str(path.resolve()))

    def close(self, status: str) -> None:
        """Write what is held back."""
        writer = self._opened(0)
        writer.add_text("status", status)
        writer.close()

    def _opened(self, step: int) -> SummaryWriter:
        if self._writer is None:
            earlier = self._folder.is_dir()
            self._writer = SummaryWriter(str(self._folder), purge_step=step if earlier else None)
            settings = dump_yaml({"run_id": self._run_id, **self._config})
            self._writer.add_text("config", "\n".join(f"    {line}" for line in settings.splitlines()), step)
        return self._writer
