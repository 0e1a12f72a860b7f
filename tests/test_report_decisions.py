from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atesd_lab.report.canvas import PALETTE
from atesd_lab.report.decisions import LATEST, RIDGES, decisions_table, policies, push, ridge, timeline
from atesd_lab.report.page import render_page
from atesd_lab.report.rows import RunRows, read_run
from fake_run import begin_run, decision_row, fake_config, metric_row, write_fake_run
from outline import Outline

NOISE = np.random.default_rng(0)


def run_of(path: Path, rows: list[dict[str, Any]], updates: int = 40, **groups: Any) -> RunRows:
    run = begin_run(path, fake_config(updates, **groups))
    for update in range(updates):
        run.append("metrics", metric_row(update, 0.5, NOISE))
    for row in rows:
        run.append("decisions", row)
    return read_run(path)


def decision(update: int, ratio: float = 0.5, **changes: Any) -> dict[str, Any]:
    return decision_row(update, ratio, NOISE) | changes


@pytest.mark.parametrize("draws", [{"": 0.83}, {"2": 0.1, "10": 0.6}])
@pytest.mark.parametrize("advantage", [1.3, -0.4])
def test_the_push_is_the_slope_of_the_advantage_weighted_log_density_toward_higher_ratios(
    draws: dict[str, float], advantage: float
):
    move = torch.zeros((), dtype=torch.float64, requires_grad=True)
    density = torch.distributions.Beta(2.5 + move, 1.2 - move).log_prob(torch.tensor(list(draws.values())).double())
    (slope,) = torch.autograd.grad(advantage * density.mean(), move)
    row = decision(0, concentration1=2.5, concentration0=1.2, samples=draws, advantage=advantage)
    assert push(row) == pytest.approx(float(slope), rel=1e-6)  # the draws were float32 for a moment


@pytest.mark.parametrize(
    "changes", [{"advantage": None}, {"concentration1": None}, {"samples": {"": 1.0}}, {"samples": {"": 0.0}}]
)
def test_a_decision_that_pushed_nothing_has_no_push(changes: dict[str, Any]):
    assert push(decision(0, advantage=1.0) | changes) is None


def test_a_ridge_is_the_beta_density_of_its_decision_above_its_own_line(tmp_path: Path):
    # Beta(2, 1) has density 2x and Beta(1, 2) has 2 - 2x: the tallest reach 2, drawn as 1.6; the second starts at -1.
    rows = [decision(0, concentration1=2.0, concentration0=1.0), decision(4, concentration1=1.0, concentration0=2.0)]
    chart = ridge(run_of(tmp_path / "run", rows))
    assert chart is not None
    (axes,) = chart.figure.axes
    lines = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) > 1]
    np.testing.assert_allclose(lines[0][:, 1], 1.6 * lines[0][:, 0], atol=0.01)
    np.testing.assert_allclose(lines[1][:, 1], 1.6 * (1 - lines[1][:, 0]) - 1, atol=0.01)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "4"]
    assert "mean 0.67 at update 0, 0.33 at update 4" in chart.description


def test_at_most_nine_ridges_are_drawn_the_first_and_the_last_among_them(tmp_path: Path):
    run = run_of(tmp_path / "run", [decision(4 * place) for place in range(50)], updates=200)
    chart = ridge(run)
    assert chart is not None
    dates = [int(label.get_text()) for label in chart.figure.axes[0].get_yticklabels()]
    assert (len(dates), dates[0], dates[-1]) == (RIDGES, 0, 196)
    assert np.ptp(np.diff(dates)) <= 4  # evenly, as far as decisions allow


def test_hold_and_look_ahead_are_drawn_where_they_were_and_the_reward_where_it_closed(tmp_path: Path):
    # hold_end: the window [4, 7] follows the hold [0, 4) of the first decision.
    rows = [
        decision(0, 0.25, window=[4, 7], reward=0.5, advantage=1.0, logged_at=7),
        decision(4, 0.75, window=[8, 11], reward=0.1, advantage=-1.0, logged_at=7),
        decision(8, 0.5, window=[12, 15], reward=0.2, advantage=None, status="pending", logged_at=12),
    ]
    credit = {"window_start": "hold_end", "lookahead_updates": 3}
    chart = timeline(run_of(tmp_path / "run", rows, updates=12, credit=credit))
    assert chart is not None
    above, below = chart.figure.axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata()), line.get_color()) for line in above.lines]
    for (start, end), ratio, colour in (
        ((0, 4), 0.25, PALETTE[0]),
        ((4, 8), 0.75, PALETTE[1]),
        ((8, 12), 0.5, PALETTE[4]),
    ):
        assert ([start, end], [ratio, ratio], colour) in drawn
    assert [xs for xs, ys, _ in drawn if ys == [0.22, 0.22]] == [[4, 7]]
    marks = [line for line in below.lines if line.get_marker() not in ("None", None, "")]
    assert [(*map(float, line.get_xydata()[0]), line.get_marker(), line.get_fillstyle()) for line in marks] == [
        (7, 0.5, "^", "full"),
        (11, 0.1, "v", "full"),
        (15, 0.2, "o", "none"),
    ]
    assert [8, 8] in [xs for xs, _, _ in drawn]  # the policy update, after update 7


def test_an_exposure_without_a_policy_has_a_timeline_and_no_ridge(tmp_path: Path):
    absent = {"concentration1": None, "concentration0": None, "advantage": None}
    run = run_of(tmp_path / "run", [decision(0, **absent), decision(4, **absent)])
    assert policies(run) == []
    assert ridge(run) is None
    chart = timeline(run)
    assert chart is not None
    assert "policy's mean" not in chart.reading
    assert timeline(run_of(tmp_path / "none", [])) is None


def test_the_table_says_of_a_decision_when_it_held_what_it_earned_and_where_that_pushed(tmp_path: Path):
    # Beta(1, 1): mean 0.5, E logit 0. Advantage 2 and a draw with odds e give a push of 2.
    draw = float(1 / (1 + np.exp(-1)))
    row = decision(36, draw, concentration1=1.0, concentration0=1.0, window=[36, 42], logged_at=44)
    row |= {"progress": 0.25, "grounding": -0.5, "reward": 0.2, "advantage": 2.0, "effective_ratio": 0.5}
    run = run_of(tmp_path / "run", [row, decision(40, status="pending", advantage=None)], updates=50)
    first, second = decisions_table(run, run.decisions, "Decisions").rows
    assert first == (
        "36",
        "36 to 39",
        "36 to 42",
        "0.50",
        "0.73",
        "0.50",
        "+0.25",
        "-0.50",
        "+0.20",
        "+2.0",
        "+2.0",
        "44",
    )
    assert second[-3:] == ("–", "–", "pending")


def test_a_page_opens_the_latest_decisions_and_folds_all_of_many(tmp_path: Path):
    write_fake_run(tmp_path / "few", updates=4 * LATEST)
    write_fake_run(tmp_path / "many", updates=4 * LATEST + 4)
    few, many = (render_page([read_run(tmp_path / name)]) for name in ("few", "many"))
    assert "All 30 decisions" not in few
    assert "The last 30 of 31 decisions" in many
    assert "All 31 decisions" in many
    assert Outline(many).faults == []
    assert few.count("<td>0 to 3</td>") == 1
    assert many.count("<td>0 to 3</td>") == 1  # only in the whole table
    assert many.count("<td>120 to 123</td>") == 2
