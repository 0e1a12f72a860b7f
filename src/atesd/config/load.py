"""Recipes, files and overrides to a checked config, and back to YAML."""

from __future__ import annotations

import importlib.resources
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from atesd.component import Choice, Component, choice_in, group_in
from atesd.config.acting import acting_settings, idle_settings
from atesd.config.explain import every_setting, explain, explain_idle, nearest, path_of_other_kind
from atesd.config.layouts import from_flat, is_recorded_flat
from atesd.config.settings import Config
from atesd.config.yaml import dump_yaml, parse_yaml
from atesd.control.credit import CREDIT_PRESETS
from atesd.errors import ConfigError, IdleSettingError
from atesd.importing import beside
from atesd.text import shown

_MOST_LINES = 40  # of faults that one error says
_HELD_AT_ONCE = frozenset(
    ("batch_size", "micro_batch_size", "group_size", "samples", "rank", "arms", "hidden", "checker_workers", "threads")
)
"""Settings that count what is held in memory at one time."""
_FUNCTIONS = (("exposure", "factory"), ("credit", "reward"), ("data", "segmenter"), ("data", "checker"))
"""Settings that may name a function of the user's."""
_TAGS = ("kind", "weights")
"""Keys that tell which kind a group is of."""


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    folder = importlib.resources.files("atesd") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_text(recipe: str) -> str:
    """The YAML text of a packaged recipe or of a file."""
    if recipe in recipe_names():
        return (importlib.resources.files("atesd") / "recipes" / f"{recipe}.yaml").read_text("utf-8")
    path = Path(recipe)
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{recipe}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
        except OSError as error:
            raise ConfigError(f"{recipe}: cannot be read: {error.strerror}") from None
    hint = nearest(recipe, recipe_names())
    raise ConfigError(f"'{recipe}' is neither a file nor a recipe{hint}; recipes: {', '.join(recipe_names())}")


