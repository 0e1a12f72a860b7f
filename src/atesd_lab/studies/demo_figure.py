"""The demo's figure: what each reveal ratio is worth in both worlds, and which ratios ATESD chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atesd_lab.report.canvas import colour, save_figure, styled


@dataclass(frozen=True, slots=True)
class Point:
    """Average@k with its interval, shares in [0, 1], at a reveal ratio."""

    ratio: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Curve:
    """One world: the untrained student, the fixed ratios up to OPSD's 1, and the learned ratio."""

    world: str
    base: float
    fixed: tuple[Point, ...]
    learned: Point
    learned_ratios: tuple[float, ...]


@styled
def draw_demo(curves: Sequence[Curve], folder: Path) -> None:
    """Write demo.svg and demo.png, on white. The same curves give the same bytes."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    scores, ratios = figure.subplots(1, 2, width_ratios=(3, 2))
    for index, curve in enumerate(curves):
        _draw_scores(scores, curve, index)
        _draw_ratios(ratios, curve, index)
    scores.set(title="Held-out accuracy by reveal ratio", xlabel="reveal ratio (1: OPSD)", ylabel="Average@k, %")
    scores.set(xlim=(-0.03, 1.16), ylim=(0, 100))
    ratios.set(title="Reveal ratio that ATESD used", xlabel="update", ylabel="reveal ratio", ylim=(0, 1))
    scores.plot([], [], linestyle="", marker="*", markersize=10, color="#57606a", label="ATESD, at its late ratio")
    scores.plot([], [], linestyle=":", color="#57606a", label="before training")
    scores.legend(loc="lower right")
    save_figure(figure, folder / "demo")


def _draw_scores(axes: Axes, curve: Curve, index: int) -> None:
    ratios = [point.ratio for point in curve.fixed]
    values = [100 * point.value for point in curve.fixed]
    spread = [_reach(point) for point in curve.fixed]
    axes.errorbar(ratios, values, yerr=list(zip(*spread, strict=True)), color=colour(index), marker="o", capsize=3)
    axes.axhline(100 * curve.base, color=colour(index), linestyle=":", linewidth=1.2)
    below, above = _reach(curve.learned)
    learned = 100 * curve.learned.value
    axes.errorbar([curve.learned.ratio], [learned], yerr=[[below], [above]], color=colour(index), capsize=3, alpha=0.6)
    axes.plot([curve.learned.ratio], [learned], marker="*", markersize=14, color=colour(index), markeredgecolor="white")
    axes.annotate(
        curve.world, (ratios[-1], values[-1]), (9, 0), textcoords="offset points", va="center", color=colour(index)
    )


def _reach(point: Point) -> tuple[float, float]:
    """How far the interval reaches below and above the value, in points."""
    return 100 * (point.value - point.low), 100 * (point.high - point.value)


def _draw_ratios(axes: Axes, curve: Curve, index: int) -> None:
    axes.step(range(len(curve.learned_ratios)), curve.learned_ratios, where="post", color=colour(index), linewidth=1.6)
    axes.annotate(
        curve.world,
        (len(curve.learned_ratios) - 1, curve.learned_ratios[-1]),
        (4, 0),
        textcoords="offset points",
        va="center",
        color=colour(index),
        annotation_clip=False,
    )
