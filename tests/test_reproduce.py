"""The paper's tables and figures: what is trained for them, the rule of the verdicts, and what is written."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atesd.config import parse_yaml
from atesd.errors import ConfigError, DataError, RunError
from atesd.rows import skipped_row
from atesd.runs import RunFolder, new_manifest
from atesd.text import MISSING, duration
from atesd_lab.cli.reproduce import run_experiments
from atesd_lab.paper import exposure, numbers, policy, reproduce, sweep, tokens, words
from atesd_lab.paper.aligned_measure import fixed_ratios
from atesd_lab.paper.bench import RATIOS, read_bench
from atesd_lab.paper.claims import Claim
from atesd_lab.paper.drawing import accuracy_dots, panels
from atesd_lab.paper.exposure import is_control
from atesd_lab.paper.reproduce import EXPERIMENTS, claims_table, named, write_experiments
from atesd_lab.paper.scale import Scale, budget, cells_for, load_scale
from atesd_lab.report.rows import RunRows, at_common_updates, shares
from atesd_lab.stats.contrast import Contrast, over_seeds
from atesd_lab.stats.differences import paired_difference
from atesd_lab.stats.selection import halves_of
from atesd_lab.sweep.grid import write_index
from atesd_lab.sweep.plan import Cell
from fake_run import decision_row, evaluation_row, metric_row, overwrite_rows, sample_row
from quick import SMALL_LEARNED as SMALL

UPDATES = 20
TINY = [*(setting for setting in SMALL if "credit." not in setting), "train.num_updates=8", "train.batch_size=8"]
FEW = [f"train.num_updates={UPDATES}", "train.evaluate_every=10"]


@pytest.fixture(scope="module")
def scale() -> Scale:
    return load_scale("micro")


def contrast(low: float, high: float) -> Contrast:
    return Contrast("a - b", (low + high) / 2, low, high)


def claim(*contrasts: Contrast) -> Claim:
    return Claim("a is better than b", "paper", "+2", contrasts)


def write_cell(cell: Cell) -> None:
    """A finished run of the cell with made-up rows; the more a fixed teacher shows, the better and the farther."""
    arm, config = cell.points["arm"], cell.job.config
    run = RunFolder.create(cell.job.folder, config, new_manifest(config, data_fingerprint="f", command=["atesd"]))
    noise = np.random.default_rng(cell.seed)
    ratio = RATIOS.get(arm, 0.5)
    for update in range(UPDATES):
        run.append("metrics", metric_row(update, ratio, noise))
    if config.exposure.kind in ("learned", "bandit"):
        for update in range(0, UPDATES, 4):
            betas = {"concentration1": None, "concentration0": None} if config.exposure.kind == "bandit" else {}
            run.append("decisions", decision_row(update, 0.5, noise) | betas)
    for update, split in ((0, "validation"), (0, "test"), (10, "validation"), (20, "validation"), (20, "test")):
        accuracy = 0.4 + 0.4 * ratio * update / UPDATES
        run.append("evaluations", evaluation_row(update, accuracy, np.random.default_rng(cell.seed), split))
    for update in (0, 10):
        words = ["a", " 3", " \\boxed{3}"]
        kl = {"token_kl": [0.01 * ratio, 0.001, 0.1 * ratio * (1 + 0.01 * cell.seed)]}
        run.append("samples", sample_row(update, words, noise, **kl))
    run.end_session("finished")


# What is trained


def test_every_experiment_of_the_registry_has_cells_that_resolve(scale: Scale):
    assert list(scale.experiments) == list(EXPERIMENTS)
    assert {len(cells_for(scale, [name], Path("out"), seeds=1)) > 0 for name in EXPERIMENTS} == {True}


def test_a_claim_rests_on_at_least_five_paired_seeds(scale: Scale):
    assert scale.seeds >= 5


def test_a_run_that_two_experiments_read_is_one_cell(scale: Scale):
    sweep, credit, policy = (cells_for(scale, [name], Path("out"), seeds=1) for name in ("sweep", "credit", "policy"))
    both = cells_for(scale, ["sweep", "credit", "policy"], Path("out"), seeds=1)
    shared = {cell.job for cell in credit} & {cell.job for cell in policy}
    assert [job.name for job in shared] == ["leaps-paper-seed-0"]
    assert len(both) == len(sweep) + len(credit) + len(policy) - 1


def test_the_whole_fits_two_hours_and_a_half_on_two_cores(scale: Scale):
    cells = cells_for(scale, named("all", scale), Path("out"))
    each = [scale.cpu_seconds_by_world.get(cell.points["world"], scale.cpu_seconds_per_update) for cell in cells]
    seconds = sum(each[i] * cell.job.config.train.num_updates for i, cell in enumerate(cells))
    assert seconds / 2 < 150 * 60
    table = budget(scale, ["credit", "policy", "words"], cells, 2)
    assert [row[:3] for row in table.rows[:3]] == [
        ("credit", "20", "3,200"),
        ("policy", "10", "1,600"),
        ("words", "60", "1,200"),
    ]
    assert table.rows[-1][3] == duration(seconds)


def test_the_word_problems_have_a_recipe_of_their_own_and_what_is_set_beats_the_worlds_own(scale: Scale):
    shared, given = (
        cells_for(scale, ["words"], Path("out"), some, seeds=1)[0].job.config for some in ([], ["train.num_updates=30"])
    )
    assert (shared.data.source, shared.model.path, shared.train.keep_checkpoints) == ("gsm_symbolic", "words:a", 1)
    assert (shared.train.num_updates, given.train.num_updates) == (20, 30)
    leaps = cells_for(scale, ["policy"], Path("out"), seeds=1)[0].job.config
    assert (leaps.data.source, leaps.train.num_updates) == ("world", 160)


def test_unknown_experiments_and_scales_are_refused_with_what_there_is(scale: Scale):
    with pytest.raises(ConfigError, match="expected all or one of sweep, main"):
        named("sweeep", scale)
    with pytest.raises(ConfigError, match="--scale huge: expected one of micro"):
        load_scale("huge")


# Verdicts


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.1, 2.0)], "agrees"),
        ([(-2.0, -0.1)], "disagrees"),
        ([(-0.1, 2.0)], "not distinguishable"),
        ([(0.1, 2.0), (-0.1, 1.0)], "not distinguishable"),
        ([(0.1, 2.0), (-2.0, -1.0)], "disagrees"),
        ([(0.1, 2.0), (1.0, 3.0)], "agrees"),
        ([(1.0, 1.0)], "not distinguishable"),  # every pair gave the same difference
        ([], "not distinguishable"),
    ],
)
def test_the_verdict_is_read_from_the_intervals(intervals: list[tuple[float, float]], verdict: str):
    assert claim(*(contrast(*interval) for interval in intervals)).verdict == verdict


def test_the_interval_over_seeds_is_students():
    # By hand: mean 2, deviation 1, t(0.975, 2) = 4.302653: reach 4.302653 / sqrt(3) = 2.484138
    found = over_seeds("gap", [1.0, 2.0, 3.0], "points")
    assert (found.value, found.low, found.high) == pytest.approx((2.0, -0.484138, 4.484138))


def test_one_seed_distinguishes_nothing():
    found = over_seeds("gap", [5.0], "points")
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert claim(found).verdict == "not distinguishable"


def test_a_claim_is_not_settled_by_the_problems_of_one_seed():
    one = Contrast("a - b", 0.2, 0.1, 0.3, covers_seeds=False)
    assert claim(one).verdict == "not distinguishable"
    assert claim(contrast(-0.3, -0.1), one).verdict == "disagrees"


def test_a_claim_is_a_row_with_the_papers_number_beside_ours():
    table = claims_table([claim(contrast(0.005, 0.015))])
    assert table.columns == ("claim", "whose", "paper", "here: difference [95 % interval]", "verdict")
    assert table.rows == (("a is better than b", "paper", "+2", "a - b: +1 [+0.5, +1.5] points", "agrees"),)


# The paper's numbers


def test_the_papers_numbers_are_those_of_the_packaged_file():
    text = Path(numbers.__file__).with_name("numbers.yaml").read_text("utf-8")
    assert numbers.paper_numbers() == parse_yaml(text, "numbers.yaml")
    assert numbers.printed("main", "qwen3-1.7b", "opsd", 3) == 43.4
    assert all("source" in group for group in numbers.paper_numbers().values() if isinstance(group, dict))


# What is written


def made_up(scale: Scale, names: list[str], out: Path) -> list[Cell]:
    cells = cells_for(scale, names, out, FEW, seeds=2)
    for cell in cells:
        write_cell(cell)
    written = write_experiments(scale, names, cells, {cell.job.folder for cell in cells}, out)
    assert [one.missing for one in written] == [""] * len(names)
    return cells


def require_pages(out: Path, names: list[str]) -> None:
    summary = (out / "results.md").read_text("utf-8")
    for name in names:
        page = (out / f"{name}.md").read_text("utf-8")
        figures = sorted(out.glob(f"figures/{name}-*"))
        assert f"[{name}]({name}.md)" in summary
        assert "**Claims**" in page
        assert page.count("\n| ---") >= 2
        assert {path.suffix for path in figures} == {".svg", ".png"}
        assert all(f"figures/{path.name}" in page for path in figures if path.suffix == ".svg")


THREE = ["credit", "policy", "tokens"]


@pytest.fixture(scope="module")
def three(scale: Scale, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Cell]]:
    out = tmp_path_factory.mktemp("reproduce")
    return out, made_up(scale, THREE, out)


@pytest.mark.slow
def test_all_experiments_are_written(scale: Scale, tmp_path: Path):
    made_up(scale, named("all", scale), tmp_path)
    require_pages(tmp_path, named("all", scale))


def test_an_experiment_ends_in_claims_tables_and_figures(three: tuple[Path, list[Cell]]):
    require_pages(three[0], THREE)


def test_the_word_problems_end_in_a_claim_per_question_and_what_each_rule_found(scale: Scale, tmp_path: Path):
    cells = made_up(scale, ["words"], tmp_path)
    require_pages(tmp_path, ["words"])
    arms = read_bench(cells, scale.wanted(["words"]))["words"]
    found = {one.text: one for one in words.report({"words": arms}).claims}
    last = {arm: arms.accuracies(arm) for arm in arms.groups}
    matters = found["words: full exposure ends above the answer alone: exposure matters"]
    assert matters.contrasts[0].value == pytest.approx(np.mean(last["full"]) - np.mean(last["fixed-0"]))
    interior = next(one for text, one in found.items() if "the optimum is interior" in text)
    assert interior.contrasts[0].name in {f"{arm} - full" for arm in ("fixed-0.5", "fixed-0.75")}
    assert set(fixed_ratios(arms.groups, "full")) == {"full", "fixed-0", "fixed-0.5", "fixed-0.75"}  # not `shuffled`
    for name in words.NAMES.values():
        assert any(f"{name} ends above the best fixed ratio" in text for text in found)
    _, rules = words.report({"words": arms}).tables
    band, null = rules.columns.index("null band"), rules.columns.index("- null")
    rows = {row[0]: row for row in rules.rows}
    assert all(rows[rule][band] != MISSING for rule in ("learned", "success-setpoint"))
    assert [rows[arm][null] == MISSING for arm in ("gate", "learned")] == [False, True]


def test_the_papers_numbers_stand_in_a_column_beside_ours(three: tuple[Path, list[Cell]]):
    lines = (three[0] / "credit.md").read_text("utf-8").splitlines()
    heading = next(line for line in lines if line.startswith("| arm |"))
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines if line.startswith("| ")}
    place = heading.strip("| ").split(" | ").index("paper")
    expected = {"one-step": "52.22", "short-delay": "56.11", "look-ahead": "58.06", "paper": "59.17", "base": MISSING}
    assert {arm: rows[arm][place] for arm in expected} == expected


def test_a_mismatch_that_rises_in_every_seed_agrees_with_figure_2b(scale: Scale, three: tuple[Path, list[Cell]]):
    start, late = sweep.mismatch_claims(read_bench(three[1], scale.wanted(["tokens"])))
    assert (start.verdict, late.verdict, start.printed) == ("agrees", "agrees", "monotone increasing")
    # write_cell: the mean of 0.01 a, 0.001 and 0.1 a, or 0.101 a, rises by 0.1105 / 12 from ratio to ratio
    assert [one.value for one in start.contrasts] == pytest.approx([0.1105 / 12] * 4)


def test_at_selected_checkpoints_no_problem_is_scored_where_it_chose(scale: Scale, three: tuple[Path, list[Cell]]):
    # By hand: each half of the validation problems is scored at the update that is best on the other half.
    bench = read_bench(three[1], scale.wanted(["tokens"]))

    def by_hand(run: RunRows) -> list[float]:
        first, last = (shares([row])[0] for row in run.evaluated("validation")[1:])
        halves = halves_of(len(last))
        late = [last[halves != half].mean() > first[halves != half].mean() for half in (0, 1)]
        return [float(last[i] if late[halves[i]] else first[i]) for i in range(len(last))]

    scored = [[by_hand(run) for run in bench["leaps"].runs(arm)] for arm in ("fixed-0.5", "full")]
    found, expected = bench["leaps"].selected("fixed-0.5", "full"), paired_difference(*scored)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_selection_needs_two_checkpoints(scale: Scale, tmp_path: Path):
    cells = cells_for(scale, ["tokens"], tmp_path, FEW, seeds=1)
    for cell in cells:
        write_cell(cell)
        rows = [evaluation_row(20, 0.5, np.random.default_rng(0), split) for split in ("validation", "test")]
        overwrite_rows(cell.job.folder, "evaluations", "".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(RunError, match=r"leaps: fixed-0\.5 and full share fewer than two .* train\.evaluate_every"):
        read_bench(cells, scale.wanted(["tokens"]))["leaps"].selected("fixed-0.5", "full")


def test_one_rollout_is_followed_through_all_ratios(three: tuple[Path, list[Cell]]):
    page = (three[0] / "tokens.md").read_text("utf-8")
    # token_kl of write_cell at ratio 1 and seed 0: 0.01, 0.001, 0.1; mean 0.037, largest at the third token
    assert "| 1 | 0.0136 | 0.0370 | 0.243 | 0.100 | 2: \\boxed{3} |" in page


def test_an_experiment_with_an_unfinished_cell_says_so_and_the_others_are_written(scale: Scale, tmp_path: Path):
    cells = cells_for(scale, ["credit", "policy"], tmp_path, FEW, seeds=2)
    finished = [cell for cell in cells if cell.points["arm"] in ("sound", "paper")]
    for cell in finished:
        write_cell(cell)
    folders = {cell.job.folder for cell in finished}
    credit, policy = write_experiments(scale, ["credit", "policy"], cells, folders, tmp_path)
    assert credit.missing == "6 of 8 cells are not finished, such as leaps-one-step-seed-0"
    assert policy.findings is not None
    assert "Not written: 6 of 8" in (tmp_path / "results.md").read_text("utf-8")


def test_one_experiment_leaves_what_is_there_of_the_others(
    scale: Scale, three: tuple[Path, list[Cell]], tmp_path: Path
):
    folders = {cell.job.folder for cell in three[1]}
    write_experiments(scale, THREE, three[1], folders - {three[1][0].job.folder}, tmp_path)
    before = (tmp_path / "results.md").read_text("utf-8")
    assert before.count("\n## ") == 3
    write_experiments(scale, ["policy"], three[1], folders, tmp_path)
    assert (tmp_path / "results.md").read_text("utf-8") == before
    write_experiments(scale, THREE, three[1], folders, tmp_path)
    assert (tmp_path / "results.md").read_bytes() == (three[0] / "results.md").read_bytes()

    mine, others = three[1][:3], three[1][3:]
    write_index([*mine, *others], tmp_path)
    whole = (tmp_path / "cells.json").read_bytes()
    write_index(mine, tmp_path, keep=True)
    assert (tmp_path / "cells.json").read_bytes() == whole
    write_index(mine, tmp_path)
    assert len(json.loads((tmp_path / "cells.json").read_text("utf-8"))) == 3


def test_no_correct_rollout_is_an_error_that_names_the_setting(scale: Scale, tmp_path: Path):
    cells = cells_for(scale, ["tokens"], tmp_path, FEW, seeds=1)
    for cell in cells:
        write_cell(cell)
        text = (cell.job.folder / "samples.jsonl").read_text("utf-8")
        overwrite_rows(cell.job.folder, "samples", text.replace('"verdict": "correct"', '"verdict": "wrong"'))
    with pytest.raises(RunError, match=r"raise train\.log_samples"):
        tokens.report(read_bench(cells, scale.wanted(["tokens"])))


def rewrite(folder: Path, kind: str, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Each row of a run as `change` returns it; None drops it."""
    rows = [change(json.loads(line)) for line in (folder / f"{kind}.jsonl").read_text("utf-8").splitlines()]
    overwrite_rows(folder, kind, "".join(f"{json.dumps(row)}\n" for row in rows if row is not None))


