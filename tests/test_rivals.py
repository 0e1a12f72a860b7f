"""The rules of others: each against its own rule worked out in a loop, on a curve it should find, and cut anywhere."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from atesd.cli.plan import acting_lines
from atesd.config import Config, config_from_mapping, load_config, method_name
from atesd.control.factory import make_exposure
from atesd.control.interface import Exposure
from atesd.control.rivals.annealing import Annealing, AnnealingSettings
from atesd.control.rivals.binary_search import BinarySearch, BinarySearchSettings
from atesd.control.rivals.control_share import ControlShare, ControlShareSettings
from atesd.control.rivals.item_response import ItemResponse, ItemResponseSettings
from atesd.control.rivals.success_setpoint import SuccessSetpoint, SuccessSetpointSettings
from atesd.control.rivals.success_trend import SuccessTrend, SuccessTrendSettings
from atesd.control.rivals.thresholds import Thresholds, ThresholdsSettings
from atesd.control.rivals.verdicts import Heard, Rule, RuleController
from atesd.control.settings import group_of
from atesd.control.simulation import late_ratio_of_a_frozen_student
from atesd.errors import ConfigError
from atesd.importing import require_offers
from atesd.maths.keyed import generator
from atesd.records import Decision, FinishedDecision, UpdateStats
from atesd.rows import late_mean
from atesd_lab.audit.audit import notes_of
from atesd_lab.report.decisions import decisions_table
from atesd_lab.report.rows import read_run
from quick import cut_after, fingerprint, finished, quick

FOLLOW_VERDICTS = ("success_setpoint", "success_trend", "thresholds", "item_response", "binary_search")
RIVALS = (*FOLLOW_VERDICTS, "control_share", "annealing")
RNG = generator(0, "test")


def stats(ratio: float = 0.5, graded: Sequence[tuple[str, float]] = (), **values) -> UpdateStats:
    return UpdateStats(ratio, ratio, 0.1, 0.1, 0.1, 0.5, group_success=tuple(graded), **values)


def heard(**groups: tuple[float, int] | tuple[float, int, float]) -> dict[str, Heard]:
    """Groups as (share solved, rollouts), with the ratio that taught them third."""
    return {name: Heard(some[0], some[1], some[2] if len(some) == 3 else None) for name, some in groups.items()}


def random_updates(count: int, *groups: str) -> Iterator[dict[str, list[float]]]:
    """Verdicts of five rollouts of each group; the chance drifts, so that every rule has something to follow."""
    for update in range(count):
        draws = generator(3, "verdicts", update)
        yield {group: (draws.random(5) < 0.1 + 0.8 * draws.random()).astype(float).tolist() for group in groups}


def told(verdicts: dict[str, list[float]]) -> dict[str, Heard]:
    return {group: Heard(sum(some) / len(some), len(some), None) for group, some in verdicts.items()}


# Each rule against a small computation of its own


def test_the_set_point_draws_around_the_mean_of_its_group_with_the_spread_of_its_verdicts():
    rule = SuccessSetpoint(
        SuccessSetpointSettings(gain=0.4, start=0.3, step=0.05, decay=0.7, deviation=0.02, spread=2.0)
    )
    history: dict[str, list[float]] = {"a": [], "b": []}
    common = 0.3
    for verdicts in random_updates(12, "a", "b"):
        rule.hear(told(verdicts))
        everything = [right for some in verdicts.values() for right in some]
        solved = np.mean(everything)
        common = min(max(common + (0.05 if solved < 0.4 else -0.05 if solved > 0.6 else 0.0), 0.0), 1.0)
        for group, some in verdicts.items():
            history[group].append(float(np.mean(some)))
    for group, means in history.items():
        # An exponential average that starts at its first value: weights .7^(n-1) on it, .3 x .7^age on the others.
        weights = np.array([0.7 ** (len(means) - 1), *(0.3 * 0.7**age for age in range(len(means) - 2, -1, -1))])
        success = float(weights @ means)
        spread = 2.0 * float(weights @ [m * (1 - m) for m in means])
        mean = min(max(common + 0.4 * (0.5 - success), 0.0), 1.0)
        drawn = mean + max(0.02, spread) * float(generator(1, "draw").standard_normal())
        assert rule.ratio(group, generator(1, "draw")) == pytest.approx(drawn)
    assert rule.features() == pytest.approx((common,))


def test_the_trend_multiplies_by_earlier_over_present_success():
    rule = SuccessTrend(SuccessTrendSettings(window=2, start=0.8))
    successes, expected = [0.5, 0.25, 0.5, 0.75, 0.75], 0.8
    said = [rule.ratio("", RNG)]
    for hold, success in enumerate(successes):
        for part in (success - 0.25, success + 0.25):  # a hold of two updates: their rollouts count together
            rule.hear(heard(all=(part, 4)))
        said.append(rule.ratio("", RNG))
        if hold:
            earlier = successes[max(0, hold - 2) : hold]
            expected = min(expected * sum(earlier) / len(earlier) / success, 1.0)
        assert said[-1] == pytest.approx(expected)
    # .8, then x 2 clipped at 1, x .375/.5, x .375/.75, x .625/.75
    assert said == pytest.approx([0.8, 0.8, 1.0, 0.75, 0.375, 0.3125])


def test_the_trend_takes_no_success_for_half_a_rollout_and_never_sticks_at_0():
    rule = SuccessTrend(SuccessTrendSettings(window=1, start=0.5))
    for success, ratio in ((0.0, 0.5), (1.0, 0.0625), (1.0, 0.0625), (0.0, 0.5)):  # 1/8 to 1 and back to 1/8
        rule.hear(heard(all=(success, 4)))
        assert rule.ratio("", RNG) == pytest.approx(ratio)
    for _ in range(9):
        rule.hear(heard(all=(0.0, 4)))
        rule.ratio("", RNG)
        rule.hear(heard(all=(1.0, 4)))
        low = rule.ratio("", RNG)
    assert low == pytest.approx(0.0625)


def test_the_thresholds_move_each_group_by_its_own_verdicts():
    settings = ThresholdsSettings(step=0.2, start=0.5, upper=0.35, ratio_max=0.9)
    rule, ratios = Thresholds(settings), {}
    for verdicts in random_updates(20, "a", "b", "c"):
        rule.hear(told(verdicts))
        first = float(np.mean(list(ratios.values()))) if ratios else 0.5
        for group, some in verdicts.items():
            step = 0.2 if not any(some) else -0.2 if sum(some) > 0.35 * len(some) else 0.0
            ratios[group] = min(max(ratios.get(group, first) + step, 0.0), 0.9)
        assert [rule.ratio(group, RNG) for group in "abc"] == pytest.approx([ratios[group] for group in "abc"])
    assert rule.ratio("new", RNG) == pytest.approx(float(np.mean(list(ratios.values()))))


def test_the_curve_is_the_mode_of_the_posterior_and_the_ratio_where_it_reaches_the_target():
    settings = ItemResponseSettings(target=0.6, prior_slope=3.0, prior_deviation=1.5, window=5)
    rule = ItemResponse(settings)
    rows = [(0.9, 1.0, 4), (0.1, 0.0, 4), (0.2, 0.25, 8), (0.5, 0.5, 4), (0.7, 1.0, 3), (0.4, 0.2, 10)]
    rule.hear({"a": Heard(0.5, 4, None)})  # first met: nothing has taught it
    for taught, success, rollouts in rows:
        rule.hear({"a": Heard(success, rollouts, taught)})

    def minus_log_posterior(curve: np.ndarray) -> float:
        total = (curve[0] ** 2 + (curve[1] - 3.0) ** 2) / (2 * 1.5**2)
        for taught, success, rollouts in rows[-5:]:
            chance = 1 / (1 + math.exp(-(curve[0] + curve[1] * (taught - 0.5))))
            total -= rollouts * (success * math.log(chance) + (1 - success) * math.log(1 - chance))
        return total

    level, slope = minimize(minus_log_posterior, np.array([0.0, 3.0]), tol=1e-12).x
    assert rule.ratio("a", RNG) == pytest.approx(0.5 + (math.log(0.6 / 0.4) - level) / slope, abs=1e-4)
    assert rule.ratio("never met", RNG) == pytest.approx(0.5 + math.log(0.6 / 0.4) / 3.0)


@pytest.mark.parametrize("success", [0.0, 1.0])
def test_a_curve_that_says_nothing_of_the_ratio_is_fitted_without_running_away(success):
    rule = ItemResponse(ItemResponseSettings())
    for _ in range(60):
        rule.hear({"a": Heard(success, 64, 0.5)})
    level, slope = rule.curve(rule._seen["a"])
    assert abs(level) < 12
    assert 3 < slope < 5
    assert (rule.ratio("a", RNG) > 1) == (success == 0.0)


def test_the_search_cuts_the_interval_at_what_taught():
    rule = BinarySearch(BinarySearchSettings(decay=0.5))
    cuts = [(0.6, 1.0, (0.0, 0.6)), (0.4, 0.0, (0.4, 0.6)), (0.5, 1.0, (0.0, 0.5)), (0.1, 0.2, (0.1, 0.5))]
    mean = (0.0, 1.0)
    for taught, success, (low, high) in cuts:
        rule.hear({"a": Heard(success, 5, taught)})
        mean = ((mean[0] + low) / 2, (mean[1] + high) / 2)
        uniform = float(generator(2, "draw").random())
        assert rule.ratio("a", generator(2, "draw")) == pytest.approx(low + (high - low) * uniform)
        assert rule.ratio("new", generator(2, "draw")) == pytest.approx(mean[0] + (mean[1] - mean[0]) * uniform)


def test_the_search_judges_a_draw_over_all_the_updates_that_it_taught():
    rule = BinarySearch(BinarySearchSettings())
    for success in (0.0, 1.0, 1.0):  # after the first: not enough; over the three: 2/3
        rule.hear({"a": Heard(success, 4, 0.7)})
    assert rule._intervals["a"] == (0.0, 0.7)
    rule.hear({"a": Heard(0.0, 8, 0.7)})  # 8 of 20
    assert rule._intervals["a"] == (0.7, 1.0)


def rewarded(ratio: float, reward: float) -> FinishedDecision:
    decision = Decision(0, (), None, None, {"": ratio})
    return FinishedDecision(decision, ratio, ratio, (0, 1), (), (), (), reward, 0.0, reward)


def test_the_standing_share_climbs_while_its_holds_earn_more_than_the_control():
    rule = ControlShare(ControlShareSettings(share=0.5, start=0.5, step=0.1, decay=0.6))
    ratio, rewards = 0.5, {True: [], False: []}
    for hold in range(60):
        drawn = rule.propose("", generator(0, "hold", hold))
        shown = not generator(0, "hold", hold).random() < 0.5
        assert drawn == pytest.approx(ratio if shown else 0.0)
        reward = float(generator(0, "reward", hold).standard_normal())
        rule.on_reward(rewarded(drawn, reward))
        rewards[shown].append(reward)
        if shown and rewards[False]:
            means = {}
            for kind, some in rewards.items():
                weights = [0.6 ** (len(some) - 1), *(0.4 * 0.6**age for age in range(len(some) - 2, -1, -1))]
                means[kind] = float(np.dot(weights, some))
            ratio = min(max(ratio + (0.1 if means[True] > means[False] else -0.1), 0.1), 1.0)
    assert len(rewards[False]) > 20


def test_annealing_takes_easy_problems_to_0_first_and_drops_out_a_share_of_all():
    settings = AnnealingSettings(start=0.8, easiest_end=0.5, hardest_end=1.0, dropout=0.25)
    plan = Annealing(settings, num_updates=40)
    for update in range(40):
        if update == 10:
            # A quarter done: easiest at 1 - .25/.5, middle (end .75) at 1 - .25/.75, hardest at 1 - .25/1, of .8 each.
            assert [plan.ramp(level) for level in (2, 5, 9)] == pytest.approx([0.4, 0.8 * 2 / 3, 0.6])
            assert plan.ramp(7) == pytest.approx(0.6)  # not met yet: as the hardest
            drawn = [plan.propose(f"2 p{i}", generator(0, "problem", i)) for i in range(4000)]
            assert set(drawn) == {0.0, plan.ramp(2)}
            assert drawn.count(0.0) / 4000 == pytest.approx(0.25, abs=0.03)
        for problem in ("2 a", "9 b", "5 c"):
            plan.propose(problem, generator(0, "problem", update))
        plan.on_update(stats())  # it hears of no verdict, nor needs one
    assert plan.ramp(9) == 0.0


def test_annealing_stays_between_its_bounds_and_its_plan_says_the_mean_of_what_it_shows():
    settings = config(
        "annealing", exposure={"ratio_min": 0.3, "dropout": 0.0, "easiest_end": 1.0}, train={"num_updates": 40}
    )
    made = make_exposure(settings, 40, 0)
    ratios = []
    for update in range(40):
        ratios.append(made.reveal_ratio(update, "3 p"))
        drive(made, settings, range(update, update + 1))
    # Down from 1 to .3 over the first .7, then level: .7 * .65 + .3 * .3
    assert np.mean(ratios) == pytest.approx(0.545, abs=0.06)  # holds of 4 updates show the ratio of their first
    assert "a mean ratio of about 0.55, or 0.55 where all" in settings.rule_note


@pytest.mark.parametrize("kind", ["annealing", "item_response"])
def test_a_ratio_by_difficulty_over_data_without_difficulties_is_said(kind):
    words = ["data.source=mine.jsonl", "model.path=x", "data.checker=math"]
    settings = load_config("micro", [f"exposure.kind={kind}", *words])
    assert any("mine.jsonl names no difficulty: all problems count as one" in line for line in acting_lines(settings))
    assert not any(
        "names no difficulty" in line for line in acting_lines(load_config("micro", [f"exposure.kind={kind}"]))
    )
    with pytest.raises(ConfigError, match=r"easiest_end.* acts with data that names difficulties"):
        load_config("micro", ["exposure.kind=annealing", "exposure.easiest_end=0.4", *words])


# On curves where its source says that it arrives


def taught_student(kind: str, success_at: Callable[[float, int], float], updates: int = 160, **exposure) -> list[float]:
    """The ratios of a rule over a student whose success, an update later, is a function of the ratio that taught it.

    32 rollouts of one group per update, and as its probe success the sum of `success_at`, as if each update added it.
    """
    config = config_from_mapping({"exposure": {"kind": kind, **exposure}, "credit": {"hold_updates": 1}})
    made = make_exposure(config, updates, 0)
    success, reached, ratios = 0.5, 0.0, []
    for update in range(updates):
        ratio = made.reveal_ratio(update, "3")
        verdicts = generator(5, "rollouts", update).random(32) < success
        group = "" if config.granularity == "update" else "3"
        made.observe(update, stats(ratio, [(group, float(right)) for right in verdicts], probe_success=reached))
        success = success_at(ratio, update)
        reached += success
        ratios.append(ratio)
    return ratios


def curve(middle: float, steepness: float = 6.0) -> Callable[[float, int], float]:
    return lambda ratio, _: 1 / (1 + math.exp(-steepness * (ratio - middle)))


@pytest.mark.parametrize("middle", [0.3, 0.6])
@pytest.mark.parametrize("kind", ["success_setpoint", "item_response"])
def test_what_aims_at_half_success_finds_the_ratio_that_gives_it(kind, middle):
    late = taught_student(kind, curve(middle))[-60:]
    assert float(np.mean(late)) == pytest.approx(middle, abs=0.1)


def test_the_search_ends_at_the_least_ratio_that_is_enough():
    # Enough from .4 on, for certain: every draw below fails, every draw above is enough and lowers the upper end.
    ratios = taught_student("binary_search", lambda ratio, _: float(ratio >= 0.4), granularity="per_difficulty")
    assert float(np.mean(ratios[-40:])) == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("step", [0.1, 0.25])
def test_the_thresholds_come_to_where_success_is_between_them(step):
    # Above .35 from ratio .5 on, and none at all below .3.
    shape = curve(0.55, 12.0)
    late = taught_student("thresholds", lambda r, u: shape(r, u) if r > 0.3 else 0.0, step=step)[-40:]
    assert 0.25 <= float(np.mean(late)) <= 0.55


def test_the_trend_withdraws_as_the_student_becomes_able():
    ratios = taught_student("success_trend", lambda _, update: min(0.2 + 0.005 * update, 1.0))
    assert ratios[0] == 0.5
    assert float(np.mean(ratios[-20:])) < 0.25


@pytest.mark.parametrize(("gain", "end"), [(1.0, 1.0), (-1.0, 0.1)])
def test_the_standing_share_finds_whether_exposure_helps(gain, end):
    # What an update adds to probe success: gain x ratio.
    ratios = taught_student("control_share", lambda ratio, _: gain * ratio)
    shown = [ratio for ratio in ratios if ratio > 0]
    assert shown[-1] == pytest.approx(end)
    assert 0.15 < ratios.count(0.0) / len(ratios) < 0.35


# What all of them have in common


def config(kind: str, **groups) -> Config:
    return config_from_mapping({**groups, "exposure": {"kind": kind, **groups.get("exposure", {})}})


def drive(made: Exposure, settings: Config, updates: range) -> list:
    """What an exposure said, update by update, of eight rollouts of two difficulties; every problem comes again."""
    said = []
    for update in updates:
        places = [(f"p{(update + place) % 12}", place % 2) for place in range(8)]
        groups = [group_of(settings.granularity, name, level) for name, level in places]
        ratios = [made.reveal_ratio(update, group) for group in groups]
        draws = generator(1, "stats", update)
        graded = list(zip(groups, (draws.random(8) > 0.5).astype(float).tolist(), strict=True))
        wanted = "probe_success" in made.measurements(update)
        said.append(
            (ratios, made.observe(update, stats(0.5, graded, probe_success=draws.random() if wanted else None)))
        )
    return said


@pytest.mark.parametrize("kind", RIVALS)
def test_a_cut_after_any_update_changes_nothing(kind):
    settings = config(kind)
    whole, said, states = make_exposure(settings, 20, 0), [], []
    for update in range(20):
        said += drive(whole, settings, range(update, update + 1))
        states.append(json.dumps(whole.state_dict(), allow_nan=False, sort_keys=True))
    for cut in range(19):
        after = make_exposure(settings, 20, 0)
        after.load_state_dict(json.loads(states[cut]))
        assert drive(after, settings, range(cut + 1, 20)) == said[cut + 1 :]
        assert json.dumps(after.state_dict(), sort_keys=True) == states[-1]


@pytest.mark.parametrize("kind", RIVALS)
def test_a_ratio_is_held_and_stays_between_the_bounds(kind):
    bounds = {"ratio_max": 0.6} if kind in ("control_share", "annealing") else {"ratio_min": 0.2, "ratio_max": 0.6}
    settings = config(kind, exposure=bounds)
    made = make_exposure(settings, 24, 0)
    require_offers(made, Exposure, kind, "")
    group = group_of(settings.granularity, "p1", 0)
    ratios = []
    for update in range(24):
        ratios.append(made.reveal_ratio(update, group))
        drive(made, settings, range(update, update + 1))
    assert all(len({*ratios[start : start + 4]}) == 1 for start in range(0, 24, 4))
    assert bounds.get("ratio_min", 0.0) <= min(ratios)
    assert max(ratios) <= 0.6


@pytest.mark.parametrize("kind", RIVALS)
def test_the_rewards_of_a_rule_are_logged(kind):
    settings = config(kind)
    rewarded = [one for _, some in drive(make_exposure(settings, 20, 0), settings, range(13)) for one in some]
    assert [one.decision.update for one in rewarded] == [0, 4, 8]


class Listening:
    """A rule that keeps what it hears."""

    def __init__(self) -> None:
        self.everything: list[dict[str, Heard]] = []

    def features(self) -> tuple[float, ...]:
        return ()

    def ratio(self, group: str, rng: np.random.Generator) -> float:  # noqa: ARG002
        return {"a": 0.25, "b": 2.0}[group] if not self.everything else 0.5

    def hear(self, heard) -> None:
        self.everything.append(dict(heard))

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state) -> None:
        pass


def test_a_rule_hears_the_ratio_that_taught_the_group_before_and_nothing_where_nothing_was_verified():
    rule: Rule = Listening()
    controller = RuleController(rule, (0.0, 0.75), shuffled=False, seed=0)
    assert [controller.propose(group, RNG) for group in "ab"] == [0.25, 0.75]
    for _ in range(2):
        controller.on_update(stats(graded=[("a", 1.0), ("a", 0.0), ("b", 1.0)]))
    controller.on_update(stats())
    assert rule.everything == [heard(a=(0.5, 2), b=(1.0, 1)), heard(a=(0.5, 2, 0.25), b=(1.0, 1, 0.75))]


def test_shuffled_verdicts_keep_the_share_of_all_so_far_and_nothing_of_who_was_right():
    rule = Listening()
    controller = RuleController(rule, (0.0, 1.0), shuffled=True, seed=0)
    for _ in range(200):
        controller.on_update(stats(graded=[("easy", 1.0)] * 10 + [("hard", 0.0)] * 30))
    means = {group: np.mean([one[group].success for one in rule.everything]) for group in ("easy", "hard")}
    assert means == pytest.approx({"easy": 0.25, "hard": 0.25}, abs=0.04)
    plain = Listening()
    RuleController(plain, (0.0, 1.0), shuffled=False, seed=0).on_update(stats(graded=[("easy", 1.0), ("hard", 0.0)]))
    assert plain.everything == [heard(easy=(1.0, 1), hard=(0.0, 1))]


@pytest.mark.parametrize("kind", FOLLOW_VERDICTS)
def test_the_null_control_of_a_rule_changes_what_it_does_and_its_name(kind):
    settings, null = config(kind), config(kind, exposure={"shuffle_verdicts": True})
    said, of_null = (drive(make_exposure(one, 40, 0), one, range(40)) for one in (settings, null))
    assert [ratios for ratios, _ in said] != [ratios for ratios, _ in of_null]
    assert method_name(null) == f"{method_name(settings)}, shuffled verdicts"


def test_the_null_control_of_the_standing_share_is_that_of_its_rewards():
    assert "shuffled rewards" in method_name(config("control_share", credit={"shuffle_rewards": True}))
    for kind in ("annealing", *FOLLOW_VERDICTS):
        with pytest.raises(ConfigError, match="shuffle_rewards"):
            load_config("micro", [f"exposure.kind={kind}", "credit.shuffle_rewards=true"])


@pytest.mark.parametrize("kind", FOLLOW_VERDICTS)
def test_a_rule_that_follows_verdicts_needs_a_checker(kind):
    with pytest.raises(ConfigError, match=rf"exposure.kind: {kind} follows verdicts; set data.checker"):
        config(kind, data={"checker": "none"})


@pytest.mark.parametrize(
    ("exposure", "message"),
    [
        ({"kind": "success_setpoint", "low": 0.7}, "low 0.7 is above high 0.6; swap them"),
        ({"kind": "control_share", "ratio_min": 0.1}, "ratio_min 0.1 would lift the control holds off 0"),
        ({"kind": "control_share", "ratio_max": 0.05}, "step 0.1 is above ratio_max 0.05"),
        (
            {"kind": "annealing", "ratio_min": 0.1},
            "ratio_min 0.1 would lift the dropout off 0; leave it out, or set dro",
        ),
        ({"kind": "annealing", "hardest_end": 0.2}, "easiest_end 0.5 is above hardest_end 0.2; swap them"),
        ({"kind": "success_trend", "ratio_min": 0}, "expected above 0 and at most 1"),
        ({"kind": "annealing", "granularity": "per_problem"}, "per_problem_in_difficulty"),
        ({"kind": "item_response", "shuffle_verdict": True}, "shuffle_verdicts"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_the_fix(exposure, message):
    with pytest.raises(ConfigError, match=message):
        config_from_mapping({"exposure": exposure})


@pytest.mark.parametrize("kind", RIVALS)
def test_dry_run_and_audit_say_what_the_budget_can_tell_a_rule(kind):
    settings = load_config("micro", [f"exposure.kind={kind}", "train.num_updates=12"])
    assert settings.rule_note.startswith("rule: ")
    assert settings.rule_note[1:] in " ".join(notes_of(settings))
    assert any(kind in line and settings.exposure.label(settings.credit) in line for line in acting_lines(settings))


def test_a_level_moves_a_rule_that_no_effect_could_have_moved():
    # The set-point under a student who never learns: shown all if it solves a quarter, nothing if three quarters.
    settings = config("success_setpoint")
    low, high = (
        late_ratio_of_a_frozen_student(make_exposure(settings, 100, 0), settings.granularity, 100, 32, level)
        for level in (0.25, 0.75)
    )
    assert low > 0.8
    assert high < 0.2
    # 25 decisions, a quarter at 0: sqrt(1/6.25 + 1/18.75) = .46
    assert "standard error of 0.46" in config("control_share").rule_note
    # Two ramps down, ends .5 and 1, of area .25 and .5, less a quarter: .28
    assert "a mean ratio of about 0.28" in config("annealing").rule_note


def test_a_run_cut_after_an_update_goes_on_to_the_same_end_and_is_reported(tmp_path: Path):
    settings = quick("exposure.kind=annealing")
    whole = finished(settings, tmp_path / "whole")
    assert [row["status"] for row in whole.rows("decisions")] == ["finished"] * 3 + ["pending"]
    again = finished(settings, cut_after(whole, 3, tmp_path / "cut"))
    assert fingerprint(again) == fingerprint(whole)
    run = read_run(whole.path)
    table = decisions_table(run, run.decisions, "Decisions")
    assert [row[table.columns.index("held")] for row in table.rows] == ["0 to 1", "2 to 3", "4 to 5", "6 to 7"]
    assert late_mean(run.series("reveal_ratio")[1]) < 0.4
