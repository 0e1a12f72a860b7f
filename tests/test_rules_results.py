"""The bench of rules: what the plan holds, and its tables against the raw files of made-up and of tiny real runs."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from atesd.config import Config
from atesd.control.budget import affordable
from atesd.control.kinds import exposure_kinds
from atesd.runs import RunFolder, new_manifest
from atesd.session import train
from atesd_lab.paper.rules_results import NULL, main, measure, null_band, write_results
from atesd_lab.stats.differences import paired_difference
from atesd_lab.sweep.grid import write_index
from atesd_lab.sweep.pivot import read_tables
from atesd_lab.sweep.plan import cells_of, load_plan, plan_from_mapping
from fake_run import evaluation_row, metric_row
from quick import HOLDS, SMALL

PROBLEMS, UPDATES = 40, 20
PLAN: dict[str, Any] = {
    "recipe": "micro",
    "set": {"train.num_updates": UPDATES, "train.evaluate_every": 10},
    "axes": {
        "world": {"leaps-half": {"data.leap_share": 0.5}, "bad-teacher": {"data.leap_share": 0}},
        "arm": {
            "full": {"exposure.kind": "full"},
            "fixed-0.25": {"exposure.kind": "fixed", "exposure.reveal_ratio": 0.25},
            "fixed-0.75": {"exposure.kind": "fixed", "exposure.reveal_ratio": 0.75},
            "success-setpoint": {"exposure.kind": "success_setpoint"},
            "success-setpoint-shuffled": {"exposure.kind": "success_setpoint", "exposure.shuffle_verdicts": True},
            "binary-search": {"exposure.kind": "binary_search"},
        },
    },
    "seeds": 3,
    "exclude": [{"world": "bad-teacher", "arm": ["fixed-0.25", "success-setpoint-shuffled"]}],
}
LAST = {"full": 0.5, "fixed-0.25": 0.3, "fixed-0.75": 0.7, "success-setpoint": 0.68, "binary-search": 0.9}
RATIO = {"success-setpoint": 0.85, "binary-search": 0.1}


@pytest.fixture(scope="module")
def configs() -> dict[str, Config]:
    """The arms of the packaged plan in one of its worlds."""
    plan = load_plan("rules")
    assert (len(plan.axes["world"]), plan.exclude, plan.without) == (7, [], [])
    one = {"axes": {**plan.axes, "world": {"steps": plan.axes["world"]["steps"]}}, "seeds": (0,)}
    cells = cells_of(plan.model_copy(update=one), Path("runs/sweep"), "rules")
    return {cell.points["arm"]: cell.job.config for cell in cells}


def test_the_plan_has_every_kind_of_exposure_and_a_null_control_of_each_rule(configs):
    arms = {arm: config.exposure.kind for arm, config in configs.items()}
    assert set(arms.values()) == set(exposure_kinds()) - {"custom", "setpoint", "staircase"}
    rules = ("success_setpoint", "control_share", "success_trend", "thresholds", "item_response", "binary_search")
    for kind in (*rules, "annealing", "bandit", "aligned"):
        assert arms[f"{kind.replace('_', '-')}{NULL}"] in (kind, "replay")


def test_the_short_holds_of_the_plan_give_the_beta_policy_a_hundred_updates(configs):
    found = {
        arm: affordable(configs[arm].train.num_updates, configs[arm].credit, configs[arm].policy)[1]
        for arm in ("paper", "paper-weighted", "paper-short", "paper-short-2", "sound-short")
    }
    assert found == {"paper": 12, "paper-weighted": 12, "paper-short": 100, "paper-short-2": 50, "sound-short": 100}
    assert configs["paper"].policy.importance_cap is None
    assert configs["paper-short"].granularity == "per_problem"
    assert len({config.train.num_updates * config.train.batch_size for config in configs.values()}) == 1


def write_sweep(out: Path, left_out: tuple[str, ...] = ()) -> Path:
    """Every cell with made-up rows: finished. The reveal ratio of a rule's late updates is that of `RATIO`."""
    cells = cells_of(plan_from_mapping(PLAN, "made up"), out)
    write_index(cells, out)
    shared = new_manifest(cells[0].job.config, data_fingerprint="f", command=["atesd"])
    for cell in cells:
        arm = cell.points["arm"]
        if arm in left_out:
            continue
        run = RunFolder.create(
            cell.job.folder, cell.job.config, shared | {"run_id": cell.job.name, "commit": "0123abcd"}
        )
        rng = np.random.default_rng([cell.seed, len(arm)])
        for update in range(UPDATES):
            late = RATIO.get(arm, 0.5) + 0.01 * (cell.seed - 1)
            run.append("metrics", metric_row(update, late if update >= 15 else 0.0, np.random.default_rng(0)))
        for update in (0, 10, 20):
            for split in ("validation", "test") if update != 10 else ("validation",):
                accuracy = 0.45 + (LAST.get(arm, 0.45) - 0.45) * update / UPDATES
                run.append("evaluations", evaluation_row(update, accuracy, rng, split, PROBLEMS))
        run.end_session("finished")
    return out


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("rules"))


