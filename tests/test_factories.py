"""Functions of the user's: found, asked in every entry, recorded, and named with what they did wrong."""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from atesd.build import build, close
from atesd.cli.plan import plan_lines
from atesd.cli.scores import evaluate_target
from atesd.config import Config, DataConfig, load_config
from atesd.control.ledger import DecisionLedger
from atesd.data.own_checker import OwnChecker, configured_checker
from atesd.data.own_segmenter import segmenter_of
from atesd.data.sources import load_problems
from atesd.errors import ConfigError, DataError
from atesd.importing import beside, named_function, sha256_of
from atesd.runs import RunFolder
from atesd.session import train
from quick import Ears, cut_after, fingerprint, finished, quick
from test_sources import jsonl, settings
from tiny import tiny_folder

EXAMPLES = Path(__file__).parent.parent / "examples"
OWN = sorted(EXAMPLES.glob("own_*.py"))


def checker(name: str, **more: Any) -> OwnChecker:
    return OwnChecker(DataConfig.model_validate({"checker": f"own_functions:{name}", "checker_workers": 1, **more}))


def verdicts(name: str, *completions: str, **more: Any) -> list[str]:
    made = checker(name, **more)
    try:
        return list(made.check([(completion, "4", "p1") for completion in completions]))
    finally:
        made.close()


# The checker


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("right", ["correct", "wrong"]),
        ("Right", ["correct", "wrong"]),
        ("lambda_right", ["correct", "wrong"]),
        ("partial_right", ["correct", "wrong"]),
        ("one", ["correct", "correct"]),
        ("floats", ["wrong", "wrong"]),
        ("word", ["unparseable", "unparseable"]),
    ],
)
def test_whatever_can_be_called_makes_a_checker_that_runs_in_other_processes(name, expected):
    assert verdicts(name, "2 + 2 = 4", "no") == expected


def test_a_checker_has_so_much_processor_time_for_an_answer():
    assert verdicts("sleepy", "slow", "quick", checker_seconds=0.2) == ["timeout", "correct"]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("failing", r"it raised KeyError: 'no such\\nkey'; problem p1, whose answer is '4', completion 'x'"),
        ("half", r"it gave float 0\.5, not true or false, 1 or 0, or one of correct, wrong"),
        ("none", r"it gave NoneType None, not true or false"),
        ("odd", r"it gave str 'right', not true or false"),
    ],
)
def test_a_checker_that_fails_names_the_problem(name, fault):
    with pytest.raises(DataError, match=f"data.checker: own_functions:{name}: {fault}"):
        verdicts(name, "x")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"checker": "nowhere.at.all:make"}, "cannot be imported .*or name the file: FILE.py:function"),
        ({"checker": "own_functions:absent"}, "cannot be imported"),
        ({"checker": "absent.py:make"}, "cannot be imported .*no such file: .*absent.py"),
        ({"checker": "own_functions:nothing_callable"}, "is no function but int 5"),
        ({"checker": "own_functions:direct"}, "TypeError: direct.. missing 2 .*; it is called with the settings of"),
        ({"checker": "own_functions:Right", "checker_settings": {"were": "x"}}, "made nothing of were='x': TypeError"),
        (
            {"checker": "builtins:dict"},
            r"made dict \{\}, which cannot be called; it is called with",
        ),
    ],
)
def test_a_name_that_gives_no_checker_is_refused_before_anything_runs(changes, fault):
    with pytest.raises(ConfigError, match=fault):
        OwnChecker(DataConfig.model_validate(changes))


@pytest.mark.parametrize("text", ["import nowhere_at_all", "1 / 0", "raise SystemExit(2)", "def make(:\n  pass"])
def test_a_module_that_does_not_run_is_named_with_its_cause(tmp_path, text):
    (tmp_path / "bad.py").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=r"data\.checker: .*bad\.py:make cannot be imported"):
        named_function(f"{tmp_path / 'bad.py'}:make", "data.checker")


@pytest.mark.parametrize("word", ["mth", "a b", ":make", "mine:", "mine:1", "", "mine:make()"])
@pytest.mark.parametrize("setting", ["checker", "segmenter"])
def test_a_word_that_is_neither_ours_nor_a_name_is_refused(word, setting):
    with pytest.raises(
        ConfigError, match=rf"data\.{setting}: .* is not allowed; expected 'auto', .* or module:function"
    ):
        load_config("micro", ["data.source=p.jsonl", "model.path=x", f"data.{setting}='{word}'"])


def test_any_text_is_an_answer_for_a_checker_of_ones_own(tmp_path):
    tests = "assert f(1) == 2\nassert f(2) == 3"
    rows = [{"problem": f"p{i}", "solution": "\\boxed{no}", "answer": tests} for i in range(99)]
    changes = {"columns": {"answer": "answer"}, "checker": "own_functions:right"}
    config = DataConfig.model_validate({**settings(jsonl(tmp_path / "p.jsonl", rows)).model_dump(), **changes})
    assert load_problems(config).train[0].answer == tests


# The segmenter


