"""`atesd reproduce --scale qwen3-*`: what it would train, and the whole of it with a tiny model for the hub's."""

from __future__ import annotations

import hashlib
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from atesd import cli
from atesd.config import load_config, yaml_value
from atesd.data.benchmarks import Asked
from atesd.errors import ConfigError, RunError
from atesd.rows import EvaluationRow
from atesd.runs import RunFolder
from atesd_lab.paper.estimate import Card, Size, decoding_seconds, disk_bytes, training_seconds
from atesd_lab.paper.pooling import pooling_of
from atesd_lab.paper.reproduce import EXPERIMENTS, named
from atesd_lab.paper.scale import SCALES, asked_of, budget, cells_for, load_scale
from atesd_lab.report.rows import read_run
from atesd_lab.sweep.jobs import Scoring
from fake_run import begin_run, evaluation_row, fake_config
from pack import THREE, three_problems, words_of, write_rows
from tiny import tiny_folder

MODELS = [scale for scale in SCALES if scale != "micro"]
SMALLER = {
    "model.device": "cpu",
    "model.dtype": "float32",
    "model.lora": {"rank": 2, "alpha": 4},
    "model.max_context_tokens": 200,
    "data.preset": None,
    "data.probe_size": 2,
    "data.validation_size": 2,
    "data.checker": "exact",
    "sampling.completion_tokens": 12,
    "sampling.temperature": 2.0,
    "train.num_updates": 8,
    "train.batch_size": 8,
    "train.evaluate_every": 4,
    "train.checkpoint_every": 8,
    "train.log_samples": 8,
    "train.learning_rate": 0.05,
    "evaluation.samples": 2,
    "evaluation.completion_tokens": 8,
    "evaluation.temperature": 2.0,
}
"""What makes a cell a matter of a second."""


def words(folder: Path, *names: str, seeds: int = 1) -> list[str]:
    """`reproduce` on a tiny model, 300 rows and benchmarks of three problems, under `folder`."""
    model, rows = tiny_folder(folder / "Qwen3-1.7B"), write_rows(folder / "rows.jsonl")
    settings = {**SMALLER, "model.path": str(model), "data.source": str(rows)}
    overrides = [word for name, value in settings.items() for word in ("--set", f"{name}={yaml_value(value)}")]
    files = [three_problems(name, folder) for name in THREE]
    place = ["--scale", "qwen3-1.7b", "--seeds", str(seeds), "--out", str(folder / "out")]
    return ["reproduce", *names, *place, *overrides, *words_of(files)]


def run(line: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["atesd", *line])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_scale_is_the_recipe_of_its_name_with_three_paired_seeds():
    for scale in MODELS:
        grid = load_scale(scale)
        assert (grid.recipe, grid.seeds) == (scale, 3)
        assert grid.recipe in grid.models


def test_the_experiments_are_those_of_micro_each_run_on_the_papers_benchmarks():
    grid = load_scale("qwen3-1.7b")
    assert [*grid.experiments, "words"] == list(EXPERIMENTS) == list(load_scale("micro").experiments)
    cells = cells_for(grid, named("all", grid), Path("out"), seeds=1)
    scorings = [cell.job.scoring for cell in cells if cell.job.scoring]
    assert len(scorings) == len(cells) == 41
    assert {tuple(one.name for one in scoring.asked) for scoring in scorings} == {THREE}
    assert all("evaluation.samples=12" in scoring.settings for scoring in scorings)
    assert sum(scoring.base for scoring in scorings) == 1  # before training all cells of a seed are one model


def test_every_arm_of_micro_is_there_and_the_shuffled_reference_beside_the_claims():
    micro, grid = load_scale("micro"), load_scale("qwen3-1.7b")
    for name in grid.experiments:
        arms = {arm for _, arm in grid.wanted([name])}
        assert {arm for _, arm in micro.wanted([name])} <= arms
    assert ("openthoughts", "shuffled") in grid.wanted(["main"])
    assert ("openthoughts", "shuffled") in grid.wanted(["exposure"])


def test_settings_on_the_command_line_beat_those_of_the_benchmarks():
    cells = cells_for(load_scale("qwen3-1.7b"), ["credit"], Path("out"), ["evaluation.samples=4"], seeds=1)
    settings = [cell.job.scoring.settings for cell in cells if cell.job.scoring]
    assert all("evaluation.samples=4" in some and "evaluation.samples=12" not in some for some in settings)


