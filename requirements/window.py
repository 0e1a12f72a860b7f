"""Run the suite at both ends of the window that pyproject.toml states, and write docs/compatibility.md's table.

    python requirements/window.py                # both ends, each in a fresh environment of its own
    python requirements/window.py lowest         # one of them; the other's column stays as it is

Needs nothing but Python's own library; the environments are `.venv-window-lowest` and `.venv-window-newest`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "compatibility.md"
ENDS = ("lowest", "newest")
USED = ("lora", "smollm2", "gsm", "datasets", "trl")
"""Extras whose lower bounds are tested; the tools of `dev` are the newest at both ends."""
SELECTED = ("-m", "not slow and not real_model and not demo and not fuzz and not trackers and not bridges")
# It compares the page with pyproject.toml, and the page is what a run is about to write.
_ABOUT_THE_PAGE = "tests/test_requirements.py::test_the_page_tells_of_the_window_that_pyproject_states"

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(.*)")
_BEGIN, _END = "<!-- written by make test-window -->", "<!-- end -->"


@dataclass(frozen=True, slots=True)
class Window:
    """What a requirement admits: from `low` on, and below `high` (None: no upper bound)."""

    low: str
    high: str | None


def windows(pyproject: str) -> dict[str, Window]:
    """The window of every package that the code uses. Raises `ValueError` for a requirement without a lower bound."""
    project = tomllib.loads(pyproject)["project"]
    required = [*project["dependencies"], *(r for extra in USED for r in project["optional-dependencies"][extra])]
    return dict(_window(requirement) for requirement in required)


def _window(requirement: str) -> tuple[str, Window]:
    found = _REQUIREMENT.fullmatch(requirement)
    parts = found[2].split(",") if found else []
    bounds = {sign: part.strip().removeprefix(sign) for part in parts for sign in (">=", "<") if _begins(part, sign)}
    if found is None or ">=" not in bounds or len(bounds) != len(parts):
        raise ValueError(f"pyproject.toml: {requirement!r} is not NAME>=LOW or NAME>=LOW,<HIGH; write it so")
    return found[1], Window(bounds[">="], bounds.get("<"))


def _begins(part: str, sign: str) -> bool:
    return re.match(rf"\s*{sign}\s*\d", part) is not None


def lowest(pyproject: str) -> str:
    """Constraints that hold every package at its lower bound."""
    return "".join(f"{name}=={window.low}\n" for name, window in windows(pyproject).items())


@dataclass(frozen=True, slots=True)
class Result:
    """What one end came to: the versions installed, the tests' counts and how long they took, in seconds."""

    end: str
    date: str
    versions: Mapping[str, str]
    counts: Mapping[str, int]
    seconds: float

    @property
    def is_green(self) -> bool:
        """Whether tests ran, and none failed."""
        return self.counts["passed"] > 0 and self.counts["failed"] == 0


def counts_of(junit: str) -> dict[str, int]:
    """Tests passed, failed (an error in a fixture too) and skipped, from pytest's JUnit XML."""
    suites = list(ElementTree.fromstring(junit).iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.attrib[name]) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def column(result: Result, names: Sequence[str]) -> dict[str, str]:
    """One end as the cells of its column, by row."""
    return {
        "date": result.date,
        "Python": result.versions["python"],
        **{name: result.versions[name] for name in names},
        **{word: f"{count:,}" for word, count in result.counts.items()},
        "minutes": f"{result.seconds / 60:.1f}",
    }


def table(columns: Mapping[str, Mapping[str, str]], admitted: Mapping[str, Window]) -> str:
    """A Markdown table: a row per package and count, a column per end; an end that was not run is left empty."""
    lines = ["| | admitted | " + " | ".join(ENDS) + " |", "|---|---|" + "---|" * len(ENDS)]
    for row in dict.fromkeys(row for own in columns.values() for row in own):
        window = admitted.get(row)
        words = "" if window is None else f"{window.low} or newer" + (f", below {window.high}" if window.high else "")
        lines.append(f"| {row} | {words} | " + " | ".join(columns.get(end, {}).get(row, "") for end in ENDS) + " |")
    return "\n".join(lines)


def read_columns(page: str) -> dict[str, dict[str, str]]:
    """The columns of the page's table, by end."""
    body = page.partition(_BEGIN)[2].partition(_END)[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in body]
    return {end: {row[0]: row[2 + place] for row in cells} for place, end in enumerate(ENDS) if cells}


def with_table(page: str, text: str) -> str:
    """The page with this table between its marks. Raises `ValueError` where it has none."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{TABLE.name}: the marks {_BEGIN} and {_END} are gone; put them back around the table")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def run_end(end: str) -> Result:
    """Install one end of the window into a fresh environment and run the suite there."""
    folder = ROOT / f".venv-window-{end}"
    venv.create(folder, with_pip=True, clear=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    constraints = folder / "constraints.txt"
    constraints.write_text(lowest((ROOT / "pyproject.toml").read_text()) if end == "lowest" else "")
    install = ("-m", "pip", "install", "--quiet", "--constraint", constraints.name, "--editable", f"{ROOT}[dev,trl]")
    subprocess.run([python, *install], check=True, cwd=folder)
    versions = _versions(python)
    begun, junit = time.monotonic(), folder / "junit.xml"
    tests = (
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        *SELECTED,
        f"--deselect={_ABOUT_THE_PAGE}",
        f"--junitxml={junit}",
    )
    subprocess.run([python, *tests], cwd=ROOT)
    seconds = time.monotonic() - begun
    return Result(end, time.strftime("%Y-%m-%d"), versions, counts_of(junit.read_text()), seconds)


def _versions(python: Path) -> dict[str, str]:
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True)
    versions = {p["name"].lower().replace("_", "-"): p["version"] for p in json.loads(listed.stdout)}
    return versions | {"python": ".".join(map(str, sys.version_info[:3]))}


def main(ends: Sequence[str]) -> int:
    """Run these ends, print the table and put it into the page; 1 if a test failed."""
    if unknown := set(ends) - set(ENDS):
        raise SystemExit(f"no end of the window is called {', '.join(sorted(unknown))}; there are {' and '.join(ENDS)}")
    admitted, columns, green = windows((ROOT / "pyproject.toml").read_text()), read_columns(TABLE.read_text()), True
    for end in ends:
        result = run_end(end)
        columns[end], green = column(result, list(admitted)), green and result.is_green
        TABLE.write_text(with_table(TABLE.read_text(), table(columns, admitted)))
    print(table(columns, admitted))
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ENDS))
