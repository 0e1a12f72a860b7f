"""The page of a whole sweep: its numbers against the raw files, what is said of absent cells, and its safety."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from typer.testing import CliRunner

from atesd.errors import ConfigError, RunError
from atesd.runs import RunFolder
from atesd_lab.cli.commands import laboratory as app
from atesd_lab.report.grid import GridCell, GridTable, absent, score_table
from atesd_lab.report.grid_figures import BESIDE, accuracies, ratios
from atesd_lab.report.grid_page import LEVELS, Scale
from atesd_lab.report.groups import group_of
from atesd_lab.report.honest import compare_groups, short_verdict
from atesd_lab.report.rows import read_run
from atesd_lab.sweep.page import write_sweep_report
from atesd_lab.sweep.pivot import cells_by_table, layout_of, own_axes, read_cells
from fake_run import begin_run, evaluation_row, fake_config, metric_row, write_fake_run
from outline import Outline

UPDATES = 4
ATTACK = '<script>alert(1)</script>" onmouseover="alert(1)" x="{{ 7 * 7 }}\u202e'
Point = Mapping[str, str]


def index(out: Path, cells: Iterable[tuple[str, Point, int]]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"folder": folder, "group": "g", "points": dict(points), "seed": seed} for folder, points, seed in cells]
    (out / "cells.json").write_text(json.dumps(rows))
    return out


def write_run(folder: Path, accuracy: float, seed: int, kind: str = "full", updates: int = UPDATES) -> RunFolder:
    """A finished run of a given accuracy on test, whose learned ratio moves."""
    run = begin_run(folder, fake_config(updates, seed, kind))
    noise = np.random.default_rng([seed, round(1000 * accuracy)])
    for update in range(updates):
        run.append("metrics", metric_row(update, 0.25 * update if kind == "learned" else 1.0, noise))
    for update, level in ((0, 0.4), (updates, accuracy)):
        for split in ("validation", "test"):
            run.append("evaluations", evaluation_row(update, level, noise, split))
    run.end_session("finished")
    return run


def write_grid(out: Path, arms: Mapping[str, float], seeds: int = 3, worlds: Iterable[str] = ("w",)) -> Path:
    cells = [(f"{w}-{arm}-{s}", {"world": w, "arm": arm}, s) for s in range(seeds) for w in worlds for arm in arms]
    for folder, points, seed in cells:
        write_run(out / folder, arms[points["arm"]], seed, "learned" if points["arm"] == "learned" else "full")
    return index(out, cells)


def grid_table(out: Path, arms: Iterable[str], seeds: int = 3) -> GridTable:
    def cell(arm: str, seed: int) -> GridCell:
        folder = f"w-{arm}-{seed}"
        return GridCell(folder, None, "finished", "", read_run(out / folder))

    return GridTable("w", {arm: {seed: cell(arm, seed) for seed in range(seeds)} for arm in arms})


ARMS = {"full": 0.5, "learned": 0.9, "same": 0.51}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grid(tmp_path_factory.mktemp("grid") / "sweep", ARMS)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two worlds; of the first every way in which a cell can be absent, with names that try to break out."""
    out = tmp_path_factory.mktemp("broken") / "sweep <b>&"
    arms = ("base", ATTACK)
    cells = [
        (f"{world}-{arm_index}<i>#?%-{seed}", {"world": world, "arm": arm}, seed)
        for seed in range(4)
        for world in (f"one{ATTACK}", "two")
        for arm_index, arm in enumerate(arms)
    ]
    cells = [(folder.replace("/", ""), points, seed) for folder, points, seed in cells]
    for place, (folder, points, seed) in enumerate(cells):
        if points["world"] == "two" or points["arm"] == "base":
            run = write_run(out / folder, 0.6, seed)
            if place == 0:
                run.report.write_text("its page")
    hostile = [folder for folder, points, _ in cells if points["world"] != "two" and points["arm"] == ATTACK]
    begin_run(out / hostile[1], fake_config(UPDATES, 1)).append("metrics", metric_row(0, 0.5, np.random.default_rng(0)))
    begin_run(out / hostile[2], fake_config(UPDATES, 2)).end_session("finished")
    begin_run(out / hostile[3], fake_config(UPDATES, 3))
    (out / hostile[3] / "metrics.jsonl").write_text(f"{ATTACK}\n")
    return index(out, cells)


