from __future__ import annotations

import base64
import io
import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rcParams
from PIL import Image

from atesd.config import ProgressSignal
from atesd.table import Table, render_text
from atesd_lab.report import figures
from atesd_lab.report.canvas import DASHES, PALETTE, Chart, empty_panel, plain, running_mean
from atesd_lab.report.rows import RunRows, peak, read_run, read_runs
from atesd_lab.report.seeds import seeds_table
from atesd_lab.report.svg import INK, inline_svg
from atesd_lab.report.tables import (
    best_common_update,
    changed_settings,
    differences_table,
    evaluation_table,
    paired_points,
    results_table,
)
from fake_run import begin_run, decision_row, evaluation_row, fake_config, metric_row, write_fake_run

NOISE = np.random.default_rng(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRows]:
    folder = tmp_path_factory.mktemp("runs")
    write_fake_run(folder / "learned")
    write_fake_run(folder / "full", seed=1, kind="full")
    return read_runs([folder / "learned", folder / "full"])


def rows_of(path: Path, **changes: object) -> RunRows:
    begin_run(path, fake_config(100))
    run = read_run(path)
    fields = {name: getattr(run, name) for name in RunRows.__slots__}
    return RunRows(**fields | changes)


def drawn(chart: Chart | None) -> ElementTree.Element:
    assert chart is not None
    return ElementTree.fromstring(chart.svg())


def words(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter("text")]


def all_charts(run: RunRows, others: list[RunRows]) -> list[Chart]:
    panels = (*figures.LEARNING, *figures.SIGNALS, *figures.HEALTH)
    charts = [figures.metric([run], panel) for panel in panels]
    charts += [figures.accuracy(others, split) for split in run.splits]
    charts += [figures.by_difficulty(run, split) for split in run.splits]
    charts += [figures.credit(run, key) for key in ("progress", "grounding", "reward", "advantage")]
    charts += [figures.exposure(run), figures.exposures(others), figures.reward_by_ratio(run)]
    charts += [figures.time_by_phase(run)]
    return [chart for chart in charts if chart is not None]


@pytest.fixture(scope="module")
def drawings(runs: list[RunRows]) -> list[tuple[Chart, ElementTree.Element]]:
    return [(chart, drawn(chart)) for chart in all_charts(runs[0], runs)]


def test_every_figure_is_one_svg_that_scales_and_says_what_it_shows(drawings: list[tuple[Chart, ElementTree.Element]]):
    assert len(drawings) > 24
    for chart, root in drawings:
        assert (root.tag, root.get("role"), root.get("width")) == ("svg", "img", None)
        assert root.get("viewBox", "").startswith("0 0 331.2 ")  # 4.6 inches of 72 points: readable on a phone
        assert root.get("aria-label") == chart.description != ""
        assert chart.reading


def test_a_figure_has_no_style_no_script_and_takes_its_ink_from_the_page(runs: list[RunRows]):
    for chart in (figures.exposure(runs[0]), figures.accuracy(runs, "test")):
        root = drawn(chart)
        assert not {element.tag for element in root.iter()} & {"style", "script", "metadata"}
        assert not [element for element in root.iter() if "style" in element.attrib]
        assert INK not in ElementTree.tostring(root, encoding="unicode")
        assert all(element.get("fill") == "currentColor" for element in root.iter("text"))