def test_other_benchmarks_can_be_asked_for_and_worlds_have_none():
    asked = asked_of(load_scale("qwen3-8b"), "aime26,hmmt-nov25=x.jsonl", [])
    assert asked == [Asked("aime26"), Asked("hmmt-nov25", "x.jsonl")]
    with pytest.raises(ConfigError, match="--benchmark: the embedded worlds have problems of their own"):
        asked_of(load_scale("micro"), "aime24", [])


ABOUT = {
    "source": "a.jsonl",
    "sha256": "0" * 64,
    "pinned": "expected",
    "held": "2024",
    "family": None,
    "clean": None,
    "thinking": None,
    "engine": "builtin",
    "pass_at": {"2": 0.5},
    "key": "k",
}


def row_of(name: str, update: int, **about: str) -> EvaluationRow:
    """An evaluation of a benchmark, two samples of 40 tokens at temperature 1."""
    return {**evaluation_row(update, 0.5, np.random.default_rng(0), name), "benchmark": {**ABOUT, **about}}


@pytest.mark.parametrize(
    ("asked", "settings", "done"),
    [
        (Asked("aime24", "a.jsonl", "0" * 64), (), True),
        (Asked("aime24", "renamed.jsonl", "0" * 64), (), True),
        (Asked("aime24", "a.jsonl", "1" * 64), (), False),
        (Asked("aime24", "a.jsonl"), (), False),  # then the registry's hash is expected
        (Asked("hmmt-feb26", "a.jsonl"), (), True),  # nobody has pinned it
        (Asked("hmmt-feb26", "b.jsonl"), (), False),
        (Asked("hmmt-feb26"), (), False),
        (Asked("aime24", "a.jsonl", "0" * 64), ("evaluation.samples=3",), False),
        (Asked("aime24", "a.jsonl", "0" * 64), ("evaluation.temperature=0.6",), False),
        (Asked("aime24", "a.jsonl", "0" * 64), ("evaluation.completion_tokens=80",), False),
    ],
)
def test_a_cell_is_evaluated_once_its_newest_rows_are_those_asked_for(
    asked: Asked, settings: tuple[str, ...], done: bool, tmp_path: Path
):
    run = begin_run(tmp_path / "run", fake_config(8))
    run.append("evaluations", row_of(asked.name, 8))
    scoring = Scoring((asked,), settings)
    assert scoring.is_done(run, run.config) is done
    run.append("evaluations", row_of(asked.name, 8, source="later.jsonl", sha256="2" * 64))
    assert not scoring.is_done(run, run.config)


def test_pooled_benchmarks_keep_what_they_held_and_both_ends_of_a_run_are_on_the_same(tmp_path: Path):
    run = begin_run(tmp_path / "run", fake_config(8))
    for row in (row_of("aime24", 0), row_of("aime24", 8), row_of("aime25", 0), row_of("aime25", 8, sha256="1" * 64)):
        run.append("evaluations", row)
    run.end_session("finished")
    read = read_run(run.path)
    same, other = pooling_of(["aime24"], [read]), pooling_of(["aime24", "aime25"], [read])
    first, *_, last = same.pooled(read).evaluated("test")
    assert first["content"] == last["content"] == {"sha256": hashlib.sha256(b"0" * 64).hexdigest()}
    with pytest.raises(RunError, match="run: evaluated on other contents of aime24, aime25 than its model before"):
        other.pooled(read)


# What it takes


CARD = Card(bytes_per_second=100, flops_per_second=1000, efficiency=(0.25, 0.5), benchmark_tokens=20, teacher_tokens=10)
SIZE = Size(parameters=10, cache_bytes_per_token=2, lora_parameters_per_rank=3)


def test_decoding_reads_the_weights_and_the_cache_for_each_token_of_a_batch():
    # By hand: 40 tokens in steps of 4; each reads 2 x 10 bytes of weights, 4 rows x 10 tokens x 2 bytes: 100, at 100/s
    assert decoding_seconds(40, 20, 4, CARD, SIZE) == pytest.approx(40 / 4 * 100 / 100)


def test_training_is_rollouts_both_passes_and_the_evaluations_on_the_way():
    changes = ["exposure.kind=full", "train.num_updates=3", "train.batch_size=2", "sampling.completion_tokens=4"]
    changes += ["sampling.batch_size=2", "train.evaluate_every=0"]
    # By hand, an update: 8 tokens in steps of 2, each 2 x 10 + 2 x 2 x 2 = 28 bytes; the student 8 x 8 tokens, the
    # teacher 2 x 2 x (4 + 10), times 10 parameters, at 1000/s
    expected = 3 * (8 / 2 * 28 / 100 + (64 + 56) * 10 / 1000)
    assert training_seconds(load_config("micro", changes), CARD, SIZE) == pytest.approx(expected)