@pytest.fixture(scope="module")
def page(broken: Path) -> str:
    return write_sweep_report(broken).read_text("utf-8")


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    return Outline(page)


# The numbers


def test_a_share_is_the_run_s_own_and_a_mean_is_that_of_its_seeds(swept: Path):
    scored = score_table(grid_table(swept, ARMS))
    for score in scored.scores:
        raw = {}
        for seed in range(3):
            rows = map(json.loads, (swept / f"w-{score.arm}-{seed}" / "evaluations.jsonl").read_text().splitlines())
            last = next(row for row in rows if (row["split"], row["update"]) == ("test", UPDATES))
            raw[seed] = sum(last["correct_counts"].values()) / (last["samples"] * last["problems"])
        assert score.shares == pytest.approx(raw)
        assert score.mean is not None
        assert score.mean["value"] == pytest.approx(fmean(raw.values()))
        assert score.mean["low"] < score.mean["value"] < score.mean["high"]


def test_differences_and_verdicts_are_those_of_compare(swept: Path):
    groups = {arm: group_of(arm, [swept / f"w-{arm}-{seed}" for seed in range(3)]) for arm in ARMS}
    scores = {score.arm: score for score in score_table(grid_table(swept, ARMS)).scores}
    for arm in ("learned", "same"):
        last = compare_groups(groups["full"], groups[arm]).comparisons[0]
        value, low, high = last.contrast.in_unit
        assert scores[arm].difference == f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
        assert (scores[arm].verdict, scores[arm].sentence) == (short_verdict(last), last.verdict)
    assert [scores[arm].verdict for arm in ARMS] == ["baseline", "better", "not distinguishable"]


def test_another_baseline_turns_the_difference_round(swept: Path):
    one = {score.arm: score for score in score_table(grid_table(swept, ARMS), "full").scores}
    other = {score.arm: score for score in score_table(grid_table(swept, ARMS), "learned").scores}
    assert one["learned"].difference.split()[0].replace("+", "-") == other["full"].difference.split()[0]
    assert other["full"].verdict == "worse"


def test_an_arm_with_fewer_seeds_is_compared_on_those_that_both_have(swept: Path):
    table = grid_table(swept, ("full", "learned"))
    fewer = {seed: cell for seed, cell in table.arms["learned"].items() if seed != 1}
    scored = score_table(GridTable("w", {"full": table.arms["full"], "learned": fewer}))
    pairs = [[score.shares[seed] for score in scored.scores] for seed in (0, 2)]
    gap = fmean(after - before for before, after in pairs)
    assert scored.scores[1].difference.startswith(f"{100 * gap:+.1f} ")
    assert any("seeds 0, 2, which both have" in note for note in scored.notes)


def test_the_interval_of_a_mean_ends_where_a_share_does(tmp_path: Path):
    for seed, accuracy in enumerate((0.8, 1.0)):
        write_run(tmp_path / f"w-full-{seed}", accuracy, seed)
    (score,) = score_table(grid_table(tmp_path, ("full",), seeds=2)).scores
    assert score.mean is not None
    assert score.mean["value"] < score.mean["high"] == 1


def test_a_shade_is_darker_for_a_higher_share_and_a_flat_grid_has_one():
    scale = Scale(0.2, 0.8)
    assert [scale.style(share) for share in (0.2, 0.5, 0.8)] == ["h0", f"h{LEVELS // 2}", f"h{LEVELS - 1}"]
    assert Scale(0.5, 0.5).style(0.5) == "h0"


# Small multiples


def test_every_arm_has_a_line_and_the_baseline_one_in_every_panel(swept: Path):
    cells = grid_table(swept, ("full", "same")).arms
    arms = {"full": cells["full"], **{f"arm {number}": cells["same"] for number in range(2 * BESIDE + 1)}}
    charts = accuracies(score_table(GridTable("w", arms)), "t").charts
    assert len(charts) == 3
    for chart in charts:
        assert "full from" in chart.description
    said = " ".join(chart.description for chart in charts)
    assert all(f"arm {number} from" in said for number in range(2 * BESIDE + 1))
    assert len({chart.figure.axes[0].get_ylim() for chart in charts}) == 1


