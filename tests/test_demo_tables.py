"""The README's tables are what the demo prints: the reading of tables, and the whole demo under `make test-demo`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from atesd.table import Table, render_text
from printed_tables import differences, read_cells

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
AVERAGE, GAINS = "Average@2 on held-out problems, %", "Differences in points, paired by problem"


def printed() -> str:
    """The block of the README that begins with the demo's first table."""
    return AVERAGE + README.partition(AVERAGE)[2].partition("\n```")[0]


def test_the_readme_holds_both_tables_with_every_cell():
    cells = read_cells(printed())
    assert {title for title, _, _ in cells} == {AVERAGE, GAINS}
    # Two worlds: five columns beside the world's name in either table.
    assert len(cells) == 2 * 5 + 2 * 5
    assert cells[AVERAGE, "leaps", "look-ahead"] == "63.8 [59, 68] at 0.63"
    assert cells[GAINS, "steps", "OPSD - base"] == "+47.8 [+42.8, +52.8]"


def test_a_printed_table_is_read_back_under_its_headings_wrapped_or_not():
    rows = (("a", "1", "22"), ("b", "333 [1, 2]", "4"))
    text = render_text(Table("title", ("name", "first", "a heading of many words that wraps"), rows))
    cells = {
        ("title", row[0], column): cell
        for row in rows
        for column, cell in zip(("first", "a heading of many words that wraps"), row[1:], strict=True)
    }
    assert read_cells(text) == cells


def test_a_cell_that_differs_is_named_with_both_texts():
    changed = printed().replace("69.2 [65, 74] at 0.75", "69.3 [65, 74] at 0.75")
    assert differences(printed(), printed()) == []
    assert differences(printed(), changed) == [
        f"{AVERAGE}: leaps, best fixed ratio: 69.2 [65, 74] at 0.75 in the README, 69.3 [65, 74] at 0.75 here"
    ]


def test_a_table_that_is_missing_is_named_cell_by_cell():
    only_first = printed().partition(GAINS)[0]
    found = differences(printed(), only_first)
    assert len(found) == 10
    assert all(line.startswith(GAINS) and line.endswith("absent here") for line in found)


@pytest.mark.demo
def test_the_demo_prints_the_tables_of_the_readme(tmp_path):
    command = [sys.executable, "-m", "atesd.cli", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = differences(printed(), done.stdout)
    assert not found, "cells that differ:\n" + "\n".join(found)
    assert printed() in done.stdout  # the words around the tables too
