"""The learned exposure as a whole: decisions, credit, policy updates, controls, and an exact resume."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atesd.config import CreditConfig, PolicyConfig
from atesd.control.learned import LearnedExposure
from atesd.control.policy import BetaPolicy
from atesd.errors import ConfigError
from atesd.maths.keyed import generator
from atesd.records import UpdateStats

PAPER = CreditConfig(preset="paper", hold_updates=2, lookahead_updates=3)


def exposure(credit: CreditConfig = PAPER, seed: int = 0, updates: int = 60, **options) -> LearnedExposure:
    return LearnedExposure(credit=credit, num_updates=updates, seed=seed, **options)


def stats(update: int, ratio: float, **changes) -> UpdateStats:
    """Keyed noise around a loss that rises with the ratio."""
    a, b, c, d = generator(0, "test", update).random(4).tolist()
    values = {
        "loss": 0.1 + ratio * a,
        "kl": 0.1 * b,
        "top1_disagreement": c,
        "student_confidence": d,
        "probe_nll": 1.0 + a,
        "probe_success": b,
        "probe_kl": c,
        "grounding": -d,
        "train_success": ((2, 1.0), (3, float(a > 0.5))),
    }
    return UpdateStats(reveal_ratio=ratio, effective_ratio=ratio, **{**values, **changes})


HALVES = (range(8), range(8, 12))


def train(made: LearnedExposure, updates: range, group: str = "", **changes) -> list:
    """The notebook's loop: everything that the exposure said, update by update."""
    said = []
    for update in updates:
        ratio = made.reveal_ratio(update, group)
        said.append((ratio, made.observe(update, stats(update, ratio, **changes))))
    return said


def consumed(said: list) -> list:
    return [finished for _, decisions in said for finished in decisions]


def test_a_ratio_is_held_and_asking_twice_changes_nothing():
    made = exposure()
    ratios = [(made.reveal_ratio(u), made.reveal_ratio(u)) for u in range(8)]
    assert all(first == second for first, second in ratios)
    assert [first for first, _ in ratios[0::2]] == [first for first, _ in ratios[1::2]]
    assert len({first for first, _ in ratios}) == 4


def test_two_seeds_give_two_sequences_and_one_seed_gives_one():
    sequences = [[ratio for ratio, _ in train(exposure(seed=seed), range(20))] for seed in (0, 0, 1)]
    assert sequences[0] == sequences[1]
    assert not set(sequences[0]) & set(sequences[2])


def test_a_policy_update_consumes_four_decisions_with_advantages_that_sum_to_zero():
    made = exposure()
    said = train(made, range(11))  # the windows of the decisions 0, 2, 4, 6 close at 3, 5, 7, 9
    assert [len(decisions) for _, decisions in said] == [0] * 9 + [4, 0]
    decisions = consumed(said)
    assert [finished.decision.update for finished in decisions] == [0, 2, 4, 6]
    assert sum(finished.advantage for finished in decisions) == pytest.approx(0.0, abs=1e-9)
    assert made.policy_updates == 1


def test_the_policy_update_is_reinforce_on_the_decisions_consumed():
    made, alone = exposure(), BetaPolicy(PolicyConfig(), state_size=7, seed=0)
    decisions = consumed(train(made, range(10)))
    alone.update(
        [finished.decision.state for finished in decisions],
        [[finished.decision.samples[""]] for finished in decisions],
        [finished.advantage for finished in decisions],
        training_progress=9 / 60,
    )
    state = made.state_dict()
    assert all(torch.equal(state["policy"]["parameters"][name], alone.parameters[name]) for name in alone.parameters)
    assert state["training_state"]["last_policy_update"] == 10


def test_decisions_drawn_before_the_last_policy_update_are_weighed():
    # H = 1, L = 4, B = 4: when the first four are consumed, the next four have long been drawn.
    stale = {**PAPER.model_dump(), "hold_updates": 1, "lookahead_updates": 4}
    runs = [exposure(CreditConfig(**stale), policy=PolicyConfig(importance_cap=cap)) for cap in (2.0, None)]
    bias = [[run._policy.parameters["output_bias"].tolist() for run in runs if train(run, part)] for part in HALVES]
    assert [run.policy_updates for run in runs] == [2, 2]
    assert bias[0][0] == bias[0][1]  # nothing is older than the first policy
    assert bias[1][0] != bias[1][1]


