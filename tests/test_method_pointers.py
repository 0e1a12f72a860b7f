"""docs/method.md, section 2: every idea is one function that exists, and its docstring has the formula of the table."""

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

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


def test_the_ideas_of_the_papers_are_all_there():
    assert {pointer for *_, pointer in ROWS} >= IDEAS
