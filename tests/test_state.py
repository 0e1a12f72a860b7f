"""The seven state numbers, their running standardisation, and the difficulty-adjusted success."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.control.state import STATE_NAMES, DifficultyAdjustment, Standardiser, TrainingState
from atesd.errors import CheckpointError
from atesd.records import UpdateStats


def stats(**changes) -> UpdateStats:
    values = {"reveal_ratio": 0.5, "effective_ratio": 0.5, "loss": 0.1, "kl": 0.1, "top1_disagreement": 0.2}
    return UpdateStats(**{**values, "student_confidence": 0.7, **changes})


def features(state: TrainingState, update: int) -> dict[str, float]:
    return dict(zip(STATE_NAMES, state.features(update), strict=True))


def test_before_the_first_update_the_policy_sees_seven_zeros():
    assert TrainingState(100, 0.9).decision_state(0) == (0.0,) * 7


def test_an_average_starts_at_its_first_value_and_moves_a_tenth_of_the_way():
    state = TrainingState(100, 0.9)
    state.observe(stats(reveal_ratio=0.2, kl=0.001))
    assert features(state, 1)["reveal_ratio"] == pytest.approx(0.2)
    assert features(state, 1)["log_kl"] == pytest.approx(math.log(2))  # log(1 + 1000 * 0.001)
    state.observe(stats(reveal_ratio=1.0, kl=0.001))
    assert features(state, 2)["reveal_ratio"] == pytest.approx(0.28)  # 0.9 * 0.2 + 0.1 * 1.0


def test_confidence_is_the_last_updates_and_disagreement_an_average():
    state = TrainingState(100, 0.9)
    state.observe(stats(student_confidence=0.3, top1_disagreement=0.0))
    state.observe(stats(student_confidence=0.6, top1_disagreement=1.0))
    assert features(state, 2)["student_confidence"] == 0.6
    assert features(state, 2)["top1_disagreement"] == pytest.approx(0.1)


def test_the_probe_nll_is_a_change_relative_to_its_first_value_and_zero_until_measured():
    state = TrainingState(100, 0.9)
    state.observe(stats())
    assert features(state, 1)["probe_nll"] == 0.0
    state.observe(stats(probe_nll=2.0))
    assert features(state, 2)["probe_nll"] == 0.0
    state.observe(stats(probe_nll=1.0))
    assert features(state, 3)["probe_nll"] == pytest.approx(0.1 * (1.0 / 2.0 - 1.0))


def test_a_probe_nll_of_zero_is_no_value_to_be_relative_to():
    state = TrainingState(100, 0.9)
    state.observe(stats(probe_nll=0.0))
    assert features(state, 1)["probe_nll"] == 0.0
    state.observe(stats(probe_nll=2.0))
    state.observe(stats(probe_nll=0.0))
    assert features(state, 3)["probe_nll"] == pytest.approx(-0.1)


def test_time_is_told_as_a_share_of_the_run_and_as_updates_since_the_last_policy_update():
    state = TrainingState(40, 0.9)
    assert features(state, 10)["training_progress"] == 0.25
    assert features(state, 10)["updates_since_policy_update"] == 10
    state.policy_updated(15)  # at the end of update 15
    assert features(state, 16)["updates_since_policy_update"] == 0
    assert features(state, 60)["training_progress"] == 1.0  # a run that goes on past its planned end


@pytest.mark.parametrize("name", ["kl", "top1_disagreement", "student_confidence", "probe_nll"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_number_is_left_out_and_counted(name, value):
    state = TrainingState(100, 0.9)
    state.observe(stats(probe_nll=1.0))
    before = state.features(1)
    state.observe(stats(**{name: value}))
    assert state.features(1) == pytest.approx(before)
    assert list(state.ignored.values()) == [1]


def test_a_kl_rounded_below_zero_counts_as_zero():
    state = TrainingState(100, 0.9)
    state.observe(stats(kl=-1e-2))
    assert features(state, 1)["log_kl"] == 0.0


@given(st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=1, max_size=20))
def test_the_standardiser_agrees_with_numpy(vectors):
    standardiser = Standardiser(2)
    for vector in vectors:
        standardiser.push(vector)
    deviation = np.std(vectors, axis=0)
    expected = (np.array(vectors[-1]) - np.mean(vectors, axis=0)) / np.where(deviation > 0, deviation, 1.0)
    assert standardiser.standardise(vectors[-1]) == pytest.approx(expected, abs=1e-9)


def decision_states(state: TrainingState, **series) -> list[dict[str, float]]:
    """The state of the decision after each update of a run whose statistics are `series`, of equal length."""
    seen = []
    for update, values in enumerate(zip(*series.values(), strict=True)):
        state.observe(stats(**dict(zip(series, values, strict=True))))
        seen.append(dict(zip(STATE_NAMES, state.decision_state(update + 1), strict=True)))
    return seen


def test_a_feature_without_a_range_is_standardised_over_the_decisions_so_far():
    seen = decision_states(TrainingState(100, 0.0), kl=[(math.exp(level) - 1) / 1000 for level in (1.0, 5.0, 9.0)])
    # z-scores within (1), (1, 5) and (1, 5, 9); std of the last three: sqrt(2/3) * 4
    assert [state["log_kl"] for state in seen] == pytest.approx([0.0, 1.0, 4 / (4 * math.sqrt(2 / 3))])


def test_a_feature_that_lies_in_0_to_1_keeps_its_scale():
    ratios, shares = [0.1, 0.5, 0.9], [0.3, 0.2, 0.6]
    series = {"reveal_ratio": ratios, "student_confidence": shares, "top1_disagreement": shares}
    seen = decision_states(TrainingState(100, 0.0), **series)
    for name, values in series.items():
        assert [state[name] for state in seen] == pytest.approx(values)


def test_training_progress_moves_the_policy_as_much_late_in_a_run_as_early():
    seen = [state["training_progress"] for state in decision_states(TrainingState(100, 0.9), reveal_ratio=[0.5] * 100)]
    assert seen[99] - seen[19] == pytest.approx(0.8)


def test_a_state_whose_features_were_all_standardised_is_refused():
    state = TrainingState(100, 0.9).state_dict()
    state["standardiser"] = {"count": 3, "mean": [0.0] * 7, "squares": [0.0] * 7}
    with pytest.raises(CheckpointError, match="start the run anew"):
        TrainingState(100, 0.9).load_state_dict(state)


def test_the_state_survives_json():
    state, other = TrainingState(100, 0.9), TrainingState(100, 0.9)
    for update in range(5):
        state.observe(stats(kl=0.1 * update, probe_nll=1.0 + update))
        state.decision_state(update)
    state.policy_updated(3)
    other.load_state_dict(json.loads(json.dumps(state.state_dict(), allow_nan=False)))
    for training_state in (state, other):
        training_state.observe(stats(probe_nll=0.3))
    assert other.decision_state(6) == state.decision_state(6)


def test_success_is_weighted_by_the_usual_shares_of_the_levels():
    adjustment = DifficultyAdjustment(0.9)
    # Level 2: 1 of 2 right; level 6: 0 of 2. Shares 1/2, 1/2.
    assert adjustment.success(((2, 1.0), (2, 0.0), (6, 0.0), (6, 0.0))) == pytest.approx(0.25)
    # Only easy problems, both right. Shares 4/6 and 2/6; level 6 counts with its running mean 0.
    assert adjustment.success(((2, 1.0), (2, 1.0))) == pytest.approx(4 / 6 * 1.0 + 2 / 6 * 0.0)


def test_a_student_that_stays_the_same_looks_the_same_whatever_the_batch_holds():
    adjustment = DifficultyAdjustment(0.9)
    batches = [[2, 2, 6, 6], [2, 2, 2, 6], [2, 6, 6, 6], [2, 2, 6, 6]]
    raw = [sum(level == 2 for level in batch) / 4 for batch in batches]
    adjusted = [adjustment.success(tuple((level, float(level == 2)) for level in batch)) for batch in batches]
    assert np.ptp(adjusted) < np.ptp(raw) / 3


def test_ungraded_rollouts_measure_nothing():
    assert DifficultyAdjustment(0.9).success(()) is None


def test_the_running_success_survives_json():
    first, second = DifficultyAdjustment(0.9), DifficultyAdjustment(0.9)
    first.success(((2, 1.0), (5, 0.0)))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.success(((5, 1.0),)) == first.success(((5, 1.0),))
