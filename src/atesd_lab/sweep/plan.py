"""A plan: one recipe, what all its runs share, what varies (axes), and the seeds. Every combination is a cell, a run.

    recipe: micro
    set: {train.num_updates: 400}
    axes:
      exposure.reveal_ratio: [0, 0.5, 1]     # values of one setting, or
      world:                                 # named groups of settings
        leaps: {data.leap_share: 0.5}
        steps: {data.leap_share: 0.0}
    seeds: 5                                 # 0 to 4; or a list

A value `{cell: {arm: sound}}` stands for the run folder of the cell that has this point on that axis, and otherwise
the points and the seed of the cell where it stands; that cell is then trained first. A point may set `recipe` too.
`exclude` lists combinations to leave out: `{world: steps, arm: [best, random]}`. `without` lists settings that some
combinations do without, because nothing would read them there: `{world: ema, arm: grpo, settings: [teacher.weights]}`.
"""

from __future__ import annotations

import importlib.resources
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict, ValidationError, field_validator

from atesd.config import Component, parse_yaml, shared_overrides, yaml_value
from atesd.config.explain import nearest
from atesd.errors import ConfigError, IdleSettingError
from atesd_lab.sweep.jobs import Job

Overrides = dict[str, Any]
Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[tuple[Seed, ...], Strict(False), Field(min_length=1)]
NAME = re.compile(r"[a-z0-9][a-z0-9.+_-]*")


class Plan(Component):
    """What `atesd sweep` runs. Settings are dotted, as after `--set`."""

    recipe: str = Field(description="a packaged recipe or a YAML file")
    common: Overrides = Field(default_factory=dict, alias="set", description="settings of all cells")
    axes: dict[str, list[Any] | dict[str, Overrides]] = Field(default_factory=dict, description="what varies")
    seeds: Annotated[int, Field(ge=1)] | Seeds = Field(1, description="how many, from 0, or a list: train.seed")
    exclude: list[dict[str, Any]] = Field(default_factory=list, description="combinations that are left out")
    without: list[dict[str, Any]] = Field(default_factory=list, description="settings that combinations do without")

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds, written out."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @field_validator("seeds")
    @classmethod
    def _seeds_once(cls, seeds: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if not isinstance(seeds, int) and len(set(seeds)) < len(seeds):
            raise ValueError(f"{list(seeds)} names a seed twice; each is one run")
        return seeds


@dataclass(frozen=True, slots=True)
class Cell:
    """A combination of points with a seed: `points` maps each axis to the name of its point."""

    group: str
    points: Mapping[str, str]
    seed: int
    job: Job


@dataclass(frozen=True, slots=True)
class _Axis:
    """An axis of a plan: its points by name, and how a point is written in `exclude` and `{cell: ...}`."""

    name: str
    points: Mapping[str, Overrides]
    by_value: bool

    def point(self, written: Any, where: str) -> str:
        name = _value_name(self.name, written) if self.by_value else str(written)
        if name not in self.points:
            allowed = [next(iter(o.values())) for o in self.points.values()] if self.by_value else list(self.points)
            raise ConfigError(
                f"{where}: axis {self.name} has no point {written!r}{nearest(str(written), map(str, allowed))}; "
                f"allowed: {', '.join(map(str, allowed))}"
            )
        return name


def plan_names() -> list[str]:
    """Names of the packaged plans."""
    folder = importlib.resources.files("atesd_lab") / "plans"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def plan_text(plan: str) -> str:
    """The YAML text of a packaged plan or of a file. Raises `ConfigError` with the nearest name."""
    if plan in plan_names():
        return (importlib.resources.files("atesd_lab") / "plans" / f"{plan}.yaml").read_text("utf-8")
    path = Path(plan)
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"{plan}: cannot be read: {error}") from None
    names = plan_names()
    raise ConfigError(f"'{plan}' is neither a file nor a plan{nearest(plan, names)}; plans: {', '.join(names)}")


def load_plan(plan: str, overrides: Iterable[str] = ()) -> Plan:
    """Load a packaged plan or a file; `a.b=value` overrides go to its `set`. Raises `ConfigError`."""
    values = parse_yaml(plan_text(plan), plan)
    return plan_from_mapping(values, plan, overrides)