def test_every_decision_is_consumed_or_pending_and_none_twice():
    made = exposure()
    decisions = consumed(train(made, range(41))) + made.pending()
    assert [finished.decision.update for finished in decisions] == list(range(0, 41, 2))


def test_the_policy_moves_toward_the_ratio_that_is_rewarded():
    credit = CreditConfig(hold_updates=1, lookahead_updates=1, progress_signal="train_success")
    made, level = exposure(credit, updates=400), 0.0
    for update in range(400):
        # The update lifts success by 0.01 at ratio 0.8, and by less the further away the ratio is.
        ratio = made.reveal_ratio(update)
        made.observe(update, stats(update, ratio, train_success=((0, level),)))
        level += 0.01 - abs(ratio - 0.8)
    decision = made.pending()[-1].decision
    assert decision.concentration1 / (decision.concentration1 + decision.concentration0) == pytest.approx(0.8, abs=0.1)


def test_equal_rewards_skip_the_policy_update_and_say_so():
    made = exposure(CreditConfig(hold_updates=1, lookahead_updates=1))
    decisions = consumed(train(made, range(9), probe_success=0.5))
    assert (made.policy_updates, made.skipped_policy_updates) == (0, 2)
    assert [finished.advantage for finished in decisions] == [None] * 8
    assert made.reveal_ratio(9) == exposure(CreditConfig(hold_updates=1)).reveal_ratio(9)


def test_shuffled_rewards_are_the_same_rewards_in_another_order():
    plain = consumed(train(exposure(), range(60)))
    shuffled = consumed(train(exposure(PAPER.model_copy(update={"shuffle_rewards": True})), range(60)))
    earned, given_out = [sorted(f.reward for f in decisions[:4]) for decisions in (plain, shuffled)]
    assert earned == pytest.approx(given_out)  # the first buffer was drawn from the same untrained policy
    own = [f.progress + 0.1 * f.grounding for f in shuffled]
    places = [own.index(pytest.approx(f.reward)) % 4 for f in shuffled]
    orders = {tuple(places[i : i + 4]) for i in range(0, len(places), 4)}
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(orders) > 3  # of 7 buffers, each with a permutation of its own


def test_standardised_mixing_reports_the_reward_that_was_used():
    credit = PAPER.model_copy(update={"mixing": "standardised"})
    first = consumed(train(exposure(credit), range(11)))
    assert sum(finished.reward for finished in first) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_costs_its_decisions_and_never_reaches_the_policy(bad):
    made = exposure()
    for update in range(60):
        ratio = made.reveal_ratio(update)
        assert 0.0 <= ratio <= 1.0
        made.observe(update, stats(update, ratio, **({"loss": bad, "kl": bad} if update % 20 == 5 else {})))
    assert made.dropped == {"non-finite progress signal": 6}  # two overlapping windows at each of 5, 25, 45
    assert made.ignored == {"log_kl": 3}
    assert made.policy_updates > 0
    json.dumps(made.state_dict(), default=torch.Tensor.tolist, allow_nan=False)


def test_draws_are_clipped_for_use_but_learned_from_as_drawn():
    made = exposure(ratio_min=0.45, ratio_max=0.55)
    said = train(made, range(60))
    assert {0.45, 0.55} < {ratio for ratio, _ in said}
    assert any(not 0.45 <= finished.decision.samples[""] <= 0.55 for finished in consumed(said))


def test_bounds_the_wrong_way_round_are_refused():
    with pytest.raises(ConfigError, match=r"ratio_min 0.7, ratio_max 0.2"):
        exposure(ratio_min=0.7, ratio_max=0.2)


def test_going_back_before_the_current_decision_is_an_error():
    made = exposure()
    made.reveal_ratio(6)
    with pytest.raises(ValueError, match="update 3 is before"):
        made.reveal_ratio(3)


def test_one_ratio_per_update_ignores_the_group():
    made = exposure()
    assert made.reveal_ratio(0, "p1") == made.reveal_ratio(0, "p2") == made.reveal_ratio(0)


def test_groups_draw_their_own_ratios_in_any_order_and_are_all_credited():
    made, other = (exposure(granularity="per_problem") for _ in range(2))
    forward = {group: made.reveal_ratio(0, group) for group in ("a", "b", "c")}
    backward = {group: other.reveal_ratio(0, group) for group in ("c", "b", "a")}
    assert forward == backward
    assert len(set(forward.values())) == 3
    (pending,) = made.pending()
    assert pending.decision.samples == forward


