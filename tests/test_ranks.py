"""Two real processes (gloo, 127.0.0.1) are one run: the same draws, ratios and decisions, weights to rounding."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atesd.cli.pack import evaluate_benchmarks
from atesd.config import dump_config
from atesd.errors import ConfigError
from atesd.models.ranks import SINGLE_PROCESS, interleave, process_group
from atesd.runs import RunFolder
from atesd.session import train
from atesd.train.checkpoint import load_newest
from pack import three_problems
from quick import cut_after, fingerprint, finished
from rank_program import CUT, DIVIDED, RUNS, STOPPED_IN, config_of

PROGRAM = Path(__file__).with_name("rank_program.py")
ROUNDING = 1e-5


def start_ranks(arguments: list[str], folders: list[Path]) -> list[subprocess.Popen[str]]:
    """One process per folder, each in its own, with the environment that torchrun would give it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": len(folders), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    processes = []
    for rank, folder in enumerate(folders):
        folder.mkdir(parents=True)
        added = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *arguments]
        processes.append(subprocess.Popen(command, cwd=folder, env={**os.environ, **added}, **pipes))
    return processes


def outputs(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each printed, once all have ended well."""
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), [errors for _, errors in told]
    return [out for out, _ in told]


def leaves(value: Any) -> Iterator[Any]:
    """Numbers and texts of a nested value, in order; each key is one too."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def rows_of(run: RunFolder, kind: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.rows(kind)]


def student(run: RunFolder) -> dict[str, Any]:
    newest = load_newest(run.checkpoints, run.run_id)
    assert newest is not None
    tensors: dict[str, Any] = newest.state["student"]
    return tensors


def assert_same_run(found: RunFolder, expected: RunFolder) -> None:
    """Texts, counts and verdicts exactly (so every token drawn); what was computed to `ROUNDING`."""
    for kind in ("metrics", "decisions", "evaluations", "samples"):
        pairs = zip(leaves(rows_of(found, kind)), leaves(rows_of(expected, kind)), strict=True)
        for one, other in pairs:
            if isinstance(one, float) and isinstance(other, float):
                assert math.isclose(one, other, rel_tol=ROUNDING, abs_tol=ROUNDING), kind
            else:
                assert one == other, kind
    weights = student(expected)
    assert all((tensor - weights[name]).abs().max() < ROUNDING for name, tensor in student(found).items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """Every run as one process makes it."""
    return {name: finished(config_of(name), tmp_path_factory.mktemp("alone") / "run") for name in RUNS}


@pytest.fixture(scope="module")
def together(alone: dict[str, RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have left all that `rank_program` does; `resumed` began as a run of one process."""
    folder = tmp_path_factory.mktemp("together")
    cut_after(alone["learned"], CUT, folder / "resumed")
    for name in DIVIDED:
        cut_after(alone[name], CUT, folder / f"{name} of one")
    outputs(start_ranks([str(PROGRAM), str(folder)], [folder / "cwd-0", folder / "cwd-1"]))
    return folder


@pytest.fixture(scope="module")
def facts(together: Path) -> list[dict[str, Any]]:
    """What `rank_program.facts` found on each rank."""
    return [json.loads((together / f"rank-{rank}.json").read_text("utf-8")) for rank in range(2)]


def test_the_command_line_under_torchruns_environment_gives_the_run_of_one_process(
    alone: dict[str, RunFolder], tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(dump_config(config_of("learned")), "utf-8")
    command = ["-m", "atesd.cli", "train", str(recipe), "--out", str(out)]
    said = outputs(start_ranks(command, [tmp_path / "cwd-0", tmp_path / "cwd-1"]))
    run, expected = RunFolder.open(out), alone["learned"]
    assert_same_run(run, expected)
    ratios = [[row["reveal_ratio"] for row in r.rows("metrics")] for r in (run, expected)]
    assert ratios[0][:4] == ratios[1][:4]  # before the first policy update a ratio depends on no float of the model
    # Rank 1 printed nothing and wrote nothing: no file of its own, no row twice, no second session.
    assert said[1] == ""
    assert "finished: 6 of 6 updates" in said[0]
    assert not any((tmp_path / "cwd-1").iterdir())
    assert {p.relative_to(out) for p in out.rglob("*")} == {
        p.relative_to(expected.path) for p in expected.path.rglob("*")
    }
    assert [session["ranks"] for session in run.manifest["sessions"]] == [2]


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_is_the_same_on_two_ranks(name: str, alone: dict[str, RunFolder], together: Path) -> None:
    assert_same_run(RunFolder.open(together / name), alone[name])


def test_two_ranks_go_on_from_a_checkpoint_of_one(alone: dict[str, RunFolder], together: Path) -> None:
    run = RunFolder.open(together / "resumed")
    assert_same_run(run, alone["learned"])
    assert "ranks: 1 -> 2; no longer bit-exact" in run.manifest["sessions"][-1]["notes"]


def test_one_process_goes_on_from_a_checkpoint_of_two(
    alone: dict[str, RunFolder], together: Path, tmp_path: Path
) -> None:
    copy = cut_after(RunFolder.open(together / "learned"), CUT, tmp_path / "run")
    assert_same_run(finished(config_of("learned"), copy), alone["learned"])


@pytest.mark.parametrize("name", DIVIDED)
def test_divided_runs_go_on_exactly_on_as_many_ranks(name: str, together: Path) -> None:
    whole, again = (RunFolder.open(together / folder) for folder in (name, f"{name} again"))
    assert fingerprint(again) == fingerprint(whole)
    newest = whole.checkpoints / "update-000006"
    assert {f"rows-{rank:05d}.safetensors" for rank in range(2)} < {path.name for path in newest.iterdir()}


@pytest.mark.parametrize("name", DIVIDED)
def test_divided_runs_go_on_from_a_checkpoint_of_one_process(
    name: str, alone: dict[str, RunFolder], together: Path
) -> None:
    assert_same_run(RunFolder.open(together / f"{name} of one"), alone[name])


@pytest.mark.parametrize("name", DIVIDED)
def test_one_process_goes_on_from_a_checkpoint_of_divided_weights(
    name: str, alone: dict[str, RunFolder], together: Path, tmp_path: Path
) -> None:
    copy = cut_after(RunFolder.open(together / name), CUT, tmp_path / "run")
    assert_same_run(finished(config_of(name), copy), alone[name])


def test_a_signal_to_rank_1_stops_both_with_a_checkpoint(
    alone: dict[str, RunFolder], together: Path, facts: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert [found["stopped"] for found in facts] == ["stopped", "stopped"]
    stopped = RunFolder.open(together / "stopped")
    assert stopped.rows("metrics")[-1]["update"] == STOPPED_IN
    assert stopped.manifest["status"] == "stopped"
    copy = cut_after(stopped, STOPPED_IN + 1, tmp_path / "run")
    assert train(config_of("learned"), copy).status == "finished"
    assert_same_run(RunFolder.open(copy), alone["learned"])


def test_three_updates_without_a_finite_loss_end_both_ranks(together: Path, facts: list[dict[str, Any]]) -> None:
    run = RunFolder.open(together / "skipped")
    assert all(found["skipped"].startswith("TrainingError: updates 0 to 2 were all skipped") for found in facts)
    assert [row["skipped"] is not None for row in run.rows("metrics")] == [True] * 3
    assert len(list((run.path / "skipped").iterdir())) == 3
    assert run.manifest["status"] == "failed"


def test_an_evaluation_by_two_ranks_is_that_of_one(alone: dict[str, RunFolder], facts: list[dict[str, Any]]) -> None:
    last = alone["learned"].rows("evaluations")[-1]
    assert [found["evaluated"] for found in facts] == [last, None]  # rank 0 alone has something to print


def test_a_benchmark_is_shared_by_the_ranks_and_kept_once(
    together: Path, facts: list[dict[str, Any]], tmp_path: Path
) -> None:
    row = facts[0]["benchmark"]
    assert facts[1]["benchmark"] is None
    assert RunFolder.open(together / "scored").rows("evaluations")[-1] == row
    # By one process: there is no folder of such a run to write to, so the run is copied.
    alone = shutil.copytree(
        together / "learned", tmp_path / "run", ignore=shutil.ignore_patterns(".lock", "evaluations*")
    )
    found = evaluate_benchmarks(str(alone), [three_problems("aime24", tmp_path)])
    assert found is not None
    assert found[0].row == row


def test_both_ranks_know_what_each_has_found(facts: list[dict[str, Any]]) -> None:
    for found in facts:
        assert found["shard"] == [["a", "c", "e"], ["b", "d"]]
        assert found["map_sharded"] == [[n * n for n in range(count)] for count in range(6)]
        assert found["broadcast"] == "said by 0"
        assert found["any"] == [True, False]
        assert found["floats"] == [[0.1, 1e-300], [1.1, 1e-300]]  # to the bit


def test_gradients_are_added_over_the_ranks(facts: list[dict[str, Any]]) -> None:
    # [1, 2] on rank 0 and twice that on rank 1; one of rank 1 alone; one of nobody; 0.5 + 0.5 in bfloat16.
    for found in facts:
        assert found["gradients"] == [[3.0, 6.0], [5.0, 7.0], None, [1.0, 1.0]]


def test_a_failure_on_one_rank_is_told_to_all(facts: list[dict[str, Any]]) -> None:
    assert facts[0]["failed"] == "TrainingError: rank 1 of 2 failed: row 7 is unreadable"
    assert facts[1]["failed"] == "DataError: row 7 is unreadable"


def test_a_rank_that_differs_is_named_on_all(facts: list[dict[str, Any]]) -> None:
    for found in facts:
        assert found["equal"] == "no error"
        assert found["unequal"].startswith("TrainingError: rank 1 and rank 0 do not agree on the number")


def test_a_rank_that_dies_is_missed_at_once(together: Path) -> None:
    told, seconds = json.loads((together / "end.json").read_text("utf-8"))
    assert told.startswith("LostRankError: rank 0 of 2 has lost the others: rank 1 gave no sign any more")
    assert seconds < 30


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_interleaved_shards_are_the_items(ranks: int) -> None:
    for items in ("", "a", "abc", "abcdefg"):
        assert interleave([items[rank::ranks] for rank in range(ranks)]) == list(items)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("auto") as ranks:
        assert ranks == SINGLE_PROCESS


def test_half_an_environment_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="MASTER_PORT"), process_group("cpu"):
        pass
