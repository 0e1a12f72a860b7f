"""The demo's figure: what each reveal ratio is worth in each world, and which ratios two exposures chose there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atesd_lab.report.arms import Arms
from atesd_lab.report.canvas import Chart, colour, dash, place_legend, save_figure, styled
from atesd_lab.report.rows import average
from atesd_lab.report.svg import INK

ALIGNED = "aligned"
LEARNED = "learned"
"""The arms that choose their ratio; the others are called by theirs."""
CHOOSING = {ALIGNED: ("look-ahead", 2, "D"), LEARNED: ("ATESD (Beta policy)", 1, "*")}
"""Of each its name, the place of its style, and its marker."""
SCORE, RATIO = "accuracy on held-out problems, %", "reveal ratio in force"


CALLED = {"steps": "steps world", "leaps": "leap world"}


@styled
def draw_demo(worlds: Sequence[Arms], folder: Path) -> None:
    """Write demo.svg and demo.png, on white: a column per world, a style per arm. The same runs give the same bytes."""
    figure = Figure(figsize=(9.2, 6.0), layout="constrained")
    panels = figure.subplots(2, len(worlds), squeeze=False, sharey="row", height_ratios=(3, 2))
    for column, arms in enumerate(worlds):
        _draw_world(panels[0][column], panels[1][column], arms)
    panels[0][0].set_ylabel(SCORE)
    panels[1][0].set_ylabel(RATIO)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, folder / "demo")


@styled
def world_chart(arms: Arms) -> Chart:
    """The same of one world, for a page."""
    figure = Figure(figsize=(4.6, 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw_world(above, below, arms)
    above.set_ylabel(SCORE)
    below.set_ylabel(RATIO)
    place_legend(above)
    scores = ", ".join(f"{arm} {_reach(arms, arm)[0]:.1f} %" for arm in arms.groups)
    words = f"{CALLED[arms.name]}: accuracy by reveal ratio ({scores}), and the ratio in force by update"
    reading = (
        "Above: accuracy after training at each ratio; bars are 95 % intervals over problems. Below: the ratios that "
    )
    return Chart(f"demo-{arms.name}", words, reading + "the two exposures chose, update by update.", figure)


def _draw_world(above: Axes, below: Axes, arms: Arms) -> None:
    _draw_scores(above, arms)
    _draw_ratios(below, arms)
    above.set_title(CALLED[arms.name])


def _draw_scores(axes: Axes, arms: Arms) -> None:
    ratios = sorted((arm for arm in arms.groups if arm not in CHOOSING), key=float)
    values, below, above = zip(*(_reach(arms, ratio) for ratio in ratios), strict=True)
    axes.errorbar(
        [float(ratio) for ratio in ratios],
        values,
        yerr=[below, above],
        color=colour(0),
        marker="o",
        capsize=3,
        label="fixed ratios; at 1 OPSD",
    )
    axes.axhline(100 * average(arms.base_test()[0]), color=INK, linestyle=":", linewidth=1.2, label="before training")
    for arm, (name, style, marker) in CHOOSING.items():
        ratio, (value, down, up) = arms.late_ratios(arm), _reach(arms, arm)
        axes.errorbar(ratio, [value], yerr=[[down], [up]], color=colour(style), capsize=3, alpha=0.6)
        axes.plot(
            ratio,
            [value],
            color=colour(style),
            linestyle=dash(style),
            marker=marker,
            markersize=13 if marker == "*" else 8,
            markeredgecolor="white",
            label=name,
            zorder=3,
        )
    axes.set(xlabel="reveal ratio (look-ahead, ATESD: mean of the last quarter)", xlim=(-0.03, 1.06), ylim=(0, 100))


def _reach(arms: Arms, arm: str) -> tuple[float, float, float]:
    """Average@k of an arm on test, %, and how far its interval reaches below and above, in points."""
    found = arms.last_test(arm)[0]["average"]
    return 100 * found["value"], 100 * (found["value"] - found["low"]), 100 * (found["high"] - found["value"])


def _draw_ratios(axes: Axes, arms: Arms) -> None:
    for arm, (_, style, _) in CHOOSING.items():
        updates, ratios = arms.runs(arm)[0].series("reveal_ratio")
        axes.step(updates, ratios, where="post", color=colour(style), linestyle=dash(style), linewidth=1.6)
    axes.set(xlabel="update", ylim=(-0.03, 1.05))