def problems(tmp_path: Path, name: str, solution: str = "a\nb {0}\n\nSo \\boxed{{4}}.") -> Any:
    rows = [{"problem": f"p{i}", "solution": solution.format(f"p{i}")} for i in range(60)]
    config = settings(jsonl(tmp_path / "p.jsonl", rows), segmenter=f"own_functions:{name}", train_size=9)
    return load_problems(config)


def test_a_segmenter_of_ones_own_cuts_the_references(tmp_path):
    problem = problems(tmp_path, "kept").train[0]
    assert problem.segments == ("a\n", f"b {problem.text}\n", "\n")
    assert problem.closing == "So \\boxed{4}."


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("lines", "gave pieces that do not join to the text: nothing may be lost, added or stripped"),
        ("empty", "gave an empty piece, number 2"),
        ("letters", "cut through the box that holds the final answer"),
        ("whole", r"gave str 'a\\nb p"),
        ("none", "gave NoneType 'None', not a list of pieces of text"),
        ("floats", "gave float '0.0', not a list of pieces of text"),
        ("made_numbers", "gave list '.1, 2.', not a list of pieces of text"),
    ],
)
def test_a_segmenter_that_fails_names_the_row(tmp_path, name, fault):
    with pytest.raises(DataError, match=rf"p\.jsonl: row \d+: data\.segmenter: own_functions:{name} {fault}"):
        problems(tmp_path, name)


def test_a_segmenter_that_raises_names_the_row(tmp_path):
    rows = [{"problem": f"p{i}", "solution": f"p{i} \\boxed{{4}}"} for i in range(40)]
    config = settings(jsonl(tmp_path / "p.jsonl", rows), segmenter="own_functions:raising")
    with pytest.raises(DataError, match=r"row 8: data\.segmenter: own_functions:raising raised ZeroDivisionError"):
        load_problems(config)


def test_a_row_without_a_reference_is_not_cut(tmp_path):
    rows = [{"problem": f"p{i}", "answer": i} for i in range(40)]
    columns = {"solution": None, "answer": "answer"}
    config = settings(jsonl(tmp_path / "p.jsonl", rows), segmenter="own_functions:raising", columns=columns)
    assert load_problems(config).train[0].segments == ()


def test_a_word_of_ours_stays_a_word():
    assert segmenter_of(DataConfig(source="p.jsonl", segmenter="line")) == "line"
    assert segmenter_of(DataConfig(source="p.jsonl", segmenter="own_functions:kept")) is segmenter_of(
        DataConfig(source="p.jsonl", segmenter="own_functions:kept")
    )


# The reward


REWARD = ("credit.reward=own_functions:shown_less", "credit.reward_settings.price=0.5")


def test_a_reward_of_ones_own_is_what_the_decisions_are_worth(tmp_path):
    run = finished(quick(*REWARD), tmp_path / "run")
    rows = [row for row in run.rows("decisions") if row["status"] == "finished"]
    assert len(rows) == 2
    assert [row["reward"] for row in rows] == [row["progress"] - 0.5 * row["effective_ratio"] for row in rows]
    assert run.rows("decisions")[-1]["reward"] == 0.0  # its window never closed, so it was not asked
    again = finished(quick(*REWARD), cut_after(run, 5, tmp_path / "cut"))
    assert fingerprint(again) == fingerprint(run)


def test_a_reward_that_is_not_finite_drops_the_decision(tmp_path):
    run = finished(quick("credit.reward=own_functions:unbounded"), tmp_path / "run")
    assert [row for row in run.rows("decisions") if row["status"] == "finished"] == []


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (
            "word",
            "credit.reward: own_functions:word gave str 'unparseable' for the decision before update 0",
        ),
        ("none", "gave NoneType None for the decision"),
        ("truth", "gave bool True for the decision"),
        ("strict", "failed for the decision before update 0: TypeError"),
    ],
)
def test_a_reward_that_is_no_number_names_the_decision(tmp_path, name, fault):
    with pytest.raises(ConfigError, match=fault):
        train(quick(f"credit.reward=own_functions:{name}"), tmp_path / "run")


def test_a_reward_that_cannot_be_made_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"credit\.reward: own_functions:absent cannot be imported"):
        DecisionLedger(quick("credit.reward=own_functions:absent").credit)
    with pytest.raises(ConfigError, match=r"credit\.mixing: .* no effect here; it acts with credit\.reward: formula"):
        quick("credit.reward=own_functions:word", "credit.mixing=standardised", "credit.grounding_weight=1")


# Files beside the recipe, and what is recorded of them