def test_a_line_is_the_mean_over_seeds_at_each_evaluated_update(swept: Path):
    table = score_table(grid_table(swept, ("full",)))
    (chart,) = accuracies(table, "t").charts
    line = chart.figure.axes[0].lines[0]
    rows = [row for run in table.groups["full"].runs for row in run.evaluated("validation")]
    for update, value in zip(line.get_xdata(), line.get_ydata(), strict=True):
        assert value == pytest.approx(fmean(100 * row["average"]["value"] for row in rows if row["update"] == update))


def test_only_arms_that_move_the_ratio_are_drawn_and_the_others_are_named(swept: Path):
    drawn = ratios(score_table(grid_table(swept, ARMS)), "t")
    (chart,) = drawn.charts
    assert "learned from 0 to 0.75" in chart.description
    assert "Always 1, and not drawn: full, same." in drawn.reading


# What is not there


def test_every_cell_that_is_in_no_mean_is_named_with_its_reason(broken: Path, outline: Outline):
    text = " ".join(outline.text)
    assert "4 cells are in no mean" in text
    for reason in ("there is no run in the folder", "running, or killed: 1 of 4 updates", "cannot be read"):
        assert reason in text
    assert "finished, but has no test evaluation after its last update, 4" in text
    assert "16: 13 finished, 1 running, or killed, 1 not begun, 1 unreadable" in text
    assert len(read_cells(broken)) == 16


def test_an_arm_without_a_run_keeps_its_row(swept: Path):
    table = grid_table(swept, ("full",))
    gone = GridCell("f", None, "not begun", "why", None)
    scored = score_table(GridTable("w", {"first": {0: gone}, **table.arms}))
    assert [(score.arm, score.mean is None) for score in scored.scores] == [("first", True), ("full", False)]
    assert scored.baseline == "full"
    assert any("first, the first arm, has no finished and evaluated run" in note for note in scored.notes)
    assert list(absent([scored])) == [("w", "f", "why")]


def test_one_run_of_an_arm_is_said_to_say_nothing_of_another_seed(swept: Path):
    scored = score_table(grid_table(swept, ("full", "learned"), seeds=1))
    assert scored.scores[1].verdict == "better, for this seed"
    assert "One run only, so that its bracket is over problems alone: full, learned." in scored.notes


def test_runs_that_cannot_be_compared_give_the_reason_and_keep_their_numbers(tmp_path: Path):
    out = write_grid(tmp_path, {"full": 0.5}, seeds=2)
    write_run(out / "w-long-0", 0.6, 0, updates=6)
    write_run(out / "w-long-1", 0.6, 1, updates=8)
    scored = score_table(grid_table(out, ("full", "long"), seeds=2))
    assert len(scored.scores[1].shares) == 2
    assert scored.scores[1].mean is None
    assert any("train.num_updates is 6 and 8" in note for note in scored.notes)


def test_a_sweep_of_which_nothing_has_begun_has_a_page(tmp_path: Path):
    out = index(tmp_path / "new", [("a-0", {"arm": "a"}, 0), ("b-0", {"arm": "b"}, 0)])
    text = " ".join(Outline(write_sweep_report(out).read_text("utf-8")).text)
    assert "No run is finished and evaluated yet" in text
    assert "2: 2 not begun" in text


def test_runs_of_two_commits_and_machines_are_a_warning(tmp_path: Path):
    out = write_grid(tmp_path, {"full": 0.5}, seeds=2)
    manifest = out / "w-full-1" / "manifest.json"
    changed = json.loads(manifest.read_text()) | {"commit": "f" * 40, "cpu": "another"}
    manifest.write_text(json.dumps(changed))
    text = " ".join(Outline(write_sweep_report(out).read_text("utf-8")).text)
    assert "several commits (0123abc: 1, fffffff: 1)" in text
    assert "several machines" in text


# The page


def test_the_page_nests_and_every_reference_has_its_target(page: str, outline: Outline):
    assert outline.faults == []
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = [attributes["aria-labelledby"] for _, attributes in outline.elements if "aria-labelledby" in attributes]
    assert {*re.findall(r'(?:href="|url\()#([^")]+)', page), *labels} <= set(ids)


def test_hostile_names_are_text_and_nothing_else(page: str, outline: Outline):
    assert not {tag for tag, _ in outline.elements} & {"script", "img", "iframe", "b", "i", "form"}
    names = [name for _, attributes in outline.elements for name in attributes]
    assert not [name for name in names if name.startswith("on") or name == "style"]
    text = "".join(outline.text)
    assert text.count("<script>alert(1)</script>") >= 6
    assert "sweep <b>&" in text
    assert "{{ 7 * 7 }}⟦U+202E⟧" in text
    assert "\u202e" not in page


