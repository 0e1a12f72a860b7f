"""The decision ledger: windows, what is measured when, who is rewarded once, and who is dropped."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.config import CreditConfig
from atesd.control.ledger import DecisionLedger
from atesd.records import Decision, UpdateStats


def credit(hold: int = 4, lookahead: int = 4, **settings) -> CreditConfig:
    values = {"progress_signal": "train_kl", "discount": 0.5, **settings}
    return CreditConfig(hold_updates=hold, lookahead_updates=lookahead, **values)


def stats(loss: float = 0.0, ratio: float = 0.5, **changes) -> UpdateStats:
    values = {"effective_ratio": ratio, "kl": 0.1, "top1_disagreement": 0.1, "student_confidence": 0.5, **changes}
    return UpdateStats(reveal_ratio=ratio, loss=loss, **values)


def decision(update: int) -> Decision:
    return Decision(update, (0.0,) * 7, 1.7, 1.7, {"": 0.5})


def run(config: CreditConfig, series: list[UpdateStats]) -> tuple[DecisionLedger, dict[int, list]]:
    """Decide every hold, record every update; what finished, by the update that finished it."""
    ledger, finished = DecisionLedger(config), {}
    for update, shown in enumerate(series):
        if update % config.hold_updates == 0:
            ledger.open(decision(update))
        finished[update] = ledger.record(update, shown)
    return ledger, finished


def test_a_decision_is_rewarded_once_and_only_after_its_lookahead():
    _, finished = run(credit(), [stats(float(10 - u)) for u in range(13)])
    assert [(u, f.decision.update) for u, fs in finished.items() for f in fs] == [(4, 0), (8, 4), (12, 8)]


def test_the_window_of_the_formula_starts_at_the_decision():
    # H = L = 2, discount 0.5: l_0..l_2 = 5, 3, 2 gives 1*2 + 0.5*1 = 2.5
    _, finished = run(credit(2, 2), [stats(loss) for loss in (5.0, 3.0, 2.0)])
    (first,) = finished[2]
    assert (first.window, first.progress_signal, first.progress) == ((0, 2), (5.0, 3.0, 2.0), pytest.approx(2.5))


def test_the_window_of_the_prose_starts_where_the_hold_ends():
    # l_2..l_4 = 2, 4, 1: 1*(-2) + 0.5*3 = -0.5
    _, finished = run(credit(2, 2, window_start="hold_end"), [stats(loss) for loss in (5.0, 3.0, 2.0, 4.0, 1.0)])
    (first,) = finished[4]
    assert (first.decision.update, first.window, first.progress) == (0, (2, 4), pytest.approx(-0.5))


def test_the_ratios_that_acted_inside_the_window_are_recorded():
    _, finished = run(credit(2, 3), [stats(ratio=r) for r in (0.1, 0.1, 0.9, 0.9)])
    assert finished[3][0].ratios_in_window == (0.1, 0.1, 0.9, 0.9)


def test_the_effective_ratio_is_the_mean_over_the_hold():
    series = [stats(effective_ratio=r) for r in (0.2, 0.4, 0.9)]
    _, finished = run(credit(2, 2), series)
    assert finished[2][0].effective_ratio == pytest.approx(0.3)


def test_grounding_is_taken_after_the_decision_and_mixed_in():
    # g_1, g_2 = -1, -4 (g_0 is before the decision acts): (1*-1 + 0.5*-4) / 1.5 = -2; reward 0 + 0.1 * -2
    series = [stats(grounding=g) for g in (-100.0, -1.0, -4.0)]
    _, finished = run(credit(2, 2, grounding_weight=0.1), series)
    (first,) = finished[2]
    assert first.grounding_signal == (-1.0, -4.0)
    assert (first.grounding, first.reward) == (pytest.approx(-2.0), pytest.approx(-0.2))


def test_successes_count_negatively_so_that_progress_is_a_fall():
    series = [stats(probe_success=0.25), stats(), stats(probe_success=0.75)]
    _, finished = run(credit(2, 2, progress_signal="probe_success"), series)
    # -0.25 - (-0.75) = 0.5, measured two updates on: discounted once
    assert finished[2][0].progress == pytest.approx(0.25)
    assert finished[2][0].progress_signal == (-0.25, None, -0.75)


@pytest.mark.parametrize(
    ("signal", "before", "after"),
    [
        ("train_kl", {"loss": 3.0}, {"loss": 1.0}),
        ("probe_nll", {"probe_nll": 3.0}, {"probe_nll": 1.0}),
        ("probe_kl", {"probe_kl": 3.0}, {"probe_kl": 1.0}),
        ("train_success", {"train_success": ((2, 0.0),)}, {"train_success": ((2, 1.0),)}),
    ],
)
def test_every_progress_signal_rewards_a_better_student(signal, before, after):
    _, finished = run(credit(1, 1, progress_signal=signal), [stats(**before), stats(**after)])
    assert finished[1][0].reward > 0


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from(["decision", "hold_end"]),
    st.lists(st.one_of(st.none(), st.floats(-9, 9)), min_size=1, max_size=40),
)
def test_every_window_shape_agrees_with_a_search_through_the_whole_series(hold, lookahead, window_start, signal):
    config = credit(hold, lookahead, progress_signal="probe_nll", window_start=window_start)
    ledger, finished = run(config, [stats(probe_nll=value) for value in signal])
    expected = {}
    for taken in range(0, len(signal), hold):
        start = taken + (hold if window_start == "hold_end" else 0)
        seen = [(u, signal[u]) for u in range(start, min(start + lookahead + 1, len(signal))) if signal[u] is not None]
        drops = [(b - d) * 0.5 ** (v - start - 1) for (_, b), (v, d) in pairwise(seen)]
        if start + lookahead < len(signal) and drops:
            expected[taken] = (start + lookahead, sum(drops))
    found = {f.decision.update: (u, f.progress) for u, fs in finished.items() for f in fs}
    assert found.keys() == expected.keys()
    for taken, (update, progress) in expected.items():
        assert found[taken] == (update, pytest.approx(progress, abs=1e-9))
    assert len(found) + len(ledger.pending()) + sum(ledger.dropped.values()) == len(range(0, len(signal), hold))


@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from(["decision", "hold_end"]))
def test_a_probe_is_due_exactly_where_some_window_starts_or_closes(hold, lookahead, window_start):
    config = credit(hold, lookahead, window_start=window_start)
    edges = {edge for taken in range(0, 40, hold) for edge in config.window(taken)}
    assert [config.probe_is_due(u) for u in range(40)] == [u in edges for u in range(40)]


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.sampled_from(["decision", "hold_end"]))
def test_within_a_window_a_probe_is_due_every_so_many_updates_and_at_its_end(hold, lookahead, every, window_start):
    config = credit(hold, lookahead, window_start=window_start).model_copy(update={"probe_every": every})
    windows = [config.window(taken) for taken in range(0, 40, hold)]
    due = {u for start, close in windows for u in (*range(start, close, every), close)}
    assert [config.probe_is_due(u) for u in range(40)] == [u in due for u in range(40)]


def test_with_hold_equal_to_lookahead_a_probe_is_due_once_per_decision():
    assert [u for u in range(13) if credit(4, 4).probe_is_due(u)] == [0, 4, 8, 12]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_signal_drops_the_decisions_around_it_and_no_others(bad):
    # H = L = 2: windows 0-2, 2-4, 4-6, 6-8. Update 4 belongs to the second and the third.
    series = [stats(bad if u == 4 else 1.0 / (u + 1)) for u in range(9)]
    ledger, finished = run(credit(2, 2), series)
    assert [f.decision.update for fs in finished.values() for f in fs] == [0, 6]
    assert ledger.dropped == {"non-finite progress signal": 2}


def test_a_non_finite_grounding_is_named():
    ledger, _ = run(credit(2, 2), [stats(), stats(grounding=math.nan)])
    assert ledger.dropped == {"non-finite grounding": 1}


def test_a_reward_that_overflows_is_dropped():
    ledger, finished = run(credit(1, 1), [stats(1e308), stats(-1e308)])
    assert finished[1] == []
    assert ledger.dropped == {"non-finite reward": 1}


def test_a_window_without_two_measurements_is_dropped():
    ledger, finished = run(credit(2, 2, progress_signal="probe_nll"), [stats(probe_nll=1.0), stats(), stats()])
    assert finished[2] == []
    assert ledger.dropped == {"progress signal not measured": 1}


def test_grounding_that_weighs_but_was_never_measured_drops_the_decision():
    ledger, _ = run(credit(1, 1, grounding_weight=0.1), [stats(), stats()])
    assert ledger.dropped == {"grounding not measured": 1}


def test_an_update_that_was_skipped_leaves_a_gap():
    ledger = DecisionLedger(credit(4, 4, discount=1.0))
    ledger.open(decision(0))
    for update, loss in ((0, 5.0), (1, 4.0), (3, 2.0)):
        assert ledger.record(update, stats(loss)) == []
    (finished,) = ledger.record(5, stats(0.0))  # the stats of update 4 never came
    assert finished.progress_signal == (5.0, 4.0, None, 2.0, None)
    assert finished.progress == pytest.approx(3.0)


def test_pending_decisions_show_the_sums_so_far():
    ledger, _ = run(credit(4, 4), [stats(loss) for loss in (5.0, 3.0)])
    (pending,) = ledger.pending()
    assert pending.progress_signal == (5.0, 3.0, None, None, None)
    assert (pending.progress, pending.grounding, pending.advantage) == (2.0, 0.0, None)


def test_a_draw_is_added_once_and_never_after_the_window_has_closed():
    ledger = DecisionLedger(credit(2, 1))
    ledger.open(Decision(0, (), 1.7, 1.7, {}))
    ledger.add_draw(0, "easy", 0.3)
    ledger.add_draw(0, "easy", 0.9)
    ledger.record(0, stats())
    (finished,) = ledger.record(1, stats())
    ledger.add_draw(0, "hard", 0.4)
    assert finished.decision.samples == {"easy": 0.3}


def test_only_rows_that_an_open_decision_needs_are_kept():
    ledger, _ = run(credit(4, 4), [stats() for _ in range(50)])
    assert [update for update, _ in ledger.state_dict()["rows"]] == [48, 49]


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_ledger_restored_from_json_goes_on_as_if_nothing_happened(cut):
    config = credit(3, 5, progress_signal="train_success", window_start="hold_end")
    series = [stats(train_success=((u % 3, float(u % 2)),)) for u in range(14)]
    _, whole = run(config, series)
    before, _ = run(config, series[:cut])
    after = DecisionLedger(config)
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    for update in range(cut, 14):
        if update % 3 == 0:
            after.open(decision(update))
        assert after.record(update, series[update]) == whole[update]


def test_a_hold_begins_at_a_multiple_of_its_length():
    # H = 4: update 6 lies in 4 .. 7
    assert CreditConfig(hold_updates=4).hold(6) == (4, 7)
    assert CreditConfig(hold_updates=1).hold(6) == (6, 6)
