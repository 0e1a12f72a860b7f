"""Every command of the README is one. Those for a model of yours run in its order, with a tiny model for the hub's.

Of the others it is checked that they are commands with these options, and in which test the like runs.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest
import typer
import yaml

from atesd import cli
from atesd.config import load_config, recipe_text
from atesd.runs import RunFolder
from atesd_lab.cli import live
from atesd_lab.cli.commands import laboratory
from tiny import tiny_folder

README = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")
SMALLER = {
    "model": {"device": "cpu", "max_context_tokens": 200},
    "data": {"probe_size": 2, "checker_workers": 1},
    "sampling": {"completion_tokens": 12},
    "train": {"num_updates": 4, "batch_size": 4, "micro_batch_size": 4, "checkpoint_every": 2},
    "evaluation": {"samples": 2, "completion_tokens": 12},
    "credit": {"hold_updates": 1, "lookahead_updates": 1},
}
"""What makes a recipe a matter of seconds; all else stays."""


ELSEWHERE = {
    "git clone": "test_readme_commands.py",  # a clone of a folder
    "cd atesd": "test_readme_commands.py",
    "make demo": "test_demo_tables.py",
    "python3 -m": "test_readme_commands.py",  # what the file installs is what .ci/run installs
    ". .venv/bin/activate": "test_readme_commands.py",
    "pip install": "test_readme_commands.py",
    "profile micro": "test_profile.py",
    "audit micro": "test_audit.py",
    "train micro": "test_notebook.py",
    "compare runs/demo/leaps-opsd": "test_compare.py",
    "sweep micro-ratios": "test_sweep.py",
    "torchrun --nproc-per-node": "test_ranks.py",
    "serve qwen3-8b": "test_serve.py",
    "train qwen3-8b": "test_server.py",
}
"""Commands that take minutes, GPUs or a network, by their first two words: the test in which they, or the like, run."""


def blocks() -> list[str]:
    """The fenced blocks of the README that hold commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [block for language, block in found if not language and not block.startswith("Average@")]


def lines_of(block: str) -> list[list[str]]:
    """The commands of a block, as words."""
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [list(part) for words in lines for found, part in groupby(words, lambda word: word != "&&") if found]


def program(words: list[str]) -> list[str]:
    """A command of ours without what starts it."""
    if words[0] == "torchrun":
        return words[words.index("atesd.cli") + 1 :]
    return words[1:] if words[0].rpartition("/")[2] == "atesd" else []


def commands() -> list[list[str]]:
    """The commands for a model of yours."""
    (block,) = (block for block in blocks() if "atesd export" in block)
    return [program(words) for words in lines_of(block)]


def stand_in(recipe: str) -> str:
    """A file of the recipe's name: the recipe over a tiny model and 120 problems."""
    settings = yaml.safe_load(recipe_text(recipe))
    for group, values in SMALLER.items():
        settings[group] = {**settings.get(group, {}), **values}
    settings["model"]["path"] = str(tiny_folder(Path("model")))
    settings["data"]["source"] = "problems.jsonl"
    Path(f"{recipe}.yaml").write_text(yaml.safe_dump(settings))
    rows = [{"problem": f"{n} + 1 = a {n}", "solution": f"{n} + 1\n\n= b\n\n\\boxed{{7}}"} for n in range(120)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("aime.jsonl").write_text("".join(json.dumps({"problem": f"{n} - 1", "answer": "7"}) + "\n" for n in range(3)))
    return f"{recipe}.yaml"


def run(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["atesd", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code, f"atesd {shlex.join(words)} ended with {end.value.code}"


def test_the_commands_for_a_model_of_yours_work_in_the_order_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    served: list[Sequence[Path]] = []
    monkeypatch.setattr(live, "serve", lambda runs, _port: served.append(runs))  # it would serve until Ctrl-C
    recipe = "qwen3-1.7b"
    file = stand_in(recipe)
    printed = {}
    for words in commands():
        run([file if word == recipe else word for word in words], monkeypatch)
        printed[" ".join(words)] = capsys.readouterr().out
    verbs = "train preview profile train train report evaluate evaluate compare report export"
    assert [words[0] for words in commands()] == verbs.split()
    assert served == [[Path("runs") / recipe]]
    plan, compared = printed[f"train {recipe} --dry-run"], printed[f"compare runs/opsd -- runs/{recipe}"]
    assert "policy updates: " in plan
    assert "sampling goes through transformers" not in "".join(printed.values())
    assert "last (aime.jsonl)" in compared
    for name in ("opsd", recipe):
        [row] = RunFolder.open(Path("runs") / name).rows("evaluations")
        assert (row["split"], row["update"], row["problems"]) == ("aime.jsonl", 4, 3)
        assert row["sampler"]["student_template.enable_thinking"] is True
    assert (Path("runs") / f"{recipe}-export" / "adapter_config.json").is_file()
    assert "aime.jsonl" in Path("compare.html").read_text("utf-8")


def test_every_other_command_is_one_and_runs_in_a_test():
    ours = commands()
    known = {**typer.main.get_group(cli.app).commands, **typer.main.get_group(laboratory).commands}
    met = set()
    others = [
        words for block in blocks() for words in lines_of(block) if words[0] == "torchrun" or program(words) not in ours
    ]
    for words in others:
        mine = program(words)
        key = " ".join(mine[:2] if words[0] != "torchrun" and mine else words[:2])
        assert key in ELSEWHERE, f"no test runs: {shlex.join(words)}"
        assert (Path(__file__).parent / ELSEWHERE[key]).is_file(), ELSEWHERE[key]
        met.add(key)
        if mine:
            known[mine[0]].make_context(mine[0], mine[1:])  # raises for an option that it does not have
    assert met == set(ELSEWHERE)


def test_a_clone_has_what_the_two_commands_need():
    root = Path(__file__).resolve().parents[1]
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert {"Makefile", "pyproject.toml", "requirements/lock.txt", "README.md"} <= set(tracked)
    extras = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (install,) = (words for block in blocks() for words in lines_of(block) if words[0] == "pip")
    assert set(re.findall(r"\w+", install[-1].partition("[")[2])) <= set(extras)


def test_the_stand_in_is_the_recipe_but_for_what_makes_it_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    small, whole = (load_config(name).model_dump() for name in (stand_in("qwen3-1.7b"), "qwen3-1.7b"))
    changed = {f"{group}.{name}" for group, values in SMALLER.items() for name in values}
    assert {
        f"{group}.{name}" for group in small for name in small[group] if small[group][name] != whole[group][name]
    } <= {*changed, "model.path", "data.source"}