def test_nothing_is_fetched_and_a_run_with_a_page_is_linked_by_a_relative_address(broken: Path, outline: Outline):
    assert not re.search(r"https?://|@import|url\((?!#)", write_sweep_report(broken).read_text("utf-8"))
    links = [
        str(attributes["href"]) for attributes in outline.named("a") if not str(attributes["href"]).startswith("#")
    ]
    assert len(links) == 2  # from the grid and from the list of folders
    assert all((broken / unquote(link)).read_text() == "its page" for link in links)


def test_links_hold_from_wherever_the_page_is_written(broken: Path, tmp_path: Path):
    out = write_sweep_report(broken, tmp_path / "deep" / "page.html")
    links = [str(a["href"]) for a in Outline(out.read_text("utf-8")).named("a") if not str(a["href"]).startswith("#")]
    assert links
    assert all(Path(os.path.normpath(out.parent / unquote(link))).read_text() == "its page" for link in links)


def test_a_folder_whose_name_is_no_unicode_is_linked_by_its_bytes(tmp_path: Path):
    name = os.fsdecode(b"w-\xff-0")
    write_run(tmp_path / name, 0.5, 0).report.write_text("its page")
    page = write_sweep_report(index(tmp_path, [(name, {"arm": "a"}, 0)])).read_text("utf-8")
    assert 'href="w-%FF-0/report.html"' in page
    assert "w-⟦U+DCFF⟧-0" in page


def test_the_same_folder_gives_the_same_bytes(broken: Path, page: str):
    assert write_sweep_report(broken).read_text("utf-8") == page


def test_every_table_scrolls_in_a_box_of_its_own(page: str):
    assert len(re.findall(r'<div class="scroll"[^>]*>\s*<table', page)) == page.count("<table") > 4


def test_the_number_stands_in_every_shaded_cell(page: str):
    shaded = re.findall(r'<td class="h\d"[^>]*>(?:<a [^>]*>)?([^<]*)<', page)
    assert len(shaded) > 13
    assert all(re.fullmatch(r"\d+\.\d( \[-?\d+, \d+\])?", text) for text in shaded)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_on_every_shade_has_the_contrast_that_wcag_asks_for(scheme: int):
    folder = importlib.resources.files("atesd_lab.report") / "templates"
    base, heat = ((folder / name).read_text("utf-8") for name in ("page.css", "grid.css"))
    ink, card = (to_rgb(re.findall(rf"--{name}: (#\w+)", base)[scheme]) for name in ("ink", "card"))
    shade = [int(part) / 255 for part in re.findall(r"--helps: (\d+), (\d+), (\d+)", base)[scheme]]
    alphas = [float(alpha) for alpha in re.findall(r"\.h\d \{ background: rgba\(var\(--helps\), ([\d.]+)\)", heat)]
    assert len(alphas) == LEVELS
    assert alphas == sorted(alphas)
    for alpha in alphas:
        ground = [alpha * top + (1 - alpha) * below for top, below in zip(shade, card, strict=True)]
        assert contrast(ink, ground) >= 4.5  # WCAG 2.1, 1.4.3: text


def contrast(one: Iterable[float], other: Iterable[float]) -> float:
    """WCAG 2 contrast ratio, 1 to 21."""
    lights = []
    for colour in (one, other):
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


# Which axes become what


