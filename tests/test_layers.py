"""Two packages, and imports that go down only: a room knows the rows above it, never a neighbour in its own row."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import atesd
import atesd_lab

ROWS = {
    "atesd": [
        {"errors", "records", "rows", "text"},
        {"table", "importing", "shapes", "refusals"},
        {"component"},
        {"maths"},
        {"control"},
        {"config"},
        {"runs", "forecast"},
        {"data", "models"},
        {"engine", "card"},
        {"world", "train"},
        {"aligned", "evaluate"},
        {"build"},
        {"session", "bridges"},
        {"export", "trackers"},
        {"cli"},
    ],
    "atesd_lab": [
        {"stats"},
        {"report"},
        {"sweep", "profile"},
        {"audit"},
        {"paper", "studies"},
        {"cli"},
    ],
}
ROOTS = {"atesd": Path(atesd.__file__).parent, "atesd_lab": Path(atesd_lab.__file__).parent}
ROW = {f"{package}.{room}": row for package, rows in ROWS.items() for row, rooms in enumerate(rows) for room in rooms}
SOURCES = sorted(path for root in ROOTS.values() for path in root.rglob("*.py") if path != root / "__init__.py")


def room_of(path: Path) -> str:
    package = "atesd" if ROOTS["atesd"] in path.parents else "atesd_lab"
    return f"{package}.{path.relative_to(ROOTS[package]).parts[0].removesuffix('.py')}"


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
    """The rooms of both packages that a file imports; a name of a package itself belongs to no room."""
    names = (name.split(".") for name in imports(path))
    found = {".".join(parts[:2]) for parts in names if parts[0] in ROWS and len(parts) > 1}
    return found & ({*ROW} | {room_of(path) for path in SOURCES})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOTS["atesd"].parent)))
def test_a_file_imports_from_the_rows_above_it_and_from_its_own_room(path: Path):
    room = room_of(path)
    package = room.partition(".")[0]
    own = {other for other in rooms_imported(path) - {room} if other.startswith(f"{package}.")}
    assert {other for other in own if ROW[other] >= ROW[room]} == set()


def test_every_file_belongs_to_a_room():
    assert {room_of(path) for path in SOURCES} <= set(ROW)


def test_the_method_never_imports_the_laboratory():
    method = [path for path in SOURCES if room_of(path).startswith("atesd.")]
    assert {name for path in method for name in imports(path) if name.split(".")[0] == "atesd_lab"} == set()


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", ["atesd_lab.report.page", "atesd.runs", "atesd.config", "atesd.forecast.advice"])
def test_what_reads_files_never_imports_torch(module: str):
    assert {"torch", "transformers"} & modules_after(f"import {module}") == set()


def test_the_controller_imports_no_trainer_no_model_and_no_data():
    modules = modules_after("import atesd.control.learned, atesd.control.factory")
    rooms = {name.split(".")[1] for name in modules if name.startswith("atesd.")}
    assert rooms == {"errors", "records", "component", "importing", "maths", "control"}
    assert "transformers" not in modules


def test_the_method_works_with_the_laboratory_deleted(tmp_path: Path):
    shutil.copytree(ROOTS["atesd"], tmp_path / "atesd", ignore=shutil.ignore_patterns("__pycache__"))
    alone = "import sys; sys.path = [p for p in sys.path if not p.endswith('src')]; sys.path.insert(0, sys.argv.pop(1))"
    program = (
        f"{alone}\nfrom atesd.cli import main\nimport atesd\nassert atesd.__file__.startswith(sys.path[0])\nmain()"
    )
    small = ["train.num_updates=2", "train.batch_size=8", "data.train_size=64", "data.validation_size=4"]
    small += ["data.probe_size=4", "data.test_size=4", "train.evaluate_every=2", "train.checkpoint_every=2"]
    settings = [word for setting in small for word in ("--set", setting)]
    for words in (
        ["train", "micro", *settings, "--out", str(tmp_path / "run")],
        ["evaluate", str(tmp_path / "run")],
        ["preview", "micro"],
        ["config", "micro"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), *words],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": ""},
        )
        assert done.returncode == 0, done.stderr
    gone = [sys.executable, "-c", program, str(tmp_path), "sweep", "aligned"]
    assert "No such command 'sweep'" in subprocess.run(gone, capture_output=True, text=True).stderr