def test_a_run_folder_holds_its_checkpoints_with_two_moments_and_the_adapter():
    config = load_config("qwen3-1.7b", ["train.keep_checkpoints=2"])
    assert disk_bytes(config, SIZE) == 64 * 3 * 4 * (1 + 2 * 3) + 20 * 2**20


def test_a_dry_run_says_that_it_is_an_estimate():
    grid = load_scale("qwen3-4b")
    table = budget(grid, ["main"], cells_for(grid, ["main"], Path("out"), seeds=1), 8)
    assert table.columns == ("experiment", "cells", "updates", "training", "benchmarks", "GPU-hours", "disk, GiB")
    assert table.rows[0][:3] == ("main", "6", "600")
    assert table.notes[0].startswith("AN ESTIMATE, from arithmetic; nothing of it was measured.")
    assert table.notes[1] == "between 60% and 25% of both, which is assumed;"
    low, high = (float(end.replace(",", "")) for end in table.rows[0][5].split(" to "))
    assert high / low == pytest.approx(0.6 / 0.25, rel=0.1)  # two digits


# End to end


def run_printed(line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run what `--print-commands` prints, as a scheduler would, and see that nothing is then left."""
    assert run([*line, "--print-commands"], monkeypatch) == 0
    commands = [text for text in capsys.readouterr().out.splitlines() if not text.startswith("#")]
    for part in (part for command in commands for part in command.split(" && ")):
        assert run(shlex.split(part)[1:], monkeypatch) == 0, part
    capsys.readouterr()
    assert run([*line, "--print-commands"], monkeypatch) == 0
    assert capsys.readouterr().out == f"# {len(commands)} of {len(commands)} cells are finished and not listed\n"


def test_the_printed_commands_train_and_evaluate_and_the_tables_are_then_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    line = words(tmp_path, "main")
    run_printed(line, monkeypatch, capsys)
    assert run(line, monkeypatch) == 0
    page = (tmp_path / "out" / "main.md").read_text("utf-8")
    heading, base = (find(page, start) for start in ("| arm | aime24, paper", "| base | 51.50"))
    assert heading.count("paper") == 4
    assert base.strip("| ").split(" | ")[1::2][:4] == ["51.50", "36.70", "23.10", "37.10"]
    assert "| shuffled |" in page
    summary = (tmp_path / "out" / "results.md").read_text("utf-8")
    assert "Model: " in summary
    assert "toys" not in summary
    rows = RunFolder.open(tmp_path / "out" / "cells" / "openthoughts-sft-seed-0").rows("evaluations")
    last = {row["split"]: row["average"]["value"] for row in rows if row["update"] == 8}
    cells = find(page.partition("on each benchmark")[2], "| sft").strip("| ").split(" | ")
    means = [last[name] for name in THREE]
    assert cells[2:9:2] == [f"{100 * value:.1f}" for value in (*means, sum(means) / 3)]
    assert "test: aime24 (" in page


def find(page: str, start: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(start))


@pytest.mark.slow
def test_all_ten_experiments_are_written_from_the_printed_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    line = words(tmp_path, "all", seeds=2)
    run_printed(line, monkeypatch, capsys)
    assert run(line, monkeypatch) == 0, capsys.readouterr().out
    for name in named("all", load_scale("qwen3-1.7b")):
        assert (tmp_path / "out" / f"{name}.md").is_file()
        assert list((tmp_path / "out" / "figures").glob(f"{name}-*.svg"))


@pytest.mark.slow
def test_processes_train_and_evaluate_and_what_is_missing_alone_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    line = [*words(tmp_path, "granularity"), "--jobs", "1"]
    assert run(line, monkeypatch) == 0
    out = tmp_path / "out"
    evaluations = out / "cells" / "openthoughts-sound-seed-0" / "evaluations.jsonl"
    whole = evaluations.read_text("utf-8")
    kept = [text for text in whole.splitlines() if '"split": "aime25"' not in text]
    evaluations.write_text("\n".join(kept) + "\n", "utf-8")
    (out / "granularity.md").unlink()
    assert run(line, monkeypatch) == 0
    assert (out / "granularity.md").is_file()
    assert sorted(evaluations.read_text("utf-8").splitlines()) == sorted(whole.splitlines())
