"""The libraries compared with: found at run time, so that what needs none of them runs without them."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from typing import Any


def peer(module: str) -> Any:
    """A module of a peer library; its own deprecations and notices of instability are no concern here.

    Raises `ImportError` where the extra `bench` is not installed.
    """
    with muted():
        return importlib.import_module(module)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """A peer's warnings and progress lines are kept out of the output."""
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield
