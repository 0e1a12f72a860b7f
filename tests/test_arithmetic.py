"""Sums in writing: what `data.source: arithmetic` makes."""

from __future__ import annotations

import ast
import operator

import pytest

from atesd.config import DataConfig
from atesd.data.arithmetic import arithmetic_rows
from atesd.data.segments import split_reference
from atesd.data.sources import load_problems
from atesd.errors import ConfigError

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub}
SMALL = DataConfig(
    source="arithmetic", checker="exact", train_size=400, validation_size=40, probe_size=20, test_size=60, seed=1
)


def value(expression: str) -> int:
    """What Python's own grammar reads in a sum."""

    def of(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](of(node.left), of(node.right))
        return ast.literal_eval(node)

    return of(ast.parse(expression, mode="eval").body)


def question(text: str) -> str:
    return text.removeprefix("Work out ").removesuffix(".")


def test_the_answer_and_every_line_are_what_python_makes_of_them():
    for row in arithmetic_rows(seed=3, count=300, most_operations=5):
        *lines, box = row.values["solution"].splitlines()
        answer = value(question(row.values["problem"]))
        assert row.values["answer"] == str(answer)
        assert box == f"\\boxed{{{answer}}}"
        for line in lines:
            left, right = line.split(" = ")
            assert value(left) == int(right) >= 0


def test_each_line_goes_on_from_the_result_of_the_line_before():
    for row in arithmetic_rows(seed=4, count=100, most_operations=6):
        *lines, _ = row.values["solution"].splitlines()
        results = [line.split(" = ")[1] for line in lines]
        assert [line.split()[0] for line in lines[1:]] == results[:-1]
        assert results[-1] == row.values["answer"]


@pytest.mark.parametrize("most", [3, 4, 6])
def test_the_difficulty_is_the_number_of_operations_and_of_segments(most: int):
    found = set()
    for row in arithmetic_rows(seed=0, count=200, most_operations=most):
        segments, closing = split_reference(row.values["solution"], row.values["answer"], "auto")
        operations = sum(word in "+-" for word in row.values["problem"].split())
        assert len(segments) == operations == row.values["difficulty"]
        assert closing == f"\\boxed{{{row.values['answer']}}}"
        found.add(operations)
    assert found == set(range(3, most + 1))


def test_a_row_is_a_function_of_the_seed_and_its_number():
    assert list(arithmetic_rows(5, 8, 4)) == list(arithmetic_rows(5, 20, 4))[:8]
    assert [row.values for row in arithmetic_rows(5, 8, 4)] != [row.values for row in arithmetic_rows(6, 8, 4)]


def test_both_signs_occur_and_carries_too():
    rows = list(arithmetic_rows(seed=0, count=300, most_operations=3))
    lines = [line for row in rows for line in row.values["solution"].splitlines()[:-1]]
    minus = sum(" - " in line for line in lines) / len(lines)
    assert 0.4 < minus < 0.6
    assert any(line.startswith(("98 + ", "99 + ")) for line in lines)


def test_the_problems_of_a_run_are_split_without_overlap_also_between_seeds():
    sets, other = load_problems(SMALL), load_problems(SMALL.model_copy(update={"seed": 2}))
    splits = [{problem.text for problem in split} for split in (sets.train, sets.validation, sets.probe, sets.test)]
    assert [len(split) for split in splits] == [400, 40, 20, 60]
    assert len(set.union(*splits)) == 520
    assert not splits[3] & {problem.text for problem in other.train}


def test_a_sum_that_comes_twice_is_left_out_and_said():
    sets = load_problems(SMALL.model_copy(update={"max_difficulty": 3, "train_size": 20000}))
    assert all("the same problem as row" in line for line in sets.skipped)
    assert sets.skipped


def test_sums_without_end_need_a_size_and_three_operations():
    with pytest.raises(ConfigError, match=r"data.train_size: none given, but arithmetic has no end"):
        load_problems(SMALL.model_copy(update={"train_size": None}))
    with pytest.raises(ConfigError, match=r"data.max_difficulty: 2: sums have 3 operations or more"):
        load_problems(SMALL.model_copy(update={"max_difficulty": 2}))
