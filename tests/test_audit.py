"""The audit calls drifting what drifts without learning, says when a budget is too small, and names what mends it."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from statistics import fmean

import numpy as np
import pytest
import torch

from atesd import cli
from atesd.build import build, close, objective
from atesd.config import load_config
from atesd.control import budget
from atesd.control.budget import one_signal
from atesd.errors import ConfigError
from atesd.train.rollouts import rollout_params
from atesd.train.update import Example
from atesd_lab.audit import audit
from atesd_lab.audit.audit import (
    Audit,
    Bench,
    RewardAudit,
    audit_student,
    budget_mends,
    budget_of,
    effect_of,
    end_means,
    other_rewards,
    run_audit,
)
from atesd_lab.audit.measure import MeasuredStudent, Reading, fresh_success, read_batches
from atesd_lab.audit.null_measure import ScoredRollout, ScoredRollouts, as_batches, measure, redrawn, score_rollouts
from atesd_lab.audit.null_simulation import MeasuredBatch, MeasuredRatio, noise
from atesd_lab.audit.text import readings_table, rewards_table, sentences
from quick import SMALL_LEARNED as SMALL
from quick import quick
from updates import distill

Loss = Callable[[float, float], float]
RATIOS = np.linspace(0, 1, 5).tolist()
PROBES = tuple(
    Reading(name, 0.4, None, 0.0, 0.06 if name == "probe_success" else None, "made up")
    for name in ("probe_nll", "probe_kl", "probe_success", "probe_gain")
)


def steady(_: float, draw: float) -> float:
    return 0.1 + 0.02 * draw


def rising(ratio: float, draw: float) -> float:
    return 0.02 + 0.2 * ratio + 0.02 * draw


def student(loss: Loss, slope: float = 0.0, probes: tuple[Reading, ...] = PROBES) -> MeasuredStudent:
    """`loss(ratio, draw)` of 64 batches at five ratios, with a normal draw for each."""
    draws = np.random.default_rng(0).standard_normal((5, 64)).tolist()
    measured = tuple(
        MeasuredRatio(
            ratio,
            tuple(
                MeasuredBatch(loss(ratio, draw), 0.1, 0.1, slope * ratio - 1.0, 0.5, ((0, float(i % 3 == 0)),))
                for i, draw in enumerate(draws[place])
            ),
        )
        for place, ratio in enumerate(RATIOS)
    )
    return MeasuredStudent(64, measured, (*probes, *read_batches(measured)))


RISING = student(rising)
FLAT = student(steady)


@pytest.fixture(autouse=True)
def few_controllers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "NOISE_SEEDS", 6)
    monkeypatch.setattr(budget, "REACH_SEEDS", 1)


@pytest.fixture
def own_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "other_rewards", lambda *_: {})


def audited(measured: MeasuredStudent, *settings: str, effect: float | None = None) -> Audit:
    return audit_student(load_config("micro", settings), measured, decisions=60, seeds=2, effect=effect)


@cache
def noise_ends() -> tuple[float, ...]:
    config = load_config("micro")
    return tuple(end_means(config, one_signal(config.credit), noise, 60, 10))


def bench(measured: MeasuredStudent, *settings: str) -> Bench:
    return Bench(load_config("micro", settings), measured, 60, 3, noise_ends())


def reward_of(name: str, measured: MeasuredStudent) -> RewardAudit:
    tried = bench(measured)
    return tried.audit(name, other_rewards(tried.config, measured)[name])


# verdicts on what was made up


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("train_kl alone", "drifts up"),
        ("sound, probe_success", "sound"),
        ("probe_nll alone", "sound"),
        ("probe_kl alone", "sound"),
        ("probe_gain alone", "sound"),
        ("train_success alone", "sound"),
    ],
)
def test_a_signal_alone_drifts_if_it_depends_on_the_ratio_and_only_then(name: str, verdict: str):
    assert reward_of(name, RISING).verdict == verdict


def test_a_sound_signal_with_the_noise_of_fresh_draws_does_not_drift_either():
    tried = bench(RISING)
    fresh = tried.audit("fresh", tried.config.credit, fresh=True)
    assert fresh.policy_updates > 10
    assert fresh.verdict == "sound"


def test_the_literal_reward_drifts_up_and_correlations_name_the_component_that_depends_on_the_ratio():
    paper = reward_of("paper", RISING)
    assert paper.verdict == "drifts up"
    assert (paper.progress or 0.0) > 0.5
    falling = student(steady, slope=-1.0)
    grounding = reward_of("grounding alone", falling)
    # g_{t+1} .. g_{t+3} are the decision's own, g_{t+4} is the next one's, with weights 1, .9, .81 and .729:
    # r = -2.71 / sqrt(2.71^2 + .729^2) = -.966.
    assert grounding.grounding == pytest.approx(-0.966, abs=0.02)
    assert grounding.verdict == "drifts down"
    assert grounding.progress is None  # the probe of a frozen student does not move


def test_noise_that_grows_with_the_ratio_is_caught_where_only_falls_are_rewarded():
    # The mean is the same at every ratio. max(0, drop) of a wider noise is larger: a drift without any slope.
    settings = "credit.preset=paper", "credit.grounding_weight=0"
    wider = bench(student(lambda ratio, draw: 0.1 + 0.05 * ratio * draw), *settings)
    assert wider.audit("own", wider.config.credit).verdict == "drifts up"
    same = bench(FLAT, *settings)
    assert same.audit("own", same.config.credit).verdict == "sound"


@pytest.mark.usefixtures("own_only")
def test_a_success_that_never_comes_is_silent_and_the_nll_mends_it():
    never = tuple(replace(r, level=0.0) for r in PROBES)
    found = audited(student(rising, probes=never))
    assert found.verdict.startswith("silent")
    assert found.mends[0].setting == "credit.progress_signal=probe_nll"
    assert "sound, probe_nll" in other_rewards(load_config("micro"), student(rising, probes=never))


def test_without_a_checker_what_needs_one_is_said_and_a_recipe_that_needs_one_is_refused():
    unchecked = student(rising, probes=PROBES[:2])
    found = audited(unchecked, "credit.progress_signal=probe_nll")
    assert set(found.unmeasured) == {"probe_success alone", "probe_gain alone"}
    assert "Not measured: probe_gain alone" in "\n".join(rewards_table(found).notes)
    with pytest.raises(ConfigError, match=r"credit.progress_signal: probe_success .* probe_nll"):
        audited(unchecked)


# the budget


@pytest.mark.usefixtures("own_only")
def test_twenty_five_decisions_are_too_few_and_it_is_said_how_far_they_reach():
    found = audited(RISING)
    assert (found.budget.decisions, found.budget.rewarded, found.budget.policy_updates) == (25, 24, 6)
    assert found.verdict == "sound, too few decisions"
    said = "\n".join(sentences(found))
    assert "100 updates are 25 decisions, 24 of them rewarded in time, and 6 policy updates" in said
    assert "cannot move the mean ratio by more than 0.2" in said


def test_the_number_of_updates_it_names_is_enough():
    needed = budget_of(load_config("micro")).needed_updates
    assert needed is not None
    assert needed > 100
    mended = budget_of(load_config("micro", [f"train.num_updates={needed}"]))
    assert mended.verdict == "sound"
    assert min(mended.reach_up - 0.5, 0.5 - mended.reach_down) >= 0.25


@pytest.mark.parametrize(
    ("setting", "mend"),
    [
        ("credit.shuffle_rewards=true", "credit.shuffle_rewards=false"),
        ("exposure.policy.learning_rate=0", "exposure.policy.learning_rate=0.02"),
    ],
)
def test_a_policy_that_cannot_learn_from_anything_is_said(setting: str, mend: str):
    config = load_config("micro", [setting])
    found = budget_of(config)
    assert found.verdict == "cannot learn"
    assert [one.setting for one in budget_mends(config, found)] == [mend]


def test_what_can_be_told_apart_is_the_slope_of_a_regression():
    # Reward noise: two readings of sd 0.06, discounted by 0.9^3, so 0.06 * sqrt(2) * 0.729 = 0.0619; with 24 decisions
    # of standard deviation 0.239 the slope has a standard error of 0.0619 / (0.239 * sqrt(24)) = 0.0529.
    tried = bench(RISING)
    own = tried.audit("own", tried.config.credit, fresh=True)
    found = effect_of(budget_of(tried.config), own, True, 0.01)
    assert found.noise == pytest.approx(0.0619, rel=0.2)
    assert found.smallest == pytest.approx(2.8 * 0.0529, rel=0.2)
    assert found.needed_decisions == math.ceil(24 * (found.smallest / 0.01) ** 2 - 1e-6)
    assert found.verdict == "too noisy"


# mends


@pytest.mark.usefixtures("own_only")
def test_every_mend_is_a_setting_that_exists_and_does_what_it_says():
    found = audited(RISING, "credit.preset=paper")
    assert found.verdict == "drifts up, too few decisions"
    mended = audited(RISING, "credit.preset=paper", *[mend.setting for mend in found.mends])
    assert mended.verdict == "sound"
    assert mended.mends == ()


# the measurement


def test_a_real_frozen_student_is_called_drifting_under_the_literal_reward_and_sound_under_its_own():
    said: list[str] = []
    found = run_audit(
        quick("train.num_updates=40", "data.probe_size=16", "data.max_difficulty=6"),
        rollouts=16,
        repeats=3,
        decisions=60,
        seeds=3,
        effect=None,
        say=said.append,
    )
    verdicts = {reward.reward: reward.verdict for reward in found.rewards}
    assert verdicts["this recipe"] == "sound"
    assert verdicts["paper"] == "drifts up"
    assert {reading.again for reading in found.readings if reading.again is not None} == {0.0}
    assert said[0] == "4 of 16 rollouts sampled and scored at 5 ratios"
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["budget"]["updates"] == 40
    assert [row[0].partition(",")[0] for row in readings_table(found).rows][:2] == ["probe_nll", "probe_success"]


def test_batches_of_the_measured_rollouts_are_what_the_step_itself_measures():
    changed = ("loss.reduction=token", "credit.preset=paper", "credit.grounding=withheld")
    for settings in (("loss.reduction=sequence",), changed):
        parts = build(quick(*settings))
        try:
            (found,) = (row.batches[1] for row in measure(parts, 2, (0.0, 0.4, 1.0)) if row.reveal_ratio == 0.4)
            config, rows = parts.config, []
            for one in parts.sampler.rollouts(1):
                problem, prompt = one.problem, parts.prompts.view(one.problem, 0.4)
                view = prompt.view
                withheld = "".join(problem.segments[view.shown_segments :]) + problem.closing
                text = withheld if config.credit.grounding == "withheld" else f"\\boxed{{{problem.answer}}}"
                answer = parts.encoder.completion(text)[:-1]
                rows.append(Example(*one.pair, prompt.context, answer=answer))
            with torch.no_grad():
                step = distill(
                    parts.scorer,
                    parts.teacher,
                    rows,
                    objective(config),
                    reduction=config.loss.reduction,
                    micro_batch_size=1,
                )
        finally:
            close(parts)
        assert found.loss == pytest.approx(step.loss, rel=1e-4)
        assert found.kl == pytest.approx(step.means["kl"], rel=1e-4)
        assert found.student_confidence == pytest.approx(step.means["confidence"], rel=1e-4)
        assert found.grounding == pytest.approx(step.grounding, rel=1e-4)


def test_fewer_rollouts_than_batches_hold_are_measured_as_asked():
    parts = build(quick())
    try:
        assert [len(rows) for rows in score_rollouts(parts, 6, (0.0, 1.0)).rows] == [6, 6]
    finally:
        close(parts)


def test_redrawn_batches_have_the_noise_of_batches():
    rng = np.random.default_rng(0)
    rows = tuple(ScoredRollout(3, value, 0.0, 0.0, 0.0, None, 0, None) for value in rng.standard_normal(400).tolist())
    groups = redrawn(400, 16, 2000, seed=0)
    assert groups == redrawn(400, 16, 2000, seed=0) != redrawn(400, 16, 2000, seed=1)
    (measured,) = as_batches(ScoredRollouts((0.5,), (rows,)), groups, "sequence")
    losses = [batch.loss for batch in measured.batches]
    assert np.std(losses) == pytest.approx(np.std([row.loss for row in rows]) / 4, rel=0.1)
    assert measured.batches[0].grounding is None


def test_the_noise_of_the_probe_is_that_of_its_fresh_means():
    parts = build(quick("data.probe_size=8"))
    try:
        from atesd.evaluate.probes import graded, probe_requests

        means = []
        for repeat in range(40):
            requests = probe_requests(
                parts.problems.probe,
                encoder=parts.encoder,
                renderer=parts.renderer,
                seed=1,
                key=("other", repeat),
            )
            rollouts = parts.engine.complete(requests, rollout_params(parts.config))
            means.append(fmean(graded(rollouts, parts.problems.probe, encoder=parts.encoder, checker=parts.checker)))
        assert fresh_success(parts, 20)[1] == pytest.approx(np.std(means, ddof=1), rel=0.35)
    finally:
        close(parts)


def test_a_method_without_a_teacher_is_refused():
    config = load_config("micro", ["train.method=sft"])
    with pytest.raises(ConfigError, match=r"train.method: sft has no teacher"):
        run_audit(config, rollouts=8, repeats=2, decisions=20, seeds=2, effect=None, say=print)


# the command


def test_the_command_prints_tables_or_json_and_ends_well_whatever_the_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    words = [word for setting in (*SMALL, "credit.preset=paper") for word in ("--set", setting)]
    small = ["audit", "micro", "--rollouts", "8", "--repeats", "2", "--decisions", "40", "--seeds", "2", *words]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["atesd", *small, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        out = capsys.readouterr().out
        if more:
            assert json.loads(out)["verdict"].startswith("drifts up")
        else:
            assert out.startswith("Verdict on this recipe: drifts up")  # what is read first
            assert "mend: --set credit." in out.partition("\n\n")[0]


def test_fewer_decisions_than_a_policy_update_takes_are_refused_before_anything_is_measured():
    config = load_config("micro", ["exposure.policy.decisions_per_policy_update=128"])
    with pytest.raises(
        ConfigError, match=r"of 100 decisions 99 are rewarded, and the policy waits for 128 .*--decisions"
    ):
        run_audit(config, rollouts=8, repeats=2, decisions=100, seeds=2, effect=None, say=pytest.fail)


def test_a_discount_that_weighs_nothing_is_a_note_of_the_audit():
    assert any("credit.discount (gamma): no effect" in note for note in audit.notes_of(load_config("micro")))
    assert not any("gamma" in note for note in audit.notes_of(load_config("micro", ["credit.probe_every=2"])))
