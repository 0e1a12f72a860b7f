"""What a user names as module:function: an exposure's factory, a listener's."""

from __future__ import annotations

import importlib
from typing import Any

from atesd.errors import ConfigError


def named_function(name: str, setting: str) -> Any:
    """The function that `setting` names. Importing runs its module. Raises `ConfigError` if it cannot be had."""
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise ConfigError(f"{setting}: {name!r} is not allowed; expected module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{setting}: {name} cannot be imported ({error}); install it, or name its folder in PYTHONPATH"
        ) from error


def require_offers(made: object, protocol: type, maker: str, fix: str) -> None:
    """Raise `ConfigError` that names the maker, what it made lacks of a protocol, and the fix."""
    missing = [part for part in vars(protocol) if not part.startswith("_") and not hasattr(made, part)]
    if missing:
        raise ConfigError(f"{maker} made a {type(made).__name__} without {', '.join(missing)}; {fix}")
