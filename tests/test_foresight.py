"""The truth against which alignment is checked, and the check itself, in a small world."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch

from atesd.build import build, close
from atesd.config import load_config
from quick import quick
from validation import foresight
from validation.foresight import Foresight, check, held_out, true_change
from validation.foresight_figure import draw_foresight

SETTINGS = ("exposure.kind=fixed", "loss.gate=aligned", "alignment.min_correct=1", "train.batch_size=8")


def test_the_true_change_is_the_importance_weighted_change_of_success() -> None:
    parts = build(quick(*SETTINGS, "data.test_size=12"))
    held = held_out(parts)
    assert len(held.pairs) == 12 * foresight.HELD_OUT_SAMPLES
    parameters = parts.weights.trained
    nothing = {name: torch.zeros_like(p) for name, p in parameters.items()}
    assert true_change(parts, held, nothing, 1.0) == (0.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    step = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    change, error = true_change(parts, held, step, 1e-3)
    assert error > 0
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())

    def logprobs() -> list[float]:
        found = []
        with torch.no_grad():
            for context, completion in held.pairs:
                ids = torch.tensor([[*context, *completion]])
                own = parts.loaded.model(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
                found.append(float(own.gather(1, ids[0, len(context) :, None]).sum()))
        return found

    old = logprobs()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter -= 1e-3 * step[name]
    ratios = (torch.tensor(logprobs()) - torch.tensor(old)).exp().tolist()
    by_hand = fmean((ratio - 1) * worth for ratio, worth in zip(ratios, held.worth, strict=True))
    assert change == pytest.approx(by_hand, abs=2e-4)
    close(parts)


def test_a_check_after_some_training_has_all_ratios_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "BATCHES_SCORED", 2)
    found = [check(quick(*SETTINGS, "train.num_updates=4", "data.test_size=8"), "leaps", "a", n) for n in (0, 2)]
    for seen in found:
        assert seen.ratios == (0.0, 0.25, 0.5, 0.75, 1.0)
        assert -1 <= seen.rank_correlation <= 1
        assert all(error >= 0 for error in (*seen.true_errors, *seen.foreseen_errors))
    assert found[0].foreseen != found[1].foreseen
    assert all(some != seen.foreseen for seen in found for some in seen.cheaper.values())
    draw_foresight(found, tmp_path)
    assert (tmp_path / "foresight.png").stat().st_size > 10_000


def test_signs_count_only_where_the_truth_is_clear_of_zero() -> None:
    foreseen, true, errors = (1.0, -1.0, 2.0), (0.5, -0.1, -0.9), (0.1,) * 3
    seen = Foresight("w", "a", 0, 0.5, (0.0, 0.5, 1.0), foreseen, errors, true, errors, {"features": (3, 2, 1)})
    assert seen.signs_agree == (1, 2)
    assert seen.rank_correlation == pytest.approx(-0.5)
    assert seen.rank_correlation_of("features") == pytest.approx(1)


@pytest.mark.parametrize("world", foresight.WORLDS)
def test_the_settings_of_every_world_hold(world: str) -> None:
    config = load_config("micro", foresight.settings(foresight.WORLDS[world], "a"))
    assert config.looks_ahead
