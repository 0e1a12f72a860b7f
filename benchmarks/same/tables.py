"""Stub."""
from typing import Any
def compare_tables(before: Any, after: Any) -> int:
    return 0
