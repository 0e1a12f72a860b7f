"""What the papers print: numbers.yaml, each group with its source."""

from __future__ import annotations

import importlib.resources
from functools import cache
from typing import Any

from atesd.config import parse_yaml


@cache
def paper_numbers() -> dict[str, Any]:
    """Everything in numbers.yaml."""
    text = (importlib.resources.files("atesd_lab.paper") / "numbers.yaml").read_text("utf-8")
    found: dict[str, Any] = parse_yaml(text, "numbers.yaml")
    return found


def printed(*path: str | int) -> Any:
    """What ATESD's paper prints under some keys, such as "main", "qwen3-1.7b", "opsd", 3; `KeyError` for others."""
    found: Any = paper_numbers()["atesd"]
    for key in path:
        found = found[key]
    return found


def source() -> str:
    """Where the numbers of ATESD are from."""
    return str(paper_numbers()["atesd"]["source"])