def test_figures_of_one_page_share_no_id(drawings: list[tuple[Chart, ElementTree.Element]]):
    ids = [element.get("id") for _, root in drawings for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 0


def test_the_same_rows_draw_the_same_bytes(runs: list[RunRows]):
    first, again = figures.exposure(runs[0]), figures.exposure(runs[0])
    assert first is not None
    assert again is not None
    assert first.svg() == again.svg() == first.svg()


def test_drawing_leaves_matplotlib_s_settings_alone(runs: list[RunRows]):
    before = dict(rcParams)
    drawn(figures.exposure(runs[0]))
    assert dict(rcParams) == before


def test_a_name_that_looks_like_markup_or_maths_is_drawn_as_text(tmp_path: Path):
    names = ["<script>$x^2$", "b\u202e]]>&amp;\n"]
    runs = [rows_of(tmp_path / "a", name=names[0]), rows_of(tmp_path / "b", name=names[1])]
    evaluations = (evaluation_row(0, 0.5, NOISE), evaluation_row(20, 0.6, NOISE))
    runs = [rows_of(tmp_path / str(i), name=run.name, evaluations=evaluations) for i, run in enumerate(runs)]
    shown = words(drawn(figures.accuracy(runs, "validation")))
    assert "<script>$x^2$" in shown
    assert "b\\u27e6U+202E\\u27e7]]>&amp; " in shown


@given(st.text(st.characters(codec=None)))
def test_a_label_is_short_plain_ascii(name: str):
    label = plain(name)
    assert label.isascii()
    assert label.isprintable() or "\t" in label
    assert len(label) <= 30


def test_the_shade_behind_the_ratio_is_the_beta_density(tmp_path: Path):
    # Beta(2, 1) has density 2x, whose peak in the grid is its last row: shades rise in proportion to the ratio.
    # Beta(1, 2) is its mirror image. Each holds 4 updates, one column each.
    rows = [decision_row(update, 0.5, NOISE) for update in (0, 4)]
    rows[0] |= {"concentration1": 2.0, "concentration0": 1.0}
    rows[1] |= {"concentration1": 1.0, "concentration0": 2.0}
    metrics = tuple(metric_row(update, 0.5, NOISE) for update in range(8))
    chart = figures.exposure(rows_of(tmp_path / "run", metrics=metrics, decisions=tuple(rows)))
    (element,) = drawn(chart).iter("image")
    pixels = base64.b64decode(element.get("href", "").partition("base64,")[2])
    with Image.open(io.BytesIO(pixels)) as image:
        alpha = np.asarray(image.convert("RGBA"))[..., 3].astype(float)
    assert alpha.shape == (figures.DENSITY_ROWS, 8)
    column = alpha[:, 0] if alpha[0, 0] < alpha[-1, 0] else alpha[::-1, 0]
    middle = (np.arange(60) + 0.5) / 59.5
    np.testing.assert_allclose(column / column.max(), middle, atol=0.02)  # 8 bits
    np.testing.assert_array_equal(alpha[:, 0], alpha[::-1, 7])


def test_effective_ratios_are_dotted_only_where_they_differ(tmp_path: Path):
    same = tuple(metric_row(update, 0.5, NOISE, effective_ratio=0.5) for update in range(4))
    moved = tuple(metric_row(update, 0.5, NOISE, effective_ratio=0.25) for update in range(4))
    count = {}
    for name, metrics in (("same", same), ("moved", moved)):
        root = drawn(figures.exposure(rows_of(tmp_path / name, metrics=metrics)))
        count[name] = len(list(root.iter("use")))
    assert count["moved"] - count["same"] == 4 + 1  # and one in the legend


def test_pending_decisions_have_no_credit_yet(tmp_path: Path):
    rows = (decision_row(0, 0.5, NOISE), decision_row(4, 0.5, NOISE) | {"status": "pending"})
    chart = figures.credit(rows_of(tmp_path / "run", decisions=rows), "reward")
    assert chart is not None
    assert chart.description.startswith("reward of 1 decisions")


def test_nothing_measured_draws_nothing(tmp_path: Path):
    empty = rows_of(tmp_path / "empty")
    assert all_charts(empty, [empty]) == []


def test_a_constant_series_fills_no_panel_with_rounding_noise(tmp_path: Path):
    metrics = tuple(metric_row(update, 0.5, NOISE) for update in range(60))
    chart = figures.metric([rows_of(tmp_path / "run", metrics=metrics)], figures.SIGNALS[3])
    assert chart is not None
    low, high = chart.figure.axes[0].get_ylim()
    assert high - low == pytest.approx(0.02 * 0.2, rel=0.1)  # 2 % of the constant


def test_phases_add_up_over_the_updates(tmp_path: Path):
    rows = ({"update": 0, "seconds": {"sample": 1.0, "teacher": 2.0}}, {"update": 1, "seconds": {"sample": 3.0}})
    assert figures.phase_seconds(rows_of(tmp_path / "run", metrics=rows)) == {"sample": 4.0, "teacher": 2.0}


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(1, 40))
def test_the_running_mean_looks_only_back(values: list[float], window: int):
    expected = [float(np.mean(values[max(0, end - window) : end])) for end in range(1, len(values) + 1)]
    np.testing.assert_allclose(running_mean(np.array(values), window), expected, atol=1e-9)


