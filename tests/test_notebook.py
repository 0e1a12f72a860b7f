"""The notebook of the README runs from its first cell to its last, and shows what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from notebook_cells import code_cells, run_cells

NOTEBOOK = json.loads((Path(__file__).parents[1] / "docs" / "first-run.ipynb").read_text("utf-8"))


def test_the_notebook_runs_on_the_embedded_world_and_ends_with_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    training, figure, difference, page = run_cells(NOTEBOOK)
    assert re.match(r"full: 20 updates, .*\nhalf: 20 updates, ", "".join(training[0]["text"]))
    assert "image/png" in figure[0]["data"]
    assert re.fullmatch(r"half - full: [+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\] points\n", difference[0]["text"][0])
    assert page[0]["text"] == ["report.html\n"]
    assert (tmp_path / "report.html").is_file()


def test_the_stored_outputs_are_those_of_these_cells():
    outputs = [cell["outputs"] for cell in code_cells(NOTEBOOK)]
    assert all(len(found) == 1 for found in outputs)
    assert [next(iter(found[0].get("data", {"text/plain": ""}))) for found in outputs] == [
        "text/plain",
        "image/png",
        "text/plain",
        "text/plain",
    ]