def raw(out: Path, arm: str, world: str = "leaps-half") -> np.ndarray:
    """Shares on test after the last update [seeds, problems], read from the lines of evaluations.jsonl."""
    rows = []
    for seed in range(3):
        lines = (out / f"{world}-{arm}-seed-{seed}" / "evaluations.jsonl").read_text("utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        (row,) = [row["correct_counts"] for row in found if (row["split"], row["update"]) == ("test", UPDATES)]
        rows.append([row[f"p{i}"] / 2 for i in range(PROBLEMS)])
    return np.array(rows)


def test_the_numbers_are_those_of_the_raw_files(swept: Path):
    table = next(iter(read_tables(swept, table_axis="world", arm_axis="arm")))
    world = measure(table, "full", band_seeds=4)
    assert (world.world, world.best) == ("leaps-half", "fixed-0.75")
    assert world.as_good == (0.75,)  # .3 and .5 are beyond the interval
    for one in world.arms:
        mine, best = raw(swept, one.arm), raw(swept, "fixed-0.75")
        assert one.accuracy["value"] == pytest.approx(mine.mean())
        if one.arm == "fixed-0.75":
            assert one.from_best is None
        else:
            gap = paired_difference(best, mine)
            assert one.from_best is not None
            found = (one.from_best.value, one.from_best.low, one.from_best.high)
            assert found == pytest.approx((float(gap.value), gap.low, gap.high))
    by_arm = {one.arm: one for one in world.arms}
    null = by_arm["success-setpoint"].from_null
    assert null is not None
    shuffled = raw(swept, "success-setpoint-shuffled")
    assert null.value == pytest.approx((raw(swept, "success-setpoint") - shuffled).mean())
    assert by_arm["binary-search"].from_null is None
    assert by_arm["success-setpoint"].late == pytest.approx((0.84, 0.85, 0.86))


def test_found_is_near_the_best_ratio_and_off_the_null_band(swept: Path):
    world = measure(next(iter(read_tables(swept, table_axis="world", arm_axis="arm"))), "full", band_seeds=4)
    by_arm = {one.arm: one for one in world.arms}
    mean, deviation = by_arm["success-setpoint"].band or (0.0, 0.0)
    assert (mean, deviation) == null_band(table_config(swept, "success-setpoint"), 0.45, 4)
    near = abs(0.85 - 0.75) <= 0.15
    assert by_arm["success-setpoint"].found == (near and abs(0.85 - mean) > 2 * deviation)
    assert by_arm["binary-search"].found is False  # .1 is far from .75
    assert by_arm["full"].found is None


def table_config(out: Path, arm: str):
    return RunFolder.open(out / f"leaps-half-{arm}-seed-0").config


def test_the_page_has_every_world_and_arm_and_names_what_is_missing(tmp_path: Path):
    out = write_sweep(tmp_path / "out", left_out=("binary-search",))
    text = write_results(out, "full", 0, out / "rules")
    assert (out / "rules.md").read_text("utf-8") == text
    assert {one["world"] for one in json.loads((out / "rules.json").read_text("utf-8"))} == {
        "leaps-half",
        "bad-teacher",
    }
    assert "leaps, q = .5" in text
    assert "bad teacher" in text
    assert "binary-search: no run is finished." in text
    assert text.count("| success-setpoint |") == 3  # the summary and two worlds


def test_a_folder_without_a_finished_run_or_baseline_is_an_error_that_says_so(tmp_path: Path, capsys):
    cells = cells_of(plan_from_mapping(PLAN, "made up"), tmp_path)
    write_index(cells, tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "no run is finished; `atesd sweep rules" in capsys.readouterr().err
    write_sweep(tmp_path, left_out=tuple(arm for arm in PLAN["axes"]["arm"] if arm != "fixed-0.75"))
    assert main([str(tmp_path), "--band-seeds", "0"]) == 2
    assert "the baseline 'full' has no finished run" in capsys.readouterr().err


def test_tiny_real_runs_of_rules_become_the_table(tmp_path: Path):
    small = {setting.partition("=")[0]: setting.partition("=")[2] for setting in (*SMALL, *HOLDS[:2])}
    shared = {name: int(value) for name, value in small.items()} | {"train.num_updates": 3, "train.batch_size": 4}
    arms = {name: PLAN["axes"]["arm"][name] for name in ("full", "success-setpoint", "success-setpoint-shuffled")}
    plan = plan_from_mapping(
        {
            "recipe": "micro",
            "set": shared,
            "axes": {"world": {"leaps": {"data.leap_share": 0.5}}, "arm": arms},
            "seeds": 2,
        },
        "tiny",
    )
    cells = cells_of(plan, tmp_path)
    write_index(cells, tmp_path)
    for cell in cells:
        train(cell.job.config, cell.job.folder)
    text = write_results(tmp_path, "full", 2, tmp_path / "rules")
    (world,) = json.loads((tmp_path / "rules.json").read_text("utf-8"))
    for one in world["arms"]:
        rows = [RunFolder.open(tmp_path / f"leaps-{one['arm']}-seed-{seed}").rows("evaluations") for seed in (0, 1)]
        last = [
            row["average"]["value"] for some in rows for row in some if (row["split"], row["update"]) == ("test", 3)
        ]
        assert one["accuracy"]["value"] == pytest.approx(fmean(last))
    assert "± " in text
