"""The demo's figure: what each reveal ratio is worth in both worlds, and which ratios ATESD chose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atesd_lab.report.arms import Arms
from atesd_lab.report.canvas import colour, save_figure, styled
from atesd_lab.report.rows import average

LEARNED = "learned"
"""The arm that chooses its ratio; the others are called by theirs."""


@styled
def draw_demo(worlds: Sequence[Arms], folder: Path) -> None:
    """Write demo.svg and demo.png, on white. The same runs give the same bytes."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    scores, ratios = figure.subplots(1, 2, width_ratios=(3, 2))
    for index, arms in enumerate(worlds):
        _draw_scores(scores, arms, index)
        _draw_ratios(ratios, arms, index)
    scores.set(title="Held-out accuracy by reveal ratio", xlabel="reveal ratio (1: OPSD)", ylabel="Average@k, %")
    scores.set(xlim=(-0.03, 1.16), ylim=(0, 100))
    ratios.set(title="Reveal ratio that ATESD used", xlabel="update", ylabel="reveal ratio", ylim=(0, 1))
    scores.plot([], [], linestyle="", marker="*", markersize=10, color="#57606a", label="ATESD, at its late ratio")
    scores.plot([], [], linestyle=":", color="#57606a", label="before training")
    scores.legend(loc="lower right")
    save_figure(figure, folder / "demo")


def _draw_scores(axes: Axes, arms: Arms, index: int) -> None:
    ratios = sorted((arm for arm in arms.groups if arm != LEARNED), key=float)
    values, below, above = zip(*(_reach(arms, ratio) for ratio in ratios), strict=True)
    places = list(map(float, ratios))
    axes.errorbar(places, values, yerr=[below, above], color=colour(index), marker="o", capsize=3)
    axes.axhline(100 * average(arms.base_test()[0]), color=colour(index), linestyle=":", linewidth=1.2)
    late, (learned, down, up) = arms.late_ratios(LEARNED), _reach(arms, LEARNED)
    axes.errorbar(late, [learned], yerr=[[down], [up]], color=colour(index), capsize=3, alpha=0.6)
    axes.plot(late, [learned], marker="*", markersize=14, color=colour(index), markeredgecolor="white")
    axes.annotate(
        arms.name, (places[-1], values[-1]), (9, 0), textcoords="offset points", va="center", color=colour(index)
    )


def _reach(arms: Arms, arm: str) -> tuple[float, float, float]:
    """Average@k of an arm on test, %, and how far its interval reaches below and above, in points."""
    found = arms.last_test(arm)[0]["average"]
    return 100 * found["value"], 100 * (found["value"] - found["low"]), 100 * (found["high"] - found["value"])


def _draw_ratios(axes: Axes, arms: Arms, index: int) -> None:
    ratios = arms.runs(LEARNED)[0].series("reveal_ratio")[1]
    axes.step(range(len(ratios)), ratios, where="post", color=colour(index), linewidth=1.6)
    axes.annotate(
        arms.name,
        (len(ratios) - 1, ratios[-1]),
        (4, 0),
        textcoords="offset points",
        va="center",
        color=colour(index),
        annotation_clip=False,
    )
