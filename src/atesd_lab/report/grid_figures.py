"""Small multiples of a grid: accuracy and reveal ratio against updates, a line per arm, the mean over its seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes

from atesd.text import visible
from atesd_lab.report.canvas import (
    PALETTE,
    Chart,
    colour,
    dash,
    draw_key,
    draw_series,
    empty_panel,
    fit_updates,
    plain,
    styled,
)
from atesd_lab.report.figures import last_update
from atesd_lab.report.grid import ScoredTable
from atesd_lab.report.groups import RunGroup
from atesd_lab.report.rows import RunRows

BESIDE = len(PALETTE) - 1  # arms in a panel, besides the baseline
Line = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Multiples:
    """Panels that share a scale, and how to read them."""

    charts: tuple[Chart, ...]
    reading: str


def accuracies(table: ScoredTable, scope: str) -> Multiples:
    """Average@k against updates, on the split that was evaluated most often; few arms a panel, the baseline in each."""
    by_split = {split: _lines(table, _evaluated(split)) for split in ("validation", "test")}
    split = max(by_split, key=lambda split: sum(map(len, by_split[split].values())))
    lines = {arm: line for arm, line in by_split[split].items() if line}
    without = [arm for arm in table.groups if arm not in lines]
    reading = (
        f"Mean over the finished runs of an arm, at the updates at which all of them were evaluated on {split}. "
        "All panels of a table have one scale."
    )
    if without:
        reading += f" Without such an update: {', '.join(without)}."
    title = visible(f"Average@{_samples(table, split)} on {split}")
    return Multiples(_panels(table, lines, title, "%", f"{scope}-accuracy", _draw_accuracy), reading)


def ratios(table: ScoredTable, scope: str) -> Multiples:
    """Reveal ratio against updates of the arms that move it; the reading names the ratios that stood still."""
    lines = _lines(table, _ratio)
    moved = {arm: line for arm, line in lines.items() if line and _moves(table.groups[arm])}
    still: dict[str, list[str]] = {}
    for arm, line in lines.items():
        if line and arm not in moved:
            still.setdefault(f"{fmean(line.values()):.2g}", []).append(arm)
    without = [arm for arm, line in lines.items() if not line]
    reading = "Mean over the finished runs of an arm. Thin: each update; thick: mean of recent updates."
    reading += "".join(f" Always {ratio}, and not drawn: {', '.join(arms)}." for ratio, arms in still.items())
    if without:
        reading += f" No teacher, hence no ratio: {', '.join(without)}."
    return Multiples(_panels(table, moved, "Reveal ratio", "share shown", f"{scope}-ratio", _draw_ratio), reading)


def _samples(table: ScoredTable, split: str) -> str:
    """The k of Average@k; several with strokes between them."""
    rows = [row for group in table.groups.values() for run in group.runs for row in run.evaluated(split)]
    return "/".join(map(str, sorted({int(row["samples"]) for row in rows}))) or "k"


def _panels(
    table: ScoredTable,
    lines: Mapping[str, Line],
    title: str,
    unit: str,
    key: str,
    draw: Callable[[Axes, Line, int], None],
) -> tuple[Chart, ...]:
    """The lines in panels of at most `BESIDE`, with the baseline's, if there is one, as the first of each."""
    beside = [arm for arm in lines if arm != table.baseline]
    first = [arm for arm in lines if arm == table.baseline]
    parts = [beside[start : start + BESIDE] for start in range(0, len(beside), BESIDE)] or ([[]] if first else [])
    runs = [run for group in table.groups.values() for run in group.runs]
    charts = []
    for place, part in enumerate(parts, start=1):
        heading = title + (f" ({place} of {len(parts)})" if len(parts) > 1 else "")
        arms = dict.fromkeys(first, 0) | {arm: index for index, arm in enumerate(part, start=1)}
        charts.append(_panel({arm: lines[arm] for arm in arms}, arms, runs, (heading, unit, f"{key}-{place}"), draw))
    _share_scale(charts)
    return tuple(charts)


@styled
def _panel(
    lines: Mapping[str, Line],
    indices: Mapping[str, int],
    runs: Sequence[RunRows],
    words: tuple[str, str, str],
    draw: Callable[[Axes, Line, int], None],
) -> Chart:
    title, unit, key = words
    figure, axes = empty_panel(title if len(lines) > 1 else f"{title}: {plain(next(iter(lines)))}", unit, height=3.1)
    said = []
    for arm, line in lines.items():
        draw(axes, line, indices[arm])
        ends = [line[update] for update in (min(line), max(line))]
        said.append(f"{plain(arm)} from {ends[0]:.3g} to {ends[1]:.3g}")
    fit_updates(axes, last_update(runs))
    draw_key(axes, [(indices[arm], arm) for arm in lines])
    return Chart(key, f"{title}, {unit}: {'; '.join(said)}", "", figure)


def _share_scale(charts: Sequence[Chart]) -> None:
    """The same vertical scale for all panels, so that lines of two of them can be compared."""
    panels = [chart.figure.axes[0] for chart in charts]
    limits = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _draw_accuracy(axes: Axes, line: Line, index: int) -> None:
    values = [100 * value for value in line.values()]
    axes.plot(list(line), values, marker="o", markersize=2.6, linewidth=1.5, color=colour(index), linestyle=dash(index))


def _draw_ratio(axes: Axes, line: Line, index: int) -> None:
    draw_series(axes, list(line), np.array(list(line.values())), index)
    axes.set_ylim(-0.03, 1.03)


def _lines(table: ScoredTable, values: Callable[[RunRows], Line]) -> dict[str, Line]:
    """For each arm the mean over its runs, at the updates that all of them have."""
    return {arm: _mean([values(run) for run in group.runs]) for arm, group in table.groups.items()}


def _mean(each: Sequence[Line]) -> Line:
    common = sorted(set.intersection(*map(set, each)))
    return {update: fmean(line[update] for line in each) for update in common}


def _evaluated(split: str) -> Callable[[RunRows], Line]:
    return lambda run: {int(row["update"]): float(row["average"]["value"]) for row in run.evaluated(split)}


def _ratio(run: RunRows) -> Line:
    return dict(zip(*run.series("reveal_ratio"), strict=True))


def _moves(group: RunGroup) -> bool:
    return any(len(set(run.series("reveal_ratio")[1])) > 1 for run in group.runs)
