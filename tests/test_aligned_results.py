"""Tables, verdicts and figures of a swept folder: against the raw files, and what is said where a run is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy import stats

from atesd.errors import RunError
from atesd.runs import RunFolder, new_manifest
from atesd_lab.paper.aligned_measure import Gap, Scored, WorldResult, measure, paces_of
from atesd_lab.paper.aligned_results import WORLDS, accuracy_table, main, overview, page, time_table, verdict_lines
from atesd_lab.report.arms import Arms
from atesd_lab.stats.contrast import Contrast
from atesd_lab.stats.differences import mean_share, paired_difference
from atesd_lab.sweep.grid import write_index
from atesd_lab.sweep.pivot import SweptTable, read_cells, read_tables
from atesd_lab.sweep.plan import cells_of, plan_from_mapping
from fake_run import begin_run, evaluation_row, fake_config, metric_row

PROBLEMS = 40
UPDATES = 20
ARMS: dict[str, dict[str, Any]] = {
    "full": {"exposure.kind": "full"},
    "fixed-0.25": {"exposure.kind": "fixed", "exposure.reveal_ratio": 0.25},
    "fixed-0.75": {"exposure.kind": "fixed", "exposure.reveal_ratio": 0.75},
    "sound": {"exposure.kind": "learned"},
    "grpo": {"train.method": "grpo"},
    "aligned": {"exposure.kind": "aligned"},
    "gate": {"exposure.kind": "full", "loss.gate": "aligned"},
    "gate-shuffled": {"exposure.kind": "full", "loss.gate": "aligned", "alignment.success": "shuffled"},
    "gate-random": {"exposure.kind": "full", "loss.gate": "random", "loss.gate.share": 0.55},
}
PLAN: dict[str, Any] = {
    "recipe": "micro",
    "set": {"train.num_updates": UPDATES, "train.evaluate_every": 10},
    "axes": {
        "world": {"steps": {"data.leap_share": 0}, "leaps-half": {"data.leap_share": 0.5}},
        "start": {"a": {"model.path": "world:a"}, "b": {"model.path": "world:b"}},
        "arm": ARMS,
    },
    "seeds": 4,
    "exclude": [{"start": "a", "seed": [2, 3]}, {"start": "b", "seed": [0, 1]}],
}
LAST = {"full": 0.5, "fixed-0.25": 0.48, "fixed-0.75": 0.6, "grpo": 0.75, "aligned": 0.6, "gate": 0.93}
SECONDS = {"gate": 0.2, "grpo": 0.15}
FEW = {"world": "steps", "arm": [arm for arm in ARMS if arm not in ("full", "fixed-0.75", "gate")]}
ONE_WORLD = [{"world": "steps"}, {"arm": ["sound", "grpo", "aligned", "gate-shuffled", "gate-random"]}]
Accuracy = Callable[[str, str, int], float]


def accuracy(arm: str, _split: str, update: int) -> float:
    return 0.4 + (LAST.get(arm, 0.45) - 0.4) * update / UPDATES


def write_sweep(out: Path, left_out: Sequence[dict[str, Any]] = (), scored: Accuracy = accuracy) -> Path:
    """Every cell with made-up rows: finished."""
    cells = cells_of(plan_from_mapping(PLAN | {"exclude": [*PLAN["exclude"], *left_out]}, "made up"), out)
    write_index(cells, out)
    shared = new_manifest(cells[0].job.config, data_fingerprint="f", command=["atesd"])
    for cell in cells:
        arm, config = cell.points["arm"], cell.job.config
        run = RunFolder.create(cell.job.folder, config, shared | {"run_id": cell.job.name, "commit": "0123abcd" * 5})
        rng = np.random.default_rng([cell.seed, list(ARMS).index(arm)])
        for update in range(2):
            kept = {"gate": 0.5, "gate-shuffled": 0.6}.get(arm)
            seconds = {"sample": 0.03, "student": SECONDS.get(arm, 0.1) - 0.03, "evaluate": 7.0}
            run.append("metrics", metric(update, kept_share=kept, seconds=seconds))
        for update in (0, 10, 20):
            for split in ("validation", "test") if update != 10 else ("validation",):
                run.append("evaluations", evaluation_row(update, scored(arm, split, update), rng, split, PROBLEMS))
        run.end_session("finished")
    return out


def metric(update: int, **changes: Any) -> dict[str, Any]:
    return metric_row(update, 0.5, np.random.default_rng(0), **changes)


def table_of(out: Path, world: str) -> SweptTable:
    return next(table for table in read_tables(out, table_axis="world", arm_axis="arm") if table.name == world)


def result_of(out: Path, world: str = "leaps-half") -> WorldResult:
    return measure(table_of(out, world), "full", paces_of(read_cells(out), "full"))


def raw(out: Path, arm: str, split: str, update: int, world: str = "leaps-half") -> np.ndarray:
    """Shares [seeds, problems], read from the lines of evaluations.jsonl."""
    rows = []
    for seed in range(4):
        lines = (out / f"{world}-{'aabb'[seed]}-{arm}-seed-{seed}" / "evaluations.jsonl").read_text().splitlines()
        counts = [json.loads(line) for line in lines]
        found = next(row for row in counts if (row["split"], row["update"]) == (split, update))["correct_counts"]
        rows.append([found[f"p{i}"] / 2 for i in range(PROBLEMS)])
    return np.array(rows)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"), [FEW])


@pytest.fixture(scope="module")
def leaps(swept: Path) -> WorldResult:
    return result_of(swept)


@pytest.fixture
def copy(swept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "copy"))


# The numbers


def test_accuracies_and_gaps_are_those_of_the_raw_files(swept: Path, leaps: WorldResult):
    assert leaps.best_fixed == "fixed-0.75"
    rivals = {"full": "full", "best fixed": "fixed-0.75", "grpo": "grpo"}
    for one in leaps.arms:
        mine = raw(swept, one.arm, "test", UPDATES)
        assert one.last["value"] == pytest.approx(mine.sum() / mine.size)
        assert one.base == pytest.approx(raw(swept, one.arm, "test", 0).mean())
        assert set(one.gaps) == {name for name, rival in rivals.items() if rival != one.arm}
        for name, gap in one.gaps.items():
            theirs = raw(swept, rivals[name], "test", UPDATES)
            found = paired_difference(theirs, mine)
            assert (gap.contrast.value, gap.contrast.low, gap.contrast.high) == pytest.approx(
                (float(found.value), found.low, found.high)
            )
            assert gap.seeds == (0, 1, 2, 3)


def test_the_interval_of_an_accuracy_covers_seeds_and_problems(swept: Path, leaps: WorldResult):
    # By hand: V = [MS_seeds + max(0, MS_problems - MS_rest)] / (S P), the crossed two-way table.
    table = raw(swept, "gate", "test", UPDATES)
    s, p = table.shape
    by_seed, by_problem, grand = table.mean(1), table.mean(0), table.mean()
    ms_seeds = p * sum((x - grand) ** 2 for x in by_seed) / (s - 1)
    ms_problems = s * sum((x - grand) ** 2 for x in by_problem) / (p - 1)
    rest = sum((table[i, j] - by_seed[i] - by_problem[j] + grand) ** 2 for i in range(s) for j in range(p))
    ms_rest = rest / ((s - 1) * (p - 1))
    floor = stats.chi2.ppf(0.05, s - 1) / (s - 1) * ms_rest
    error = np.sqrt((max(ms_seeds, floor) + max(0, ms_problems - ms_rest)) / (s * p))
    gate = leaps.arm("gate")
    assert gate is not None
    half = gate.last["value"] - gate.last["low"]
    assert stats.t.ppf(0.975, p + s) * error <= half <= stats.t.ppf(0.975, s - 1) * error * (1 + 1e-9)
    assert gate.last["value"] == pytest.approx(grand)
    assert gate.last["high"] == pytest.approx(min(1, grand + half))


def test_the_interval_of_an_accuracy_ends_where_a_share_does():
    # All but four of 40 answers are right in one seed, all in the other: Student's interval reaches beyond 1.
    shares = np.ones((2, PROBLEMS))
    shares[0, :4] = 0
    found = paired_difference(np.zeros_like(shares), shares)
    assert found.high > 1
    assert mean_share(shares) == {"value": found.value, "low": found.low, "high": 1.0}


def test_a_checkpoint_counts_once_in_the_stricter_interval(swept: Path, leaps: WorldResult):
    differences = raw(swept, "gate", "test", UPDATES) - raw(swept, "grpo", "test", UPDATES)
    by_start = np.stack([differences[:2].mean(axis=0), differences[2:].mean(axis=0)])
    found = paired_difference(np.zeros_like(by_start), by_start)
    gap = leaps.arm("gate").gaps["grpo"]
    assert gap.by_block == pytest.approx({"a": differences[:2].mean(), "b": differences[2:].mean()})
    assert gap.over_blocks == pytest.approx((float(found.low), float(found.high)))


def test_the_best_fixed_ratio_is_chosen_on_validation_and_not_on_what_it_is_compared_on(tmp_path: Path):
    def crossed(arm: str, split: str, update: int) -> float:
        ahead = "fixed-0.25" if split == "validation" else "fixed-0.75"
        return 0.9 if arm == ahead else accuracy(arm, split, update)

    found = result_of(write_sweep(tmp_path / "s", ONE_WORLD, scored=crossed))
    assert found.best_fixed == "fixed-0.25"
    best, other = found.arm("best fixed"), found.arm("fixed-0.75")
    assert best is not None
    assert other is not None
    assert best.last["value"] < other.last["value"]


def test_an_arm_is_a_fixed_ratio_if_nothing_but_its_exposure_differs(leaps: WorldResult):
    assert {one.arm: one.ratio for one in leaps.arms if one.ratio is not None} == {
        "full": 1.0,
        "fixed-0.25": 0.25,
        "fixed-0.75": 0.75,
    }


def test_kept_shares_are_means_over_updates_and_runs(leaps: WorldResult):
    kept = {one.arm: one.kept_share for one in leaps.arms}
    assert kept["gate"] == pytest.approx(0.5)
    assert kept["full"] is None


# Equal time


def test_at_equal_time_the_slower_arm_is_stopped_between_two_evaluations(swept: Path, leaps: WorldResult):
    gate = leaps.arm("gate")
    assert gate is not None
    assert gate.pace is not None
    assert gate.pace["value"] == pytest.approx(2.0)  # 0.2 s against 0.1 s; evaluations do not count
    timed = gate.timed["grpo"]
    # grpo: 20 updates of 0.15 s are 15 of 0.2 s: half way between the gate's evaluations at 10 and 20.
    assert (timed.baseline_updates, timed.candidate_updates) == pytest.approx((20, 15))
    ours = (raw(swept, "gate", "validation", 10) + raw(swept, "gate", "validation", 20)) / 2
    found = paired_difference(raw(swept, "grpo", "validation", 20), ours)
    assert (timed.gap.contrast.value, timed.gap.contrast.low) == pytest.approx((float(found.value), float(found.low)))
    back = leaps.arm("full").timed["grpo"]
    assert (back.baseline_updates, back.candidate_updates) == pytest.approx((20 * 2 / 3, 20))


def test_scores_at_an_evaluation_are_those_of_the_evaluation(swept: Path):
    scored = Scored(table_of(swept, "leaps-half"), "full", {})
    for update in (0, 10, 20):
        exact = raw(swept, "gate", "validation", update)
        names = sorted(f"p{i}" for i in range(PROBLEMS))
        assert (scored.validated("gate", update) == exact[:, [int(name[1:]) for name in names]]).all()


def test_seconds_may_come_from_another_folder(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    times = tmp_path / "times"
    times.mkdir()
    shutil.copy(swept / "cells.json", times)
    for arm, seconds in (("full", 1.0), ("gate", 4.0)):
        run = Path(shutil.copytree(swept / f"leaps-half-a-{arm}-seed-0", times / f"leaps-half-a-{arm}-seed-0"))
        rows = [metric(0, seconds={"sample": seconds, "evaluate": 9.0})]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(swept), "--times", str(times), "--figure", str(tmp_path / "figures" / "f")]) == 0
    text = capsys.readouterr().out
    assert "| gate | 4.00 |" in text  # one pair of runs has no range
    assert "the pace of grpo is not known" in text


# What is missing or mixed


def test_an_arm_without_a_seed_is_named_and_compared_on_the_seeds_that_it_has(copy: Path):
    shutil.rmtree(copy / "leaps-half-b-gate-seed-3")
    manifest = copy / "leaps-half-a-gate-seed-1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"status": "finished"', '"status": "running"'))
    found = result_of(copy)
    gate = found.arm("gate")
    assert gate is not None
    assert gate.seeds == (0, 2)
    differences = (raw(copy, "full", "test", 20) - 0)[[0, 2]].mean()
    assert gate.gaps["full"].contrast.value == pytest.approx(gate.last["value"] - differences)
    text = page([found], [], "full")
    assert "| gate | 2 of 4 |" in text
    lost = "leaps-half-a-gate-seed-1 (running), leaps-half-b-gate-seed-3 (not begun)"
    assert f"gate: 2 of 4 runs are finished; not there: {lost}." in text


def test_an_arm_without_any_run_is_a_row_and_its_questions_are_not_answered(copy: Path):
    for folder in copy.glob("leaps-half-*-grpo-seed-*"):
        shutil.rmtree(folder)
    found = result_of(copy)
    assert ("grpo", "0") in [row[:2] for row in accuracy_table(found, "full").rows]
    answers = {one.question: (one.answer, one.detail) for one in found.verdicts}
    assert answers["gate, against GRPO at equal rollouts"] == ("not answered", "grpo has no finished run")
    assert "grpo" not in found.arm("gate").gaps


def test_arms_without_a_common_seed_are_not_compared(copy: Path):
    for seed, arm in ((0, "gate"), (1, "gate"), (2, "grpo"), (3, "grpo")):
        shutil.rmtree(copy / f"leaps-half-{'aabb'[seed]}-{arm}-seed-{seed}")
    details = {one.question: one.detail for one in result_of(copy).verdicts}
    assert details["gate, against GRPO at equal rollouts"] == "gate and grpo have no finished runs of one seed"


def test_an_arm_of_no_plan_is_not_asked_about(tmp_path: Path):
    found = result_of(write_sweep(tmp_path / "s", [{"world": "steps"}, {"arm": ["aligned", "sound"]}]))
    assert not any("aligned" in one.question for one in found.verdicts)
    assert "gate, against the best fixed ratio" in {one.question for one in found.verdicts}


def test_fixed_ratios_without_a_common_seed_have_no_best_and_that_is_said(copy: Path):
    for seed, arm in ((0, "full"), (1, "full"), (2, "fixed-0.25"), (3, "fixed-0.25")):
        shutil.rmtree(copy / f"leaps-half-{'aabb'[seed]}-{arm}-seed-{seed}")
    found = result_of(copy)
    assert found.best_fixed is None
    details = {one.question: (one.answer, one.detail) for one in found.verdicts}
    assert details["gate, against the best fixed ratio"] == (
        "not answered",
        "the fixed ratios have no seed in common",
    )
    with pytest.raises(RunError, match="leaps-half: the fixed ratios have no seed in common"):
        Arms("leaps-half", table_of(copy, "leaps-half").groups).best_fixed({"full": 1.0, "fixed-0.25": 0.25})


def test_a_margin_is_not_reached_where_no_noise_was_seen(tmp_path: Path):
    # Every answer of the gate is right and every other wrong: differences of 100 points, intervals without width.
    sweep = write_sweep(tmp_path / "s", ONE_WORLD, scored=lambda arm, _split, _update: float(arm == "gate"))
    found = result_of(sweep)
    one = next(one for one in found.verdicts if "at least 15 points" in one.question)
    assert one.answer == "measured yes, not beyond doubt"


def test_runs_of_two_commits_or_machines_are_said(copy: Path):
    assert result_of(copy).notes == ()
    path = copy / "leaps-half-a-gate-seed-0" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"commit": "fedcba9876543210+changes", "cpu": "another"}))
    commits, machines = result_of(copy).notes
    assert "several commits (0123abc: 35, fedcba9+changes: 1)" in commits
    assert "another, threads" in machines
    assert result_of(copy, "steps").notes == ()


def test_a_run_resumed_under_another_commit_is_said(copy: Path):
    path = copy / "leaps-half-a-gate-seed-0" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sessions"].append(manifest["sessions"][0] | {"commit": "abcdef0123"})
    path.write_text(json.dumps(manifest))
    assert "0123abc then abcdef0: 1" in result_of(copy).notes[0]


def test_a_folder_that_is_no_sweep_and_a_seed_in_two_places_are_refused(copy: Path, tmp_path: Path):
    with pytest.raises(RunError, match=r"cells\.json: cannot be read"):
        read_cells(tmp_path / "nothing")
    with pytest.raises(RunError, match=r"has no axis 'method'; its axes: world, start, arm"):
        list(read_tables(copy, table_axis="world", arm_axis="method"))
    rows = json.loads((copy / "cells.json").read_text())
    moved = next(row for row in rows if row["points"]["arm"] == "gate" and row["seed"] == 0)
    moved["points"]["start"] = "b"
    (copy / "cells.json").write_text(json.dumps(rows))
    with pytest.raises(RunError, match="seed 0 stands at a and at b"):
        list(read_tables(copy, table_axis="world", arm_axis="arm"))
    (copy / "cells.json").write_text('[{"folder": "x"}]')
    with pytest.raises(RunError, match="is no list of cells"):
        read_cells(copy)


def test_a_baseline_that_is_no_finished_full_exposure_is_refused(swept: Path):
    table = table_of(swept, "leaps-half")
    with pytest.raises(RunError, match=r"'opsd' has no finished run; with finished runs: full, fixed-0\.25"):
        measure(table, "opsd", {})
    with pytest.raises(RunError, match=r"sound has exposure\.kind learned; expected full"):
        measure(table, "sound", {})


# Verdicts


@pytest.mark.parametrize(
    ("low", "high", "seeds", "word"),
    [
        (0.01, 0.2, 6, "ahead"),
        (-0.2, -0.01, 6, "behind"),
        (-0.01, 0.2, 6, "not distinguishable"),
        (0.1, 0.2, 1, "one seed, no verdict"),
        (0.1, 0.1, 6, "not distinguishable"),
    ],
)
def test_the_word_is_read_from_the_interval(low: float, high: float, seeds: int, word: str):
    contrast = Contrast("a - b", (low + high) / 2, low, high, covers_seeds=seeds > 1)
    assert Gap(contrast, tuple(range(seeds)), {}, None).word == word


@pytest.mark.parametrize(("gate", "answer"), [(0.99, "yes"), (0.62, "no"), (0.8, "measured yes, not beyond doubt")])
def test_the_gate_must_be_ahead_of_every_fixed_ratio_by_its_whole_interval(tmp_path: Path, gate: float, answer: str):
    def scored(arm: str, split: str, update: int) -> float:
        return gate if arm == "gate" else accuracy(arm, split, update)

    found = result_of(write_sweep(tmp_path / "s", ONE_WORLD, scored=scored))
    one = next(one for one in found.verdicts if "at least 15 points" in one.question)
    assert (one.answer, one.detail) == (answer, "fixed-0.75")


def test_the_verdicts_of_a_clear_case(leaps: WorldResult, swept: Path):
    answers = {one.question: one.answer for one in leaps.verdicts}
    assert answers["gate, against the best fixed ratio"] == "ahead"
    assert answers["aligned, against the best fixed ratio"] == "not distinguishable"
    for control in ("gate-shuffled", "gate-random"):
        assert answers[f"null control {control}, against the gate"] == "behind"
    steps = result_of(swept, "steps")
    assert not any("15 points" in one.question for one in steps.verdicts)  # claimed of leap worlds alone
    line = next(line for line in verdict_lines([steps, leaps]) if "ate, against the best fixed ratio:" in line)
    assert "ahead in steps (+" in line
    assert "leaps, q = .5 (+" in line


# What is written


def test_the_command_writes_page_numbers_and_figures(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "figures" / "aligned"
    assert main([str(swept), "--figure", str(path)]) == 0
    names = {file.name for file in path.parent.iterdir()}
    drawn = {f"aligned{part}.{kind}" for part in ("", "-worlds") for kind in ("svg", "png")}
    assert names == drawn | {"aligned.md", "aligned.json"}
    assert (path.parent / "aligned.md").read_text() == capsys.readouterr().out.removesuffix("\n")
    row = "| leaps, q = .5 | 36 of 36 | 0, 1 on a; 2, 3 on b | 0123abc |"
    assert row in (path.parent / "aligned.md").read_text()
    numbers = json.loads((path.parent / "aligned.json").read_text())
    steps = next(world for world in numbers["worlds"] if world["world"] == "steps")
    gate = next(one for one in steps["arms"] if one["arm"] == "gate")
    assert gate["last"]["value"] == pytest.approx(raw(swept, "gate", "test", 20, "steps").mean())
    drawing = (path.parent / "aligned.svg").read_text()
    assert "designed so that exposure matters" in drawing
    worlds = json.loads((path.parent / "aligned.json").read_text())["worlds"]
    assert all(WORLDS.get(world["world"], world["world"]) in drawing for world in worlds)  # also where the gate loses


def test_a_sweep_without_a_world_axis_is_one_world_named_like_its_folder(tmp_path: Path):
    axes = {"arm": {name: ARMS[name] for name in ("full", "fixed-0.75", "gate")}}
    plan = {**PLAN, "axes": axes, "exclude": [], "seeds": 2}
    out = tmp_path / "aligned-bad-teacher"
    cells = cells_of(plan_from_mapping(plan, "made up"), out)
    write_index(cells, out)
    rng = np.random.default_rng(0)
    for cell in cells:
        manifest = new_manifest(cell.job.config, data_fingerprint="f", command=["atesd"])
        run = RunFolder.create(cell.job.folder, cell.job.config, manifest)
        run.append("metrics", metric(0))
        for update in (0, 20):
            for split in ("validation", "test"):
                run.append("evaluations", evaluation_row(update, 0.5, rng, split, PROBLEMS))
        run.end_session("finished")
    found = result_of(out, "aligned-bad-teacher")
    assert [one.seeds for one in found.arms] == [(0, 1)] * 3
    assert found.arm("gate").gaps["full"].over_blocks is None
    assert overview([found]).columns == ("arm", "bad teacher")


def test_an_unfinished_or_foreign_folder_ends_in_an_error_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path)]) == 2
    assert "cells.json: cannot be read" in capsys.readouterr().err
    run = begin_run(tmp_path / "a", fake_config(8))
    run.end_session("finished")
    (tmp_path / "cells.json").write_text('[{"folder": "a", "group": "a", "points": {"method": "a"}, "seed": 0}]')
    assert main([str(tmp_path)]) == 2
    assert "cells.json: cell a has no axis 'arm'; its axes: method" in capsys.readouterr().err


def test_a_pace_is_the_median_over_paired_cells(swept: Path):
    paces = paces_of(read_cells(swept), "full")
    assert paces["full"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert paces["grpo"]["value"] == pytest.approx(1.5)
    assert fmean([paces["gate"]["low"], paces["gate"]["high"]]) == pytest.approx(2.0)


def test_the_time_table_shows_every_evaluation(leaps: WorldResult):
    assert time_table(leaps, "full").columns[-3:] == ("@0, %", "@10, %", "@20, %")
