"""The null test on a real frozen student: the embedded one, measured small."""

from pathlib import Path

import pytest

from atesd.build import build, close
from atesd.config import CreditConfig, PolicyConfig
from atesd_lab.audit.null_measure import measure
from atesd_lab.audit.null_report import Drift, draw_null, run_null_test
from atesd_lab.audit.null_simulation import simulate
from quick import quick

FROZEN = quick("train.batch_size=8", "train.micro_batch_size=8")


def test_the_literal_reward_drifts_on_a_real_frozen_student_and_the_sound_one_does_not_move():
    parts = build(FROZEN)
    try:
        before = {name: value.clone() for name, value in parts.loaded.model.state_dict().items()}
        measured = measure(parts, batches=6)
        assert all(value.equal(before[name]) for name, value in parts.loaded.model.state_dict().items())
    finally:
        close(parts)
    losses = [sum(batch.loss for batch in row.batches) for row in measured]
    assert losses[-1] > losses[0], "the loss rises with the ratio, whatever is learned"
    ends = {
        preset: [simulate(measured, CreditConfig(preset=preset), PolicyConfig(), 100, s).end_mean for s in range(3)]
        for preset in ("paper", "sound")
    }
    assert min(ends["paper"]) > 0.6
    assert ends["sound"] == [pytest.approx(0.5)] * 3


@pytest.mark.parametrize(
    ("ends", "verdict"), [((0.5, 0.54), "sound"), ((0.9, 0.8), "drifts up"), ((0.2,), "drifts down")]
)
def test_the_verdict_is_in_words(ends: tuple[float, ...], verdict: str):
    assert Drift("any", ends, 0.0, ()).verdict == verdict


def test_table_and_figure_hold_every_reward_and_the_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("atesd_lab.audit.null_report.NOISE_SEEDS", 3)
    text, figures = run_null_test(FROZEN, decisions=20, seeds=2, batches=2)
    for name in ("sound", "paper", "paper, no grounding", "pure noise"):
        assert name in text
    draw_null(figures, tmp_path / "null")
    assert b"never learns" in (tmp_path / "null.svg").read_bytes()
