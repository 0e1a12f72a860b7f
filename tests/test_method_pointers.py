"""docs/method.md, section 2: every idea is one function that exists, and its docstring has the formula of the table."""

import ast
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import atesd

SOURCE = Path(atesd.__file__).parent
TEXT = (Path(__file__).parents[1] / "docs" / "method.md").read_text("utf-8")
ROW = re.compile(r"^\| (.+) \| (.*) \| `([^`]+)` \| `([\w.]+)` \|$", re.MULTILINE)
ROWS = [(idea, formula.replace(r"\|", "|"), pointer) for idea, _, formula, pointer in ROW.findall(TEXT)]
IDEAS = {
    "maths.divergence.forward_kl",
    "train.update.BatchPlan.weights",
    "maths.beta.concentrations",
    "maths.credit.discounted_progress",
    "maths.credit.discounted_grounding",
    "maths.credit.advantages",
    "control.policy.BetaPolicy.loss",
    "maths.beta.entropy_penalty",
    "data.views.shown_segments",
    "control.state.TrainingState.features",
    "control.credit.CreditConfig.hold",
    "control.credit.CreditConfig.window",
    "maths.divergence.clip_per_entry",
    "maths.advantages.group_advantages",
    "aligned.direction.SuccessDirection.renew",
}


@pytest.mark.parametrize(("idea", "formula", "pointer"), ROWS, ids=[pointer for *_, pointer in ROWS])
def test_a_pointer_leads_to_a_function_whose_docstring_has_the_formula(idea: str, formula: str, pointer: str):
    documented = inspect.getdoc(pointed_at(pointer))
    assert documented is not None, idea
    assert formula in " ".join(documented.split())


def pointed_at(pointer: str) -> object:
    """What `room.module.name` or `room.module.Class.name` names."""
    room, module, *names = pointer.split(".")
    found: object = importlib.import_module(f"atesd.{room}.{module}")
    for name in names:
        found = getattr(found, name)
    return found


def test_every_row_of_the_table_is_read_and_no_function_stands_for_two_ideas():
    table = TEXT.partition("| formula | function |")[2].partition("\n\n")[0]
    assert len(ROWS) == len(table.strip().splitlines()) - 1  # less the rule below the heading
    assert max(Counter(pointer for *_, pointer in ROWS).values()) == 1


CONSTANT = re.compile(r"^\| [^|]+ \| ([^|]+) \| ((?:`[\w.]+`(?:, )?)+) \|$", re.MULTILINE)
CONSTANTS = [
    (value, re.findall(r"`(.+?)`", where)) for value, where in CONSTANT.findall(TEXT.partition("all ours:")[2])
]
OF_THE_COMPUTATION = {  # they change no result but its last digits
    "maths.closed_forms._LEAST",
    "maths.fused.CPU_LOGIT_BYTES",
    "maths.fused.CPU_ROW_BYTES",
    "maths.fused.CUDA_LOGIT_BYTES",
    "maths.fused.CUDA_ROW_BYTES",
    "maths.head._TILE_ENTRIES",
    "maths.statistics._BLOCK",
    "train.fitting._LISTED",
}


def test_every_number_that_a_room_of_the_method_names_stands_in_the_table_of_constants_with_its_value():
    named = {pointer: value for value, pointers in CONSTANTS for pointer in pointers}
    assert len(named) > 15
    wrong = {pointer: value for pointer, value in named.items() if not holds(pointed_at(pointer), value)}
    assert wrong == {}
    assert set(numbers_in("control", "maths", "aligned", "train")) - OF_THE_COMPUTATION <= set(named)


def holds(found: object, value: str) -> bool:
    """Whether a constant is the number with which a cell begins; of a function or class only that it is there."""
    return found == float(value.split()[0].rstrip(",")) if isinstance(found, int | float) else found is not None


def numbers_in(*rooms: str) -> Iterator[str]:
    """The numbers that modules name at their top level."""
    for path in (path for room in rooms for path in sorted((SOURCE / room).glob("*.py"))):
        module = f"{path.parent.name}.{path.stem}"
        for node in ast.parse(path.read_text("utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [f"{module}.{target.id}" for target in targets if isinstance(target, ast.Name)]
            yield from (name for name in names if isinstance(pointed_at(name), int | float))


def test_the_ideas_of_the_papers_are_all_there():
    assert {pointer for *_, pointer in ROWS} >= IDEAS
