"""Train the cells of some experiments and write what they say, for `atesd reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atesd.data.rows import require
from atesd.models.load import model_source
from atesd_lab.cli.sweep import train_cells
from atesd_lab.paper.reproduce import verdict_lines, write_experiments
from atesd_lab.paper.scale import FOLDER, Scale
from atesd_lab.sweep.plan import Cell


def run_experiments(
    scale: Scale, names: Sequence[str], cells: Sequence[Cell], processes: int | None, out: Path
) -> tuple[str, bool]:
    """Train what is not finished and write every experiment that can be; what to print, and whether all were."""
    _require_material(cells)
    board = train_cells(cells, processes, out / FOLDER, keep=True)
    finished = {entry.job.folder for entry in board if entry.status == "finished"}
    written = write_experiments(scale, names, cells, finished, out)
    lines = [verdict_lines(written), *(entry.reason for entry in board if entry.status != "finished")]
    lines.append(f"results: {out / 'results.md'}, a page per experiment beside it; figures: {out / 'figures'}")
    return "\n".join(lines), all(one.findings is not None for one in written)


def _require_material(cells: Sequence[Cell]) -> None:
    """Raise now, not after an hour, where a cell's problems or its model will not be there."""
    configs = [cell.job.config for cell in cells]
    for path in dict.fromkeys(config.model.path for config in configs):
        model_source(path)
    if any(config.data.source == "gsm_symbolic" for config in configs):
        require("reasoning_gym", "gsm", "data.source: gsm_symbolic")
