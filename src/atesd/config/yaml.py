"""YAML, read strictly and written so that it reads back the same."""

from __future__ import annotations

import re
from typing import Any

import yaml
from pydantic import TypeAdapter

from atesd.errors import ConfigError

_MOST_VALUES = 100_000


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{key_node.start_mark.name}: line {line}: a key is a word, not a {key_node.id}")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"{key_node.start_mark.name}: line {line}: the key '{key}' is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our loader would take for something else, such as '1e3'."""

    yaml_implicit_resolvers = _UniqueKeyLoader.yaml_implicit_resolvers


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text on one line: line breaks of every kind, and what cannot be seen, are written as escapes."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text_node)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML strictly: duplicate keys and syntax errors are `ConfigError`s that name the line."""
    try:
        loader = _UniqueKeyLoader(text)
        loader.name = name
        node = loader.get_single_node()
        if node is not None:
            _written_out(node, {}, name)
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply; settings are two or three levels deep") from None
    except (LookupError, TypeError, AttributeError):  # PyYAML's, where a tag such as !!int stands before something else
        raise ConfigError(
            f"{name}: not valid YAML: a value does not fit the tag before it; leave the tag out"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{name}: {where}not valid YAML: {getattr(error, 'problem', None) or error}") from None


def _written_out(node: yaml.Node, known: dict[int, int], name: str) -> int:
    """How many values a node holds with every alias written out. Raises `ConfigError` for too many or endless ones.

    A few lines of aliases of aliases stand for more values than any memory holds.
    """
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES  # of a node within itself
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = inner if isinstance(node, yaml.CollectionNode) else ()
        known[id(node)] = 1 + sum(_written_out(part, known, name) for part in parts)
        if known[id(node)] > _MOST_VALUES:
            raise ConfigError(
                f"{name}: line {node.start_mark.line + 1}: holds itself, or more than {_MOST_VALUES:,} values once its "
                "aliases are written out; write out what is meant"
            )
    return known[id(node)]


def plain(value: Any) -> Any:
    """A value as YAML holds it: numbers, words, lists and mappings."""
    return TypeAdapter(Any).dump_python(value, mode="json")


def dump_yaml(values: Any) -> str:
    """A mapping as YAML in blocks, in its own order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def yaml_value(value: Any) -> str:
    """One value as YAML on one line."""
    text: str = yaml.dump([plain(value)], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.strip()[1:-1]
