from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atesd.text import signed, spelt
from atesd_lab.report.page import render_page
from atesd_lab.report.rows import RunRows, read_run
from atesd_lab.report.samples import SORTED_TOKENS, SampleView, alignment_level, sample_views
from fake_run import begin_run, fake_config, sample_row
from outline import Outline

NOISE = np.random.default_rng(0)


def run_of(path: Path, *rows: dict[str, Any], gate: str = "aligned") -> RunRows:
    run = begin_run(path, fake_config(10, kind="full", loss={"gate": gate}))
    for row in rows:
        run.append("samples", row)
    return read_run(path)


def view_of(path: Path, tokens: list[str], gate: str = "aligned", **values: Any) -> SampleView:
    (view,) = sample_views(run_of(path, sample_row(0, tokens, NOISE, **values), gate=gate))
    return view


def test_a_token_s_colour_is_its_sign_and_its_share_of_the_largest_alignment():
    # Shares of the largest, 2: 1, 0.5, 0.25, 0.05, 0.005.
    assert [alignment_level(value, 2.0) for value in (2.0, -1.0, -0.5, 0.1, -0.01)] == [3, -3, -2, 1, 0]
    assert alignment_level(0.0, 0.0) == 0


def test_the_completion_is_shown_once_by_kl_and_once_by_alignment_with_what_the_gate_kept(tmp_path: Path):
    values = {"token_kl": [0.5, 0.0, 2.0], "token_alignment": [-2.0, 0.001, 0.5]}
    kl, alignment = view_of(tmp_path / "run", ["a", " b", "\n"], **values).heats
    assert [token.style for token in kl.tokens] == ["k4", "k0", "k5 n"]
    assert [token.style for token in alignment.tokens] == ["m3", "k0 kept", "p2 kept n"]
    assert [token.words for token in alignment.tokens] == ["-2.0, left out", "+0.0010, kept", "+0.50, kept"]
    for heat in (kl, alignment):
        assert "".join(token.text for token in heat.tokens) == "a b\n"


def test_without_the_aligned_gate_no_token_is_called_kept_or_left_out(tmp_path: Path):
    view = view_of(tmp_path / "run", ["a", "b"], gate="none", token_kl=[1.0, 1.0], token_alignment=[1.0, -1.0])
    assert [token.style for token in view.heats[1].tokens] == ["p3", "m3"]
    assert [token.words for token in view.heats[1].tokens] == ["+1.0", "-1.0"]
    assert view.columns == ("KL, nats", "alignment")


def test_a_token_s_own_ratio_is_shown_where_it_was_logged(tmp_path: Path):
    values = {"token_kl": [1.0] * 3, "token_alignment": [], "token_ratio": [0.0, 0.7, None]}
    view = view_of(tmp_path / "run", ["a", "b", "c"], gate="none", **values)
    assert [token.style for token in view.heats[1].tokens] == ["r0", "r3", "k0"]
    assert view.columns == ("KL, nats", "ratio")
    assert [row.values[1] for row in view.orders[0].rows] == ["0.0", "0.70", "–"]


def test_tokens_can_be_read_in_the_order_of_each_measurement(tmp_path: Path):
    kl, alignment = [0.3, 2.0, None, 0.7], [0.5, -1.0, 2.0, None]
    view = view_of(tmp_path / "run", ["a", "b", "c", "d"], token_kl=kl, token_alignment=alignment)
    places = {order.name: [row.place for row in order.rows] for order in view.orders}
    assert places == {
        "position": [1, 2, 3, 4],
        "largest KL": [2, 4, 1, 3],
        "most helpful": [3, 1, 2, 4],  # what was not measured comes last
        "most harmful": [2, 1, 3, 4],
    }


def test_a_row_of_a_sorted_list_shows_the_text_before_its_token(tmp_path: Path):
    tokens = ["The", " answer", "\n", " is", " 7"]
    view = view_of(tmp_path / "run", tokens, token_kl=[1.0] * 5)
    before = [row.before for row in view.orders[0].rows]
    assert before == ["", "The", "The answer", "The answer↵", "The answer↵ is"]
    assert [row.token.text for row in view.orders[0].rows] == ["The", "␣answer", "↵", "␣is", "␣7"]


def test_a_long_rollout_says_how_many_tokens_its_lists_leave_out(tmp_path: Path):
    count = SORTED_TOKENS + 1
    view = view_of(tmp_path / "long", ["x"] * count, token_kl=[float(i) for i in range(count)])
    assert [len(order.rows) for order in view.orders] == [SORTED_TOKENS] * 2
    assert view.orders[1].rows[0].place == count
    assert view.note == "The first 100 of 101 tokens in each order."
    assert view_of(tmp_path / "short", ["x"] * 100, token_kl=[1.0] * 100).note == ""


def test_each_rollout_has_its_own_radio_buttons_and_each_order_a_rule_that_shows_it(tmp_path: Path):
    row = sample_row(0, ["a", "b"], NOISE, token_alignment=[1.0, -1.0])
    page = render_page([run_of(tmp_path / "run", row, row)])
    outline = Outline(page)
    assert outline.faults == []
    buttons = outline.named("input")
    assert [button["type"] for button in buttons] == ["radio"] * 8
    assert sorted({str(button["name"]) for button in buttons}) == ["run1-sample1", "run1-sample2"]
    assert sum("checked" in button for button in buttons) == 2
    assert sorted(label["for"] or "" for label in outline.named("label")) == sorted(b["id"] or "" for b in buttons)
    for place in (1, 2, 3, 4):
        assert f".by{place}:checked ~ .order{place}" in page
        assert sum(f"order{place}" in (div.get("class") or "") for div in outline.named("div")) == 2


def test_white_space_is_spelt_out_and_signs_are_written():
    assert spelt(" a\n\tb") == "␣a↵⇥b"
    assert [signed(value) for value in (0.5, -0.5, 0.0, None)] == ["+0.50", "-0.50", "0.0", "–"]


def style_sheet(scheme: str) -> dict[str, str]:
    """The style sheet's variables as a scheme of the reader sets them."""
    text = (importlib.resources.files("atesd_lab.report") / "templates" / "page.css").read_text("utf-8")
    blocks = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    pairs = [dict(re.findall(r"--([\w-]+): ([^;]+);", block)) for block in blocks]
    return pairs[0] | (pairs[1] if scheme == "dark" else {})


def shades() -> list[tuple[str, str, float]]:
    text = (importlib.resources.files("atesd_lab.report") / "templates" / "page.css").read_text("utf-8")
    return [
        (name, colour, float(alpha))
        for name, colour, alpha in re.findall(
            r"^\.([kpmr]\d) \{ background: rgba\((.+?), ([.\d]+)\)", text, re.MULTILINE
        )
    ]


def linear(share: np.ndarray) -> float:
    parts = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return float(parts @ [0.2126, 0.7152, 0.0722])


def from_hex(colour: str) -> np.ndarray:
    return np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])


@pytest.mark.parametrize("behind", ["page", "card"])  # of a text, of a sorted list
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour_of_a_heat_map(scheme: str, behind: str):
    variables, found = style_sheet(scheme), shades()
    assert len(found) == 17  # 6 of KL, 3 and 3 of alignment, 5 of a ratio
    ink, page = linear(from_hex(variables["ink"])), from_hex(variables[behind])
    for name, colour, alpha in found:
        parts = variables[colour[6:-1]] if colour.startswith("var") else colour
        shade = linear(page + alpha * (np.array([float(part) for part in parts.split(",")]) / 255 - page))
        low, high = sorted((ink, shade))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name  # WCAG 2.1, 1.4.3