def skip(folder: Path, update: int) -> None:
    """What a run has of an update that it skipped: a row without numbers, no decision, no rollouts."""
    rewrite(folder, "metrics", lambda row: skipped_row(update, "nan", 0.1) if row["update"] == update else row)
    for kind in ("decisions", "samples"):
        if (folder / f"{kind}.jsonl").exists():
            rewrite(folder, kind, lambda row: None if row["update"] == update else row)


def test_a_mismatch_at_a_skipped_update_is_an_error_that_names_the_run(scale: Scale, tmp_path: Path):
    cells = cells_for(scale, ["tokens"], tmp_path, FEW, seeds=1)
    for cell in cells:
        write_cell(cell)
    path = cells[0].job.folder
    skip(path, 10)
    with pytest.raises(RunError, match=rf"{path.name} has those of \[0\]; .*train anew"):
        sweep.mismatch_table(read_bench(cells, scale.wanted(["tokens"])))


def test_series_of_several_seeds_are_read_at_the_updates_that_all_have(scale: Scale, tmp_path: Path):
    cells = cells_for(scale, ["tokens"], tmp_path, FEW, seeds=2)
    for cell in cells:
        write_cell(cell)
        run = RunFolder.open(cell.job.folder)
        run.append("samples", sample_row(19, ["a"], np.random.default_rng(0), token_kl=[RATIOS[cell.points["arm"]]]))
        run.append("evaluations", evaluation_row(5, 0.5, np.random.default_rng(0)))
        rewrite(cell.job.folder, "samples", dict)  # and no tally of the rows
    path = cells[0].job.folder
    skip(path, 7)
    skip(path, 19)
    rewrite(path, "evaluations", lambda row: None if row["update"] == 5 else row)
    bench = read_bench(cells, scale.wanted(["tokens"]))
    assert sweep.logged_updates(bench, "leaps") == [0, 10]
    assert [row[1] for row in sweep.optimum_table(bench).rows] == ["0", "10", "20"]
    sweep._draw_mismatch(bench, "leaps")
    skipped, whole = bench["leaps"].runs(cells[0].points["arm"])
    updates, each = at_common_updates("kl", [skipped.series("kl"), whole.series("kl")])
    assert updates == [update for update in range(UPDATES) if update not in (7, 19)]
    assert each[1] == [whole.series("kl")[1][update] for update in updates]
    with pytest.raises(RunError, match="kl: there is no update at which every run has it"):
        at_common_updates("kl", [([0], [1.0]), ([1], [1.0])])


