"""The null test: a frozen student must leave a sound controller where it started, and moves the literal one."""

from typing import Any

import numpy as np
import pytest

from atesd.config import CreditConfig, PolicyConfig, load_config
from atesd_lab.audit.null_simulation import MeasuredBatch, MeasuredRatio, NullBand, _stats_at, null_band, simulate
from atesd_lab.paper import exposure

SEEDS = range(10)


def noise(rising: bool = True) -> list[MeasuredRatio]:
    """Shaped like the embedded world: loss .02 at ratio 0, .22 at 1, 18 % between batches; grounding falls slowly."""
    ease = 1 + 0.18 * np.random.default_rng(0).standard_normal(64)
    rows = []
    for ratio in np.linspace(0, 1, 11).tolist():
        loss = (0.02 + 0.2 * (ratio if rising else 0.5)) * ease
        batches = (MeasuredBatch(value, value, 0.1 * ratio, -0.5 - 0.3 * ratio) for value in loss.tolist())
        rows.append(MeasuredRatio(ratio, tuple(batches)))
    return rows


def end_means(credit: CreditConfig, measured: list[MeasuredRatio], seeds: range = SEEDS) -> list[float]:
    return [simulate(measured, credit, PolicyConfig(), decisions=100, seed=seed).end_mean for seed in seeds]


@pytest.mark.parametrize("credit", [CreditConfig(), CreditConfig(progress_signal="probe_nll")])
def test_the_sound_preset_stays_where_it_started(credit):
    assert end_means(credit, noise()) == pytest.approx([0.5] * 10, abs=0.05)


def test_the_literal_reward_drifts_up_although_nothing_is_learned():
    means = end_means(CreditConfig(preset="paper"), noise())
    assert min(means) > 0.6
    assert np.mean(means) > 0.75


def test_the_drift_is_the_windows_last_step_into_the_next_hold():
    # With the whole window inside one hold, the loss at the decision's own ratio is on both sides of every drop.
    inside = CreditConfig(preset="paper", drop="signed", grounding_weight=0, hold_updates=8, lookahead_updates=4)
    crossing = inside.model_copy(update={"hold_updates": 4})
    assert np.mean(end_means(inside, noise(), range(5))) == pytest.approx(0.5, abs=0.2)
    assert np.mean(end_means(crossing, noise(), range(5))) > 0.75


def test_a_loss_that_does_not_depend_on_the_ratio_does_not_pull():
    credit = CreditConfig(preset="paper", grounding_weight=0)
    assert np.mean(end_means(credit, noise(rising=False), range(5))) == pytest.approx(0.5, abs=0.2)


def test_grounding_alone_pulls_toward_the_ratio_it_likes():
    credit = CreditConfig(progress_signal="probe_nll", grounding_weight=0.1)
    assert max(end_means(credit, noise(), range(5))) < 0.4


def test_a_result_holds_every_decision_in_order():
    result = simulate(noise(), CreditConfig(preset="paper"), PolicyConfig(), decisions=20, seed=1)
    assert len(result.means) == 20
    assert result.means[0] == pytest.approx(0.5)
    assert result.end_mean == pytest.approx(np.mean(result.means[-5:]))
    assert result.policy_updates == 4  # 19 windows close within the run


def test_the_same_seed_gives_the_same_result_and_another_seed_another():
    run = {seed: simulate(noise(), CreditConfig(preset="paper"), PolicyConfig(), 12, seed) for seed in (0, 1)}
    assert simulate(noise(), CreditConfig(preset="paper"), PolicyConfig(), 12, 0) == run[0]
    assert run[0].means != run[1].means


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.1, 0.37, 0.999, 1.0])
def test_a_batch_keeps_its_own_ease_between_the_grids_ratios(ratio):
    measured = noise()
    for batch in (0, 7):
        by_ratio = [row.batches[batch].loss for row in measured]
        expected = np.interp(ratio, [row.reveal_ratio for row in measured], by_ratio)
        assert _stats_at(measured, batch, ratio).loss == pytest.approx(expected)


def test_a_grid_with_holes_at_its_ends_or_uneven_batches_is_refused():
    whole = noise()
    uneven = [whole[0], MeasuredRatio(1.0, whole[-1].batches[:3])]
    for measured in ([], whole[1:], whole[:-1], whole[::-1], uneven):
        with pytest.raises(ValueError, match="rising ratios from 0 to 1"):
            simulate(measured, CreditConfig(), PolicyConfig(), 4, 0)


def test_pure_noise_widens_a_band_around_one_half():
    band = null_band(CreditConfig(), PolicyConfig(), decisions=60, seeds=range(12))
    assert len(band.mean) == len(band.deviation) == 60
    assert (band.mean[0], band.deviation[0]) == (0.5, 0.0)
    assert band.mean == pytest.approx([0.5] * 60, abs=0.15)
    assert 0.05 < band.deviation[-1] < 0.3


def test_the_band_behind_a_page_s_curves_is_that_of_its_run_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(*given: Any) -> NullBand:
        made.append(given[2])
        return null_band(*given)

    monkeypatch.setattr(exposure, "null_band", counted)
    monkeypatch.setattr(exposure, "NULL_SEEDS", range(3))
    config = load_config("micro", ["exposure.kind=learned"])
    bands = [exposure._null_band(config, decisions) for decisions in (6, 6, 7)]
    assert made == [6, 7]
    assert bands[0] == bands[1] == null_band(config.credit, config.policy, 6, range(3))
