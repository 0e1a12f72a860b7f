"""Thompson sampling over ratios: its belief by other routes, the optimum it finds, and where noise alone leads it."""

import json

import numpy as np
import pytest

from atesd.config import BanditSettings, CreditConfig
from atesd.control.bandit import Bandit
from atesd.control.controlled import ControlledExposure
from atesd.errors import ConfigError
from atesd.maths.keyed import generator
from atesd.records import Decision, FinishedDecision, UpdateStats


def rewarded(ratio: float, reward: float, standing: float = 0.0) -> FinishedDecision:
    decision = Decision(0, (), None, None, {"": ratio})
    return FinishedDecision(decision, ratio, ratio, (0, 1), (standing, None), (), (), reward, 0.0, reward)


def exposure(seed: int = 0, config: BanditSettings | None = None, **credit) -> ControlledExposure:
    held = CreditConfig(progress_signal="probe_nll", hold_updates=1, lookahead_updates=1, **credit)
    return ControlledExposure(Bandit(config or BanditSettings()), credit=held, seed=seed)


def play(made: ControlledExposure, decisions: range, gain, noise: float = 1.0) -> list[float]:
    """Ratios of a world in which an update at a ratio lowers the probe NLL by gain(ratio), with noise."""
    ratios, level = [], 0.0
    for update in decisions:
        ratios.append(ratio := made.reveal_ratio(update))
        made.observe(update, UpdateStats(ratio, ratio, 0.0, 0.0, 0.0, 0.0, probe_nll=level))
        level -= gain(ratio) + noise * float(generator(made._seed, "noise", update).standard_normal())
    return ratios


def test_a_belief_without_rewards_is_the_prior():
    mean, covariance = Bandit(BanditSettings(smoothness=0.25, prior_deviation=2.0)).belief()
    assert mean.tolist() == [0.0] * 5
    # Neighbours are 0.25 apart: 4 exp(-1/2)
    assert (covariance[0, 0], covariance[0, 1]) == pytest.approx((4.0, 4 * np.exp(-0.5)))


def test_the_belief_is_gaussian_regression_on_every_single_reward():
    # By another route: the full Gaussian-process formula with one row per reward, no sums, and the noise by its rule.
    bandit, rng = Bandit(BanditSettings(discount=1.0)), np.random.default_rng(0)
    played, rewards, standings = rng.integers(5, size=12), rng.normal(3.0, 2.0, size=12), rng.normal(9.0, 0.3, size=12)
    for arm, reward, standing in zip(played, rewards, standings, strict=True):
        bandit.on_reward(rewarded(bandit.ratios[arm], float(reward), float(standing)))
    y, z = ((values - values.mean()) / values.std() for values in (rewards, standings))
    kernel = np.exp(-((bandit.ratios[:, None] - bandit.ratios[None, :]) ** 2) / (2 * 0.35**2))
    across, rest, noise = kernel[:, played], np.outer(z, z) + 1.0, 1.0
    for _ in range(3):
        signal = kernel[np.ix_(played, played)] + rest
        inverse = np.linalg.inv(signal + noise * np.eye(12))
        expected = across @ inverse @ y, kernel - across @ inverse @ across.T
        noise = (np.square(y - signal @ inverse @ y).sum() + 1.0) / 13.0
    mean, covariance = bandit.belief()
    assert mean == pytest.approx(expected[0])
    assert covariance == pytest.approx(expected[1])


def test_a_low_standing_is_not_credited_to_the_ratio_that_followed_it():
    # The reward is minus twice the standing, whatever the ratio; arm 0 happened to be played at low standings.
    bandit, rng = Bandit(BanditSettings(discount=1.0)), np.random.default_rng(0)
    for _ in range(40):
        standing = float(rng.normal())
        bandit.on_reward(rewarded(0.0 if standing < 0 else 1.0, -2 * standing, standing))
    assert bandit.belief()[0] == pytest.approx([0.0] * 5, abs=0.2)


def test_the_scale_and_the_zero_of_the_reward_do_not_matter():
    beliefs = []
    for scale, zero in ((1.0, 0.0), (1e-4, 5.0)):
        bandit = Bandit(BanditSettings())
        for arm, reward in enumerate([1.0, -2.0, 0.5, 0.0, 3.0]):
            bandit.on_reward(rewarded(bandit.ratios[arm], zero + scale * reward))
        beliefs.append(bandit.belief()[0])
    assert beliefs[0] == pytest.approx(beliefs[1], abs=1e-6)