def plan_from_mapping(values: Any, name: str, overrides: Iterable[str] = ()) -> Plan:
    """Check the mapping that a plan's YAML stands for. `ConfigError`: key, value, what is allowed, the nearest name."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: expected a plan with the keys {', '.join(_keys())}, found {type(values).__name__}")
    try:
        plan = Plan.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(item) for item in error.errors(include_url=False))
        raise ConfigError(f"{name}: " + "\n  ".join(lines)) from None
    return plan.model_copy(update={"common": {**plan.common, **dict(_parsed(override) for override in overrides)}})


def cells_of(plan: Plan, out: Path, name: str = "plan") -> list[Cell]:
    """Every cell, in the order in which it may be trained: after the cells whose folders it names. Seeds vary slowest.

    A cell's folder is `out/GROUP-seed-N`, its group the names of its points; adding a point or a seed renames none.
    Raises `ConfigError` for every cell whose config does not hold.
    """
    axes = [_axis(axis, points, name) for axis, points in plan.axes.items()]
    _require_apart(plan, axes, name)
    excluded = [_combination(entry, plan, axes, f"{name}: exclude[{i}]") for i, entry in enumerate(plan.exclude)]
    spared = [_spared(entry, plan, axes, f"{name}: without[{i}]") for i, entry in enumerate(plan.without)]
    combinations = [
        (dict(zip((axis.name for axis in axes), points, strict=True)), seed)
        for seed in plan.seed_list
        for points in itertools.product(*(axis.points for axis in axes))
    ]
    kept = [one for one in combinations if not _is_excluded(*one, excluded)]
    if not kept:
        raise ConfigError(f"{name}: exclude leaves no cell of {len(combinations)}")
    folders = {_key(points, seed): _folder(out, points, seed) for points, seed in kept}
    cells = [_cell(plan, axes, points, seed, folders, _omitted(points, seed, spared), name) for points, seed in kept]
    return _in_order(_checked_cells(cells, plan, name), name)


def stages(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells in rounds: what is in one round needs nothing of the same round."""
    rounds: dict[Path, int] = {}
    for cell in cells:
        rounds[cell.job.folder] = 1 + max((rounds[folder] for folder in cell.job.needs), default=-1)
    found: list[list[Cell]] = [[] for _ in range(1 + max(rounds.values(), default=-1))]
    for cell in cells:
        found[rounds[cell.job.folder]].append(cell)
    return found


def _axis(axis: str, points: list[Any] | dict[str, Overrides], name: str) -> _Axis:
    where = f"{name}: axes.{axis}"
    if not points:
        raise ConfigError(f"{where}: has no point; list values, or name groups of settings")
    if axis == "seed":
        raise ConfigError(f"{where}: seeds are no axis; write `seeds: 5` or `seeds: [0, 1]` at the top of the plan")
    if isinstance(points, list):
        if "." not in axis:
            raise ConfigError(
                f"{where}: a list holds values of one setting, and {axis!r} is none; call the axis by a setting such "
                "as exposure.reveal_ratio, or name the points: {point: {setting: value}}"
            )
        named: dict[str, Overrides] = {}
        for value in points:
            point = _value_name(axis, value)
            if point in named:
                raise ConfigError(f"{where}: {value!r} gives the name {point} a second time; each point is one run")
            named[point] = {axis: value}
    else:
        if "." in axis:
            raise ConfigError(f"{where}: named points need an axis with a name of its own, without a dot")
        named = points
    for point, overrides in named.items():
        if not NAME.fullmatch(point) or len(point) > 60:
            raise ConfigError(
                f"{where}: {point!r} cannot name a folder everywhere; use lower-case letters, digits and . + _ -, "
                "at most 60 of them"
            )
        _require_settings(overrides, f"{where}.{point}")
    return _Axis(axis, named, isinstance(points, list))


def _value_name(axis: str, value: Any) -> str:
    """The name of a value of a setting: reveal_ratio-0.25."""
    text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else yaml_value(value)
    words = re.sub(r"[^a-z0-9.+-]+", "_", text.lower()).strip("_.")
    return f"{axis.rsplit('.', 1)[-1].lower()}-{words}"


def _require_settings(overrides: Overrides, where: str) -> None:
    for setting in overrides:
        if setting == "train.seed":
            raise ConfigError(f"{where}: train.seed belongs to `seeds`, so that cells of one seed are paired")
        if "." not in setting and (setting != "recipe" or where.endswith(": set")):
            raise ConfigError(f"{where}: {setting!r} is no dotted setting, such as train.num_updates: 100")


def _require_apart(plan: Plan, axes: Sequence[_Axis], name: str) -> None:
    """No setting is decided in two places, and the names of cells stay apart on every file system."""
    _require_settings(plan.common, f"{name}: set")
    owners: dict[str, str] = dict.fromkeys(plan.common, "set")
    for axis in axes:
        for setting in dict.fromkeys(setting for overrides in axis.points.values() for setting in overrides):
            if setting in owners:
                raise ConfigError(
                    f"{name}: {setting} is decided twice, by {owners[setting]} and by axes.{axis.name}; keep one"
                )
            owners[setting] = f"axes.{axis.name}"
    groups: dict[str, tuple[str, ...]] = {}
    for points in itertools.product(*(axis.points for axis in axes)):
        group = "-".join(points)
        if group in groups:
            raise ConfigError(f"{name}: axes: {groups[group]} and {points} both give the name {group}; rename a point")
        groups[group] = points


