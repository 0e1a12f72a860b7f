"""Imports go down only: a room knows the rows above it, never a neighbour in its own row."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import atesd

ROOT = Path(atesd.__file__).parent
ROWS = [
    {"errors", "records"},
    {"config"},
    {"maths", "runs"},
    {"data", "models", "control"},
    {"train", "evaluate", "report"},
    {"build"},
    {"experiments", "bridges"},
    {"cli"},
]
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imports(path))
    return {parts[1] for parts in names if parts[0] == "atesd" and len(parts) > 1 and parts[1] != "__version__"}


SOURCES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_the_rows_above_it_and_from_its_own_room(path: Path):
    room = room_of(path)
    forbidden = {other for other in rooms_imported(path) - {room} if ROW[other] >= ROW[room]}
    assert forbidden == set()


def test_every_file_belongs_to_a_room():
    assert {room_of(path) for path in SOURCES} <= set(ROW)


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", ["atesd.report.page", "atesd.runs", "atesd.config"])
def test_what_reads_files_never_imports_torch(module: str):
    assert {"torch", "transformers"} & modules_after(f"import {module}") == set()


def test_the_controller_imports_no_trainer_no_model_and_no_data():
    modules = modules_after("import atesd.control.learned, atesd.control.make")
    rooms = {name.split(".")[1] for name in modules if name.startswith("atesd.")}
    assert rooms == {"errors", "records", "config", "maths", "control"}
    assert "transformers" not in modules