def test_policies_of_several_seeds_are_averaged_at_one_update(
    scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arms = [*RATIOS, *exposure.LEARNED]
    some = [
        cell
        for cell in cells_for(scale, ["exposure"], tmp_path, FEW, seeds=2)
        if cell.points["world"] == "leaps" and cell.points["arm"] in arms
    ]
    for cell in some:
        write_cell(cell)
        if cell.seed == 1 and cell.points["arm"] not in RATIOS:
            skip(cell.job.folder, 8)
    bench = read_bench(some, [("leaps", arm) for arm in arms])
    runs = bench["leaps"].runs("sound")
    assert exposure.policy_means(runs)[0] == [0, 4, 12, 16]
    table = policy.density_table(bench, "leaps", "sound")
    assert [row[0] for row in table.rows] == ["0", "4", "12", "16"]
    # decision_row: concentrations 1.7 + update / 20 and 1.7 + update / 30 in both seeds; by hand at update 16
    assert float(table.rows[-1][2]) == pytest.approx(2.5 / (2.5 + 1.7 + 16 / 30), abs=0.005)
    monkeypatch.setattr(exposure, "NULL_SEEDS", range(2))
    exposure._draw_ratios(bench)  # over the null band of its settings, whatever these hold


def test_a_rollout_is_followed_where_every_ratio_logged_it_with_a_finite_kl(scale: Scale, tmp_path: Path):
    cells = cells_for(scale, ["tokens"], tmp_path, FEW, seeds=2)
    for cell in cells:
        write_cell(cell)
        rewrite(cell.job.folder, "samples", lambda row: row | {"token_kl": [None, *row["token_kl"][1:]]})
        if (cell.points["arm"], cell.seed) == ("full", 0):
            skip(cell.job.folder, 0)
    single, every = tokens.report(read_bench(cells, scale.wanted(["tokens"]))).tables
    # write_cell at ratio 1 and seed 1: 0.001 and 0.101 are left; their mean is 0.051
    assert single.rows[-1][2:] == ("0.0510", "0.243", "0.101", "2: \\boxed{3}")
    assert {row[1] for row in every.rows} == {"1"}


def test_runs_without_logged_rollouts_or_test_problems_are_refused_in_words(scale: Scale, tmp_path: Path):
    cells = cells_for(scale, ["tokens"], tmp_path, FEW, seeds=1)
    for cell in cells:
        write_cell(cell)
        overwrite_rows(cell.job.folder, "samples", "")
        rewrite(cell.job.folder, "evaluations", lambda row: None if row["split"] == "test" else row)
    bench = read_bench(cells, scale.wanted(["tokens"]))
    for made in (sweep.mismatch_claims, tokens.report):
        with pytest.raises(RunError, match=r"train\.log_samples"):
            made(bench)
    for read in (bench["leaps"].base_test, lambda: bench["leaps"].last_test("full")):
        with pytest.raises(RunError, match=r"never evaluated on test; set data\.test_size above 0"):
            read()
    with pytest.raises(ConfigError, match=r"data\.test_size is 0"):
        cells_for(scale, ["tokens"], tmp_path, ["data.test_size=0"], seeds=1)


def test_thirds_of_few_problems_are_refused(scale: Scale, tmp_path: Path):
    cells = cells_for(scale, ["tokens"], tmp_path, FEW, seeds=1)
    few = {f"p{place}": 1 for place in range(5)}
    for cell in cells:
        write_cell(cell)
        rewrite(cell.job.folder, "evaluations", lambda row: row | {"correct_counts": few, "problems": 5})
    bench = read_bench(cells, scale.wanted(["tokens"]))
    for made in (sweep.difficulty_table, sweep._difficulty_claims, sweep._draw_difficulty):
        with pytest.raises(RunError, match="leaps: 5 test problems leave thirds of fewer than two"):
            made(bench, "leaps")


def test_an_experiment_that_breaks_is_named_and_the_others_are_written(
    scale: Scale, three: tuple[Path, list[Cell]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def breaks(_: object) -> None:
        [].pop()

    monkeypatch.setitem(reproduce.EXPERIMENTS, "policy", breaks)
    folders = {cell.job.folder for cell in three[1]}
    broken, credit = write_experiments(scale, ["policy", "credit"], three[1], folders, tmp_path)
    assert broken.missing.startswith("IndexError: pop from empty list (test_reproduce.py:")
    assert credit.findings is not None
    assert "Not written: IndexError: pop from empty list" in (tmp_path / "results.md").read_text("utf-8")


def test_an_experiment_is_trained_and_written_end_to_end(scale: Scale, tmp_path: Path):
    cells = cells_for(scale, ["granularity"], tmp_path, TINY, seeds=1)
    text, whole = run_experiments(scale, ["granularity"], cells, 1, tmp_path)
    assert whole
    assert "granularity" in text
    page = (tmp_path / "granularity.md").read_text("utf-8")
    assert "| per-problem | 1 |" in page
    assert (tmp_path / "figures" / "granularity-accuracy.png").stat().st_size > 1000


def test_without_reasoning_gym_nothing_is_trained_first(scale: Scale, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    cells = cells_for(scale, ["words", "policy"], tmp_path, FEW, seeds=1)
    with pytest.raises(DataError, match=r"atesd\[gsm\]"):
        run_experiments(scale, ["words", "policy"], cells, 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_row_of_panels_is_no_wider_than_three():
    for count, rows, columns in ((1, 1, 1), (3, 1, 3), (4, 2, 2), (5, 2, 3)):
        figure, axes = panels(count)
        grid = axes[0].get_gridspec()
        assert (len(axes), grid.nrows, grid.ncols) == (count, rows, columns)
        assert sum(one.get_visible() for one in figure.axes) == count


def test_the_papers_number_is_drawn_where_it_is_given_and_nowhere_else(three: tuple[Path, list[Cell]]):
    bench = read_bench(three[1], [("leaps", "full")])
    plain, starred = (accuracy_dots(bench, ["leaps"], ["full"], paper) for paper in ({}, {"full": 43.3}))
    stars = [[line for line in one.axes[0].lines if line.get_marker() == "*"] for one in (plain, starred)]
    assert stars[0] == []
    assert [list(line.get_xdata()) for line in stars[1]] == [[43.3], []]  # and its place in the legend


def test_the_controls_of_a_controller_have_a_figure_of_their_own_with_the_controllers(
    scale: Scale,
):
    arms = [arm for world, arm in scale.wanted(["exposure"]) if world == "leaps"]
    shown = {arm for arm in arms if is_control(arm)}
    assert shown == {
        "shuffled-reward",
        "shuffled-replay",
        "untrained",
        *(f"{name}-{control}" for name in ("bandit", "aligned") for control in ("shuffled-reward", "shuffled-replay")),
    }