def _combination(entry: Mapping[str, Any], plan: Plan, axes: Sequence[_Axis], where: str) -> dict[str, set[Any]]:
    """An entry of `exclude` or `without` as axis -> names of points (or seeds)."""
    by_name = {axis.name: axis for axis in axes}
    named: dict[str, set[Any]] = {}
    for axis, written in entry.items():
        listed = written if isinstance(written, list) else [written]
        if axis == "seed":
            named[axis] = set(listed)
            unknown = sorted(map(str, named[axis] - set(plan.seed_list)))
            if unknown:
                raise ConfigError(f"{where}: seed {', '.join(unknown)} is not in the plan: {plan.seed_list}")
        else:
            named[axis] = {_known_axis(axis, by_name, where).point(point, where) for point in listed}
    if not named:
        raise ConfigError(f"{where}: is empty, which would leave out everything; name an axis and a point")
    return named


def _spared(
    entry: Mapping[str, Any], plan: Plan, axes: Sequence[_Axis], where: str
) -> tuple[dict[str, set[Any]], frozenset[str]]:
    """An entry of `without`: the combination, and the settings that it does without."""
    written = entry.get("settings")
    listed = written if isinstance(written, list) else [written]
    set_anywhere = {*plan.common, *(setting for axis in axes for point in axis.points.values() for setting in point)}
    for setting in listed:
        if setting not in set_anywhere:
            raise ConfigError(
                f"{where}: settings: {setting!r} is set nowhere in the plan{nearest(str(setting), set_anywhere)}"
            )
    rest = {axis: points for axis, points in entry.items() if axis != "settings"}
    return _combination(rest, plan, axes, where), frozenset(listed)


def _omitted(
    points: Mapping[str, str], seed: int, spared: Sequence[tuple[Mapping[str, set[Any]], frozenset[str]]]
) -> frozenset[str]:
    """The settings that a cell does without."""
    return frozenset().union(*(settings for entry, settings in spared if _is_excluded(points, seed, [entry])))


def _known_axis(axis: str, axes: Mapping[str, _Axis], where: str) -> _Axis:
    if axis not in axes:
        raise ConfigError(f"{where}: there is no axis {axis!r}{nearest(axis, axes)}; axes: {', '.join(axes)}, seed")
    return axes[axis]


def _is_excluded(points: Mapping[str, str], seed: int, excluded: Sequence[Mapping[str, set[Any]]]) -> bool:
    has = {**points, "seed": seed}
    return any(all(has[axis] in named for axis, named in entry.items()) for entry in excluded)


def _key(points: Mapping[str, str], seed: int) -> tuple[Any, ...]:
    return (*sorted(points.items()), seed)


def _folder(out: Path, points: Mapping[str, str], seed: int) -> Path:
    return out / "-".join([*points.values(), "seed", str(seed)])


def _cell(
    plan: Plan,
    axes: Sequence[_Axis],
    points: Mapping[str, str],
    seed: int,
    folders: Mapping[tuple[Any, ...], Path],
    omitted: frozenset[str],
    name: str,
) -> Cell:
    where = f"{name}: cell {_folder(Path(), points, seed)}"
    settings = dict(plan.common)
    for axis in axes:
        settings |= axis.points[points[axis.name]]
    settings = {setting: value for setting, value in settings.items() if setting not in omitted}
    recipe = str(settings.pop("recipe", plan.recipe))
    needs: dict[str, Path] = {}
    for setting, value in settings.items():
        if isinstance(value, Mapping) and set(value) == {"cell"}:
            needs[setting] = _needed(value["cell"], axes, points, seed, folders, f"{where}: {setting}")
    written = {**settings, **{setting: portable(folder) for setting, folder in needs.items()}, "train.seed": seed}
    overrides = tuple(f"{setting}={yaml_value(value)}" for setting, value in written.items())
    folder = folders[_key(points, seed)]
    group = "-".join(points.values()) or Path(recipe).stem
    return Cell(group, points, seed, Job(recipe, overrides, folder, tuple(dict.fromkeys(needs.values()))))


