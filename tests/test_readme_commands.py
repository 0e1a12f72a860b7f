"""The commands of the README for a model of yours work, in the README's order, with a tiny model for the hub's."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from atesd import cli
from atesd.config import load_config, recipe_text
from atesd.runs import RunFolder
from atesd_lab.cli import live
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


def commands() -> list[list[str]]:
    """The lines of the section's first block that run `atesd`, as words."""
    block = re.search(r"## On your model and data\n\n```\n(.*?)```", README, re.DOTALL)
    assert block is not None
    lines = [shlex.split(line, comments=True) for line in block.group(1).splitlines()]
    return [words[1:] for words in lines if words[0] == "atesd"]


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


def test_the_stand_in_is_the_recipe_but_for_what_makes_it_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    small, whole = (load_config(name).model_dump() for name in (stand_in("qwen3-1.7b"), "qwen3-1.7b"))
    changed = {f"{group}.{name}" for group, values in SMALLER.items() for name in values}
    assert {
        f"{group}.{name}" for group in small for name in small[group] if small[group][name] != whole[group][name]
    } <= {*changed, "model.path", "data.source"}
