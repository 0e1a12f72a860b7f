"""The comparison of two run folders finds a single bit, and nothing where there is nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from atesd.config import load_config
from benchmarks.same import compare
from benchmarks.same.cases import Case, all_cases, with_needs
from benchmarks.same.child import cut_back
from benchmarks.same.compare import compare_runs, fingerprint


def write_run(run: Path, weights: torch.Tensor, seconds: float = 1.0) -> Path:
    """A run folder of one row with a checkpoint of one tensor and a trained model of another."""
    checkpoint = run / "checkpoints" / "update-000012"
    checkpoint.mkdir(parents=True)
    state = {"student": {"w": {"#tensor": "/student/w"}}, "skipped_in_a_row": 0}
    (checkpoint / "state.json").write_text(json.dumps({"state": state, "aliases": {}}))
    save_file({"/student/w": weights}, checkpoint / "tensors.safetensors")
    (run / "model").mkdir()
    save_file({"w": weights.bfloat16()}, run / "model" / "model.safetensors")
    (run / "metrics.jsonl").write_text(json.dumps({"update": 0, "loss": 0.5, "seconds": {"step": seconds}}) + "\n")
    return run


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    return write_run(tmp_path / "old", weights), write_run(tmp_path / "new", weights, seconds=9.0)


def test_runs_that_differ_in_their_times_alone_are_equal(runs: tuple[Path, Path]):
    found = compare_runs(*runs)
    # by hand: update, loss and skipped_in_a_row; four entries in the checkpoint and four in the model
    assert (found.verdict, found.rows, found.tensors, found.numbers) == ("equal", 1, 2, 3 + 4 + 4)
    assert fingerprint(runs[0]) == fingerprint(runs[1])


@pytest.mark.parametrize(
    ("weights", "verdict"),
    [
        # the float32 after 3 is 3 + 2 ** -22; the bfloat16 of the model does not see it
        ([[1.0, 2.0], [3.0 + 2**-22, 4.0]], "state /student/w [2]: 3.0 -> 3.000000238418579"),
        ([[1.0, 2.0], [3.0, 5.0]], "state /student/w [3]: 4.0 -> 5.0 (and 1 more)"),
    ],
)
def test_one_bit_of_a_tensor_is_found(runs: tuple[Path, Path], weights: list[list[float]], verdict: str):
    shutil.rmtree(runs[1])
    assert compare_runs(runs[0], write_run(runs[1], torch.tensor(weights))).verdict == verdict


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ({"update": 0, "loss": 0.5000001}, "metrics 0/loss: 0.5 -> 0.5000001"),
        ({"update": 0.0, "loss": 0.5}, "metrics 0/update: 0 -> 0.0"),
        ({"update": 0}, "metrics 0/loss: 0.5 -> (absent)"),
        ({"update": 0, "loss": 0.5, "more": 1}, "metrics 0/more: (absent) -> 1"),
    ],
)
def test_a_key_that_changes_comes_or_goes_is_a_difference(runs: tuple[Path, Path], row: dict[str, Any], verdict: str):
    (runs[1] / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert compare_runs(*runs).verdict == verdict


def test_a_state_that_only_moved_is_equal_once_the_table_says_so(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    checkpoint = runs[1] / "checkpoints" / "update-000012"
    state = {"pupil": {"w": {"#tensor": "/pupil/w"}}, "skipped_in_a_row": 0}
    (checkpoint / "state.json").write_text(json.dumps({"state": state, "aliases": {}}))
    save_file({"/pupil/w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, checkpoint / "tensors.safetensors")
    assert compare_runs(*runs).verdict != "equal"
    monkeypatch.setattr(compare, "STATE_PATHS", {"/student": "/pupil"})
    assert compare_runs(*runs).verdict == "equal"


def test_every_case_is_a_run_of_this_tree(tmp_path: Path):
    """With settings that this tree knows, and that act: a case whose run is refused compares nothing."""
    recipe = tmp_path / "text.yaml"
    recipe.write_text("loss: {clip: none}\n", "utf-8")
    for case in all_cases().values():
        texts = [text.replace("{material}", str(tmp_path)) for text in (case.recipe, *case.settings_after)]
        load_config(texts[0], [re.sub(r"\{run:[^}]+\}", "runs/other", text) for text in texts[1:]])


def test_a_case_comes_after_the_run_that_it_reads():
    assert [case.name for case in with_needs(["replay"], all_cases())] == ["learned", "replay"]


def test_a_cases_key_changes_with_the_run_that_it_reads():
    replay = Case("replay", ("exposure.replay_run={run:first}",))
    keys = {replay.key({"first": Case("first", (setting,))}) for setting in ("train.seed=1", "train.seed=2")}
    assert len(keys) == 2


def test_a_run_is_not_cut_back_to_a_checkpoint_that_it_never_had(runs: tuple[Path, Path]):
    with pytest.raises(RuntimeError, match="no checkpoint after 6 updates"):
        cut_back(runs[0], 6)