def _needed(
    written: Any,
    axes: Sequence[_Axis],
    points: Mapping[str, str],
    seed: int,
    folders: Mapping[tuple[Any, ...], Path],
    where: str,
) -> Path:
    """The folder of the cell that `{cell: {axis: point}}` names."""
    if not isinstance(written, Mapping) or not written:
        raise ConfigError(f"{where}: cell: {written!r}; expected the axes that differ, such as {{arm: sound}}")
    by_name = {axis.name: axis for axis in axes}
    wanted = {axis: _known_axis(axis, by_name, where).point(p, where) for axis, p in written.items() if axis != "seed"}
    key = _key({**points, **wanted}, written.get("seed", seed))
    if key not in folders:
        raise ConfigError(f"{where}: the cell {dict(written)} is not in the plan: excluded, or a seed it does not have")
    return folders[key]


def portable(folder: Path) -> str:
    """A path as a setting holds it: relative below the working directory, however it was typed; else absolute."""
    relative = os.path.relpath(folder)
    return str(folder.resolve()) if relative.startswith(os.pardir) else relative


def _checked_cells(cells: Sequence[Cell], plan: Plan, name: str) -> list[Cell]:
    """The cells, each with those settings of `set` that act in it; each complaint is made once, with its first cell.

    What an axis sets must act in every cell of the point, and what `set` says in one cell at least.
    """
    found: dict[str, str] = {}
    updates: dict[Path, int] = {}
    kept: list[Cell] = []
    idle: dict[str, str] = {}
    for cell in cells:
        try:
            one, updates[cell.job.folder] = _with_what_acts(cell, plan, idle)
            kept.append(one)
        except ConfigError as error:
            found.setdefault(str(error), cell.job.name)
    acting = {_setting(override) for cell in kept for override in cell.job.overrides}
    for setting in [] if found else [setting for setting in idle if setting not in acting]:
        found[idle[setting]] = "(every cell)"
    for cell in [] if found else kept:
        for needed in cell.job.needs:
            if updates[needed] < updates[cell.job.folder]:
                short = f"train.num_updates: {updates[cell.job.folder]} is more than the {updates[needed]} of the cell"
                found.setdefault(f"{short} that it reads, {needed.name}", cell.job.name)
    if found:
        lines = [f"cell {cell}: {message}" for message, cell in found.items()]
        raise ConfigError(f"{name}: " + "\n  ".join(lines))
    return kept


def _with_what_acts(cell: Cell, plan: Plan, idle: dict[str, str]) -> tuple[Cell, int]:
    """The cell without the settings of `set` that do not act in it, and its number of updates.

    `idle` takes in which settings these are, and why. Its config is read once, as a plan may have a thousand cells.
    """
    job = cell.job
    try:
        return cell, job.config.train.num_updates
    except IdleSettingError as error:
        common = [override for override in job.overrides if _setting(override) in plan.common]
        own = [override for override in job.overrides if _setting(override) not in plan.common]
        shared = shared_overrides(job.recipe, common, own)
        idle.update({_setting(override): str(error) for override in common if override not in shared})
        job = replace(job, overrides=(*shared, *own))
        return replace(cell, job=job), job.config.train.num_updates


def _setting(override: str) -> str:
    return override.partition("=")[0]


def _in_order(cells: Sequence[Cell], name: str) -> list[Cell]:
    """Stable: a cell waits only for those it needs. Raises `ConfigError` for cells that wait for each other."""
    ordered: list[Cell] = []
    placed: set[Path] = set()
    waiting = list(cells)
    while waiting:
        ready = next((cell for cell in waiting if placed.issuperset(cell.job.needs)), None)
        if ready is None:
            names = ", ".join(cell.job.name for cell in waiting)
            raise ConfigError(f"{name}: these cells wait for each other: {names}")
        waiting.remove(ready)
        ordered.append(ready)
        placed.add(ready.job.folder)
    return ordered


def _parsed(override: str) -> tuple[str, Any]:
    setting, equals, text = override.partition("=")
    if not equals or "." not in setting:
        raise ConfigError(f"--set {override}: expected a.b=value, for example --set train.num_updates=4")
    return setting.strip(), parse_yaml(text, f"--set {override}")


def _keys() -> list[str]:
    return [field.alias or name for name, field in Plan.model_fields.items()]


def _explain(item: Any) -> str:
    """One pydantic error as: key, value, what is allowed, nearest key."""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(where, _keys())}; allowed: {', '.join(_keys())}"
    if item["type"] == "missing":
        return f"{where}: is missing; a plan names its recipe"
    if item["type"] == "value_error":
        return f"{where}: {item['ctx']['error']}"
    return f"{where}: {item['input']!r} is not allowed; {item['msg'].replace('Input should', 'it should')}"
