"""Differences of groups of runs: by hand, against scipy, and how often their intervals hold a known truth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from atesd.maths.keyed import generator
from atesd_lab.stats.contrast import Contrast
from atesd_lab.stats.differences import (
    Needed,
    needed,
    paired_difference,
    sampling_noise,
    unpaired_difference,
)
from atesd_lab.stats.selection import best_fixed, cross_fitted
from validation.coverage import Regime, coverage_table, draw_groups, measure, optimism, regimes


def table(seeds: int = 4, problems: int = 30, key: str = "table") -> np.ndarray:
    return generator(0, "test", key).binomial(4, 0.6, size=(seeds, problems)) / 4


def test_a_pair_of_two_by_two_is_worked_out_by_hand():
    # Differences [[1, 0], [0.5, -0.5]]: mean 0.25, seed means 0.5 and 0, problem means 0.75 and -0.25.
    # MS_seeds = 2 * (0.25^2 + 0.25^2) = 0.25; MS_problems = 2 * (0.5^2 + 0.5^2) = 1; no rest.
    # V = (0.25 + 1) / 4 = 0.3125, df = 1.25^2 / (0.25^2 + 1^2) = 1.4706.
    found = paired_difference(np.zeros((2, 2)), [[1.0, 0.0], [0.5, -0.5]])
    assert found.value == pytest.approx(0.25)
    assert found.standard_error == pytest.approx(0.3125**0.5)
    assert found.freedom == pytest.approx(1.5625 / 1.0625)
    assert found.high - found.value == pytest.approx(0.3125**0.5 * stats.t.ppf(0.975, 1.5625 / 1.0625))
    assert (found.seed_variance, found.problem_variance, found.rest_variance) == pytest.approx((0.125, 0.5, 0))


def test_one_seed_a_side_is_scipys_paired_t_test_over_problems():
    a, b = table(1, key="a"), table(1, key="b")
    theirs = stats.ttest_rel(b[0], a[0]).confidence_interval(0.95)
    for find in (paired_difference, unpaired_difference):
        found = find(a, b)
        assert (found.low, found.high) == pytest.approx(tuple(theirs))
        assert not found.covers_seeds


def test_where_problems_are_all_alike_it_is_scipys_paired_t_test_over_seeds():
    a, b = (np.tile(generator(0, "test", key).random((5, 1)), (1, 20)) for key in "ab")
    theirs = stats.ttest_rel(b[:, 0], a[:, 0]).confidence_interval(0.95)
    found = paired_difference(a, b)
    assert (found.low, found.high) == pytest.approx(tuple(theirs))


@pytest.mark.parametrize(("sizes", "equal"), [((5, 5), False), ((2, 6), True), ((3, 6), False)])
def test_where_problems_are_all_alike_unpaired_is_students_or_welchs_t_test(sizes: tuple[int, int], equal: bool):
    a, b = (np.tile(generator(0, "test", s).random((s, 1)), (1, 20)) + i for i, s in enumerate(sizes))
    theirs = stats.ttest_ind(b[:, 0], a[:, 0], equal_var=equal).confidence_interval(0.95)
    found = unpaired_difference(a, b)
    assert (found.low, found.high) == pytest.approx(tuple(theirs))


def test_a_single_run_against_a_group_has_the_groups_variance_between_seeds():
    # Crawford and Howell 1998: t with n - 1 degrees of freedom and the standard error s sqrt(1 + 1 / n).
    group, one = np.tile([[0.4], [0.5], [0.7], [0.6]], (1, 10)), np.full((1, 10), 0.8)
    found = unpaired_difference(group, one)
    error = np.std([0.4, 0.5, 0.7, 0.6], ddof=1) * np.sqrt(1 + 1 / 4)
    assert found.standard_error == pytest.approx(error)
    assert found.freedom == pytest.approx(3)
    assert found.covers_seeds


def test_the_parts_of_the_variance_are_found_again():
    rng = generator(0, "test")
    shape = (3000, 4, 40)
    noise = 0.3 * rng.standard_normal((3000, 4, 1)) + 0.5 * rng.standard_normal((3000, 1, 40))
    found = paired_difference(np.zeros(shape), noise + 0.2 * rng.standard_normal(shape))
    parts = [np.mean(part) for part in (found.seed_variance, found.problem_variance, found.rest_variance)]
    assert parts == pytest.approx([0.09, 0.25, 0.04], rel=0.05)


def test_leading_axes_are_separate_comparisons():
    a, b = (np.stack([table(key=f"{side}{i}") for i in range(3)]) for side in "ab")
    for find in (paired_difference, unpaired_difference):
        together = find(a, b)
        assert together.low == pytest.approx([float(find(x, y).low) for x, y in zip(a, b, strict=True)])


def test_swapping_the_groups_mirrors_the_interval():
    a, b = table(3, key="a"), table(5, key="b")
    there, back = unpaired_difference(a, b), unpaired_difference(b, a)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_luck_that_a_seed_gives_both_groups_cancels_in_pairs_alone():
    luck = 0.1 * generator(0, "test").standard_normal((5, 1))
    a, b = table(5, 200, "a") + luck, table(5, 200, "b") + luck
    paired, unpaired = paired_difference(a, b), unpaired_difference(a, b)
    assert paired.value == pytest.approx(unpaired.value)
    assert 2 * (paired.high - paired.low) < unpaired.high - unpaired.low


@pytest.mark.parametrize(
    "call",
    [
        lambda: paired_difference(np.zeros((2, 3)), np.zeros((3, 3))),
        lambda: unpaired_difference(np.zeros((2, 3)), np.zeros((2, 4))),
        lambda: paired_difference(np.zeros((2, 1)), np.zeros((2, 1))),
        lambda: paired_difference(np.zeros(4), np.zeros(4)),
    ],
)
def test_tables_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match="needed"):
        call()


def test_sampling_noise_is_the_spread_of_repeated_evaluations():
    rng = generator(0, "test")
    chances = rng.random((3, 50))
    counts = rng.binomial(4, chances, size=(4000, 3, 50))
    truth = counts.mean(axis=(1, 2)).std() / 4
    squares = [sampling_noise(one, 4)[0] ** 2 for one in counts[:300]]
    assert np.sqrt(np.mean(squares)) == pytest.approx(truth, rel=0.03)
    assert sampling_noise(counts[0], 4)[1]


def test_with_one_sample_the_noise_is_an_upper_bound_and_says_so():
    rng = generator(0, "test")
    chances = rng.random((1, 50)) + np.zeros((3, 1))
    truth = np.sqrt(np.sum(chances * (1 - chances))) / 150
    many = [sampling_noise(rng.binomial(1, chances), 1) for _ in range(300)]
    assert np.sqrt(np.mean([noise**2 for noise, _ in many])) == pytest.approx(truth, rel=0.05)  # seeds are alike here
    assert not many[0][1]
    single, exact = sampling_noise(rng.binomial(1, chances[:1]), 1)
    assert single > truth
    assert not exact


def test_the_seeds_said_to_be_needed_find_the_effect_four_times_in_five():
    regime = Regime(seeds=(4, 4), problems=100, samples=4, difference=0.04, seed_deviation=(0.03, 0.03), taste=0.0)
    a, b = draw_groups(regime, 400, generator(0, "test"))
    pilot = paired_difference(a, b)
    parts = {name: np.mean(getattr(pilot, name)) for name in ("seed_variance", "problem_variance", "rest_variance")}
    seeds = needed(replace(pilot, freedom=np.float64(3), **parts), 4, 100, 0.04, paired=True).seeds
    assert seeds is not None
    found = paired_difference(*draw_groups(replace(regime, seeds=(seeds, seeds)), 400, generator(1, "test")))
    assert np.mean(found.low > 0) == pytest.approx(0.8, abs=0.07)


def test_problems_needed_are_those_of_a_paired_t_test():
    # One seed: the least n with (t_0.975 + t_0.8) sd / sqrt(n) <= effect, both t of n - 1 degrees of freedom.
    a, b = table(1, key="a"), table(1, key="b")
    n = np.arange(2, 100_000)
    enough = (stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * np.std(b - a, ddof=1) / np.sqrt(n) <= 0.02
    expected = int(n[enough][0])
    assert needed(paired_difference(a, b), 1, 30, 0.02, paired=True) == Needed(seeds=None, problems=expected)


def test_the_problems_said_to_be_needed_find_the_effect_four_times_in_five_also_with_few_seeds():
    # Three seeds that differ: the more problems, the more of the variance is the seeds', with two degrees of freedom.
    regime = Regime(seeds=(3, 3), problems=100, samples=4, difference=0.08, seed_deviation=(0.008, 0.008), taste=0.0)
    pilot = paired_difference(*draw_groups(regime, 400, generator(0, "few")))
    parts = {name: np.mean(getattr(pilot, name)) for name in ("seed_variance", "problem_variance", "rest_variance")}
    more = needed(replace(pilot, freedom=np.mean(pilot.freedom), **parts), 3, 100, 0.08, paired=True).problems
    assert more is not None
    found = paired_difference(*draw_groups(replace(regime, problems=more), 400, generator(1, "few")))
    assert np.mean(found.low > 0) >= 0.77


def test_what_is_needed_grows_as_the_effect_shrinks_and_may_not_exist():
    found = unpaired_difference(table(5, 300, "a"), table(5, 300, "b"))
    assert needed(found, 5, 300, 0.01, paired=False).seeds > needed(found, 5, 300, 0.03, paired=False).seeds
    assert needed(found, 5, 300, 0.0, paired=False) == Needed(None, None)
    fickle = paired_difference(np.zeros((3, 50)), np.array([[0.0], [0.5], [0.1]]) + table(3, 50))
    assert needed(fickle, 3, 50, 0.01, paired=True).problems is None  # three such seeds settle it on no problems


def test_no_problem_scores_the_checkpoint_it_chose():
    # Checkpoint 0 is right on the even problems, 1 on the odd ones: each half chooses what fails on the other.
    scores = np.array([[[1.0, 0, 1, 0]], [[0, 1.0, 0, 1]]])
    fair, chosen = cross_fitted(scores, [0, 1, 0, 1])
    assert chosen == (1, 0)
    assert fair.tolist() == [[0, 0, 0, 0]]


def test_the_peak_of_equal_checkpoints_is_too_high_and_its_halves_are_not():
    # The mean of the highest of 8 normal means is 1.42 standard errors; a problem's p (1 - p) is about 0.207 here.
    peak, fair = optimism(200, samples=2, checkpoints=8, repeats=400)
    assert peak == pytest.approx(1.42 * np.sqrt(0.207 / 400), rel=0.08)
    assert fair == pytest.approx(0, abs=0.003)


@pytest.mark.parametrize("paired", [True, False])
def test_made_up_groups_have_the_difference_they_promise(paired: bool):
    regime = Regime(paired=paired, seeds=(4, 4), problems=60, accuracy=0.2, difference=0.03, taste=1.0)
    a, b = draw_groups(regime, 3000, generator(0, "test"))
    assert a.mean() == pytest.approx(0.2, abs=0.002)
    assert b.mean() - a.mean() == pytest.approx(0.03, abs=0.003)


FAST = (
    Regime(seeds=(3, 3), problems=60, samples=1, accuracy=0.2, seed_deviation=(0.0, 0.0)),
    Regime(seeds=(3, 3), problems=60, samples=4, difference=0.02, seed_deviation=(0.03, 0.03)),
    Regime(seeds=(5, 5), problems=150, samples=2, accuracy=0.8, difference=0.02, taste=1.0),
    Regime(paired=False, seeds=(3, 3), problems=60, samples=2, accuracy=0.8, difference=0.02),
    Regime(paired=False, seeds=(5, 5), problems=150, samples=2, seed_deviation=(0.0, 0.0), difficulty=2.5),
    Regime(paired=False, seeds=(3, 10), problems=60, samples=4, seed_deviation=(0.03, 0.01)),
    Regime(paired=False, seeds=(1, 6), problems=60, samples=2),
)


@pytest.mark.parametrize("regime", FAST, ids=str)
def test_intervals_hold_a_known_truth_as_often_as_they_say(regime: Regime):
    # 1000 repeats: the standard error of the coverage is 0.7 points; the keys are fixed.
    assert 0.93 <= measure(regime, 1000).ours <= 0.97


def test_the_percentile_bootstrap_over_three_seeds_is_too_narrow():
    regime = Regime(seeds=(3, 3), samples=12, seed_deviation=(0.03, 0.03), taste=0.0, luck=0.0)
    found = measure(regime, 200, bootstrap=200)
    assert found.percentile is not None
    assert found.percentile < 0.88 < 0.93 < found.ours


def test_the_coverage_table_lists_the_worst_first_and_counts():
    rows = [measure(one, 50) for one in (FAST[0], FAST[3])]
    shown = coverage_table(rows)
    assert float(shown.rows[0][7]) <= float(shown.rows[1][7])
    assert " of 2 within 93 to 97 %" in shown.notes[0]


@pytest.mark.slow
def test_intervals_cover_in_every_regime_that_users_have():
    shares = [measure(one, 1000).ours for one in regimes(0, 60)]
    assert np.mean([0.93 <= share <= 0.97 for share in shares]) >= 0.9
    assert min(shares) > 0.91


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (0.01, 0.2, 0.0, "above"),
        (-0.2, -0.01, 0.0, "below"),
        (-0.01, 0.2, 0.0, "not distinguishable"),
        (0.1, 0.1, 0.0, "not distinguishable"),  # all differences are the same: no noise was seen, so none is known
        (0.1, 0.2, 0.15, "not distinguishable"),
        (0.16, 0.2, 0.15, "above"),
        (0.1, 0.14, 0.15, "below"),
        (-math.inf, math.inf, 0.0, "not distinguishable"),
    ],
)
def test_a_contrast_is_read_from_its_whole_interval(low: float, high: float, margin: float, verdict: str):
    assert Contrast("a - b", 0.0, low, high).against(margin) == verdict


def test_points_are_shares_times_a_hundred_and_other_units_are_as_they_are():
    assert str(Contrast("a - b", 0.125, 0.01, 0.24)) == "a - b: +12.5 [+1, +24] points"
    assert str(Contrast("kl", 0.125, 0.01, 0.24, "nats")) == "kl: +0.125 [+0.01, +0.24] nats"


def test_the_best_fixed_ratio_is_the_lowest_of_equals_in_whatever_order_they_come():
    ratios = {"full": 1.0, "half": 0.5, "none": 0.0}
    assert best_fixed(ratios, {"full": 0.6, "half": 0.6, "none": 0.5}) == "half"
    assert best_fixed(ratios, {"full": 0.7, "half": 0.6, "none": 0.5}) == "full"
