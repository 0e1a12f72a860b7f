"""A scale of the reproduction: one grid of worlds, arms and seeds, and which part of it each experiment reads.

All experiments share one folder of cells, so that a run that several of them read is trained once.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from atesd.config import Component, parse_yaml
from atesd.errors import ConfigError
from atesd.table import Table
from atesd.text import duration
from atesd_lab.sweep.plan import Cell, cells_of, plan_from_mapping

FOLDER = "cells"
SCALES = ("micro",)


class Block(Component):
    """Every one of some arms in every one of some worlds."""

    worlds: list[str]
    arms: list[str]


class Scale(Component):
    """The grid of a scale: what all cells share, worlds and arms by name, and the blocks of each experiment."""

    recipe: str
    common: dict[str, Any] = Field(alias="set")
    seeds: int = Field(ge=1)
    cpu_seconds_per_update: float = Field(gt=0)
    worlds: dict[str, dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    experiments: dict[str, list[Block]]

    def wanted(self, experiments: Sequence[str]) -> list[tuple[str, str]]:
        """The (world, arm) pairs of some experiments, each once, in the order of worlds and arms."""
        pairs = {
            (world, arm)
            for name in experiments
            for block in self.experiments[name]
            for world in block.worlds
            for arm in block.arms
        }
        return [(world, arm) for world in self.worlds for arm in self.arms if (world, arm) in pairs]


def load_scale(name: str) -> Scale:
    """A packaged scale. Raises `ConfigError` for an unknown one."""
    if name not in SCALES:
        raise ConfigError(f"--scale {name}: expected one of {', '.join(SCALES)}")
    text = (importlib.resources.files("atesd_lab.paper") / f"{name}.yaml").read_text("utf-8")
    return Scale.model_validate(parse_yaml(text, name))


def cells_for(
    scale: Scale, experiments: Sequence[str], out: Path, overrides: Sequence[str] = (), seeds: int | None = None
) -> list[Cell]:
    """The cells of some experiments under `out`/cells. Raises `ConfigError` for a setting that does not hold."""
    pairs = scale.wanted(experiments)
    worlds = list(dict.fromkeys(world for world, _ in pairs))
    arms = [arm for arm in scale.arms if any(arm == wanted for _, wanted in pairs)]
    left_out = {world: [arm for arm in arms if (world, arm) not in pairs] for world in worlds}
    plan = plan_from_mapping(
        {
            "recipe": scale.recipe,
            "set": scale.common,
            "axes": {
                "world": {world: scale.worlds[world] for world in worlds},
                "arm": {arm: scale.arms[arm] for arm in arms},
            },
            "seeds": scale.seeds if seeds is None else seeds,
            "exclude": [{"world": world, "arm": some} for world, some in left_out.items() if some],
        },
        "reproduce",
        overrides,
    )
    return cells_of(plan, out / FOLDER, "reproduce")


def budget(scale: Scale, experiments: Sequence[str], cells: Sequence[Cell], processes: int) -> Table:
    """Cells and minutes of each experiment by itself, and of all together with shared cells counted once."""
    updates = {(cell.points["world"], cell.points["arm"], cell.seed): _updates(cell) for cell in cells}
    rows = []
    for name in experiments:
        pairs = set(scale.wanted([name]))
        mine = [count for (world, arm, _), count in updates.items() if (world, arm) in pairs]
        rows.append((name, *_costs(mine, scale, processes)))
    rows.append(("all, shared cells once", *_costs(list(updates.values()), scale, processes)))
    seconds = scale.cpu_seconds_per_update
    notes = (
        f"Expected at {seconds:g} CPU seconds per update (measured; evaluations included) and {processes} processes,",
        "each with a core of its own. Cells that are finished already are not left out.",
    )
    return Table("What it takes", ("experiment", "cells", "updates", "CPU", "wall"), tuple(rows), notes)


def _updates(cell: Cell) -> int:
    return cell.job.config.train.num_updates


def _costs(updates: Sequence[int], scale: Scale, processes: int) -> tuple[str, str, str, str]:
    seconds = sum(updates) * scale.cpu_seconds_per_update
    return str(len(updates)), f"{sum(updates):,}", duration(seconds), duration(seconds / processes)
