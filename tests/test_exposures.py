"""The exposures that learn nothing, and the way from settings to an exposure."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from atesd.config import Config
from atesd.control.factory import make_exposure
from atesd.control.fixed import FixedExposure, ramp, random_ratios, replayed
from atesd.control.learned import LearnedExposure
from atesd.errors import ConfigError
from atesd.records import UpdateStats
from atesd.rows import skipped_row
from atesd.runs import recorded_ratios
from fake_run import begin_run, fake_config, write_fake_run

STATS = UpdateStats(0.5, 0.5, math.nan, 0.1, 0.1, 0.5)


def made(updates: int = 20, seed: int = 0, replay=(), **exposure) -> list[float]:
    config = Config.model_validate({"exposure": exposure})
    built = make_exposure(config, updates, seed, replay)
    return [built.reveal_ratio(update) for update in range(updates)]


def test_full_exposure_is_opsd():
    assert made(kind="full") == [1.0] * 20


def test_fixed_exposure_keeps_its_ratio_for_every_group():
    exposure = FixedExposure(0.25)
    assert {exposure.reveal_ratio(u, group) for u in range(5) for group in ("", "2", "p7")} == {0.25}


@pytest.mark.parametrize("kind", ["full", "fixed", "random", "schedule"])
def test_an_exposure_without_learning_asks_for_nothing_and_ignores_what_it_is_shown(kind):
    exposure = make_exposure(Config.model_validate({"exposure": {"kind": kind}}), 20, 0)
    before = exposure.reveal_ratio(7)
    assert exposure.measurements(0) == frozenset()
    assert exposure.observe(0, STATS) == exposure.pending() == []
    exposure.load_state_dict(exposure.state_dict())
    assert (exposure.state_dict(), exposure.reveal_ratio(7)) == ({}, before)


def test_random_ratios_are_held_as_long_as_a_learned_decision():
    ratios = made(kind="random")  # hold_updates: 4
    assert all(len(set(ratios[i : i + 4])) == 1 for i in range(0, 20, 4))
    assert len(set(ratios)) == 5


def test_random_ratios_are_uniform_between_the_bounds():
    plan = random_ratios(0.2, 0.6, hold_updates=1, seed=3)
    ratios = [plan(update, "") for update in range(2000)]
    assert scipy.stats.kstest(ratios, scipy.stats.uniform(0.2, 0.4).cdf).pvalue > 0.01


def test_random_ratios_differ_between_groups_and_seeds_but_not_between_calls():
    draws = {(seed, group): random_ratios(0, 1, 4, seed)(8, group) for seed in (0, 1) for group in ("a", "b")}
    assert len(set(draws.values())) == 4
    assert random_ratios(0, 1, 4, 1)(9, "b") == draws[1, "b"]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.25)])
def test_a_ramp_runs_from_its_start_to_its_end_without_turning(shape, start, end):
    ratios = made(kind="schedule", schedule=shape, schedule_start=start, schedule_end=end)
    assert (ratios[0], ratios[-1]) == (start, pytest.approx(end))
    assert ratios == sorted(ratios, reverse=start > end)


def test_ramps_by_hand():
    # Five updates: p = 0, 1/4, .. 1; cosine weight at 1/4: (1 - cos(pi/4)) / 2 = 0.1464
    assert [ramp("linear", 0.2, 1.0, 5)(u, "") for u in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert ramp("cosine", 0.0, 1.0, 5)(1, "") == pytest.approx(0.14645, abs=1e-5)


@given(st.integers(0, 50), st.sampled_from(["linear", "cosine"]), st.integers(1, 20))
def test_a_ramp_never_leaves_its_ends_even_past_the_planned_run(update, shape, updates):
    assert 0.0 <= ramp(shape, 0.0, 1.0, updates)(update, "") <= 1.0


def test_a_run_of_one_update_is_at_the_start_of_its_ramp():
    assert ramp("linear", 0.3, 1.0, 1)(0, "") == 0.3


def test_replay_gives_the_recorded_ratios_in_order():
    assert made(3, replay=[0.1, 0.7, 0.4, 0.9], kind="replay", replay_run="runs/a") == [0.1, 0.7, 0.4]


def test_a_shuffled_replay_has_the_same_ratios_in_an_order_of_its_own():
    recorded = [i / 20 for i in range(20)]
    orders = [made(20, seed, recorded, kind="replay", replay_run="r", replay_order="shuffled") for seed in (0, 0, 1)]
    assert sorted(orders[0]) == recorded
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != recorded


@pytest.mark.parametrize(
    ("skipped", "ratios"),
    [
        ({2}, [0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3]),  # not .1, .1, .2, ..
        ({3, 4}, [0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3]),
        ({3, 4, 5}, "update 3 was skipped in .* and nobody knows its ratio; set train.num_updates to at most 3"),
        ({8}, [0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3]),  # beyond what is replayed
        (set(range(9)), []),
    ],
)
def test_a_skipped_update_of_the_recorded_run_keeps_its_place(tmp_path: Path, skipped: set[int], ratios):
    # Holds of 3 updates: .1 three times, .2 three times, .3 three times.
    recorded = {"exposure": {"kind": "bandit"}, "credit": {"hold_updates": 3, "lookahead_updates": 3}}
    run = begin_run(tmp_path / "run", fake_config(9, **recorded))
    for update in range(9):
        row = {**skipped_row(update, "", 0.0), "skipped": None, "reveal_ratio": (0.1, 0.2, 0.3)[update // 3]}
        run.append("metrics", skipped_row(update, "loss", 0.0) if update in skipped else row)
    config = Config.model_validate(
        {"exposure": {"kind": "replay", "replay_run": str(run.path)}, "train": {"num_updates": 8}}
    )
    if isinstance(ratios, str):
        with pytest.raises(ConfigError, match=ratios):
            recorded_ratios(config)
    else:
        assert recorded_ratios(config) == (ratios, 3)


def test_a_shuffled_replay_permutes_holds_and_leaves_them_whole():
    recorded = [ratio for ratio in (0.1, 0.3, 0.5, 0.7, 0.9) for _ in range(4)]
    orders = [[replayed(recorded, "shuffled", 20, seed, 4)(u, "") for u in range(20)] for seed in range(4)]
    for order in orders:
        assert sorted(order) == recorded
        assert all(len(set(order[i : i + 4])) == 1 for i in range(0, 20, 4))
    assert len(set(map(tuple, orders))) > 1


def test_a_hold_that_the_end_of_the_run_cuts_stays_as_short_when_it_is_shuffled():
    recorded = [0.1] * 4 + [0.5] * 4 + [0.9] * 2
    order = [replayed(recorded, "shuffled", 10, 1, 4)(u, "") for u in range(10)]
    assert sorted(order) == recorded
    assert sum(before != after for before, after in pairwise(order)) == 2


def test_a_shorter_run_shuffles_only_the_ratios_that_it_would_have_replayed():
    recorded = [0.1, 0.2, 0.3, 0.9, 0.9, 0.9]
    for seed in range(5):
        assert sorted(replayed(recorded, "shuffled", 3, seed)(u, "") for u in range(3)) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(("kind", "hold"), [("learned", 4), ("random", 4), ("fixed", 1)])
def test_the_holds_are_those_of_the_recorded_run(tmp_path, kind, hold):
    write_fake_run(tmp_path / "recorded", updates=8, kind=kind)
    config = Config.model_validate({"exposure": {"kind": "replay", "replay_run": str(tmp_path / "recorded")}})
    ratios, hold_updates = recorded_ratios(config)
    assert hold_updates == hold
    assert len(ratios) > 0


def test_a_recording_that_is_too_short_is_refused_with_both_lengths():
    with pytest.raises(ConfigError, match=r"exposure.replay_run: it recorded 3 ratios.*20"):
        replayed([0.1, 0.2, 0.3], "recorded", 20, 0)


def test_learned_settings_reach_the_learned_exposure():
    config = Config.model_validate({"exposure": {"ratio_min": 0.4, "ratio_max": 0.6}, "credit": {"hold_updates": 2}})
    exposure = make_exposure(config, 50, 0)
    assert isinstance(exposure, LearnedExposure)
    ratios = [exposure.reveal_ratio(update) for update in range(50)]
    assert (min(ratios), max(ratios)) == (0.4, 0.6)
    assert ratios[0::2] == ratios[1::2]
