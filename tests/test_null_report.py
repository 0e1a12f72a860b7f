"""The null test on a real frozen student: the embedded one, measured small."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from atesd.build import build, close
from atesd.config import CreditConfig, PolicyConfig, load_config
from atesd.control.simulation import Driven, drive
from atesd.errors import ConfigError
from atesd_lab.audit.audit import notes_of
from atesd_lab.audit.null_measure import measure
from atesd_lab.audit.null_report import Drift, draw_null, run_null_test
from atesd_lab.audit.null_simulation import null_band, simulate
from atesd_lab.cli.commands import laboratory
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
    draw_null(figures, tmp_path / "null-0.5")
    assert b"never learns" in (tmp_path / "null-0.5.svg").read_bytes()
    assert (tmp_path / "null-0.5.png").is_file()


def test_what_the_audit_honours_acts_here_too(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[float, float]] = []

    def driven(*given: Any) -> Driven:
        asked.append(given[5])
        return drive(*given)

    monkeypatch.setattr("atesd_lab.audit.null_simulation.drive", driven)
    monkeypatch.setattr("atesd_lab.audit.null_report.NOISE_SEEDS", 2)
    bounded = quick(
        "train.batch_size=8",
        "train.micro_batch_size=8",
        "exposure.ratio_min=0.6",
        "exposure.granularity=per_difficulty",
    )
    text, _ = run_null_test(bounded, decisions=20, seeds=2, batches=2)
    assert set(asked) == {(0.6, 1.0)}
    assert [note in text for note in notes_of(bounded)] == [True, True]
    whole, high = (null_band(CreditConfig(), PolicyConfig(), 20, range(2), bounds) for bounds in ((0, 1), (0.6, 1)))
    assert whole != high
    with pytest.raises(ConfigError, match=r"null-test: train\.method: sft has no teacher to expose"):
        run_null_test(load_config("micro", ["train.method=sft"]), decisions=20, seeds=2, batches=2)


def test_a_name_with_a_dot_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = {"noise": {"mean": [0.5], "deviation": [0.1]}, "drifts": []}
    monkeypatch.setattr("atesd_lab.audit.null_report.run_null_test", lambda *_: ("", figures))
    monkeypatch.setattr("atesd_lab.audit.null_report.draw_null", lambda *_: None)
    result = CliRunner().invoke(laboratory, ["null-test", "micro", "--out", str(tmp_path / "ratio-0.5")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "ratio-0.5.json").read_text("utf-8")) == figures
    assert "ratio-0.5.svg" in result.output.replace("\n", "")
