"""What is wrong with a config, in words: dotted path, value, what is allowed, the nearest name, who would read it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pydantic import BaseModel

from atesd.component import choice_in, group_in
from atesd.config.acting import Setting
from atesd.config.layouts import GONE, KIND_OF_GROUP, MOVED
from atesd.config.settings import Config
from atesd.text import shown

_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an error is: the group, the kind it is of (`kind: bandit`), the setting in it, and the path to both."""

    group: type[BaseModel]
    kind: str = ""
    name: str = ""
    path: tuple[str, ...] = ()


def explain(item: Any) -> Iterator[str]:
    """One pydantic error as lines of: dotted path, value, what is allowed, nearest valid name."""
    location = [str(part) for part in item["loc"]]
    if item["type"] in ("extra_forbidden", "invalid_key"):
        yield from _unknown(location, item["input"])
        return
    place = _place(location)
    kinds, group = _kinds_at(place), group_in(place.group, place.name)
    path, value = ".".join(place.path), item["input"]
    if item["type"] in ("value_error", "assertion_error"):
        message = str(item["ctx"]["error"])
        yield f"{path}: {message}" if path else message
    elif item["type"] == "missing":
        meaning = place.group.model_fields[location[-1]].description
        yield f"{path}: {place.kind} needs {location[-1]}: {meaning}"
    elif item["type"] == "union_tag_invalid":
        tag, words = str(item["ctx"]["discriminator"]).strip("'"), list(kinds)
        chosen = value.get(tag) if isinstance(value, Mapping) else value
        yield f"{path}.{tag}: {shown(chosen)} is not allowed; expected {_listed(words)}{nearest(_word(chosen), words)}"
    elif item["type"] in ("model_type", "model_attributes_type", "dict_type") and (kinds or group):
        names = list(kinds) or list(group.model_fields if group else ())
        yield f"{path}: {shown(value)} is not a group of settings; allowed in it: {', '.join(names)}"
    else:
        schema = place.group.model_json_schema()["properties"].get(place.name, {})
        words = [str(word) for rule in _alternatives(schema) for word in rule.get("enum", [])]
        yield f"{path}: {shown(value)} is not allowed; expected {_expected(item, schema)}{nearest(_word(value), words)}"


def path_of_other_kind(item: Any) -> str | None:
    """The path of an unknown key that exists under another kind; None for any other error."""
    location = [str(part) for part in item["loc"]]
    if item["type"] != "extra_forbidden":
        return None
    path = ".".join((*_place(location[:-1], inside=True).path, location[-1]))
    return path if every_setting().get(path) else None


def explain_idle(setting: Setting, written: Any) -> str:
    """A setting that was written and does not act, with what would make it act."""
    return f"{setting.path}: {shown(written)} has no effect here; it acts with {setting.acts_with}"


