"""A resumed run is the uninterrupted run: the same tensors, the same rows, whatever was cut where."""

from __future__ import annotations

from pathlib import Path

import pytest

from atesd.errors import RunError
from atesd.session import train
from quick import cut_after, fingerprint, finished, quick

SETTINGS = {
    "fixed": ["exposure.kind=fixed", "exposure.reveal_ratio=0.5"],
    "random": ["exposure.kind=random"],
    "learned": ["exposure.kind=learned"],
    "learned, literal reward": ["credit.preset=paper"],
    "learned, per problem": ["exposure.granularity=per_problem", "credit.progress_signal=train_success"],
    "probe KL on stored rollouts": ["credit.progress_signal=probe_kl"],
    "EMA teacher": ["teacher.weights=ema", "teacher.decay=0.9", "exposure.kind=full"],
    "refreshed teacher": ["teacher.weights=refresh", "teacher.every=3", "exposure.kind=full"],
    "gradient accumulation": ["train.micro_batch_size=1"],
    "token budget": ["train.micro_batch_tokens=120"],
    "LoRA": ["model.lora={rank: 2, alpha: 4}"],
    "GRPO": ["train.method=grpo", "train.group_size=2"],
    "SFT": ["train.method=sft"],
}


@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS.keys())
def test_cutting_after_any_update_of_two_windows_changes_nothing(overrides: list[str], tmp_path: Path) -> None:
    config = quick(*overrides)  # 8 updates = two times hold 2 + look-ahead 2
    whole = finished(config, tmp_path / "whole")
    expected = fingerprint(whole)
    for update in range(1, config.train.num_updates + 1):
        resumed = finished(config, cut_after(whole, update, tmp_path / f"cut-{update}"))
        assert fingerprint(resumed) == expected, f"cut after update {update}"


def test_two_seeds_differ_and_the_same_seed_does_not(tmp_path: Path) -> None:
    first, again = finished(quick(), tmp_path / "first"), finished(quick(), tmp_path / "again")
    other = finished(quick("train.seed=1"), tmp_path / "other")
    assert fingerprint(first)["state"] == fingerprint(again)["state"]
    assert fingerprint(first)["state"] != fingerprint(other)["state"]
    ratios = [[row["reveal_ratio"] for row in run.rows("metrics")] for run in (first, other)]
    assert ratios[0] != ratios[1]


def test_an_extra_evaluation_changes_no_sample(tmp_path: Path) -> None:
    often = finished(quick("train.evaluate_every=1"), tmp_path / "often")
    never = finished(quick("train.evaluate_every=0"), tmp_path / "never")
    assert fingerprint(often)["state"] == fingerprint(never)["state"]


def test_the_same_tokens_are_drawn_whatever_the_micro_batch(tmp_path: Path) -> None:
    runs = [finished(quick(f"train.micro_batch_size={size}"), tmp_path / f"{size}") for size in (1, 3, 4)]
    completions = [[row["completion"] for row in run.rows("samples")] for run in runs]
    assert completions[0] == completions[1] == completions[2]


def test_a_run_with_another_config_is_refused_by_setting(tmp_path: Path) -> None:
    finished(quick(), tmp_path / "run")
    with pytest.raises(RunError, match=r"train\.learning_rate"):
        train(quick("train.learning_rate=1e-3"), tmp_path / "run")


def test_a_run_begun_with_the_former_default_of_attention_goes_on_with_it(tmp_path: Path) -> None:
    half = ["model.dtype=bfloat16", "model.lora={rank: 2, alpha: 4}"]
    finished(quick(*half, "model.attention=sdpa", "train.num_updates=2"), tmp_path / "run")
    longer = finished(quick(*half, "train.num_updates=3"), tmp_path / "run")
    assert len(longer.rows("metrics")) == 3
    assert longer.config.model.attention == "sdpa"


def test_never_resuming_refuses_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    finished(quick(), tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run"):
        train(quick(), tmp_path / "run", resume="never")


def test_a_run_that_another_process_holds_is_refused_before_a_model_is_looked_for(tmp_path: Path) -> None:
    run = finished(quick(), tmp_path / "run")
    with run.lock(), pytest.raises(RunError, match="in use by process"):
        train(quick("model.path=./nowhere"), tmp_path / "run")