def load_config(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """Load a packaged recipe or a YAML file, apply `a.b=value` overrides, and check everything.

    A function of the user's (`mine:make`) whose file lies beside the YAML file is named by that file from then on.

    An override that chooses a kind (`exposure.kind`, `loss.gate` ...) takes the place of the settings that belong to
    the kind in the file, and one of `credit.preset` of all that presets fill in. What the file writes out and no longer
    acts because of an override falls away with it. Anything else that does not act is refused.

    Raises `ConfigError` that names each setting by its dotted path, its value, what is allowed, and the nearest name.
    """
    values = parse_yaml(recipe_text(recipe), recipe) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{recipe}: expected settings grouped by component, found {type(values).__name__}")
    if is_recorded_flat(values):
        values = acting_settings(_settled(from_flat(values), recipe))
    folder = None if recipe in recipe_names() else Path(recipe).parent
    return _overridden(values, list(overrides), recipe, folder)


def shared_overrides(recipe: str, shared: Sequence[str], own: Sequence[str]) -> list[str]:
    """Those of the overrides `shared`, which several runs have in common, that act beside a run's `own`."""
    kept = list(shared)
    while True:
        try:
            load_config(recipe, [*kept, *own])
        except IdleSettingError as error:
            acting = [text for text in kept if not _names_any(text, error.paths)]
            if len(acting) == len(kept):
                raise
            kept = acting
        else:
            return kept


def _names_any(override: str, paths: Iterable[str]) -> bool:
    written = override.partition("=")[0].strip()
    return any(f"{path}.".startswith(f"{written}.") or written.startswith(f"{path}.") for path in paths)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """`config` with `a.b=value` overrides, applied and checked as `load_config` does."""
    return _overridden(acting_settings(config), list(overrides), "--set")


def with_groups(config: Config, groups: Mapping[str, Mapping[str, Any]], name: str) -> Config:
    """`config` with whole groups in place of its own; what acts no longer because of them falls away."""
    values = {**acting_settings(config), **groups}
    _refuse_idle(groups, _checked(values, name), name)
    return _settled(values, name)


def config_from_mapping(values: Mapping[str, Any], name: str = "config") -> Config:
    """Check a nested mapping of settings. Raises `ConfigError` as `load_config` does."""
    config = _checked(values, name)
    _refuse_idle(values, config, name)
    return config


def dump_config(config: Config) -> str:
    """The settings that act as YAML that `load_config` reads back to an equal config."""
    return dump_yaml(acting_settings(config))


def _checked(values: Mapping[str, Any], name: str) -> Config:
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        items = error.errors(include_url=False)
        some = items[: 2 * _MOST_LINES]  # the nearest of all names takes a while to find
        message = f"{name}: " + _lines(dict.fromkeys(line for item in some for line in explain(item)), len(items))
        paths = tuple(filter(None, map(path_of_other_kind, items)))
        raise (IdleSettingError(message, paths) if len(paths) == len(items) else ConfigError(message)) from None
    _refuse_absurd(config, name)
    return config


def _lines(lines: Iterable[str], whole: int) -> str:
    """The first of many lines, and how many faults there are if not all are said."""
    first = list(itertools.islice(lines, _MOST_LINES))
    return "\n  ".join(first) + (f"\n  and others: {whole} in all" if whole > 2 * _MOST_LINES else "")


def _refuse_absurd(config: BaseModel, name: str, prefix: str = "") -> None:
    """Raise `ConfigError` for an integer that no machine could hold, or wait for."""
    for setting, value in config:
        if isinstance(value, BaseModel):
            _refuse_absurd(value, name, f"{prefix}{setting}.")
        elif type(value) is int and value > (most := _most(setting)):
            raise ConfigError(f"{name}: {prefix}{setting}: {shown(value)} is too large; expected at most {most:,}")


def _most(setting: str) -> int:
    """The largest integer that a setting may be."""
    if setting == "seed":
        return 2**63 - 1
    return 10**6 if setting in _HELD_AT_ONCE else 10**9


def _refuse_idle(values: Mapping[str, Any], config: Config, name: str) -> None:
    """Raise `ConfigError` for what is written in `values` and does not act in `config`."""
    idle = list(idle_settings(values, config))
    if idle:
        lines = [explain_idle(setting, written) for setting, written in idle]
        raise IdleSettingError(f"{name}: " + "\n  ".join(lines), tuple(setting.path for setting, _ in idle))


def _settled(values: Mapping[str, Any], name: str) -> Config:
    """The config of `values` without what does not act in it."""
    while True:
        config = _checked(values, name)
        if not any(True for _ in idle_settings(values, config)):
            return config
        values = acting_settings(config)


def _overridden(values: dict[str, Any], overrides: list[str], name: str, folder: Path | None = None) -> Config:
    _find_files(values, folder)
    if not overrides:
        return config_from_mapping(values, name)
    _refuse_idle_alone(values, name)
    changed: dict[str, Any] = {}
    for override in sorted(overrides, key=_order):
        _apply_override(values, override)
        _apply_override(changed, override)
    _find_files(values, folder)
    _refuse_idle(changed, _checked(values, name), name)
    return _settled(values, name)


def _find_files(values: Mapping[str, Any], folder: Path | None) -> None:
    """Name each function of the user's by its file, where that lies in the recipe's folder."""
    for group, setting in _FUNCTIONS:
        inside = values.get(group)
        if folder is not None and isinstance(inside, dict) and isinstance(inside.get(setting), str):
            inside[setting] = beside(inside[setting], folder)


def _refuse_idle_alone(values: Mapping[str, Any], name: str) -> None:
    """Refuse what does not act in a file by itself; a file that only overrides complete is left to them."""
    try:
        config = Config.model_validate(values)
    except ValidationError:
        return
    _refuse_idle(values, config, name)


def _order(override: str) -> tuple[bool, int]:
    """What chooses a kind or a preset comes first, so that none takes back another override."""
    path = override.partition("=")[0].strip()
    known = every_setting()
    word = any(f"{path}.{tag}" in known for tag in _TAGS)
    chooses = path == "credit.preset" or word or (path in known and path.rpartition(".")[2] in _TAGS)
    return not chooses, path.count(".") + word


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Write one override into nested values; a kind or a preset takes the place of what belongs to the one before."""
    path, equals, text = override.partition("=")
    *groups, leaf = path.strip().split(".")
    if not equals or not leaf or not all(groups):
        raise ConfigError(f"--set {override}: expected a.b=value, for example --set train.num_updates=4")
    value = parse_yaml(text, f"--set {override}")
    at = _Node(values, Config, None)
    for group in groups:
        at = _entered(at, group, override)
    choice = choice_in(at.group, leaf)
    if choice and isinstance(value, str):  # a word in place of a group
        at, leaf = _entered(at, leaf, override), choice[0].tag
    if at.choice and leaf == at.choice[0].tag:
        _replace_kind(at.values, str(value), *at.choice)
    if [*groups, leaf] == ["credit", "preset"]:
        for filled in CREDIT_PRESETS["sound"]:
            at.values.pop(filled, None)
    at.values[leaf] = value


@dataclass(frozen=True, slots=True)
class _Node:
    """A group on the way of an override: what is written in it, its class, and the kinds that it may be of."""

    values: dict[str, Any]
    group: type[BaseModel]
    choice: tuple[Choice, dict[str, type[Component]]] | None


def _entered(at: _Node, name: str, override: str) -> _Node:
    """The group of this name, opened where nothing is written in it yet."""
    child, choice = at.values.get(name), choice_in(at.group, name)
    if choice and isinstance(child, str):
        child = {choice[0].tag: child}
    if not isinstance(child, dict | None):
        raise ConfigError(f"--set {override}: '{name}' is a setting, not a group of settings")
    child = at.values[name] = {} if child is None else child
    if choice is None:
        return _Node(child, group_in(at.group, name) or _Unknown, None)
    mark, kinds = choice
    return _Node(child, kinds.get(str(mark.with_tag(child)[mark.tag]), _Unknown), choice)


class _Unknown(Component):
    """A group that no part of the program reads; the check says so."""


def _replace_kind(values: dict[str, Any], word: str, mark: Choice, kinds: Mapping[str, type[Component]]) -> None:
    """Take out what belongs to another kind than `word`; settings that both kinds have of a common base stay."""
    old, new = (kinds.get(str(mark.with_tag(named)[mark.tag])) for named in (values, word))
    if old is new or old is None or new is None:
        return
    for name in [name for name in values if _owner(old, name) is not _owner(new, name)]:
        del values[name]


def _owner(kind: type[Component], name: str) -> type | None:
    """The class that declares a setting of a kind."""
    return next((base for base in kind.__mro__ if name in vars(base).get("__annotations__", {})), None)
