from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from atesd.config import with_overrides
from atesd_lab.report import lookahead
from atesd_lab.report.canvas import PALETTE, Chart
from atesd_lab.report.page import render_page
from atesd_lab.report.rows import RunRows, read_run
from fake_run import begin_run, fake_config, metric_row
from outline import Outline

NOISE = np.random.default_rng(0)


def looked(values: list[float], errors: list[float], ratios: tuple[float, ...] = (0.0, 1.0)) -> dict[str, Any]:
    return {"ratios": list(ratios), "values": values, "errors": errors, "rollouts": 32}


def run_of(path: Path, looks: dict[int, dict[str, Any]], updates: int = 12, **groups: Any) -> RunRows:
    config = fake_config(updates, **{"kind": "aligned", **groups})
    run = begin_run(path, config)
    for update in range(updates):
        run.append("metrics", metric_row(update, 0.5, NOISE, alignment=looks.get(update)))
    return read_run(path)


def points(chart: Chart) -> list[list[tuple[float, float]]]:
    """The corners of every path where it is used, in points from the drawing's upper left corner."""
    root = ElementTree.fromstring(chart.svg())
    paths = {
        element.get("id", ""): [
            (float(x), float(y)) for x, y in re.findall(r"[ML] ?(-?[\d.]+) (-?[\d.]+)", element.get("d", ""))
        ]
        for element in root.iter("path")
    }
    uses = [(use.get("href", "")[1:], float(use.get("x", 0)), float(use.get("y", 0))) for use in root.iter("use")]
    return [[(x + right, y + down) for x, y in paths[name]] for name, right, down in uses if paths.get(name)]


def test_a_band_lies_1_96_standard_errors_around_the_value_at_the_scale_of_its_look(tmp_path: Path):
    # Largest magnitudes 2 and 4, so that ratio 1 is at -1 +- 1.96 * 0.25 and at 0.25 +- 1.96 * 0.05.
    run = run_of(tmp_path / "run", {4: looked([1.0, -2.0], [0.3, 0.5]), 8: looked([4.0, 1.0], [0.4, 0.2])})
    chart = lookahead.alignment(run)
    assert chart is not None
    paths = points(chart)
    width, height = (72 * inches for inches in chart.figure.get_size_inches())
    _, full, _ = chart.figure.axes
    assert full.get_ylabel() == "at 1"
    box, (bottom, top) = full.get_position(), full.get_ylim()

    def at(update: float, value: float) -> tuple[float, float]:
        across = (update + 0.02 * 12) / (1.04 * 12)  # 12 updates and a margin
        up = (value - bottom) / (top - bottom)
        return width * (box.x0 + across * box.width), height * (1 - box.y0 - up * box.height)

    corners = [at(4, -1.49), at(4, -0.51), at(8, 0.152), at(8, 0.348)]
    gaps = [max(min(abs(np.subtract(c, p)).max() for p in path) for c in corners) for path in paths]
    assert min(gaps) < 0.02  # of a point: one path has all four corners
    assert sorted(gaps)[1] > 0.02


def test_every_ratio_has_a_panel_highest_ratio_on_top_and_all_share_their_scale(tmp_path: Path):
    ratios = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    run = run_of(tmp_path / "run", {4: looked([0.1 * i for i in range(7)], [0.0] * 7, ratios)})
    chart = lookahead.alignment(run)
    assert chart is not None
    first, *below = chart.figure.axes
    assert first.get_ylabel() == "in force"
    assert [axes.get_ylabel() for axes in below] == [f"at {ratio:g}" for ratio in reversed(ratios)]
    assert len({axes.get_ylim() for axes in below}) == 1
    assert "(0.60 to 0.60 of success" in chart.reading


def test_the_map_shows_the_share_of_the_largest_and_nothing_where_nothing_was_seen(tmp_path: Path):
    # Looks at 2, 4 and 8: each lasts two updates, so that nothing is known of 6 and 7. The run ends with update 9.
    looks = {2: looked([1.0, -2.0], [0, 0]), 4: looked([-3.0, 0.0], [0, 0]), 8: looked([0.5, 1.0], [0, 0])}
    chart = lookahead.alignment_map(run_of(tmp_path / "run", looks, updates=10))
    assert chart is not None
    (element,) = ElementTree.fromstring(chart.svg()).iter("image")
    with Image.open(io.BytesIO(base64.b64decode(element.get("href", "").partition("base64,")[2]))) as image:
        pixels = np.asarray(image.convert("RGBA")).astype(float)
    assert pixels.shape == (lookahead.MAP_ROWS, 8, 4)
    rows = pixels[[-1, 0]] if element.get("transform") else pixels[[0, -1]]  # full exposure, then the answer alone
    share = rows[..., 3] / (0.75 * 255)
    expected = [[1, 1, 0, 0, 0, 0, 1, 1], [0.5, 0.5, 1, 1, 0, 0, 0.5, 0.5]]
    found = share if np.allclose(share[0, :2], 1, atol=0.02) else share[::-1]
    np.testing.assert_allclose(found, expected, atol=0.01)
    orange, blue = ([int(name[place : place + 2], 16) for place in (1, 3, 5)] for name in (PALETTE[1], PALETTE[0]))
    full = rows[0] if found is share else rows[1]
    np.testing.assert_allclose(full[0, :3], orange, atol=2)
    np.testing.assert_allclose(full[7, :3], blue, atol=2)


def test_without_a_look_there_is_nothing_to_draw_and_zeros_are_drawn_as_zeros(tmp_path: Path):
    none = run_of(tmp_path / "none", {})
    assert lookahead.alignment(none) is None
    assert lookahead.alignment_map(none) is None
    zeros = run_of(tmp_path / "zeros", {4: looked([0.0, 0.0], [0.0, 0.0])})
    for chart in (lookahead.alignment(zeros), lookahead.alignment_map(zeros)):
        assert chart is not None
        assert "nan" not in chart.svg()


@pytest.mark.parametrize(
    ("granularity", "words"), [("update", "smoothing"), ("per_problem", "the mean over the update")]
)
def test_the_reading_says_whose_ratio_the_line_is(tmp_path: Path, granularity: str, words: str):
    config = with_overrides(fake_config(8), ["exposure.kind=aligned", f"exposure.granularity={granularity}"])
    run = begin_run(tmp_path / "run", config)
    run.append("metrics", metric_row(0, 0.5, NOISE, alignment=looked([0.0, 1.0], [0.0, 0.0])))
    chart = lookahead.alignment_map(read_run(tmp_path / "run"))
    assert chart is not None
    assert words in chart.reading


def test_a_page_of_an_aligned_run_shows_its_look_ahead_and_says_why_there_is_no_credit(tmp_path: Path):
    run = run_of(tmp_path / "run", {4: looked([1.0, -2.0], [0.3, 0.5])})
    page = render_page([run])
    assert Outline(page).faults == []
    assert page.count("Alignment by ratio") >= 1
    assert "Alignment at its own scale" in page
    assert "the ratios come from the look-ahead" in page
    assert "Tokens kept by the gate" not in page


def test_a_page_of_a_gated_run_shows_the_kept_share_and_the_curvature(tmp_path: Path):
    run = begin_run(tmp_path / "run", fake_config(4, kind="full", loss={"gate": "aligned"}))
    for update in range(4):
        run.append("metrics", metric_row(update, 1.0, NOISE, kept_share=0.25, curvature=0.05))
    page = render_page([read_run(tmp_path / "run")])
    assert "Tokens kept by the gate, % of tokens: run from 25.0 to 25.0" in page
    assert "Curvature of the look-ahead" in page
    assert "Alignment by ratio" not in page
