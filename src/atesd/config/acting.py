"""Which settings of a config act: one that nothing reads is neither listed nor dumped, and none may be written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atesd.component import ActsWhen, Component
from atesd.config.settings import Config
from atesd.config.yaml import plain


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: dotted path, value in force, default, unit and origin, and what would make it act if it does not."""

    path: str
    value: Any
    default: Any
    description: str
    acts_with: str | None

    @property
    def changed(self) -> bool:
        """Whether it has another value than its default."""
        return bool(self.value != self.default)


def describe_settings(config: Config) -> Iterator[Setting]:
    """Each setting that acts, in the order of the config."""
    return (setting for setting in _settings(config, "", (), config) if setting.acts_with is None)


def acting_settings(config: Config) -> dict[str, Any]:
    """The settings that act as a nested mapping of YAML values, from which the same config can be made."""
    nested: dict[str, Any] = {}
    for setting in describe_settings(config):
        *groups, leaf = setting.path.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = plain(setting.value)
    return nested


def idle_settings(values: Mapping[str, Any], config: Config) -> Iterator[tuple[Setting, Any]]:
    """The settings written in `values`, of which `config` was made, that do not act, each as it was written."""
    for setting in _settings(config, "", (), config):
        if setting.acts_with is not None and (written := _written(values, setting.path.split("."))):
            yield setting, written[0]


def _settings(component: Component, prefix: str, rules: Sequence[ActsWhen], config: Config) -> Iterator[Setting]:
    for name, field in type(component).model_fields.items():
        value = getattr(component, name)
        both = [*rules, *(mark for mark in field.metadata if isinstance(mark, ActsWhen))]
        if isinstance(value, Component):
            yield from _settings(value, f"{prefix}{name}.", both, config)
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        acts_with = next((rule.where for rule in both if not rule.holds(config)), None)
        yield Setting(f"{prefix}{name}", value, default, field.description or "", acts_with)


def _written(values: Any, parts: Sequence[str]) -> list[Any]:
    """The value at a path if it is written there; a plain word in place of a group is its kind."""
    for depth, part in enumerate(parts):
        if isinstance(values, str) and depth == len(parts) - 1 and part in ("kind", "weights"):
            return [values]
        if not isinstance(values, Mapping) or part not in values:
            return []
        values = values[part]
    return [values]
