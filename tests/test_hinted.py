"""Hinted rollouts: which, how much they see, what becomes of them, and where they are refused."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from atesd.aligned.direction import Attempt, weighted_rows
from atesd.build import build, close
from atesd.cli.plan import acting_lines
from atesd.config import Config, dump_config, load_config, method_name
from atesd.errors import ConfigError, DataError
from atesd.maths.advantages import group_advantages
from atesd.records import Problem, Rollout, View
from atesd.session import train
from atesd.train.components import Components
from atesd.train.hinted import HintRatio, require_references
from atesd.train.loop import Trainer
from atesd.train.reveal import reveal
from atesd.train.rollouts import GradedRollout, Hint, hinted_places
from quick import cut_after, fingerprint, finished, quick
from updates import direction_of

GATED = ("exposure.kind=full", "loss.gate=aligned", "alignment.min_correct=1", "train.batch_size=16")
HINTED = (*GATED, "hinted.rollouts=6")
GRPO = ("train.method=grpo", "train.batch_size=16", "train.group_size=4", "hinted.rollouts=4")


def written(parts: Components, ratio: float = 0.7) -> list[GradedRollout]:
    return parts.sampler.rollouts(0, ratio)


def test_the_last_of_the_batch_or_of_each_group_are_hinted() -> None:
    assert hinted_places(quick(*HINTED)) == [10, 11, 12, 13, 14, 15]
    assert hinted_places(quick(*GRPO)) == [3, 7, 11, 15]
    assert hinted_places(quick(*GRPO, "hinted.rollouts=16")) == list(range(16))
    assert hinted_places(quick(*GATED)) == []


def test_a_hinted_rollout_is_what_the_student_writes_after_the_teacher_s_message() -> None:
    """The others are those of a batch without hints, token for token."""
    parts = build(quick(*HINTED))
    plain, hinted = parts.sampler.rollouts(0), written(parts)
    assert [one.rollout for one in hinted[:10]] == [one.rollout for one in plain[:10]]
    for one, alone in zip(hinted[10:], plain[10:], strict=True):
        shown = math.floor(0.7 * len(one.problem.segments) + 1e-9)
        message = parts.renderer.teacher(one.problem, shown, False)
        assert one.hint is not None
        assert one.rollout.prompt_ids == parts.encoder.student(message)
        assert one.hint == Hint(View(message, shown, len(one.problem.segments)), alone.rollout.prompt_ids)
        assert one.unhinted_pair == (alone.rollout.prompt_ids, one.rollout.completion_ids)
    assert [one.rollout.completion_ids for one in hinted[10:]] != [one.rollout.completion_ids for one in plain[10:]]
    close(parts)


def outcomes(*correct: bool) -> list[GradedRollout]:
    """Hinted rollouts with these verdicts, and a correct one without a hint."""
    problem = Problem("p", "1 + 1", ("so 2. ",), "2", "2")
    own = GradedRollout(problem, Rollout("p", 0, (1,), (2,), (-0.5,), truncated=False), "correct")
    hinted = replace(own, hint=Hint(View("1 + 1, so 2.", 1, 1), (3,)))
    return [own, *(replace(hinted, verdict="correct" if ok else "wrong") for ok in correct)]


def test_the_ratio_follows_the_success_of_the_hinted_alone_and_stays_between_0_and_1() -> None:
    ratio = HintRatio(quick(*HINTED, "hinted.target_success=0.75"))
    assert ratio.ratio == 0.5
    row = ratio.observe(outcomes(True, False, False, False))
    assert row is not None
    assert (row["rollouts"], row["reveal_ratio"], row["accuracy"]) == (4, 0.5, 0.25)
    assert ratio.ratio == pytest.approx(0.5 + 0.25 * (0.75 - 0.25))
    for _ in range(9):
        ratio.observe(outcomes(False))
    assert ratio.ratio == 1.0
    for _ in range(20):
        ratio.observe(outcomes(True))
    assert ratio.ratio == 0.0
    other = HintRatio(quick(*HINTED))
    other.load_state_dict(ratio.state_dict())
    assert other.ratio == 0.0
    assert HintRatio(quick(*GATED)).ratio is None


def test_hinted_rollouts_are_not_distilled_and_raise_the_likelihood_without_their_hint() -> None:
    """The direction against autograd on the real model, under the problem alone."""
    parts = build(quick(*HINTED, "data.max_difficulty=6"))
    rows = written(parts)
    direction = direction_of(parts)
    direction.remember(rows)
    direction.renew(0)
    right = [one for one in rows if one.verdict == "correct"]
    assert any(one.hint for one in right)
    total = torch.zeros(())
    for one in right:
        context = parts.encoder.student(parts.renderer.student(one.problem))
        completion = one.rollout.completion_ids
        logprobs = parts.loaded.model(torch.tensor([[*context, *completion]])).logits[0].log_softmax(-1)
        total = total + logprobs[range(len(context) - 1, len(context) + len(completion) - 1), list(completion)].mean()
    gradients = torch.autograd.grad(total, list(parts.weights.trained.values()))
    length = torch.cat([g.flatten() for g in gradients]).norm()
    for name, gradient in zip(parts.weights.trained, gradients, strict=True):
        torch.testing.assert_close(direction.unit[name], gradient / length, rtol=1e-3, atol=1e-6)
    close(parts)


@pytest.mark.parametrize("cap", [0.01, 1e9])
def test_importance_is_the_probability_without_the_hint_over_that_with_it_up_to_the_cap(cap: float) -> None:
    parts = build(quick(*HINTED, f"hinted.importance_cap={cap}", "sampling.temperature=0.8", "data.max_difficulty=6"))
    rows = written(parts)
    direction = direction_of(parts)
    direction.remember(rows)
    weights = direction._importance(direction._attempts)
    assert weights[:10] == [1.0] * 10
    for one, weight in zip(rows[10:], weights[10:], strict=True):
        both = []
        for context in (parts.encoder.student(parts.renderer.student(one.problem)), one.rollout.prompt_ids):
            completion = one.rollout.completion_ids
            with torch.no_grad():
                logits = parts.loaded.model(torch.tensor([[*context, *completion]])).logits[0] / 0.8
            places = range(len(context) - 1, len(context) + len(completion) - 1)
            both.append(float(logits.log_softmax(-1)[places, list(completion)].sum()))
        assert weight == pytest.approx(min(math.exp(both[0] - both[1]), cap), rel=1e-3)
    close(parts)


def attempts(*correct: bool, hinted: int) -> list[Attempt]:
    """The last so many of them hinted."""
    plain = len(correct) - hinted
    return [
        Attempt(2, (1,), (2 + i,), (), correct=ok, hinted_logprob=-1.0 if i >= plain else None)
        for i, ok in enumerate(correct)
    ]


def settings(*overrides: str) -> Config:
    return load_config("micro", ["exposure.kind=aligned", "hinted.rollouts=8", *overrides])


def test_an_advantage_is_multiplied_by_its_importance_and_centred_among_its_own_kind() -> None:
    some = attempts(True, False, False, False, True, True, True, False, hinted=4)
    weights = [1.0] * 4 + [0.5, 0.25, 2.0, 4.0]
    kept = weighted_rows(some, settings("alignment.min_correct=4"), 0, weights)
    assert [(row.completion, row.advantage) for row in kept] == [((2,), 1.0), ((6,), 0.5), ((7,), 0.25), ((8,), 2.0)]
    assert not weighted_rows(some, settings("alignment.min_correct=5"), 0, weights)
    centred = weighted_rows(some, settings("alignment.min_correct=4", "alignment.success=centred"), 0, weights)
    assert [row.advantage for row in centred] == [0.75, -0.25, -0.25, -0.25, 0.125, 0.0625, 0.5, -3.0]


def test_shuffled_verdicts_stay_among_the_hinted_and_among_the_others() -> None:
    some = attempts(*[True] * 2, *[False] * 14, *[True] * 8, *[False] * 8, hinted=16)
    found = [weighted_rows(some, settings("alignment.success=shuffled"), update) for update in (0, 4)]
    for rows in found:
        owners = [row.completion[0] - 2 for row in rows]
        assert (sum(owner < 16 for owner in owners), sum(owner >= 16 for owner in owners)) == (2, 8)
        assert {owner for owner in owners if owner >= 16} != set(range(16, 24))
    assert found[0] != found[1]


def test_the_log_says_what_was_hinted_and_its_accuracy_is_that_of_the_others(tmp_path: Path) -> None:
    run = finished(quick(*HINTED, "train.num_updates=2"), tmp_path / "run")
    rows = run.rows("metrics")
    for before, after in pairwise(rows):
        moved = before["hinted"]["reveal_ratio"] + 0.25 * (0.5 - before["hinted"]["accuracy"])
        assert after["hinted"]["reveal_ratio"] == pytest.approx(min(1.0, max(0.0, moved)))
    parts = build(quick(*HINTED))
    one = written(parts, rows[0]["hinted"]["reveal_ratio"])
    close(parts)
    assert rows[0]["hinted"]["rollouts"] == 6
    assert rows[0]["hinted"]["accuracy"] == sum(r.verdict == "correct" for r in one[10:]) / 6
    assert rows[0]["accuracy"] == sum(r.verdict == "correct" for r in one[:10]) / 10
    assert rows[0]["completion_tokens"] == sum(len(r.rollout.completion_ids) for r in one) / 16


def test_without_hinted_rollouts_nothing_is_logged_kept_or_written_of_them(tmp_path: Path) -> None:
    run = finished(quick(*GATED, "train.num_updates=1"), tmp_path / "run")
    assert all("hinted" not in row for row in run.rows("metrics"))
    parts = build(quick(*GATED))
    assert parts.hints.state_dict() == {}
    close(parts)


@pytest.mark.parametrize("prompt", ["hinted", "student"])
def test_in_grpo_a_hinted_rollout_joins_its_group_under_the_prompt_of_the_setting(prompt: str) -> None:
    parts = build(quick(*GRPO, f"hinted.prompt={prompt}", "data.max_difficulty=6"))
    rows = written(parts)
    examples = [
        row.example
        for row in reveal(
            rows, parts.exposure, 0, prompts=parts.prompts, foresight=parts.foresight, config=parts.config
        )
    ]
    rewards = [float(one.verdict == "correct") for one in rows]
    assert [e.advantage for e in examples] == group_advantages(rewards, 4)
    for place, (one, example) in enumerate(zip(rows, examples, strict=True)):
        alone = parts.encoder.student(parts.renderer.student(one.problem))
        assert (one.rollout.prompt_ids == alone) == (place not in (3, 7, 11, 15))
        assert example.context == (one.rollout.prompt_ids if prompt == "hinted" else alone)
        assert example.completion == one.rollout.completion_ids
    close(parts)


@pytest.mark.parametrize("overrides", [(*HINTED, "hinted.importance_cap=1"), GRPO], ids=["direction, weighted", "grpo"])
def test_a_resumed_run_equals_the_uninterrupted_one(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = quick(*overrides, "train.num_updates=6")
    whole = finished(config, tmp_path / "whole")
    assert len({row["hinted"]["reveal_ratio"] for row in whole.rows("metrics")}) > 2
    wanted = fingerprint(whole)
    for update in (1, 4):
        assert fingerprint(train(config, cut_after(whole, update, tmp_path / f"cut-{update}")).run) == wanted


def test_a_distilled_update_has_only_the_unhinted_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    update = Trainer.update

    def watched(trainer: Trainer, number: int):
        batches.append(update(trainer, number).batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "update", watched)
    with pytest.raises(KeyboardInterrupt):
        train(quick(*HINTED), tmp_path / "run")
    [batch] = batches
    assert [len(batch.rows), len(batch.aside)] == [10, 6]
    assert all(row.graded.hint is None for row in batch.rows)
    assert all(graded.hint for graded in batch.aside)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.method=sft", "hinted.rollouts=8"), "it acts with exposure.kind: aligned, loss.gate: aligned or"),
        (("exposure.kind=full", "hinted.rollouts=8"), "it acts with exposure.kind: aligned, loss.gate: aligned or"),
        (("exposure.kind=aligned", "hinted.target_success=0.4"), "it acts with hinted.rollouts above 0"),
        (("train.method=grpo", "hinted.rollouts=8", "hinted.importance_cap=1"), "and a look-ahead"),
        (("exposure.kind=aligned", "hinted.rollouts=8", "hinted.prompt=student"), "and GRPO"),
        (("exposure.kind=aligned", "hinted.rollouts=32"), "hinted.rollouts 32 is more than 31 of train.batch_size 32"),
        (("train.method=grpo", "hinted.rollouts=6"), "not a multiple of the 4 groups"),
        (("exposure.kind=aligned", "hinted.rollouts=8", "train.grpo_weight=1"), "does not go with train.grpo_weight"),
        (("exposure.kind=aligned", "hinted.rollouts=8", "views.answer=only"), "a view that grows with its ratio"),
        (
            ("exposure.kind=aligned", "hinted.rollouts=8", "exposure.reference_ablation=shuffled"),
            "reference_ablation: shuffled deprives the teacher",
        ),
        (
            ("exposure.kind=aligned", "hinted.rollouts=8", "alignment.success=references"),
            "not read by alignment.success: references",
        ),
    ],
)
def test_hinted_rollouts_are_refused_where_they_could_not_act(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config("micro", overrides)


def test_problems_without_a_reference_are_refused_and_named() -> None:
    bare = [Problem("p1", "1 + 1", ("so 2. ",), "2", "2"), Problem("p2", "1 + 2", (), "", "3")]
    with pytest.raises(DataError, match=re.escape("hinted.rollouts 8: 1 of 2 training problems have no reference")):
        require_references(bare, settings())
    require_references(bare, load_config("micro", ["exposure.kind=aligned"]))
    require_references(bare[:1], settings())


def test_what_a_hint_shows_may_be_set_without_a_teacher_and_is_kept() -> None:
    config = quick(*GRPO, "views.answer=withhold")
    assert "answer: withhold" in dump_config(config)


def test_a_run_is_named_by_its_hinted_rollouts_and_says_who_reads_them() -> None:
    assert method_name(quick(*GRPO)) == "GRPO, 4 of 16 rollouts hinted"
    assert method_name(quick(*HINTED)).endswith("aligned tokens (correct), 6 of 16 rollouts hinted")
    assert "hinted" not in method_name(quick(*GATED))
    lines = {name: "\n".join(acting_lines(quick(*words))) for name, words in (("gate", HINTED), ("grpo", GRPO))}
    assert "hinted: 6 of 16 rollouts an update, for the success direction; the ratio moves until 50%" in lines["gate"]
    assert "hinted: 4 of 16 rollouts an update, for GRPO, under the hinted prompt" in lines["grpo"]
