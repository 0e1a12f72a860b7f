"""Step sizes are chosen by validation over the whole run, and by nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from atesd_lab.paper.step_sizes import chosen, figures, main
from atesd_lab.sweep.pivot import read_cells
from fake_run import begin_run, evaluation_row, fake_config

NOISE = np.random.default_rng(0)


def tuned(out: Path, arms: dict[tuple[str, float, int], tuple[float, float]], done: bool = True) -> Path:
    """A sweep whose runs, by arm, rate and seed, have these validation accuracies in the middle and at the end."""
    cells = []
    for (arm, rate, seed), levels in arms.items():
        folder = f"{arm}-{rate}-{seed}"
        run = begin_run(out / folder, fake_config(4, train={"num_updates": 4, "seed": seed, "learning_rate": rate}))
        for update, level in zip((0, 2, 4), (0.9, *levels), strict=True):
            row = evaluation_row(update, level, NOISE)
            row["average"]["value"] = level
            run.append("evaluations", row)
            run.append("evaluations", {**row, "split": "test", "average": {**row["average"], "value": 1 - level}})
        if done:
            run.end_session("finished")
        cells.append({"folder": folder, "points": {"world": "w", "arm": arm}, "seed": seed})
    (out / "cells.json").write_text(json.dumps(cells))
    return out


def test_the_rate_with_the_highest_mean_over_seeds_and_evaluations_is_chosen(tmp_path: Path) -> None:
    slow, fast, even = (0.2, 0.8), (0.7, 0.7), (0.5, 0.5)
    runs = {("gate", 0.1, 0): slow, ("gate", 0.2, 0): fast, ("gate", 0.1, 1): even, ("gate", 0.2, 1): even}
    found = figures(read_cells(tuned(tmp_path, runs)))["w"]["gate"]
    assert found == pytest.approx({0.1: 0.5, 0.2: 0.6})
    assert chosen(found) == 0.2
    assert chosen({0.4: 0.5, 0.1: 0.5, 0.2: 0.3}) == 0.1


def test_the_page_says_what_was_chosen_and_how_much_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tuned(tmp_path, {("gate", 0.1, 0): (0.2, 0.8), ("gate", 0.2, 0): (0.7, 0.7)}))]) == 0
    page = capsys.readouterr().out
    assert "| gate | 50.0 | 70.0 | 0.2 |" in page
    assert "2 of 2 runs are finished" in page


def test_a_sweep_without_a_finished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tuned(tmp_path, {("gate", 0.1, 0): (0.2, 0.8)}, done=False))]) == 2
    assert "no run is finished" in capsys.readouterr().err
