"""A scale of the reproduction: one grid of worlds, arms and seeds, and which part of it each experiment reads.

All experiments share one folder of cells, so that a run that several of them read is trained once. `micro` has the
embedded worlds; the others are the paper's models, whose runs are also evaluated on its benchmarks.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import mul
from pathlib import Path
from typing import Any

from pydantic import Field

from atesd.config import Component, parse_yaml, yaml_value
from atesd.data.benchmarks import Asked, asked_for
from atesd.errors import ConfigError
from atesd.table import Table
from atesd.text import duration
from atesd_lab.paper.estimate import Card, Size, estimated
from atesd_lab.sweep.jobs import Scoring, holds_base
from atesd_lab.sweep.plan import Cell, cells_of, plan_from_mapping

FOLDER = "cells"
SCALES: Mapping[str, str] = {"micro": "micro", **dict.fromkeys(("qwen3-1.7b", "qwen3-4b", "qwen3-8b"), "qwen3")}
"""The file of each scale."""


class Block(Component):
    """Every one of some arms in every one of some worlds."""

    worlds: list[str]
    arms: list[str]


class Scored(Component):
    """The benchmarks on which every run is evaluated at its end, and with which settings."""

    names: list[str]
    settings: dict[str, Any] = Field(alias="set")


class Scale(Component):
    """The grid of a scale: what all cells share, worlds and arms by name, and the blocks of each experiment."""

    arms_of: str | None = None
    recipe: str
    common: dict[str, Any] = Field(alias="set")
    seeds: int = Field(ge=1)
    cpu_seconds_per_update: float | None = Field(None, gt=0)
    cpu_seconds_by_world: dict[str, float] = Field(default_factory=dict)
    benchmarks: Scored | None = None
    estimate: Card | None = None
    models: dict[str, Size] = Field(default_factory=dict)
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
    scale = _packaged(SCALES[name])
    return scale if name == SCALES[name] else scale.model_copy(update={"recipe": name})


def _packaged(file: str) -> Scale:
    text = (importlib.resources.files("atesd_lab.paper") / f"{file}.yaml").read_text("utf-8")
    scale = Scale.model_validate(parse_yaml(text, file))
    if scale.arms_of is None:
        return scale
    return scale.model_copy(update={"arms": {**_packaged(scale.arms_of).arms, **scale.arms}})


def asked_of(scale: Scale, benchmark: str | None, expected: Sequence[str]) -> list[Asked]:
    """The benchmarks of a scale, or those that are named instead: aime24=FILE. `ConfigError` where it has none."""
    if scale.benchmarks is None:
        if benchmark is not None or expected:
            raise ConfigError(
                "--benchmark: the embedded worlds have problems of their own; leave it and its hashes out"
            )
        return []
    return asked_for(",".join(scale.benchmarks.names) if benchmark is None else benchmark, expected)


def cells_for(
    scale: Scale,
    experiments: Sequence[str],
    out: Path,
    overrides: Sequence[str] = (),
    seeds: int | None = None,
    asked: Sequence[Asked] | None = None,
) -> list[Cell]:
    """The cells of some experiments under `out`/cells. Raises `ConfigError` for a setting that does not hold."""
    pairs = scale.wanted(experiments)
    worlds = list(dict.fromkeys(world for world, _ in pairs))
    arms = [arm for arm in scale.arms if any(arm == wanted for _, wanted in pairs)]
    left_out = {world: [arm for arm in arms if (world, arm) not in pairs] for world in worlds}
    given = {override.partition("=")[0].strip() for override in overrides}
    shared = {world: {**scale.common, **scale.worlds[world]} for world in worlds}
    own = {world: {name: value for name, value in some.items() if name not in given} for world, some in shared.items()}
    plan = plan_from_mapping(
        {
            "recipe": scale.recipe,
            "axes": {
                "world": own,
                "arm": {arm: scale.arms[arm] for arm in arms},
            },
            "seeds": scale.seeds if seeds is None else seeds,
            "exclude": [{"world": world, "arm": some} for world, some in left_out.items() if some],
        },
        "reproduce",
        overrides,
    )
    cells = cells_of(plan, out / FOLDER, "reproduce")
    if scale.benchmarks is None:
        for cell in {cell.points["world"]: cell for cell in cells}.values():
            if not cell.job.config.data.test_size:
                raise ConfigError("data.test_size is 0; every experiment compares arms on the test problems")
        return cells
    return _evaluated(cells, asked_of(scale, None, ()) if asked is None else asked, scale.benchmarks, overrides)


def _evaluated(cells: Sequence[Cell], asked: Sequence[Asked], scored: Scored, overrides: Sequence[str]) -> list[Cell]:
    """The cells, each to be evaluated on the benchmarks; one of each seed before training too.

    Before training all cells of a seed are one model with one set of draws. `overrides` beat the scale's settings.
    """
    given = {override.partition("=")[0].strip(): override for override in overrides}
    settings = [given.get(name, f"{name}={yaml_value(value)}") for name, value in scored.settings.items()]
    bases = {cell.seed: cell.job.folder for cell in reversed(cells)}
    names = [one.name for one in asked]
    bases |= {cell.seed: cell.job.folder for cell in reversed(cells) if holds_base(cell.job.folder, names)}
    found = []
    for cell in cells:
        server = cell.job.config.sampling.engine == "server"
        acting = tuple(one for one in settings if not (server and one.startswith("sampling.batch_size=")))
        scoring = Scoring(tuple(asked), acting, base=bases[cell.seed] == cell.job.folder)
        found.append(replace(cell, job=replace(cell.job, scoring=scoring)))
    return found


def budget(scale: Scale, experiments: Sequence[str], cells: Sequence[Cell], processes: int) -> Table:
    """Cells and time of each experiment by itself, and of all together with shared cells counted once."""
    groups = {}
    for name in experiments:
        pairs = set(scale.wanted([name]))
        groups[name] = [cell for cell in cells if (cell.points["world"], cell.points["arm"]) in pairs]
    groups["all, shared cells once"] = list(cells)
    if scale.estimate is not None:
        return estimated(groups, scale.estimate, scale.models[scale.recipe], processes)
    rows = [(name, *_costs(scale, some, processes)) for name, some in groups.items()]
    others = "".join(f", {seconds:g} in {world}" for world, seconds in scale.cpu_seconds_by_world.items())
    notes = (
        f"Expected at {scale.cpu_seconds_per_update or 0:g} CPU seconds per update{others} (measured; evaluations "
        f"included) and {processes} processes,",
        "each with a core of its own. Cells that are finished already are not left out.",
    )
    return Table("What it takes", ("experiment", "cells", "updates", "CPU", "wall"), tuple(rows), notes)


def _costs(scale: Scale, cells: Sequence[Cell], processes: int) -> tuple[str, str, str, str]:
    updates = [cell.job.config.train.num_updates for cell in cells]
    usual = scale.cpu_seconds_per_update or 0.0
    each = [scale.cpu_seconds_by_world.get(cell.points["world"], usual) for cell in cells]
    seconds = sum(map(mul, updates, each))
    return str(len(updates)), f"{sum(updates):,}", duration(seconds), duration(seconds / processes)
