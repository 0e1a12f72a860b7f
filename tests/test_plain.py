"""The middle of the house stays plain: short stacks, no function in a function, no `Any`, packages within budget."""

import ast
import sys
from pathlib import Path
from types import FrameType

import pytest

import atesd
import atesd_lab
from atesd.maths import fused
from atesd.train.loop import Trainer
from quick import finished, quick

ROOT = Path(atesd.__file__).parent
MOST_FRAMES = 10
METHOD = ("maths", "control", "train", "aligned", "engine", "evaluate", "build", "session", "records", "rows")
"""The rooms that a reader of the paper reads; the others meet files, models, templates, users and other trainers."""
MOST_LINES = {"the method": 11_250, "its edges": 18_400, "rivals": 900, "bridges": 1_760, "the laboratory": 12_750}
TYPED = ("train", "engine", "models", "control")


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def frames_between(frame: FrameType | None) -> list[str]:
    """Names of our functions from `Trainer.train` down to a frame."""
    names = []
    while frame is not None:
        if str(ROOT) in frame.f_code.co_filename:
            names.append(frame.f_code.co_name)
        if frame.f_code is Trainer.train.__code__:
            return names[::-1]
        frame = frame.f_back
    raise AssertionError("not below Trainer.train")


def test_an_update_is_few_frames_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = []
    measured = fused.divergence_rows

    def watched(*arguments, **options):
        stacks.append([*frames_between(sys._getframe(1)), "divergence_rows"])
        return measured(*arguments, **options)

    monkeypatch.setattr(fused, "divergence_rows", watched)
    finished(quick("exposure.kind=full", "train.num_updates=1", "train.evaluate_every=0"), tmp_path / "run")
    deepest = max(stacks, key=len)
    assert deepest[:2] == ["train", "update"]
    assert len(deepest) <= MOST_FRAMES, deepest


@pytest.mark.parametrize("path", sources("train", "aligned"), ids=lambda path: path.name)
def test_no_function_holds_another(path: Path) -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            inner = [child for part in node.body for child in ast.walk(part) if isinstance(child, functions)]
            assert not inner, f"{path.name}: {node.name} holds a function at line {inner[0].lineno}"


def annotations(function: ast.FunctionDef) -> list[ast.expr]:
    """Every annotation in a signature."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    found = [argument.annotation for argument in arguments if argument is not None]
    return [annotation for annotation in (*found, function.returns) if annotation is not None]


@pytest.mark.parametrize("path", sources(*TYPED), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_signature_says_any(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            names = {n.id for a in annotations(node) for n in ast.walk(a) if isinstance(n, ast.Name)}
            assert "Any" not in names, f"{path.name}: line {node.lineno}, {node.name}"


@pytest.mark.parametrize("name", ["prime_rl", "swift", "tinker", "trl", "trl_sdpo", "verl"])
def test_a_bridge_stays_short(name: str) -> None:
    assert len((ROOT / "bridges" / f"{name}.py").read_text("utf-8").splitlines()) <= 200


def part_of(path: Path) -> str:
    """Which budget a file is counted in."""
    if ROOT not in path.parents:
        return "the laboratory"
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if "rivals" in path.parts:
        return "rivals"
    return "the method" if room in METHOD else "bridges" if room == "bridges" else "its edges"


@pytest.mark.parametrize("part", MOST_LINES)
def test_a_part_of_the_house_is_no_longer_than_its_budget(part: str) -> None:
    files = [path for package in (atesd, atesd_lab) for path in Path(package.__file__).parent.rglob("*.py")]
    lines = [len(path.read_text("utf-8").splitlines()) for path in files if part_of(path) == part]
    assert 0.8 * MOST_LINES[part] < sum(lines) <= MOST_LINES[part]