def layout(out: Path, cells: Iterable[tuple[Point, int]]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    listed = [(f"c{place}", points, seed) for place, (points, seed) in enumerate(cells)]
    found = layout_of(read_cells(index(out, listed)))
    return found.arm, found.tables, found.blocks


def test_arms_are_the_axis_of_that_name_and_a_seed_s_checkpoint_makes_no_table(tmp_path: Path):
    cells = [({"arm": a, "world": w, "start": "ab"[s]}, s) for s in range(2) for a in "xy" for w in "vw"]
    assert layout(tmp_path, cells) == ("arm", ("world",), ("start",))


def test_without_an_axis_of_that_name_arms_are_the_last_that_varies(tmp_path: Path):
    cells = [({"world": w, "rate": r, "one": "1"}, s) for s in range(2) for w in "vw" for r in "123"]
    assert layout(tmp_path, cells) == ("rate", ("world",), ())


def test_with_one_seed_no_axis_is_taken_for_a_checkpoint(tmp_path: Path):
    assert layout(tmp_path, [({"world": w, "arm": a}, 0) for w in "vw" for a in "xy"]) == ("arm", ("world",), ())


def test_two_outer_axes_give_a_table_per_combination(tmp_path: Path):
    points = [{"size": s, "world": w, "arm": a} for s in "12" for w in "vw" for a in "xy"]
    cells = read_cells(index(tmp_path, [(f"c{place}", point, 0) for place, point in enumerate(points)]))
    assert list(cells_by_table(cells, layout_of(cells), "whole")) == ["1, v", "1, w", "2, v", "2, w"]


def test_a_sweep_without_axes_is_one_arm_named_like_the_folder(tmp_path: Path):
    cells = read_cells(index(tmp_path, [(f"seed-{seed}", {}, seed) for seed in range(2)]))
    assert [list(arms) for arms in cells_by_table(cells, layout_of(cells), "whole").values()] == [["whole"]]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([], "lists no cell"),
        ([("a", {"arm": "x"}, 0), ("b", {"world": "x"}, 0)], "share their axes"),
        ([("a", {"arm": "x"}, 0), ("b", {"arm": "x"}, 0)], "a and b are both x, seed 0"),
    ],
)
def test_a_list_of_cells_that_makes_no_grid_is_refused(tmp_path: Path, cells: list[Any], message: str):
    with pytest.raises(RunError, match=message):
        write_sweep_report(index(tmp_path, cells))


def test_a_damaged_list_of_cells_is_refused_by_its_path(tmp_path: Path):
    (tmp_path / "cells.json").write_text('[{"folder": "a", "points": "arm", "seed": 0}]')
    with pytest.raises(RunError, match=r"cells\.json: is no list of cells"):
        write_sweep_report(tmp_path)


# The command


def test_the_command_writes_the_page_into_the_sweep(swept: Path):
    result = CliRunner().invoke(app, ["report", str(swept), "--baseline", "same"])
    assert result.output == f"report: {swept / 'report.html'}\n"
    assert "- same, points" in (swept / "report.html").read_text("utf-8")
    (swept / "report.html").unlink()


def test_a_baseline_that_is_no_arm_is_answered_with_the_arms(swept: Path):
    with pytest.raises(ConfigError, match=r"--baseline other: is no arm of .*; its arms: full, learned, same"):
        write_sweep_report(swept, baseline="other")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{sweep}", "{run}"], "has a page to itself; leave out"),
        (["{run}", "{sweep}"], "has a page to itself; leave out"),
        (["{sweep}", "--live"], "--live serves run folders"),
        (["{parent}"], "so name that"),
    ],
)
def test_mixtures_are_refused_with_the_way_out(swept: Path, tmp_path: Path, words: list[str], message: str):
    (tmp_path / "cells").symlink_to(swept)
    places = {"sweep": swept, "run": swept / "w-full-0", "parent": tmp_path}
    result = CliRunner().invoke(app, ["report", *(word.format(**places) for word in words)])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert not (swept / "report.html").exists()


def test_a_baseline_is_for_sweeps_alone(tmp_path: Path):
    run = write_fake_run(tmp_path / "run", updates=4)
    result = CliRunner().invoke(app, ["report", str(run.path), "--baseline", "full"])
    assert result.exit_code == 2
    assert "is read for a sweep's folder alone" in result.output


def test_a_step_size_of_an_arm_s_own_makes_no_table_and_a_grid_of_step_sizes_does(tmp_path: Path) -> None:
    chosen = {("w", "full"): "small", ("w", "grpo"): "large", ("v", "full"): "large", ("v", "grpo"): "large"}
    points = [({"world": w, "arm": arm, "step": step}, s) for (w, arm), step in chosen.items() for s in range(2)]
    own = read_cells(index(tmp_path / "own", [(f"{n}", point, seed) for n, (point, seed) in enumerate(points)]))
    assert layout_of(own).tables == ("world",)
    assert own_axes(own) == ("step",)
    grid = [({"world": w, "arm": arm, "step": step}, 0) for w, arm in chosen for step in ("small", "large")]
    every = read_cells(index(tmp_path / "grid", [(f"{n}", point, seed) for n, (point, seed) in enumerate(grid)]))
    assert layout_of(every).tables == ("world", "step")
    assert own_axes(every) == ()