def nearest(word: str, names: Iterable[str]) -> str:
    """`; did you mean NAME?` for the name that looks like the word; empty where none does."""
    close = difflib.get_close_matches(word[:100], list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _word(value: object) -> str:
    """The value to look for among words; a long or nested one is no misspelt word."""
    return value if isinstance(value, str) and len(value) < 100 else shown(value)


def _unknown(location: Sequence[str], value: Any) -> Iterator[str]:
    """An unknown key: it moved, or another kind reads it, or a name looks like it, or stands elsewhere."""
    if len(location) == 1 and location[0] in KIND_OF_GROUP and isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield f"{location[0]}.{name}: {_unknown_words((location[0], str(name)), inner, _Place(Config))}"
        return
    place = _place(location[:-1], inside=True)
    path = (*place.path, location[-1])
    yield f"{'.'.join(path)}: {_unknown_words(path, value, place)}"


def _unknown_words(path: tuple[str, ...], value: Any, place: _Place) -> str:
    dotted, name, names = ".".join(path), path[-1], list(place.group.model_fields)
    where = f"in '{'.'.join(place.path)}'" if place.path else "at the top"
    allowed = f"allowed {where}: {', '.join(names)}"
    readers, moved = _readers(dotted), MOVED.get(dotted)
    if dotted in GONE:
        return f"unknown setting; {GONE[dotted]}: remove it; {allowed}"
    if moved is not None:
        needs = _readers(moved)
        return f"unknown setting; it is now {moved}{f', which {needs} reads' if needs else ''}"
    if readers:
        return f"unknown setting with {place.kind}, so {shown(value)} has no effect; {readers} would read it; {allowed}"
    elsewhere = [other for other in every_setting() if other.rsplit(".", 1)[-1] == name]
    hint = nearest(name, names) or (f"; did you mean {elsewhere[0]}?" if elsewhere else "")
    return f"unknown setting{hint}; {allowed}{f' with {place.kind}' if place.kind else ''}"


def _readers(path: str) -> str:
    """The kinds that read a setting: `exposure.kind: bandit or setpoint`; empty for one that always exists."""
    by_tag = every_setting().get(path, {})
    return " with ".join(f"{tag}: {_listed(kinds, quoted=False)}" for tag, kinds in by_tag.items())


@cache
def every_setting() -> dict[str, dict[str, list[str]]]:
    """Every path under any kinds -> the keys that choose a kind, each with the kinds under which the path exists.

    Empty for a path that exists under all kinds.
    """
    found: dict[str, dict[str, list[str]]] = {}
    _collect(Config, "", {}, found)
    return found


def _collect(
    component: type[BaseModel], prefix: str, needs: Mapping[str, str], found: dict[str, dict[str, list[str]]]
) -> None:
    for name in component.model_fields:
        path, choice, group = f"{prefix}{name}", choice_in(component, name), group_in(component, name)
        for tag, word in needs.items():
            found.setdefault(path, {}).setdefault(tag, []).append(word)
        found.setdefault(path, {})
        if choice is not None:
            mark, kinds = choice
            common = set.intersection(*(set(kind.model_fields) for kind in kinds.values()))
            for word, kind in kinds.items():
                _collect(kind, f"{path}.", {**needs, f"{path}.{mark.tag}": word}, found)
            for shared in common:
                found[f"{path}.{shared}"] = {}
        elif group is not None:
            _collect(group, f"{path}.", needs, found)


def _place(location: Sequence[str], *, inside: bool = False) -> _Place:
    """The last group on the way to a location and the setting in it; with `inside`, the group at the location.

    Pydantic puts the word of the kind behind a field that has kinds, and names of types behind a union.
    """
    place = _Place(Config)
    kinds: Mapping[str, type[BaseModel]] = {}
    tag = ""
    for part in location:
        if part in kinds:
            place, kinds = replace(place, group=kinds[part], kind=f"{tag}: {part}", name=""), {}
            continue
        group = group_in(place.group, place.name) if place.name else place.group
        if group is None or part not in group.model_fields:
            break
        place = _Place(group, place.kind if group is place.group else "", part, (*place.path, part))
        choice = choice_in(group, part)
        tag, kinds = (choice[0].tag, choice[1]) if choice else ("", {})
    entered = group_in(place.group, place.name) if inside and place.name else None
    return replace(place, group=entered, kind="", name="") if entered else place


def _kinds_at(place: _Place) -> Mapping[str, type[BaseModel]]:
    """The kinds of the field at a place; none for a field without kinds."""
    choice = choice_in(place.group, place.name)
    return choice[1] if choice else {}


def _expected(item: Any, schema: Mapping[str, Any]) -> str:
    """What a setting allows, in words, from its JSON schema; the whole range whichever bound was crossed."""
    rules = _alternatives(schema)
    bounds = [f"{word} {rule[key]:g}" for key, word in _BOUNDS.items() for rule in rules if key in rule]
    if item["type"] == "finite_number":
        return " and ".join(["a finite number", *bounds])
    if item["type"].startswith(("greater_than", "less_than")):
        return " and ".join(bounds)
    if item["loc"][-1:] in [("bool",), ("int",), ("str",), ("tuple[str, ...]",)]:  # an alternative of a union
        return " or ".join(rule["type"] for rule in rules if rule.get("type") not in (None, "object"))
    return str(item["msg"]).removeprefix("Input should be ").replace("a valid ", "a ").replace("a int", "an int")


def _alternatives(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = schema.get("additionalProperties")
    return [schema, *schema.get("anyOf", []), *(inner.get("anyOf", []) if isinstance(inner, Mapping) else [])]


def _listed(words: Sequence[str], *, quoted: bool = True) -> str:
    """Words as in a sentence: a, b or c."""
    shown = [f"'{word}'" if quoted else word for word in words]
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