def recipe(tmp_path: Path, **groups: Any) -> Path:
    """A recipe on a file of sums, with the examples beside it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for example in OWN:
        (folder / example.name).write_text(example.read_text("utf-8"), "utf-8")
    rows = [
        {"problem": f"{i} + {j} =", "solution": f"{i}\n{j}\nso\n{i + j}", "answer": i + j}
        for i in range(9)
        for j in range(9)
    ]
    config = {
        "model": {"path": str(tiny_folder(tmp_path / "model")), "chat_template": False, "max_context_tokens": 256},
        "data": {
            "source": jsonl(tmp_path / "sums.jsonl", rows),
            "columns": {"answer": "answer"},
            "validation_size": 2,
            "probe_size": 2,
            "test_size": 2,
            "shares": {"train": 0.6, "validation": 0.1, "probe": 0.2, "test": 0.1},
            "train_size": 8,
            "checker": "own_checker:make",
            "checker_settings": {"tolerance": 0.01},
            "segmenter": "own_segmenter:make",
        },
        "credit": {
            "reward": "own_reward:make",
            "reward_settings": {"price": 0.5},
            "hold_updates": 1,
            "lookahead_updates": 1,
        },
        "sampling": {"completion_tokens": 8},
        "train": {"num_updates": 4, "batch_size": 2, "evaluate_every": 2, "checkpoint_every": 2, "threads": 1},
        **groups,
    }
    path = folder / "sums.yaml"
    path.write_text(json.dumps(config), "utf-8")  # JSON is YAML
    return path


def test_the_examples_are_short_and_named_in_the_page():
    page = (EXAMPLES.parent / "docs" / "factories.md").read_text("utf-8")
    assert [path.stem for path in OWN] == ["own_checker", "own_reward", "own_segmenter"]
    for path in OWN:
        assert len(path.read_text("utf-8").splitlines()) <= 40
        assert f"../examples/{path.name}" in page


def test_the_examples_beside_a_recipe_train_resume_and_say_when_they_change(tmp_path, monkeypatch):
    path = recipe(tmp_path)
    monkeypatch.chdir(tmp_path)  # not where the recipe lies
    config = load_config(str(path))
    assert config.factories == {
        "credit.reward": f"{path.parent}/own_reward.py:make",
        "data.checker": f"{path.parent}/own_checker.py:make",
        "data.segmenter": f"{path.parent}/own_segmenter.py:make",
    }
    run = finished(config, tmp_path / "run")
    assert {row["update"] for row in run.rows("decisions")} == {0, 1, 2, 3}
    named = run.manifest["factories"]
    assert named["data.checker"]["sha256"] == sha256_of(config.data.checker) is not None
    cut = cut_after(run, 2, tmp_path / "cut")
    (path.parent / "own_checker.py").write_text(OWN[0].read_text("utf-8") + "\n# mended\n", "utf-8")
    ears = Ears()
    train(load_config(str(path)), cut, listeners=[ears])
    said = f"data.checker: the file of {config.data.checker} has changed: SHA-256 "
    assert any(message.startswith(said) for message in ears.heard)
    assert any(note.startswith(said) for note in RunFolder.open(cut).manifest["sessions"][-1]["notes"])
    assert fingerprint(RunFolder.open(cut)) == fingerprint(run)


def test_the_dry_run_says_whose_functions_decide_and_what_the_checker_makes_of_the_references(tmp_path):
    components = build(load_config(str(recipe(tmp_path))))
    try:
        said = list(takewhile(lambda line: not line.startswith("exposure decisions"), plan_lines(components)))
    finally:
        close(components)
    assert any(line.startswith("data.segmenter: ") and "own_segmenter.py:make, SHA-256 " in line for line in said)
    assert "checker: finds 8 of the first 8 references right" in said
    assert "segments: 2: 8" in said


def test_a_checker_that_fails_on_a_reference_is_refused_before_the_model_is_loaded(tmp_path):
    config = load_config(str(recipe(tmp_path)), ["data.checker=own_functions:half", "model.path=nowhere"])
    with pytest.raises(DataError, match=r"it gave float 0\.5"):
        build(config)


def test_a_name_on_the_command_line_is_found_beside_the_recipe_too(tmp_path):
    path = recipe(tmp_path)
    (path.parent / "test.py").write_text("def make(**_): return lambda completion, answer: True", "utf-8")
    config = load_config(str(path), ["data.checker=test:make"])
    assert config.data.checker == f"{path.parent}/test.py:make"  # and not Python's own package of that name
    assert type(configured_checker(config)) is OwnChecker


def test_a_file_that_a_run_is_evaluated_on_is_judged_by_the_run_s_own_checker(tmp_path):
    run = finished(quick("data.checker=own_functions:one", "train.num_updates=1"), tmp_path / "run")
    tests = jsonl(tmp_path / "t.jsonl", [{"problem": f"p{i}", "answer": i} for i in range(3)])
    scored = evaluate_target(str(run.path), tests, "test", ["data.columns.solution=null"])
    assert scored is not None
    assert scored.row["average"]["value"] == 1.0


def test_what_lies_nowhere_beside_keeps_its_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("", "utf-8")
    assert beside("a.b:f", tmp_path) == f"{tmp_path}/a/b.py:f"
    assert beside("b.py:f", tmp_path / "a") == f"{tmp_path}/a/b.py:f"
    assert beside("json:loads", tmp_path) == "json:loads"
    assert beside("math", tmp_path) == "math"


def test_ranks_are_asked_for_the_same_functions():
    config: Config = quick("data.checker=own_functions:right")
    assert config.factories == {"data.checker": "own_functions:right"}
    assert sha256_of("own_functions:right") == sha256_of(f"{Path(__file__).with_name('own_functions.py')}:right")
    assert sha256_of("nowhere.at.all:f") is None
