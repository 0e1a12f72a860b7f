"""The loop around a step: what a broken update leaves behind, what the baselines do without, and who is drawn twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atesd.build import build, close
from atesd.config import Config
from atesd.data.splits import ProblemSets
from atesd.errors import DataError, ModelError, NonFiniteError, TrainingError
from atesd.models.teacher import Teacher
from atesd.rows import NOT_ALWAYS, MetricsRow
from atesd.runs import RunFolder
from atesd.session import config_of_trained, evaluate, train
from atesd.train import loop, update
from atesd.train.loop import Trainer
from atesd.train.record import UpdateRecord
from atesd.train.rollouts import GradedRollout, RolloutSampler
from atesd.train.selectors import RandomGate
from atesd.train.update import Selection, StepMeters
from quick import Ears, finished, quick

NAN = float("nan")


def test_a_broken_update_is_logged_kept_and_counted_also_where_samples_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = update.accumulate

    def broken(*given: Any, **settings: Any) -> StepMeters:
        meters = measured(*given, **settings)
        meters.tokens["kl"][0][0] = NAN
        return replace(meters, loss=NAN)

    monkeypatch.setattr(loop, "accumulate", broken)
    with pytest.raises(TrainingError, match="updates 0 to 2 were all skipped"):
        train(quick("exposure.kind=full"), tmp_path / "run")  # samples are logged at update 0
    run = RunFolder.open(tmp_path / "run")
    (sample,) = run.rows("samples")
    assert sample["token_kl"][0] is None
    assert all(value is not None for value in sample["token_kl"][1:])
    assert [row["loss"] for row in run.rows("metrics")] == [None] * 3
    assert len(list((run.path / "skipped").iterdir())) == 3


@pytest.mark.parametrize("method", [["train.method=sft"], ["train.method=grpo", "train.group_size=2"]])
@pytest.mark.parametrize("recipe", ["micro-paper", "micro-bandit"])
def test_a_baseline_has_no_teacher_and_so_neither_decides_nor_probes(
    method: list[str], recipe: str, tmp_path: Path
) -> None:
    config = quick(*method, "train.num_updates=3", recipe=recipe)
    run = finished(config, tmp_path / "run")
    assert run.rows("decisions") == []
    assert {row["probe_kl"] for row in run.rows("metrics")} == {None}


def test_a_problem_met_twice_in_a_batch_is_answered_twice_afresh() -> None:
    parts = build(quick("train.batch_size=48"))  # 24 problems
    try:
        rollouts = [one.rollout for one in parts.sampler.rollouts(0)]
    finally:
        close(parts)
    assert len({(rollout.problem_id, rollout.sample) for rollout in rollouts}) == 48
    assert len({(rollout.problem_id, rollout.completion_ids) for rollout in rollouts}) > 24


def problems_of(config: Config) -> ProblemSets:
    parts = build(config)
    close(parts)
    return parts.problems


def test_a_setting_of_the_evaluation_never_decides_what_is_trained_on() -> None:
    # Contexts of the world have 43 words: 43 + 40 fit into 96, 43 + 60 do not.
    short = problems_of(quick("model.max_context_tokens=96"))
    long = problems_of(quick("model.max_context_tokens=96", "evaluation.completion_tokens=60", "data.on_bad_row=skip"))
    assert (long.train, long.probe) == (short.train, short.probe)
    assert (len(short.test), len(long.test), len(long.validation)) == (4, 0, 0)
    assert long.notes == ("problems that fit model.max_context_tokens 96: validation 0 of 4, test 0 of 4",)


@pytest.mark.parametrize(
    ("window", "completion", "exposure", "message"),
    [
        (
            80,
            40,
            "full",
            r"max_context_tokens 80: train 0 of 24, validation 0 of 4, probe 0 of 4, test 0 of 4; raise it",
        ),
        (
            48,
            4,
            "learned",
            r"max_context_tokens 48: probe 0 of 4; raise it, .*: its student context and reference have",
        ),
    ],
)
def test_a_window_that_leaves_nothing_to_train_or_to_probe_on_is_named(
    window: int, completion: int, exposure: str, message: str
) -> None:
    lengths = (f"model.max_context_tokens={window}", f"sampling.completion_tokens={completion}")
    with pytest.raises(DataError, match=message):
        build(quick(*lengths, f"exposure.kind={exposure}", "data.on_bad_row=skip"))


def test_what_leaves_no_room_is_named() -> None:
    with pytest.raises(DataError, match=r"evaluation\.completion_tokens 60 leaves room for 36"):
        build(quick("model.max_context_tokens=96", "evaluation.completion_tokens=60"))


def test_an_evaluated_run_scores_as_it_did_in_training_also_in_bfloat16(tmp_path: Path) -> None:
    run = finished(quick("model.dtype=bfloat16", "model.lora={rank: 4, alpha: 8}"), tmp_path / "run")
    last = run.rows("evaluations")[-1]
    assert (last["split"], last["update"]) == ("test", 8)
    assert evaluate(config_of_trained(run), "test", update=8) == last
    with pytest.raises(ModelError, match="leaves nothing to train"):
        train(config_of_trained(run), tmp_path / "again")


@pytest.mark.parametrize(("lora", "warned"), [("null", True), ("{rank: 2, alpha: 4}", False)])
def test_weights_too_coarse_for_their_updates_are_said(lora: str, warned: bool, tmp_path: Path) -> None:
    ears = Ears()
    config = quick("model.dtype=bfloat16", f"model.lora={lora}", "train.num_updates=1", "train.evaluate_every=0")
    train(config, tmp_path / "run", listeners=[ears])
    assert any("bfloat16 without model.lora" in text for text in ears.heard) is warned


def test_a_student_that_cannot_write_costs_its_update_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = RolloutSampler.rollouts

    def failing(sampler: RolloutSampler, update: int, hint_ratio: float | None) -> list[GradedRollout]:
        if update == 2:
            raise NonFiniteError("the model's logits are not finite while it completes p7")
        return drawn(sampler, update, hint_ratio)

    monkeypatch.setattr(RolloutSampler, "rollouts", failing)
    run = finished(quick("train.num_updates=6"), tmp_path / "run")
    rows = run.rows("metrics")
    assert [row["update"] for row in rows] == list(range(6))
    assert [row["skipped"] is None for row in rows] == [True, True, False, True, True, True]
    assert "p7" in rows[2]["skipped"]
    assert set(rows[2]) == set(rows[3]) == set(MetricsRow.__annotations__) - NOT_ALWAYS
    assert (run.path / "skipped" / "update-000002.json").exists()


def test_an_update_that_fails_half_way_leaves_no_gradient_and_does_not_stop_the_teacher_s_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select, called = RandomGate.select, []

    def failing(gate: RandomGate, *given: Any) -> Selection:
        called.append(gate)
        if len(called) == 6:  # the second of the four rows of the second update
            raise NonFiniteError("not finite on rollout 1")
        return select(gate, *given)

    stepped, clock = Trainer.update, []

    def watched(trainer: Trainer, update: int) -> UpdateRecord:
        assert all(parameter.grad is None for parameter in trainer.components.weights.trained.values())
        return stepped(trainer, update)

    monkeypatch.setattr(RandomGate, "select", failing)
    monkeypatch.setattr(Trainer, "update", watched)
    monkeypatch.setattr(Teacher, "after_update", lambda _, done: clock.append(done))
    words = ("exposure.kind=full", "loss.gate=random", "train.micro_batch_size=1", "teacher.weights=refresh")
    run = finished(quick(*words, "train.num_updates=4"), tmp_path / "run")
    assert [row["skipped"] is None for row in run.rows("metrics")] == [True, False, True, True]
    assert clock == [1, 2, 3, 4]
