"""The window of versions in pyproject.toml, the lock inside it, and the table of runs at both ends."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from atesd.trackers.interface import TRACKERS
from requirements.lock import HEADER, lock_text
from requirements.window import ENDS, TABLE, Window, counts_of, lowest, read_columns, table, windows, with_table

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
LOCK = (ROOT / "requirements" / "lock.txt").read_text()
PINS = dict(line.split("==") for line in LOCK.removeprefix(HEADER).splitlines())


def project(dependencies: list[str]) -> str:
    extras = "".join(f"{extra} = []\n" for extra in ("lora", "smollm2", "gsm", "datasets", "trl"))
    return f"[project]\ndependencies = {dependencies}\n[project.optional-dependencies]\n{extras}"


@pytest.mark.parametrize("name", ["torch", "transformers", "peft", "trl", "math-verify", "datasets", "pydantic"])
def test_what_has_broken_or_may_break_us_has_a_bound_on_either_side(name):
    assert windows(PYPROJECT)[name].high is not None


def test_every_package_of_the_window_and_of_the_tools_is_locked_at_a_version_that_pyproject_admits():
    tables = tomllib.loads(PYPROJECT)["project"]
    extras = {name: lines for name, lines in tables["optional-dependencies"].items() if name not in TRACKERS}
    lines = [*tables["dependencies"], *(line for extra in extras.values() for line in extra)]
    for required in map(Requirement, lines):
        assert required.name == "atesd" or PINS[required.name.lower()] in required.specifier


def test_the_build_backend_is_locked():
    backend = Requirement(tomllib.loads(PYPROJECT)["build-system"]["requires"][0])
    assert PINS[backend.name] in backend.specifier


def test_the_lock_names_no_build_of_a_version_and_nothing_that_is_torchs_own():
    assert not any("+" in version for version in PINS.values())
    assert not any(name.startswith(("nvidia-", "cuda-", "triton")) for name in PINS)


def test_a_lock_is_sorted_constraints_without_local_versions():
    packages = [
        {"name": name, "version": version}
        for name, version in (("torch", "2.13.0+cpu"), ("PyYAML", "6.0"), ("nvidia-nvtx", "13"), ("pip", "26"))
    ]
    assert lock_text(packages) == HEADER + "pyyaml==6.0\ntorch==2.13.0\n"


def test_the_lowest_end_holds_every_package_at_its_lower_bound():
    assert lowest(project(["a>=1.2,<2", "b[extra]>=3"])) == "a==1.2\nb==3\n"
    assert windows(project(["a>=1.2,<2", "b>=3"])) == {"a": Window("1.2", "2"), "b": Window("3", None)}
    for line in lowest(PYPROJECT).splitlines():
        name, version = line.split("==")
        assert version in SpecifierSet(f"=={version}")
        assert name in PINS


@pytest.mark.parametrize("requirement", ["a", "a<2", "a==1", "a>=1,!=1.3", "a>=1,<=2"])
def test_a_requirement_that_states_no_window_is_refused(requirement):
    with pytest.raises(ValueError, match="is not NAME>=LOW"):
        windows(project([requirement]))


def test_counts_come_from_pytests_own_file_and_an_error_is_a_failure():
    junit = '<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>'
    assert counts_of(junit) == {"passed": 3, "failed": 3, "skipped": 3}


def test_a_table_is_read_back_from_its_page_and_one_end_can_be_written_alone():
    columns = {"newest": {"date": "2026-01-02", "a": "1.5", "failed": "0"}}
    text = table(columns, {"a": Window("1.2", "2")})
    page = with_table("before <!-- written by make test-window -->old<!-- end --> after", text)
    assert "| a | 1.2 or newer, below 2 |  | 1.5 |" in page
    assert page.startswith("before")
    assert page.endswith("after")
    assert read_columns(page)["newest"] == columns["newest"]


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="put them back"):
        with_table("no marks", "table")


def test_the_page_tells_of_the_window_that_pyproject_states():
    columns = read_columns(TABLE.read_text())
    assert set(columns) == set(ENDS)
    for name, window in windows(PYPROJECT).items():
        found = columns["lowest"][name].partition("+")[0]
        assert found in SpecifierSet(f"=={window.low}"), f"{name}: run make test-window"
        assert window.high is None or columns["newest"][name].partition("+")[0] in SpecifierSet(f"<{window.high}")
    assert {columns[end]["failed"] for end in ENDS} == {"0"}
