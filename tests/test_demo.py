"""The demo: which runs it makes, what it does with finished, failed and interrupted ones, and what it prints."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from atesd.config import load_config
from atesd.errors import RunError
from atesd.runs import RunFolder
from atesd_lab.report.arms import Arms
from atesd_lab.report.groups import RunGroup
from atesd_lab.report.rows import RunRows
from atesd_lab.studies import demo
from atesd_lab.studies.demo import ARMS, Arm, demo_text, job_of, lead_of, run_demo
from atesd_lab.studies.demo_figure import draw_demo
from atesd_lab.sweep import jobs
from fake_run import fake_config, write_fake_run
from quick import SMALL_LEARNED as SMALL


def row(split: str, update: int, value: float) -> dict[str, Any]:
    """An evaluation on 10 problems with 2 samples each."""
    correct = round(20 * value)
    return {
        "split": split,
        "update": update,
        "average": {"value": value, "low": value - 0.05, "high": value + 0.05},
        "samples": 2,
        "correct_counts": {str(i): min(2, max(0, correct - 2 * i)) for i in range(10)},
    }


def run(test: float, validation: float) -> RunRows:
    """Eight updates, of which the last two reveal 0.7 and 0.9."""
    metrics = tuple({"update": i, "reveal_ratio": ratio} for i, ratio in enumerate((0.5,) * 6 + (0.7, 0.9)))
    rows = row("test", 0, 0.4), row("test", 8, test), row("validation", 8, validation)
    return RunRows("run", fake_config(8), {}, metrics, (), rows, ())


def world(name: str, test: Mapping[str, float], validation: Mapping[str, float] | None = None) -> Arms:
    accuracies = {arm.ratio: test.get(arm.ratio, 0.5) for arm in ARMS}
    runs = {ratio: run(value, (validation or test).get(ratio, 0.5)) for ratio, value in accuracies.items()}
    return Arms(name, {ratio: RunGroup(ratio, (one,)) for ratio, one in runs.items()})


def worlds(**by_ratio: float) -> list[Arms]:
    return [world(name, {ratio.removeprefix("r"): value for ratio, value in by_ratio.items()}) for name in demo.WORLDS]


def test_the_demo_compares_the_look_ahead_opsd_three_fixed_ratios_and_atesd_in_both_worlds():
    assert [arm.name for arm in ARMS] == [
        f"{world}-{name}"
        for world in ("steps", "leaps")
        for name in ("look-ahead", "opsd", "atesd", "fixed-0.25", "fixed-0.5", "fixed-0.75")
    ]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_differs_from_its_recipe_in_the_exposure_alone(arm: Arm):
    words = job_of(arm, Path("out")).command
    assert words[0] == "train"
    assert words[-2:] == ["--out", f"out/{arm.name}"]
    config, recipe = load_config(words[1], arm.overrides), load_config(words[1])
    kind = {"1": "full", "learned": "learned", "aligned": "aligned"}.get(arm.ratio, "fixed")
    assert config.exposure.kind == kind
    assert config.data.leap_share == (0.5 if arm.world == "leaps" else 0.0)
    assert config.model_copy(update={"exposure": recipe.exposure}) == recipe
    assert kind != "fixed" or config.exposure.reveal_ratio == float(arm.ratio)


def test_the_best_fixed_ratio_is_picked_on_validation_and_not_on_test():
    validation = {"0.25": 0.5, "0.5": 0.8, "0.75": 0.6}
    test = {"0.25": 0.9, "0.5": 0.3, "0.75": 0.9}
    assert "30.0 [25, 35] at 0.5" in demo_text([world("leaps", test, validation)])


def test_the_late_ratio_is_the_mean_of_the_last_quarter():
    assert worlds()[0].late_ratios("learned") == pytest.approx([0.8])  # of 8 updates the last two: 0.7 and 0.9


def test_the_table_holds_both_worlds_with_intervals_and_says_what_the_leap_world_is():
    text = demo_text(worlds(r1=0.5, raligned=0.8, rlearned=0.6, **{"r0.5": 0.7}))
    assert text.count("50.0 [45, 55]") == 2
    assert text.count("80.0 [75, 85] at 0.80") == 2
    assert text.count("70.0 [65, 75] at 0.5") == 2
    assert text.count("60.0 [55, 65] at 0.80") == 2
    assert text.count("+20.0 [") == 2  # the best fixed ratio against OPSD
    assert "designed to make a point" in text
    assert "no evidence about language models" in text
    assert "picked on the validation problems and reported on the held-out test problems" in text


def test_where_the_whole_reference_is_best_it_is_the_best_fixed_ratio():
    text = demo_text(worlds(r1=0.9))
    assert text.count("90.0 [85, 95] at 1\n") + text.count("90.0 [85, 95] at 1 ") == 2


def test_the_page_begins_with_what_each_world_wants_and_ends_its_head_with_commands():
    lead = lead_of(worlds(r1=0.5, raligned=0.6, **{"r0.5": 0.7}), Path("runs/demo"))
    steps, leaps = lead.headline
    assert steps == (
        "In the steps world a share of 0.5 is best: 70.0 %, from 40.0 % before training; the whole reference ends at "
        "50.0 %. The look-ahead ends at 60.0 %, with a ratio of 0.80."
    )
    assert leaps.startswith("In the leap world ")
    assert lead_of(worlds(r1=0.9), Path()).headline[0].startswith("In the steps world all of the reference is best")
    assert [chart.key for chart in lead.charts] == ["demo-steps", "demo-leaps"]
    assert all(command.startswith("atesd ") for command, _ in lead.commands)


def test_the_figure_is_written_the_same_twice(tmp_path: Path):
    files = []
    for _ in range(2):
        draw_demo(worlds(), tmp_path)
        files.append([(tmp_path / name).read_bytes() for name in ("demo.svg", "demo.png")])
    assert files[0] == files[1]
    assert b"reveal ratio" in files[0][0]


def finished_runs(out: Path) -> None:
    for arm in ARMS:
        write_fake_run(out / arm.name, updates=8)


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    finished_runs(tmp_path)
    config = RunFolder.open(tmp_path / ARMS[0].name).config
    monkeypatch.setattr(jobs, "load_config", lambda *_: config)
    monkeypatch.setattr(jobs.Worker, "give", lambda *_: pytest.fail("a finished run was started"))
    monkeypatch.setattr(demo, "write_report", lambda runs, out, lead: (out, len(runs), lead)[0])
    said: list[str] = []
    text = run_demo(tmp_path, said.append)
    assert said == [f"12 runs under {tmp_path}, 12 of them finished; 2 at a time"]
    assert f"page: {tmp_path / 'report.html'}" in text
    assert (tmp_path / "table.txt").read_text() in text


def test_a_finished_run_with_other_settings_is_refused_and_not_taken_for_ours(tmp_path: Path):
    finished_runs(tmp_path)
    with pytest.raises(RunError, match=r"steps-look-ahead: the config differs"):
        run_demo(tmp_path, lambda _: None)


def test_a_failing_run_ends_the_demo_with_the_end_of_its_log(tmp_path: Path):
    with pytest.raises(RunError, match=r"exit code 2; its log .*steps-(look-ahead|opsd).log ends with") as caught:
        run_demo(tmp_path, lambda _: None, ["model.path=nowhere"])
    assert "nowhere" in str(caught.value)
    log = (tmp_path / "steps-look-ahead.log").read_text()
    command = shlex.join(job_of(ARMS[0], tmp_path, ["model.path=nowhere"]).command)
    assert log.splitlines()[0] == f"$ atesd {command}"


@pytest.mark.slow
def test_the_demo_runs_end_to_end_and_again_without_training(tmp_path: Path):
    words = [sys.executable, "-m", "atesd.cli", "demo", "--out", str(tmp_path / "demo")]
    words += [word for setting in SMALL for word in ("--set", setting)]
    first = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    again = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "12 runs" in first
    assert "12 of them finished" in again
    assert (tmp_path / "demo" / "table.txt").read_text() in again
    assert (tmp_path / "demo" / "report.html").is_file()


@pytest.mark.slow
def test_an_interrupted_demo_leaves_no_process_and_goes_on_later(tmp_path: Path):
    words = [sys.executable, "-m", "atesd.cli", "demo", "--out", str(tmp_path)]
    words += [word for setting in (*SMALL, "train.num_updates=2000") for word in ("--set", setting)]
    first = tmp_path / "steps-look-ahead"
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        while not (first / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 3
    run = RunFolder.open(first)
    assert run.manifest["status"] == "stopped"
    with run.lock():  # nobody else is at work in it
        assert run.rows("metrics")