def linear(colour: str) -> np.ndarray:
    share = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio, 1 to 21."""
    high, low = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", PALETTE)
@pytest.mark.parametrize("card", ["#ffffff", "#171b21"])
def test_every_colour_stands_out_from_both_cards(colour: str, card: str):
    assert contrast(colour, card) >= 3  # WCAG 2.1, 1.4.11: graphical objects


def test_lines_differ_for_a_reader_who_sees_no_green():
    # Deuteranopia as a linear map of linear RGB (Machado et al. 2009, severity 1.0).
    seen = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])
    for (one, a), (other, b) in itertools.combinations(enumerate(PALETTE), 2):
        assert np.abs(seen @ (linear(a) - linear(b))).max() > 0.05
        assert DASHES[one] != DASHES[other]


def test_ids_are_prefixed_where_they_are_used_and_dropped_elsewhere():
    figure, axes = empty_panel("a", "b")
    axes.plot([0, 1], [0, 1], marker="o")
    root = ElementTree.fromstring(inline_svg(figure, "k<1", "d"))
    ids = {element.get("id") for element in root.iter() if element.get("id")}
    targets = {use.get("href", "")[1:] for use in root.iter("use")}
    targets |= {element.get("clip-path", "")[5:-1] for element in root.iter() if element.get("clip-path")}
    assert ids == targets
    assert all(name.startswith("k-1-") for name in ids)


def counted(update: int, counts: list[int], split: str = "test") -> dict[str, object]:
    row = evaluation_row(update, 0.5, NOISE, split, problems=len(counts))
    value = sum(counts) / (2 * len(counts))
    average = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return row | {"correct_counts": {f"p{i}": n for i, n in enumerate(counts)}, "average": average}


def test_the_results_table_shows_base_last_gain_and_a_peak_that_owns_up(tmp_path: Path):
    rows = (counted(0, [0, 1, 1, 0]), counted(20, [2, 2, 2, 1]), counted(40, [2, 2, 1, 1]))
    table = results_table([rows_of(tmp_path / "run", evaluations=rows)], "test")
    assert table.columns[-1] == "peak (selected on the same data)"
    ((_, last, gain, base, _, best),) = table.rows
    # 2, 7 and 6 of 8 samples correct
    assert base == "25.0 [15, 35]"
    assert last == "75.0 [65, 85] @40"
    assert gain.startswith("+50.0 [")
    assert best == "87.5 [78, 98] @20"
    assert any("too high" in note for note in table.notes)
    assert any("designed" in note for note in table.notes)  # the leap world


def test_before_training_there_is_a_base_and_nothing_else(tmp_path: Path):
    table = results_table([rows_of(tmp_path / "run", evaluations=(counted(0, [0, 1, 1, 0]),))], "test")
    assert [table.rows[0][place] for place in (1, 2, 3, 5)] == ["–", "–", "25.0 [15, 35]", "–"]


def test_panels_run_over_all_planned_updates(tmp_path: Path):
    run = rows_of(tmp_path / "run", evaluations=(counted(0, [1]),), metrics=(metric_row(0, 0.5, NOISE),))
    for chart in (figures.accuracy([run], "test"), figures.exposure(run), figures.metric([run], figures.LEARNING[0])):
        assert chart is not None
        assert chart.figure.axes[0].get_xlim() == (-2, 102)  # 100 updates and a margin


def test_a_paired_interval_has_no_width_where_every_problem_gains_the_same():
    assert paired_points(counted(0, [0, 1, 0, 1]), counted(9, [1, 2, 1, 2])) == "+50.0 [+50.0, +50.0]"


def test_pairs_are_matched_by_problem_and_not_by_place():
    before, after = counted(0, [0, 2, 0, 2]), counted(9, [0, 2, 0, 2])
    after["correct_counts"] = dict(reversed(list(after["correct_counts"].items())))
    assert paired_points(before, after) == "+0.0 [+0.0, +0.0]"


def test_without_common_problems_there_is_no_difference(tmp_path: Path):
    other = counted(40, [1, 1]) | {"correct_counts": {"q1": 1, "q2": 1}}
    assert paired_points(counted(0, [1, 1]), other) == "–"
    assert paired_points(None, other) == "–"
    assert differences_table([rows_of(tmp_path / "run")], "test") is None


def test_the_best_common_update_is_trained_shared_and_best_on_the_mean(tmp_path: Path):
    first = rows_of(tmp_path / "a", evaluations=(counted(0, [2, 2]), counted(20, [2, 2]), counted(40, [1, 1])))
    second = rows_of(tmp_path / "b", evaluations=(counted(0, [2, 2]), counted(20, [0, 0]), counted(40, [2, 2])))
    # Means 1.0 at 0 (not trained), 0.5 at 20, 0.75 at 40.
    assert best_common_update([first, second], "test") == 40
    assert best_common_update([first], "test") is None


def test_runs_on_different_data_are_never_subtracted(tmp_path: Path):
    rows = (counted(0, [0, 1]), counted(20, [2, 2]))
    steps = fake_config(100, data={"source": "world", "leap_share": 0.0})
    leaps, other = (rows_of(tmp_path / name, name=name, evaluations=rows) for name in ("leaps", "steps"))
    runs = [leaps, replace(other, config=steps)]
    assert differences_table(runs, "test") is None
    assert best_common_update(runs, "test") is None
    assert any("different data" in note for note in results_table(runs, "test").notes)


def test_the_peak_is_the_earliest_of_equals():
    best = peak([counted(0, [1]), counted(20, [2]), counted(40, [2])])
    assert best is not None
    assert best["update"] == 20


def test_runs_that_differ_in_the_seed_alone_are_taken_together(tmp_path: Path):
    runs = []
    for kind, gain in (("full", 0), ("learned", 1)):
        for seed in (0, 1, 2):
            path = tmp_path / f"{kind}{seed}"
            begin_run(path, fake_config(100, seed, kind)).append("evaluations", counted(100, [gain, gain + 1, gain]))
            runs.append(read_run(path))
    table = seeds_table(runs, "test")
    assert table is not None
    names, values, seeds, updates = zip(*table.rows, strict=True)
    assert names[:2] == ("OPSD (full exposure) as full0", "ATESD (sound credit) as learned0")
    assert set(seeds) == {"3"}
    assert set(updates) == {"100"}
    assert values[2] == "+50.0 [+50.0, +50.0]"  # every problem gains one of two samples under every seed
    assert seeds_table(runs[2:4], "test") is None  # two runs, two configs


def test_the_evaluation_table_counts_every_verdict_apart(tmp_path: Path):
    row = counted(0, [1, 2]) | {"verdicts": {"correct": 3, "wrong": 0, "unparseable": 1, "timeout": 0}}
    table = evaluation_table(rows_of(tmp_path / "run", evaluations=(row,)))
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert [cells[verdict] for verdict in ("correct", "wrong", "unparseable", "timeout")] == ["3", "0", "1", "0"]


def test_only_changed_settings_are_listed():
    table = changed_settings(fake_config(10))
    assert ("train.num_updates", "10", "100") in table.rows
    assert "train.seed" not in [row[0] for row in table.rows]


def test_a_table_in_a_terminal_is_aligned_and_bare_of_control_marks():
    table = Table("T", ("run", "a rather long heading"), (("x\x1b[31m", "1.0"), ("longer name", "22.0")), ("note",))
    lines = render_text(table).splitlines()
    assert lines[0] == "T"
    assert lines[-1] == "note"
    body = [line for line in lines if line.endswith(".0")]
    assert len({len(line) for line in body}) == 1
    assert "x⟦U+001B⟧[31m" in body[0]
    assert "a rather long heading" not in "".join(lines)  # wrapped over narrow figures


@pytest.mark.parametrize("signal", get_args(ProgressSignal))
def test_a_reward_by_success_or_its_gain_is_a_share_and_one_by_a_likelihood_is_in_nats(tmp_path: Path, signal: str):
    begin_run(tmp_path / "run", fake_config(8, credit={"progress_signal": signal}))
    units = [figures._credit_unit(read_run(tmp_path / "run"), key) for key in ("progress", "reward", "grounding")]
    share = signal in ("probe_success", "probe_gain", "train_success")
    assert units == [*["share verified" if share else "nats per token"] * 2, "nats per token"]
