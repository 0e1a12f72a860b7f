"""The figure of `foresight`: per world, what alignment foresees of each ratio, and what one step brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atesd_lab.report.canvas import colour, save_figure, styled


class Seen(Protocol):
    """What is drawn of one check; see `foresight.Foresight`."""

    @property
    def world(self) -> str: ...
    @property
    def checkpoint(self) -> str: ...
    @property
    def updates(self) -> int: ...
    @property
    def ratios(self) -> tuple[float, ...]: ...
    @property
    def foreseen(self) -> tuple[float, ...]: ...
    @property
    def true(self) -> tuple[float, ...]: ...
    @property
    def true_errors(self) -> tuple[float, ...]: ...
    @property
    def rank_correlation(self) -> float: ...


@styled
def draw_foresight(found: Sequence[Seen], folder: Path) -> None:
    """Write foresight.svg and foresight.png: a column per world, a row per moment of training."""
    worlds = list(dict.fromkeys(seen.world for seen in found))
    moments = list(dict.fromkeys(seen.updates for seen in found))
    figure = Figure(figsize=(2.1 * len(worlds) + 0.6, 2.3 * len(moments) + 0.4), layout="constrained")
    panels = figure.subplots(len(moments), len(worlds), squeeze=False, sharex=True, sharey=True)
    for row, moment in enumerate(moments):
        for column, world in enumerate(worlds):
            some = [seen for seen in found if (seen.world, seen.updates) == (world, moment)]
            _draw(panels[row][column], some)
            if row == 0:
                panels[row][column].set_title(world)
            if row == len(moments) - 1:
                panels[row][column].set_xlabel("reveal ratio")
        panels[row][0].set_ylabel(f"after {moment} updates" if moment else "at the start")
    panels[0][0].plot([], [], color="#57606a", label="foreseen")
    panels[0][0].plot([], [], color="#57606a", linestyle="", marker="o", label="true")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, folder / "foresight")


def _draw(axes: Axes, some: Sequence[Seen]) -> None:
    """Both, each over its largest magnitude: only the shape is comparable, and only the shape chooses a ratio."""
    axes.axhline(0.0, color="#57606a", linewidth=0.8)
    axes.set(xlim=(-0.05, 1.05), ylim=(-1.15, 1.15), xticks=(0, 0.5, 1), yticks=(-1, 0, 1))
    for seen in some:
        index = "abc".find(seen.checkpoint)
        foreseen, true = _unit(seen.foreseen), _unit(seen.true)
        largest = max(abs(value) for value in seen.true) or 1.0
        axes.plot(seen.ratios, foreseen, color=colour(max(index, 0)), linewidth=1.2)
        errors = [error / largest for error in seen.true_errors]
        axes.errorbar(
            seen.ratios, true, yerr=errors, color=colour(max(index, 0)), linestyle="", marker="o", markersize=3
        )
    said = ", ".join(f"{seen.rank_correlation:.1f}" for seen in some)
    axes.text(0.03, -1.1, f"rank corr. {said}", fontsize=7.5)


def _unit(values: Sequence[float]) -> list[float]:
    largest = max(abs(value) for value in values) or 1.0
    return [value / largest for value in values]
