"""Figure 4B: the policy's Beta density over training, as a mixture over the seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import beta

from atesd.table import Table
from atesd.text import MISSING
from atesd_lab.paper.bench import Bench, Findings
from atesd_lab.paper.claims import Claim
from atesd_lab.paper.drawing import panels
from atesd_lab.paper.exposure import policies_at, policy_means
from atesd_lab.paper.numbers import printed
from atesd_lab.report.canvas import colour, styled
from atesd_lab.report.decisions import Policy, moments
from atesd_lab.report.rows import RunRows
from atesd_lab.report.svg import INK
from atesd_lab.stats.contrast import over_seeds

GRID = (np.arange(400) + 0.5) / 400


def report(bench: Bench) -> Findings:
    """Mean, mode and mass of the density at moments of training; the ridge; whether it moves up as the paper's does."""
    (world,) = bench
    paper = printed("policy_over_training")
    claims = []
    for arm in list(bench[world].groups):
        moves = [means[-1] - means[0] for means in policy_means(bench[world].runs(arm))[1]]
        contrast = over_seeds("last mean - first mean", moves, "of ratio")
        printed_move = f"{paper['start_mean']} to a mode of {paper['late_mode']}"
        claims.append(Claim(f"{world}: the policy ({arm}) moves up over training", "paper", printed_move, (contrast,)))
    return Findings(
        "The policy over training: figure 4B",
        tuple(density_table(bench, world, arm) for arm in list(bench[world].groups)),
        {"ridge": _draw_ridges(bench, world)},
        tuple(claims),
        (
            f"The densities of all {len(bench[world].seeds)} seeds are averaged. A movement inside the "
            "null band of `exposure` says nothing.",
        ),
    )


def density_table(bench: Bench, world: str, arm: str) -> Table:
    """The mixture density of an arm at a few decisions."""
    runs = bench[world].runs(arm)
    paper = printed("policy_over_training")
    rows = []
    updates, each = policies_at(runs)
    places = moments(len(updates))
    for place in places:
        density = mixture([held[place] for held in each])
        mass = np.cumsum(density) / density.sum()
        low, high = (float(GRID[np.searchsorted(mass, share)]) for share in (0.05, 0.95))
        words = {
            places[0]: f"mean {paper['start_mean']}",
            places[-1]: f"mode {paper['late_mode']}, mass {paper['mass']}",
        }
        mean, mode = float((GRID * density).sum() / density.sum()), float(GRID[density.argmax()])
        rows.append(
            (str(updates[place]), words.get(place, MISSING), f"{mean:.2f}", f"{mode:.2f}", f"{low:.2f} to {high:.2f}")
        )
    columns = ("update", "paper", "mean", "mode", "90 % of the mass")
    return Table(f"{world}, {arm}: the policy's density over training", columns, tuple(rows))


def mixture(held: Sequence[Policy]) -> NDArray[np.float64]:
    """The mean of some Beta densities, on `GRID`."""
    density: NDArray[np.float64] = np.mean(
        [beta.pdf(GRID, one.concentration1, one.concentration0) for one in held], axis=0
    )
    return density


@styled
def _draw_ridges(bench: Bench, world: str) -> Figure:
    arms = list(bench[world].groups)
    figure, all_axes = panels(len(arms), width=4.4, height=4.6)
    for index, (axes, arm) in enumerate(zip(all_axes, arms, strict=True)):
        _draw_ridge(axes, bench[world].runs(arm), index)
        axes.set(title=f"{world}, {arm}", xlabel="reveal ratio", xlim=(0, 1))
    all_axes[0].set_ylabel("update")
    return figure


def _draw_ridge(axes: Axes, runs: Sequence[RunRows], index: int) -> None:
    updates, each = policies_at(runs)
    places = moments(len(updates))
    densities = [mixture([held[place] for held in each]) for place in places]
    tallest = max(float(density.max()) for density in densities)
    for step, density in enumerate(densities):
        height = 1.6 * density / tallest - step
        axes.fill_between(GRID, -step, height, color="white", linewidth=0, zorder=step + 2)
        axes.fill_between(GRID, -step, height, color=colour(index), alpha=0.45, linewidth=0, zorder=step + 2)
        axes.plot(GRID, height, color=INK, linewidth=0.7, zorder=step + 2)
    axes.set_yticks([-step for step in range(len(places))], [str(updates[place]) for place in places])
