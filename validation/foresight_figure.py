"""The figure of `foresight`: per world, what alignment foresees of each ratio, and what one step brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atesd_lab.report.canvas import colour, save_figure, styled
from atesd_lab.report.svg import INK


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


COLUMNS = 4  # so that the words are readable on a page
AXIS = "change of the student's success by one small step, as a share of the largest true one"


@styled
def draw_foresight(found: Sequence[Seen], folder: Path) -> None:
    """Write foresight.svg and foresight.png: a panel per world and moment of training, one moment above the other."""
    worlds = list(dict.fromkeys(seen.world for seen in found))
    moments = list(dict.fromkeys(seen.updates for seen in found))
    columns = min(COLUMNS, len(worlds))
    blocks = -(-len(worlds) // columns)
    figure = Figure(figsize=(2.2 * columns + 0.7, 2.2 * len(moments) * blocks + 0.7), layout="constrained")
    panels = figure.subplots(len(moments) * blocks, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat:
        axes.set_visible(False)
    for place, world in enumerate(worlds):
        block, column = divmod(place, columns)
        for step, moment in enumerate(moments):
            axes = panels[block * len(moments) + step][column]
            axes.set_visible(True)
            _draw(axes, [seen for seen in found if (seen.world, seen.updates) == (world, moment)])
            if step == 0:
                axes.set_title(world)
            if column == 0:
                axes.set_ylabel(f"after {moment} updates" if moment else "at the start")
            axes.tick_params(labelbottom=step == len(moments) - 1)
            if step == len(moments) - 1:
                axes.set_xlabel("reveal ratio")
    figure.supylabel(AXIS, fontsize=10)
    first = panels[0][0]
    first.plot([], [], color=INK, label="foreseen by the alignment (its own scale)")
    first.plot([], [], color=INK, linestyle="", marker="o", label="true, with its standard error")
    for checkpoint in sorted({seen.checkpoint for seen in found} & set("abc")):
        first.plot([], [], color=colour("abc".find(checkpoint)), linewidth=3, label=f"checkpoint {checkpoint}")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, folder / "foresight")


def _draw(axes: Axes, some: Sequence[Seen]) -> None:
    """Both, each over its largest magnitude: only the shape is comparable, and only the shape chooses a ratio."""
    axes.axhline(0.0, color=INK, linewidth=0.8)
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
