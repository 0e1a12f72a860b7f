"""What the first-order look-ahead saw: the alignment of every ratio over training, and what the token gate kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from atesd.rows import AlignmentRow
from atesd.text import number
from atesd_lab.report.canvas import (
    PALETTE,
    SMOOTH_FROM,
    Chart,
    empty_panel,
    fit_updates,
    place_legend,
    stacked_panels,
    styled,
)
from atesd_lab.report.figures import MAX_COLUMNS, Panel, last_update
from atesd_lab.report.rows import RunRows
from atesd_lab.report.svg import INK
from atesd_lab.stats.contrast import NORMAL_95

MAP_ROWS = 120

GATE = (
    Panel(
        "kept_share",
        "Tokens kept by the gate",
        "% of tokens",
        "Share of the student's tokens that were distilled (of a gate that weighs them: their mean "
        "weight). All of them: with `aligned`, success had no direction yet.",
        share=True,
    ),
    Panel(
        "curvature",
        "Curvature of the look-ahead",
        "share of the change",
        "How far the logits are from a straight line over the step that measures alignment. 0: first order is exact; "
        "near 1: do not believe the signs.",
    ),
)


@dataclass(frozen=True, slots=True)
class Look:
    """The alignment of every ratio before one update, with standard errors over its rollouts."""

    update: int
    ratios: tuple[float, ...]
    values: NDArray[np.float64]
    errors: NDArray[np.float64]

    @property
    def largest(self) -> float:
        """The largest magnitude among the ratios."""
        return float(np.abs(self.values).max())


def looks(run: RunRows) -> list[Look]:
    """Every alignment that was logged."""
    return [_look(int(row["update"]), found) for row in run.metrics if (found := row.get("alignment"))]


def _look(update: int, found: AlignmentRow) -> Look:
    """Lowest ratio first, however they were logged."""
    order = np.argsort(found["ratios"])
    ratios, values, errors = (np.array(found[name], float)[order] for name in ("ratios", "values", "errors"))
    return Look(update, tuple(map(float, ratios)), values, errors)


@styled
def alignment(run: RunRows, scope: str = "all") -> Chart | None:
    """Alignment of each ratio over updates with 95 % intervals, under the ratio in force; None without a look-ahead."""
    seen = looks(run)
    if not seen:
        return None
    ratios = seen[0].ratios
    units = ["in force", *(f"at {ratio:g}" for ratio in reversed(ratios))]
    height = 1.6 + 0.62 * len(ratios)
    figure, (above, *below) = stacked_panels("Alignment by ratio", units, [1.2, *[1.0] * len(ratios)], height)
    _draw_ratio(above, run)
    updates, largest = [look.update for look in seen], np.array([look.largest for look in seen])
    values, halves = (np.array(rows) for rows in zip(*map(_at_unit_scale, seen), strict=True))
    low, high = (values - halves).min(), (values + halves).max()
    size = 2.6 if len(seen) < SMOOTH_FROM else 0.0
    for index, axes in enumerate(reversed(below)):
        value, half = values[:, index], halves[:, index]
        axes.fill_between(updates, value - half, value + half, color=PALETTE[0], alpha=0.22, linewidth=0)
        axes.plot(updates, value, color=PALETTE[0], linewidth=1.4, marker="o", markersize=size)
        if len(seen) == 1:
            axes.vlines(updates, value - half, value + half, color=PALETTE[0], linewidth=1.2)
        axes.axhline(0, color=INK, linewidth=0.7)
        axes.set_ylim(min(low, -0.1), max(high, 0.1))
    fit_updates(below[-1], last_update([run]))
    means = ", ".join(f"{mean:.2f} at {ratio:g}" for mean, ratio in zip(values.mean(0), ratios, strict=True))
    reading = (
        f"Top: the ratio that was used{_granularity(run)}; until success has a direction, the fallback's. Below, for "
        "each ratio: what a small step on its loss would do to verified success, to first order; above 0 it helps. 1 "
        f"is the largest of that look ({number(largest.min(), 2)} to {number(largest.max(), 2)} of success per unit of "
        "learning rate). Bands: 95 % intervals over the update's rollouts, which all ratios share: differences are "
        "surer than they look."
    )
    return Chart(f"{scope}-alignment", f"Alignment by ratio, mean over {len(seen)} looks: {means}", reading, figure)


@styled
def alignment_map(run: RunRows, scope: str = "all") -> Chart | None:
    """Alignment by update and ratio, each look at its own scale, under the ratio in force; None without one."""
    seen = looks(run)
    if not seen:
        return None
    figure, axes = empty_panel("Alignment at its own scale", "reveal ratio", height=3.1)
    _draw_map(axes, seen, run.updates_done)
    best = [look.ratios[int(look.values.argmax())] for look in seen]
    size = 9 if len(seen) < SMOOTH_FROM else 4
    axes.scatter(
        [look.update for look in seen], best, s=size, color=INK, zorder=4, linewidths=0, label="best of the moment"
    )
    _draw_ratio(axes, run)
    fit_updates(axes, last_update([run]))
    axes.plot([], [], color=INK, linewidth=1.3, label="ratio in force")
    for name, place in (("a step would help", 0), ("a step would harm", 1)):
        axes.fill_between([], [], [], color=PALETTE[place], alpha=0.6, linewidth=0, label=name)
    place_legend(axes)
    words = f"Alignment by update and ratio over {len(seen)} looks; best: {best[0]:g} first, {best[-1]:g} last"
    smoothed = run.config.granularity == "update"
    reading = (
        "As deep as its share of the largest of that update; the best of the moment is that of all rollouts together. "
        "The ratio in force is "
        + ("the best after smoothing over earlier looks." if smoothed else f"what was used{_granularity(run)}.")
    )
    return Chart(f"{scope}-alignment-map", words, reading, figure)


def _at_unit_scale(look: Look) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values and half-widths of their intervals, divided by the largest magnitude; all zeros stay as they are."""
    scale = look.largest or 1.0
    return look.values / scale, NORMAL_95 * look.errors / scale


