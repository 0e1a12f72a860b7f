"""What the figures of the experiments have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from atesd_lab.paper.bench import Bench
from atesd_lab.report.canvas import colour, dash, plain, save_figure, styled
from atesd_lab.report.rows import average
from atesd_lab.report.svg import INK
from atesd_lab.stats.contrast import Contrast

DENSE = 12  # points; longer lines have no markers


@styled
def panels(count: int, width: float = 4.6, height: float = 3.4, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """Empty panels of this size in inches, so many in a row at most, that their words are readable on a page."""
    rows = -(-count // columns)
    columns = -(-count // rows)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    found = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in found[count:]:
        axes.set_visible(False)
    return figure, found[:count]


@styled
def accuracy_dots(
    bench: Bench, worlds: Sequence[str], arms: Sequence[str], paper: Mapping[str, float] = MappingProxyType({})
) -> Figure:
    """Accuracy of each arm: a dot for every seed, a bar at their mean, a star for the paper's number if one is given.

    Give the paper's numbers on its own benchmarks only: they have no place on a toy world's axis.
    """
    shown = [[arm for arm in arms if arm in bench[world].groups] for world in worlds]
    figure, all_axes = panels(len(worlds), height=1.3 + 0.3 * max(map(len, shown)))
    for axes, world, some in zip(all_axes, worlds, shown, strict=True):
        base = 100 * float(np.mean(list(map(average, bench[world].base_test()))))
        axes.axvline(base, color=INK, linestyle=":", linewidth=1)
        for place, arm in enumerate(some):
            values = 100 * np.array(bench[world].accuracies(arm))
            axes.plot(values, [place] * len(values), "o", color=colour(0), alpha=0.45, markersize=4)
            axes.plot([values.mean()], [place], "|", color=colour(0), markersize=13, markeredgewidth=2.2)
            if arm in paper:
                axes.plot([paper[arm]], [place], "*", color=colour(1), markersize=9)
        axes.set_yticks(range(len(some)), [plain(arm) for arm in some])
        axes.set(title=world, xlabel="Average@k on test, %", ylim=(len(some) - 0.4, -0.6))
    all_axes[0].plot([], [], "o", color=colour(0), alpha=0.45, markersize=4, label="a seed")
    all_axes[0].plot([], [], "|", color=colour(0), markersize=13, markeredgewidth=2.2, label="their mean")
    all_axes[0].plot([], [], color=INK, linestyle=":", linewidth=1, label="before training")
    if paper:
        all_axes[0].plot([], [], "*", color=colour(1), label="the paper, on these benchmarks")
    figure.legend(loc="outside lower center", ncols=2 if len(worlds) == 1 else 4)
    return figure


@styled
def contrast_bars(title: str, contrasts: Sequence[Contrast]) -> Figure:
    """Differences with their 95 % intervals, beside a line at 0."""
    figure, (axes,) = panels(1, width=6.4, height=1.1 + 0.28 * len(contrasts))
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, one in enumerate(contrasts):
        value, *interval = one.in_unit
        ends = [end for end in interval if np.isfinite(end)]
        axes.plot(ends, [place] * len(ends), color=colour(0), linewidth=1.6)
        axes.plot([value], [place], "o", color=colour(0), markersize=5)
    axes.set_yticks(range(len(contrasts)), [one.name for one in contrasts])
    axes.invert_yaxis()
    axes.set(title=title, xlabel=f"{contrasts[0].unit if contrasts else ''} (95 % interval over seeds and problems)")
    return figure


def log_axis(axes: Axes) -> None:
    """A logarithmic vertical axis whose labels are plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_seeds(
    axes: Axes, horizontal: Sequence[float], by_seed: Sequence[Sequence[float]], index: int, name: str
) -> None:
    """A thin line for every seed and a thick one for their mean."""
    for one in by_seed:
        axes.plot(horizontal, one, color=colour(index), linewidth=0.6, alpha=0.4)
    mean = np.mean(np.array(by_seed, dtype=float), axis=0)
    axes.plot(
        horizontal,
        mean,
        color=colour(index),
        linestyle=dash(index),
        linewidth=2,
        marker="o" if len(mean) < DENSE else "",
        markersize=3.5,
        label=name,
    )


@styled
def write_figure(figure: Figure, path: Path) -> None:
    """Write the figure as SVG and PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
