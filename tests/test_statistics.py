"""Average@k, pass@k and bootstrap intervals."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from atesd.maths.keyed import generator
from atesd.maths.statistics import (
    average_at_k,
    bootstrap_interval,
    hierarchical_bootstrap,
    paired_bootstrap,
    pass_at_k,
)


def test_average_at_k_is_the_share_of_correct_samples():
    # By hand: 0/4, 1/4, 4/4 have the mean 5/12.
    assert average_at_k([0, 1, 4], samples=4) == pytest.approx(5 / 12)


@pytest.mark.parametrize(("samples", "k"), [(1, 1), (4, 1), (5, 2), (6, 3), (6, 6)])
def test_pass_at_k_counts_the_choices_of_k_samples_with_a_correct_one(samples, k):
    for correct in range(samples + 1):
        right = [i < correct for i in range(samples)]
        share = np.mean([any(choice) for choice in combinations(right, k)])
        assert pass_at_k([correct], samples, k) == pytest.approx([share])


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_pass_at_k_is_unbiased(chance):
    # Over all 2^5 outcomes of 5 samples its mean is the true 1 - (1 - p)^2; the share of "any of the first k" agrees.
    outcomes = list(product([0, 1], repeat=5))
    weights = [chance ** sum(o) * (1 - chance) ** (5 - sum(o)) for o in outcomes]
    estimates = pass_at_k([sum(o) for o in outcomes], 5, 2)
    assert np.dot(weights, estimates) == pytest.approx(1 - (1 - chance) ** 2)


def test_pass_at_k_equals_the_binomial_formula_where_that_would_overflow():
    estimate = pass_at_k([3], samples=5000, k=1000)[0]
    assert estimate == pytest.approx(1 - comb(4997, 1000) / comb(5000, 1000), rel=1e-12)


def test_pass_at_one_is_average_at_k():
    counts = [0, 3, 5, 12]
    assert pass_at_k(counts, 12, 1).mean() == pytest.approx(average_at_k(counts, 12))


@pytest.mark.parametrize(("counts", "samples"), [([], 2), ([3], 2), ([-1], 2), ([0], 0), ([[1]], 2)])
def test_impossible_counts_are_refused(counts, samples):
    with pytest.raises(ValueError, match="count"):
        average_at_k(counts, samples)


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=f"k is {k}, allowed: 1 to .* 2"):
        pass_at_k([1], 2, k)


def test_the_interval_is_that_of_all_equally_likely_resamples():
    # Three values have 27 resamples; their exact 10 % and 90 % points are found by listing them.
    values = [0.0, 0.3, 1.0]
    means = [np.mean(choice) for choice in product(values, repeat=3)]
    exact = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
    assert bootstrap_interval(values, level=0.8, resamples=20_000) == pytest.approx(exact, abs=1e-9)


def test_the_interval_is_about_that_of_scipy():
    values = generator(0, "test").beta(2, 1, size=200)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=1).confidence_interval
    assert bootstrap_interval(values, resamples=5000) == pytest.approx(tuple(theirs), abs=3e-3)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    # 400 sets of 60 problems, each worth 0, 1/2 or 1; the truth is 0.7. Standard error of the coverage: 0.011.
    draws = generator(0, "test").binomial(2, 0.7, size=(400, 60)) / 2
    intervals = [bootstrap_interval(row, seed=i, resamples=400) for i, row in enumerate(draws)]
    assert np.mean([low <= 0.7 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.035)


def test_the_same_seed_and_key_give_the_same_interval():
    values = generator(0, "test").random(50)
    again = [bootstrap_interval(values, seed=s, key=k) for s, k in [(1, "a"), (1, "a"), (2, "a"), (1, "b")]]
    assert again[0] == again[1]
    assert len(set(again)) == 3


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(-2, 2))
def test_an_interval_moves_with_its_values(values, shift):
    low, high = bootstrap_interval(values, resamples=50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    shifted = bootstrap_interval(np.array(values) + shift, resamples=50)
    assert shifted == pytest.approx((low + shift, high + shift), abs=1e-9)


def test_blocks_do_not_change_what_is_drawn(monkeypatch):
    values = generator(0, "test").random(64)
    whole = bootstrap_interval(values, resamples=100)
    monkeypatch.setattr("atesd.maths.statistics._BLOCK", 640)
    assert bootstrap_interval(values, resamples=100) == whole


def test_pairing_cancels_what_the_problems_are_worth():
    rng = generator(0, "test")
    worth = rng.random(100)
    better, worse = worth + 0.1 + 0.01 * rng.standard_normal(100), worth
    low, high = paired_bootstrap(better, worse)
    assert 0.09 < low < 0.1 < high < 0.11
    assert bootstrap_interval(better)[0] < bootstrap_interval(worse)[1]  # two intervals would overlap


def test_a_pair_needs_both_values():
    with pytest.raises(ValueError, match="pairs"):
        paired_bootstrap([1.0, 2.0], [1.0])


def test_seeds_and_problems_are_drawn_together_as_a_crossed_table():
    # 2 seeds, 2 problems: 4 x 4 equally likely (rows, columns), listed.
    table = np.array([[0.0, 0.2], [0.5, 1.0]])
    picks = list(product(range(2), repeat=2))
    means = [table[np.ix_(rows, columns)].mean() for rows in picks for columns in picks]
    exact = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
    assert hierarchical_bootstrap(table, level=0.8, resamples=20_000) == pytest.approx(exact, abs=1e-9)


def test_one_seed_leaves_the_problems_and_one_problem_leaves_the_seeds():
    values = generator(0, "test").random(40)
    ours = hierarchical_bootstrap(values[None, :], resamples=5000)
    assert ours == pytest.approx(bootstrap_interval(values, resamples=5000), abs=0.01)
    assert hierarchical_bootstrap(values[:, None], resamples=5000) == pytest.approx(ours, abs=0.01)


def test_seeds_that_differ_widen_the_interval():
    rng = generator(0, "test")
    alike = np.tile(rng.random(50), (3, 1))
    apart = alike + np.array([[-0.3], [0.0], [0.3]])
    widths = [high - low for low, high in map(hierarchical_bootstrap, (alike, apart))]
    assert widths[1] > 1.5 * widths[0]


@pytest.mark.parametrize(
    "call", [lambda: bootstrap_interval([]), lambda: bootstrap_interval([[1.0]]), lambda: hierarchical_bootstrap([1.0])]
)
def test_an_interval_of_nothing_is_refused(call):
    with pytest.raises(ValueError, match="needed"):
        call()