def _granularity(run: RunRows) -> str:
    return "" if run.config.granularity == "update" else " (the mean over the update's rollouts)"


def _draw_ratio(axes: Axes, run: RunRows) -> None:
    updates, ratios = run.series("reveal_ratio")
    ends = [*updates, updates[-1] + 1], [*ratios, ratios[-1]]
    axes.step(*ends, where="post", color=INK, linewidth=1.3, zorder=3)
    axes.set_ylim(-0.06, 1.06)


def _draw_map(axes: Axes, seen: list[Look], end: int) -> None:
    """One image: a cell lasts for the shortest time between two looks, and reaches half-way to the next ratio."""
    starts = np.array([look.update for look in seen])
    lasting = np.diff(starts).min(initial=end - int(starts[0]))
    columns = np.linspace(starts[0], end, min(end - int(starts[0]), MAX_COLUMNS), endpoint=False)
    grid = (np.arange(MAP_ROWS) + 0.5) / MAP_ROWS
    nearest = np.abs(grid[:, None] - np.array(seen[0].ratios)).argmin(1)
    values = np.array([_at_unit_scale(look)[0] for look in seen])
    place = np.searchsorted(starts, columns, side="right") - 1
    shown = np.where((columns < starts[place] + lasting)[:, None], values[place], 0.0)[:, nearest].T
    image = np.where((shown >= 0)[..., None], to_rgb(PALETTE[0]), to_rgb(PALETTE[1]))
    image = np.concatenate([image, 0.75 * np.abs(shown)[..., None]], axis=2)
    axes.imshow(image, extent=(starts[0], end, 0, 1), origin="lower", aspect="auto", interpolation="none", zorder=0.5)
