"""An empty panel in the report's style, and what is drawn on it in the same way everywhere.

Nothing here touches matplotlib's global state but through a context that puts it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from atesd.text import visible
from atesd_lab.report.svg import INK, inline_svg

# Mid-tones: each has a contrast of at least 3 with a white and with a near-black page, and they stay apart for readers
# with a colour vision deficiency; dashes say the same again.
PALETTE = ("#2a7ab9", "#d9730d", "#0a8f6c", "#b4519e", "#7d7f86", "#9a7b00")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1)), (0, (1, 1, 4, 1)))
_STEPS = [1, 2, 2.5, 5, 10]
SMOOTH_FROM = 50  # updates; shorter series are drawn as they are

styled = rc_context(
    {
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9.5,
        "xtick.labelsize": 9.0,
        "ytick.labelsize": 9.0,
        "legend.fontsize": 9.0,
        "legend.frameon": False,
        "text.color": INK,
        "text.parse_math": False,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": INK,
        "grid.alpha": 0.14,
        "grid.linewidth": 0.6,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.size": 0.0,
        "ytick.major.size": 0.0,
        "axes.unicode_minus": False,
        "axes.formatter.useoffset": False,
        "figure.constrained_layout.h_pad": 0.05,
        "figure.constrained_layout.w_pad": 0.05,
    }
)


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn panel. `description` says in words what it shows; `reading` how to read it."""

    key: str
    description: str
    reading: str
    figure: Figure

    @styled
    def svg(self) -> str:
        """One inline `<svg>` element; the same rows give the same bytes."""
        self._settle()
        return inline_svg(self.figure, self.key, self.description)

    def _settle(self) -> None:
        """Lay the panel out once: a second pass starts from the first one's result and moves it by a hair."""
        if self.figure.get_layout_engine() is not None:
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")


def empty_panel(title: str, unit: str, horizontal: str = "update", height: float = 2.7) -> tuple[Figure, Axes]:
    """A panel of 4.6 inches by `height`, so small that its text stays readable at the width of a phone."""
    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(horizontal)
    axes.set_ylabel(unit)
    if horizontal == "update":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_STEPS))
    return figure, axes


def stacked_panels(
    title: str, units: Sequence[str], shares: Sequence[float], height: float
) -> tuple[Figure, list[Axes]]:
    """Panels over the same updates, one above the other, as wide as one panel; `shares` are those of the height."""
    figure = Figure(figsize=(4.6, height), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(units), 1, sharex=True, height_ratios=shares))
    panels[0].set_title(title)
    panels[-1].set_xlabel("update")
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS, integer=True))
    for axes, unit in zip(panels, units, strict=True):
        axes.set_ylabel(unit)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=_STEPS))
    figure.align_ylabels(panels)
    return figure, panels


def draw_series(axes: Axes, updates: Sequence[int], values: NDArray[np.float64], index: int) -> None:
    """A line; a long series as a thin line under the mean of its recent values."""
    if len(values) >= SMOOTH_FROM:
        axes.plot(updates, values, linewidth=0.6, color=colour(index), alpha=0.4)
        values = running_mean(values, max(5, len(values) // 20))
    marker = "o" if len(values) <= 2 else ""  # a line of one point would not be seen
    axes.plot(updates, values, linewidth=1.6, color=colour(index), linestyle=dash(index), marker=marker, markersize=3)


def fit_updates(axes: Axes, last: int) -> None:
    """Let the panel run over all planned updates, so that panels of one page agree and one point has a scale."""
    last = max(1, last)
    axes.set_xlim(-0.02 * last, 1.02 * last)


def fit_vertical(axes: Axes, is_share: bool) -> None:
    """Keep rounding noise from filling the panel, and a share in percent from going far below 0."""
    low, high = axes.get_ylim()
    least = 1.0 if is_share else 0.02 * max(abs(low), abs(high))
    missing = max(0.0, least - (high - low)) / 2
    low, high = low - missing, high + missing
    axes.set_ylim(max(-0.02 * high, low) if is_share else low, high)


def draw_key(axes: Axes, names: Sequence[tuple[int, str]]) -> None:
    """Which line is whose, below the panel, where there are several."""
    if len(names) < 2:
        return
    for index, name in names:
        axes.plot([], [], color=colour(index), linestyle=dash(index), linewidth=1.7, label=plain(name))
    place_legend(axes)


def place_legend(axes: Axes) -> None:
    """The legend inside the figure, below the panel, in two columns; the layout gives it the room that it needs."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=2.4)


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of the last `window` values at each place; of fewer at the start."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    mean: NDArray[np.float64] = (total[end] - total[start]) / (end - start)
    return mean


def colour(index: int) -> str:
    """The colour of the run or evaluation at this place."""
    return PALETTE[index % len(PALETTE)]


def dash(index: int) -> str | tuple[int, tuple[float, ...]]:
    """The dashes of the run at this place; with a colour that comes again they are others."""
    return DASHES[(index + index // len(PALETTE)) % len(DASHES)]


def plain(name: str) -> str:
    """A name as a figure may show it: ASCII, on one line, of bounded length."""
    ascii_name = visible(name).replace("\n", " ").encode("ascii", "backslashreplace").decode()
    return ascii_name if len(ascii_name) <= 30 else f"{ascii_name[:29]}~"


def save_figure(figure: Figure, path: Path) -> None:
    """Write `path`, a name without suffix, as .svg and .png, on white; the same figure gives the same bytes."""
    with rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path.with_name(f"{path.name}.svg"), facecolor="white", metadata={"Date": None})
    figure.savefig(path.with_name(f"{path.name}.png"), dpi=160, facecolor="white", metadata={"Software": None})
