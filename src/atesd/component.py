"""What every group of settings is made of: strict, frozen, and open about when a setting acts.

Two means keep a setting that nothing reads out of a config. What varies with a kind is a `tagged` union of groups, so
that a setting of another kind is an unknown key. What depends on other groups carries an `ActsWhen` beside its field.
This module imports neither torch nor transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field

from atesd.importing import ALLOWED, is_named

Fraction = Annotated[float, Field(ge=0, le=1)]
OwnSettings = dict[str, bool | int | float | str]
"""What a function of the user's reads; kept with the run."""


class Component(BaseModel):
    """A group of settings that one part of the program reads. Frozen; an unknown key is an error.

    Strict: true is not 1, "4" is not 4; an integer is a number. No setting is infinite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class ActsWhen:
    """Beside a field (`Annotated[int, ActsWhen(...)]`): the setting acts only in a config for which `holds` is true.

    `where` says what would make it act, as the end of "it acts with ...".
    """

    holds: Callable[[Any], bool]
    where: str


def word_or_named(*words: str) -> AfterValidator:
    """Of a text: one of `words`, or module:function of the user's own."""

    def check(value: str) -> str:
        if value in words or is_named(value):
            return value
        close = difflib.get_close_matches(value, words, n=1, cutoff=0.5)
        near = f"; did you mean {close[0]}?" if close else ""
        listed = ", ".join(f"'{word}'" for word in words)
        raise ValueError(f"{value[:100]!r} is not allowed; expected {listed}, or {ALLOWED}{near}")

    return AfterValidator(check)


@dataclass(frozen=True, slots=True)
class Choice:
    """Marks a field that holds one of several kinds of a group: the key that names the kind, and the usual kind."""

    tag: str
    default: str
    renamed: Mapping[str, str]

    def with_tag(self, value: Any) -> Any:
        """A plain word stands for the kind of this name; a group that names no kind is of the usual one."""
        if isinstance(value, str):
            value = {self.tag: value}
        if not isinstance(value, Mapping):
            return value
        kind = value.get(self.tag, self.default)
        return {**value, self.tag: self.renamed.get(kind, kind) if isinstance(kind, str) else kind}


def chosen(tag: str, default: str, renamed: Mapping[str, str] | None = None) -> tuple[Any, BeforeValidator, Choice]:
    """The annotations of a union of components whose literal field `tag` tells them apart.

    `renamed` maps earlier names of kinds to the present ones.
    """
    choice = Choice(tag, default, renamed or {})
    return Discriminator(tag), BeforeValidator(choice.with_tag), choice


def tagged(kinds: Iterable[type[Component]], tag: str, default: str, renamed: Mapping[str, str] | None = None) -> Any:
    """The type of a field that holds one of `kinds`: a discriminated union, made while the program runs."""
    discriminator, before, choice = chosen(tag, default, renamed)
    union: Any = Union[tuple(kinds)]  # noqa: UP007 - the members are known only now
    return Annotated[union, discriminator, before, choice]


def kind_of(component: type[Component], tag: str) -> str:
    """The word by which a member of a union is told from the others."""
    (word,) = get_args(component.model_fields[tag].annotation)
    return str(word)


def choice_in(component: type[BaseModel], name: str) -> tuple[Choice, dict[str, type[Component]]] | None:
    """How the kinds of a field are told apart, and its kinds by name; None for a field that has no kinds."""
    field = component.model_fields.get(name)
    marks = [mark for mark in field.metadata if isinstance(mark, Choice)] if field else []
    if not field or not marks:
        return None
    members = get_args(field.annotation) or (field.annotation,)
    return marks[0], {kind_of(member, marks[0].tag): member for member in members}


def group_in(component: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The group of settings that a field holds; None if it holds a value, or one of several kinds."""
    field = component.model_fields.get(name)
    if field is None or choice_in(component, name) is not None:
        return None
    candidates = [field.annotation, *get_args(field.annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
