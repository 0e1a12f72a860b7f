"""The kinds of exposure: every settings class below this folder that names a kind. A new file here is a new kind."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import Literal, get_origin

import atesd.control
from atesd.component import Component, kind_of
from atesd.control.settings import ExposureSettings

IMPORT_TORCH = {"policy"}
"""Files that import torch and hold no settings: a config is read without them."""


@cache
def exposure_kinds() -> dict[str, type[ExposureSettings]]:
    """The settings class of each `exposure.kind`, by name."""
    for module in pkgutil.walk_packages(atesd.control.__path__, "atesd.control."):
        if module.name.rpartition(".")[2] not in IMPORT_TORCH:
            importlib.import_module(module.name)
    named = {kind_of(kind, "kind"): kind for kind in _subclasses(ExposureSettings) if _is_named(kind)}
    return dict(sorted(named.items()))


def _subclasses(kind: type[ExposureSettings]) -> Iterator[type[ExposureSettings]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _is_named(kind: type[Component]) -> bool:
    return get_origin(kind.model_fields["kind"].annotation) is Literal
