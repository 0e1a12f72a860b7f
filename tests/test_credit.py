"""Delayed credit by hand and by brute force."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.maths.credit import advantages, discounted_grounding, discounted_progress, rewards

number = st.floats(-100, 100)
maybe = st.one_of(st.none(), number)
discounts = st.floats(0.1, 1.0)


def test_only_falls_in_the_signal_are_rewarded_by_the_paper():
    # A fall of 1.0, a rise, a fall of 0.5, at discount 0.5:  1*1.0 + 0.5*0 + 0.25*0.5 = 1.125
    assert discounted_progress([3.0, 2.0, 2.5, 2.0], 0.5, "positive") == pytest.approx(1.125)


def test_signed_progress_also_counts_the_rises():
    # 1*1.0 + 0.5*(-0.5) + 0.25*0.5 = 0.875
    assert discounted_progress([3.0, 2.0, 2.5, 2.0], 0.5, "signed") == pytest.approx(0.875)


def test_a_drop_over_a_gap_is_discounted_as_of_its_later_measurement():
    # Measured at offsets 0 and 4 only: (5 - 3) * 0.5^3 = 0.25. At 1 and 3 only: (4 - 1) * 0.5^2 = 0.75.
    assert discounted_progress([5.0, None, None, None, 3.0], 0.5, "signed") == pytest.approx(0.25)
    assert discounted_progress([None, 4.0, None, 1.0, None], 0.5, "signed") == pytest.approx(0.75)


@pytest.mark.parametrize("signal", [[], [1.0], [None, None], [None, 2.0, None]])
def test_fewer_than_two_measurements_give_no_progress(signal):
    assert discounted_progress(signal, 0.9, "signed") is None


@given(st.lists(number, min_size=2, max_size=9), discounts)
def test_progress_is_the_papers_sum(signal, discount):
    drops = [max(0.0, signal[i - 1] - signal[i]) for i in range(1, len(signal))]
    expected = float(np.dot(discount ** np.arange(len(drops)), drops))
    assert discounted_progress(signal, discount, "positive") == pytest.approx(expected, abs=1e-9)


@given(st.lists(maybe, min_size=2, max_size=9))
def test_undiscounted_signed_progress_telescopes_over_any_gaps(signal):
    measured = [value for value in signal if value is not None]
    progress = discounted_progress(signal, 1.0, "signed")
    assert progress is None if len(measured) < 2 else progress == pytest.approx(measured[0] - measured[-1], abs=1e-9)


@given(st.lists(maybe, min_size=2, max_size=9), discounts)
def test_the_positive_part_is_never_below_the_signed_sum(signal, discount):
    positive = discounted_progress(signal, discount, "positive")
    signed = discounted_progress(signal, discount, "signed")
    assert positive is signed is None or positive >= max(0.0, signed) - 1e-9


@pytest.mark.parametrize("drop", ["signed", "positive"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_in_the_signal_is_not_hidden_by_the_positive_part(place, drop):
    signal = [3.0, 2.0, 1.0]
    signal[place] = math.nan
    assert math.isnan(discounted_progress(signal, 0.9, drop))


def test_grounding_is_a_discounted_mean():
    # (1*-1 + 0.5*-2 + 0.25*-4) / 1.75 = -3 / 1.75; without the second: (-1 - 1) / 1.25
    assert discounted_grounding([-1.0, -2.0, -4.0], 0.5) == pytest.approx(-3 / 1.75)
    assert discounted_grounding([-1.0, None, -4.0], 0.5) == pytest.approx(-2 / 1.25)


@given(st.lists(maybe, max_size=9), discounts)
def test_grounding_lies_between_its_extremes(signal, discount):
    measured = [value for value in signal if value is not None]
    grounding = discounted_grounding(signal, discount)
    assert grounding is None if not measured else min(measured) - 1e-9 <= grounding <= max(measured) + 1e-9


def test_raw_mixing_is_the_papers_formula():
    assert rewards([1.0, 2.0], [-3.0, -5.0], 0.1, "raw") == pytest.approx([0.7, 1.5])


def test_standardised_mixing_does_not_depend_on_the_units():
    progress, grounding = [1.0, 2.0, 4.0], [-3.0, -5.0, -1.0]
    mixed = rewards(progress, grounding, 0.5, "standardised")
    scaled = rewards([1e-3 * p + 7 for p in progress], [40 * g for g in grounding], 0.5, "standardised")
    expected = [
        (p - np.mean(progress)) / np.std(progress) + 0.5 * (g - np.mean(grounding)) / np.std(grounding)
        for p, g in zip(progress, grounding, strict=True)
    ]
    assert mixed == pytest.approx(expected)
    assert scaled == pytest.approx(expected)


def test_a_component_that_never_varies_counts_nothing_when_standardised():
    assert rewards([2.0, 2.0], [-1.0, 1.0], 1.0, "standardised") == pytest.approx([-1.0, 1.0])


def test_advantages_are_centred_and_scaled():
    # mean 2, std sqrt(((1)^2 + 0 + 1) / 3) = sqrt(2/3)
    scale = math.sqrt(2 / 3) + 1e-6
    assert advantages([1.0, 2.0, 3.0]) == pytest.approx([-1 / scale, 0.0, 1 / scale])


@given(number, st.integers(2, 8))
def test_equal_rewards_give_no_advantages(reward, size):
    assert advantages([reward] * size) is None


@given(st.lists(number, min_size=2, max_size=8))
def test_advantages_sum_to_zero_and_keep_the_order(values):
    normalised = advantages(values)
    if normalised is not None:
        assert sum(normalised) == pytest.approx(0.0, abs=1e-4)
        assert normalised[np.argmax(values)] == max(normalised)


def test_a_shift_of_all_rewards_changes_no_advantage():
    assert advantages([0.1, 0.4, 0.2]) == pytest.approx(advantages([5.1, 5.4, 5.2]))
