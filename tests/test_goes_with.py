"""The table of docs/scale.md says what the program does: which exposure is refused with which way of running."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atesd.bridges.core import MEASURED
from atesd.bridges.settings import bridge_config
from atesd.config import config_from_mapping
from atesd.control.kinds import exposure_kinds
from atesd.errors import ConfigError

PAGE = Path(__file__).parents[1] / "docs/scale.md"
NEEDS: dict[str, dict[str, Any]] = {
    "fixed": {"reveal_ratio": 0.5},
    "custom": {"factory": "builtins:len"},
    "replay": {"replay_run": "runs/other"},
}
WAYS: tuple[dict[str, dict[str, Any]], ...] = (
    {},
    {},  # torchrun changes no setting
    {"model": {"sharding": "full"}},
    {"sampling": {"engine": "server"}},
)


def rows() -> Iterator[tuple[str, list[str]]]:
    """The exposure of each row, as settings name it, and its cells."""
    table = PAGE.read_text("utf-8").partition("| exposure | one process |")[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        named, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        yield from ((kind, cells) for kind in re.findall(r"`([\w.]+)`", named))


TABLE = dict(rows())


def settings_of(name: str) -> dict[str, Any]:
    if name == "exposure.reference_ablation":
        return {"kind": "full", "reference_ablation": "shuffled"}
    return {"kind": name, **NEEDS.get(name, {})}


def is_refused(name: str, way: int) -> bool:
    exposure = {"exposure": settings_of(name)}
    try:
        if way < len(WAYS):
            config_from_mapping({**exposure, **WAYS[way]})
        else:
            measurable = frozenset({"train_kl", "train_success", *MEASURED})
            bridge_config(exposure, {"model": {"path": "a-model"}}, trainer="a trainer", measurable=measurable)
    except ConfigError as error:
        if "does not go with" in str(error) or "needs our own loop" in str(error):
            return True
        raise
    return False


def test_every_kind_of_exposure_has_a_row():
    assert {name for name in TABLE if "." not in name} == set(exposure_kinds())


@pytest.mark.parametrize("name", TABLE)
def test_what_the_table_calls_refused_is_refused_and_nothing_else(name: str):
    told = [cell.startswith("refused") for cell in TABLE[name]]
    assert len(told) == 5
    assert all(cell.startswith(("yes", "refused")) for cell in TABLE[name])
    assert [is_refused(name, way) for way in range(5)] == told