def test_what_was_learned_long_ago_is_forgotten():
    bandit = Bandit(BanditSettings(discount=0.5, smoothness=0.01, prior_deviation=0.5))
    for reward in [5.0, *[0.0, 1.0] * 20]:
        bandit.on_reward(rewarded(0.0 if reward == 5.0 else 1.0, reward))
    mean, covariance = bandit.belief()
    assert (mean[0], covariance[0, 0]) == pytest.approx((0.0, 0.25), abs=1e-6)  # the prior again


@pytest.mark.parametrize("best", [0.0, 0.6, 1.0])
def test_it_ends_within_fifteen_hundredths_of_a_known_optimum(best):
    # The reward's noise is as large as its fall half the range away from the optimum. 4 seeds, last 100 of 400.
    late = [play(exposure(seed), range(400), lambda r: 1 - 4 * (r - best) ** 2)[-100:] for seed in range(4)]
    assert np.mean(late) == pytest.approx(best, abs=0.15)


def test_it_follows_an_optimum_that_moves():
    made = exposure(config=BanditSettings(discount=0.95))
    early = play(made, range(150), lambda r: 4 * r)
    late = play(made, range(150, 400), lambda r: -4 * r)
    assert np.mean(early[-50:]) > 0.8
    assert np.mean(late[-100:]) < 0.2


def test_rewards_that_are_noise_alone_leave_it_in_the_middle():
    means = [np.mean(play(exposure(seed), range(100), lambda _: 0.0)) for seed in range(20)]
    assert np.mean(means) == pytest.approx(0.5, abs=0.1)


def test_a_reward_that_never_varies_leaves_the_prior_as_it_was():
    made = exposure()
    ratios = play(made, range(200), lambda _: 0.0, noise=0.0)
    assert made.controller.features() == (0.0,) * 5
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.1)


def test_two_seeds_give_two_sequences_and_one_seed_gives_one():
    sequences = [play(exposure(seed), range(30), lambda r: r) for seed in (0, 0, 1)]
    assert sequences[0] == sequences[1] != sequences[2]


def test_arms_lie_between_the_bounds():
    assert Bandit(BanditSettings(arms=3, ratio_min=0.2, ratio_max=0.6)).ratios == pytest.approx([0.2, 0.4, 0.6])


def look(made: ControlledExposure, updates: range) -> list:
    """What the exposure said to probes of keyed noise."""
    said = []
    for update in updates:
        ratio, noise = made.reveal_ratio(update), float(generator(0, "probe", update).standard_normal())
        said.append((ratio, made.observe(update, UpdateStats(ratio, ratio, 0.0, 0.0, 0.0, 0.0, probe_nll=noise))))
    return said


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_cut_after_any_update_changes_nothing(shuffle):
    whole = exposure(shuffle_rewards=shuffle)
    said, states = [], []
    for update in range(16):
        said += look(whole, range(update, update + 1))
        states.append(json.dumps(whole.state_dict(), allow_nan=False))
    for cut in range(15):
        after = exposure(shuffle_rewards=shuffle)
        after.load_state_dict(json.loads(states[cut]))
        assert look(after, range(cut + 1, 16)) == said[cut + 1 :]
        assert json.dumps(after.state_dict()) == states[-1]


def test_shuffled_rewards_are_the_same_ones_in_buffers_of_four():
    plain, shuffled = exposure(), exposure(shuffle_rewards=True)
    logged = []
    for made in (plain, shuffled):
        rows = []
        for update in range(9):
            made.reveal_ratio(update)
            stats = UpdateStats(0.5, 0.5, 0.0, 0.0, 0.0, 0.0, probe_nll=float(-(update**2)))
            rows.append(made.observe(update, stats))
        logged.append(rows)
    assert [len(rows) for rows in logged[0]] == [0] + [1] * 8  # the window of each decision closes an update later
    assert [len(rows) for rows in logged[1]] == [0, 0, 0, 0, 4, 0, 0, 0, 4]
    one_by_one, together = ([f.reward for row in rows for f in row] for rows in logged)
    assert sorted(one_by_one[:4]) == sorted(together[:4])
    assert one_by_one != together


def test_bounds_the_wrong_way_round_are_refused():
    with pytest.raises(ConfigError, match=r"ratio_min 0.7, ratio_max 0.2"):
        ControlledExposure(Bandit(BanditSettings()), ratio_min=0.7, ratio_max=0.2)