def test_groups_first_met_later_in_the_hold_belong_to_its_decision():
    made = exposure(granularity="per_difficulty")
    for update, group in enumerate(["2", "3", "2", "5", "2"]):
        made.observe(update, stats(update, made.reveal_ratio(update, group)))
    first, second, third = (pending.decision.samples.keys() for pending in made.pending())
    assert (first, second, third) == ({"2", "3"}, {"2", "5"}, {"2"})


def test_the_sound_preset_measures_its_probe_once_per_decision_and_the_state_s_once_per_policy_update():
    made = exposure(CreditConfig(), policy=PolicyConfig(decisions_per_policy_update=2))
    wanted = {update: made.measurements(update) for update in range(17)}
    both, one = {"probe_success", "probe_nll"}, {"probe_success"}
    assert {u: names for u, names in wanted.items() if names} == {0: both, 4: one, 8: both, 12: one, 16: both}


def test_the_paper_preset_asks_for_grounding_at_every_update():
    made = exposure(CreditConfig(preset="paper"))
    assert [made.measurements(u) for u in (0, 1)] == [{"grounding", "probe_nll"}, {"grounding"}]


def test_a_probe_that_closes_windows_off_the_decisions_is_measured_there_too():
    made = exposure(CreditConfig(progress_signal="probe_kl", hold_updates=4, lookahead_updates=6))
    due = [update for update in range(13) if "probe_kl" in made.measurements(update)]
    assert due == [0, 4, 6, 8, 10, 12]
    assert "train_success" in exposure(CreditConfig(progress_signal="train_success")).measurements(3)


def whole_state(made: LearnedExposure) -> str:
    return json.dumps(made.state_dict(), default=torch.Tensor.tolist, sort_keys=True)


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state, default=torch.Tensor.tolist, allow_nan=False))


@pytest.mark.parametrize("granularity", ["update", "per_problem"])
@pytest.mark.parametrize("signal", ["train_kl", "train_success"])
@pytest.mark.parametrize("window_start", ["decision", "hold_end"])
def test_a_cut_after_any_update_changes_nothing(granularity, signal, window_start):
    # (hold + lookahead) = 5 updates; B = 2, so that three policy updates lie inside the 16 cuts.
    credit = PAPER.model_copy(update={"progress_signal": signal, "window_start": window_start})
    options = {"granularity": granularity, "policy": PolicyConfig(decisions_per_policy_update=2, beta1=0.5)}
    whole = exposure(credit, **options)
    said = train(whole, range(20), group="p1")
    assert whole.policy_updates >= 3
    before = exposure(credit, **options)
    for cut in range(16):
        train(before, range(cut, cut + 1), group="p1")
        after = exposure(credit, **options)
        after.load_state_dict(through_json(before.state_dict()))
        assert train(after, range(cut + 1, 20), group="p1") == said[cut + 1 :]
        assert whole_state(after) == whole_state(whole)
        assert after.pending() == whole.pending()


def test_a_cut_between_the_ratio_and_its_stats_changes_nothing():
    whole, before, after = exposure(), exposure(), exposure()
    train(whole, range(10))
    train(before, range(4))
    before.reveal_ratio(4)  # the decision is taken, and the process ends
    after.load_state_dict(through_json(before.state_dict()))
    train(after, range(4, 10))
    assert whole_state(after) == whole_state(whole)


def test_the_state_sees_every_observation():
    made = exposure()
    states = {whole_state(made)}
    for update in range(12):
        train(made, range(update, update + 1))
        states.add(whole_state(made))
    assert len(states) == 13


def test_ranks_that_see_different_numbers_have_different_states():
    first, second = exposure(), exposure()
    train(first, range(3))
    train(second, range(3), top1_disagreement=0.123)
    assert whole_state(first) != whole_state(second)


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.sampled_from(["raw", "standardised"]))
def test_any_hold_and_lookahead_keep_the_ratio_a_ratio(hold, lookahead, seed, mixing):
    credit = CreditConfig(preset="paper", hold_updates=hold, lookahead_updates=lookahead, mixing=mixing)
    made = exposure(credit, seed=seed)
    said = train(made, range(30))
    assert all(0.0 <= ratio <= 1.0 for ratio, _ in said)
    assert len(consumed(said)) + len(made.pending()) == -(-30 // hold)


def test_the_controller_needs_neither_a_trainer_nor_transformers():
    code = (
        "import sys, atesd.control.learned; print([m for m in sys.modules if m.startswith(('transformers', 'peft'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
