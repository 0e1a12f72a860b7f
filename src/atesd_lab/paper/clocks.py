"""Two clocks: how much the teacher sees, and which weights it has; whether the one changes what the other is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from atesd.table import Table
from atesd.text import percent
from atesd_lab.paper.bench import Bench, Findings, main_world
from atesd_lab.paper.claims import Claim
from atesd_lab.paper.drawing import panels
from atesd_lab.report.canvas import colour, plain, styled
from atesd_lab.report.rows import at_common_updates, validated
from atesd_lab.stats.contrast import POINTS, Contrast, over_seeds

MOVING: Mapping[str, str] = {"ema": "EMA", "refresh": "refresh", "live": "live"}
"""Worlds whose teacher's weights move, beside the first one, where they are frozen."""
ARMS = ("full", "fixed-0.5", "sound")


def report(bench: Bench) -> Findings:
    """Accuracy and late ratio by weights and exposure, a table for each weights, and the interactions."""
    claims = [
        Claim(
            f"{MOVING[world]} weights: what full exposure adds to a fixed ratio of 0.5 differs from frozen weights",
            "ours",
            "-",
            (_two_sided(interaction(bench, world)),),
        )
        for world in MOVING
    ]
    return Findings(
        "Exposure and the teacher's weights: two clocks",
        (clock_table(bench), *(bench[world].table(ARMS, "full") for world in bench)),
        {"clocks": _draw(bench)},
        tuple(claims),
        (f"The paper keeps the teacher's weights frozen. All in the {main_world(bench)} world.",),
    )


def clock_table(bench: Bench) -> Table:
    """Mean accuracy in % of every exposure under every weights, with the range over seeds."""
    rows = []
    for world, name in _weights(bench).items():
        cells = []
        for arm in ARMS:
            values = bench[world].accuracies(arm)
            cells.append(f"{percent(fmean(values))} ({percent(min(values))} to {percent(max(values))})")
        rows.append((name, *cells, f"{fmean(bench[world].late_ratios('sound')):.2f}"))
    columns = ("teacher's weights", *ARMS, "late ratio of sound")
    return Table("Average@k on test after the last update, %: mean and range over seeds", columns, tuple(rows))


def interaction(bench: Bench, world: str) -> Contrast:
    """(full - fixed 0.5) under these weights minus the same under frozen weights, over seeds."""
    full, half, frozen_full, frozen_half = (
        bench[where].accuracies(arm) for where in (world, main_world(bench)) for arm in ("full", "fixed-0.5")
    )
    gaps = [(a - b) - (c - d) for a, b, c, d in zip(full, half, frozen_full, frozen_half, strict=True)]
    return over_seeds(f"{MOVING[world]}: (full - 0.5) - the same with frozen weights", gaps, POINTS)


def _weights(bench: Bench) -> dict[str, str]:
    """What the teacher's weights do, by world."""
    return {main_world(bench): "frozen", **MOVING}


def _two_sided(one: Contrast) -> Contrast:
    """A difference of either sign speaks for an interaction: the contrast with the sign that it has."""
    if one.value >= 0:
        return one
    return replace(one, name=f"minus {one.name}", value=-one.value, low=-one.high, high=-one.low)


@styled
def _draw(bench: Bench) -> Figure:
    figure, all_axes = panels(len(bench), width=3.4)
    for axes, (world, name) in zip(all_axes, _weights(bench).items(), strict=True):
        for index, arm in enumerate(ARMS):
            validations = [validated(run) for run in bench[world].runs(arm)]
            updates, shares = at_common_updates(f"{world}, {arm}: accuracy on validation", validations)
            values = [[100 * share for share in one] for one in shares]
            axes.plot(
                updates, np.mean(values, axis=0), color=colour(index), linewidth=2, marker="o", markersize=3, label=arm
            )
            for one in values:
                axes.plot(updates, one, color=colour(index), linewidth=0.5, alpha=0.4)
        axes.set(title=plain(f"teacher: {name}"), xlabel="update", ylim=(0, 100))
    all_axes[0].set_ylabel("Average@k on validation, %")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
