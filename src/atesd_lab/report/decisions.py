"""The decisions of a run: the policy behind each, what each earned and when, and which way that pushed the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from scipy.special import digamma, logit
from scipy.stats import beta

from atesd.rows import DecisionRow
from atesd.table import Table
from atesd.text import finite, number, signed
from atesd_lab.report.canvas import PALETTE, Chart, empty_panel, fit_vertical, place_legend, stacked_panels, styled
from atesd_lab.report.rows import RunRows
from atesd_lab.report.svg import INK

LATEST = 30  # decisions on the timeline, and in the table that is open
RIDGES = 9
_GRID = (np.arange(200) + 0.5) / 200
_OVERLAP = 1.6  # height of the tallest density, in distances between two ridges


@dataclass(frozen=True, slots=True)
class Policy:
    """The Beta of one decision, over the updates [start, end) that it held, and the ratio that it gave."""

    start: int
    end: int
    concentration1: float
    concentration0: float
    reveal_ratio: float

    @property
    def mean(self) -> float:
        """The mean of the Beta."""
        return self.concentration1 / (self.concentration1 + self.concentration0)


def policies(run: RunRows) -> list[Policy]:
    """The policy at each logged decision; empty for an exposure that has none."""
    starts = [int(row["update"]) for row in run.decisions]
    ends = [start + run.config.credit.hold_updates for start in starts]
    found = []
    for row, start, end, following in zip(run.decisions, starts, ends, [*starts[1:], *ends[-1:]], strict=True):
        first, second = finite(row.get("concentration1")), finite(row.get("concentration0"))
        if first is not None and second is not None:
            found.append(Policy(start, min(end, following), first, second, float(row["reveal_ratio"])))
    return found


def finished(run: RunRows) -> list[DecisionRow]:
    """Decisions that a policy update has used; the credit of the others may not be whole."""
    return [row for row in run.decisions if row.get("status") != "pending"]


def push(row: DecisionRow) -> float | None:
    """Which way a decision pushed the policy's mean: advantage x mean over its draws of [logit(x) - E logit(x)].

    The derivative of advantage x log Beta(x; c1 + m, c0 - m) in m at 0, with E logit(x) = digamma(c1) - digamma(c0).
    None for a decision without a Beta or an advantage, and for a draw at 0 or 1, where the density has no derivative.
    """
    names = ("advantage", "concentration1", "concentration0")
    advantage, first, second = (finite(row.get(name)) for name in names)
    draws = [x for x in map(finite, (row.get("samples") or {}).values()) if x is not None]
    if advantage is None or first is None or second is None or not all(0 < x < 1 for x in draws) or not draws:
        return None
    return advantage * float(np.mean(logit(draws)) - (digamma(first) - digamma(second)))


def moments(decisions: int) -> list[int]:
    """Which of so many decisions a ridge shows: at most `RIDGES`, evenly over training, first and last among them."""
    return sorted({round(place) for place in np.linspace(0, decisions - 1, min(RIDGES, decisions))})


@styled
def ridge(run: RunRows, scope: str = "all") -> Chart | None:
    """The policy's Beta densities at moments of training, one above the other; None without a policy."""
    known = policies(run)
    if not known:
        return None
    shown = [known[place] for place in moments(len(known))]
    figure, axes = empty_panel("The policy over training", "decision before update", "reveal ratio", height=3.6)
    densities = [beta.pdf(_GRID, policy.concentration1, policy.concentration0) for policy in shown]
    tallest = max(float(density.max()) for density in densities)
    for step, (policy, density) in enumerate(zip(shown, densities, strict=True)):
        height, front = _OVERLAP * density / tallest - step, 2 + step
        name = "" if step else "the policy's density"
        axes.fill_between(_GRID, -step, height, color=PALETTE[1], alpha=0.32, linewidth=0, zorder=front, label=name)
        axes.plot(_GRID, height, color=PALETTE[1], linewidth=1.1, zorder=front)
        axes.scatter(
            [policy.reveal_ratio],
            [-step],
            s=18,
            color=PALETTE[0],
            linewidths=0,
            zorder=front + len(shown),
            clip_on=False,
            label="" if step else "the ratio that was drawn",
        )
    axes.set_yticks([-step for step in range(len(shown))], [str(policy.start) for policy in shown])
    axes.set_xlim(0, 1)
    tops = [_OVERLAP * float(density.max()) / tallest - step for step, density in enumerate(densities)]
    axes.set_ylim(0.75 - len(shown), max(tops) + 0.15)
    first, last = shown[0], shown[-1]
    words = f"Beta densities of {len(shown)} of {len(known)} decisions: mean {first.mean:.2f} at update {first.start}"
    place_legend(axes)
    reading = "First decision on top, all on one scale: a narrow peak is a policy that is sure of itself."
    return Chart(f"{scope}-ridge", f"{words}, {last.mean:.2f} at update {last.start}", reading, figure)


@styled
def timeline(run: RunRows, scope: str = "all") -> Chart | None:
    """The latest decisions: hold and look-ahead window at the height of the ratio; below, the reward each earned."""
    rows = run.decisions[-LATEST:]
    if not rows:
        return None
    units = "reveal ratio", "reward"
    figure, (above, below) = stacked_panels("Decisions and what they earned", units, shares=(1.7, 1), height=4.4)
    for row in rows:
        start, end = _hold(row, run)
        ratio, (opened, closed) = float(row["reveal_ratio"]), row["window"]
        above.plot([start, end], [ratio] * 2, color=_tone(row)[0], linewidth=3.2, solid_capstyle="butt", zorder=3)
        above.plot([opened, closed], [ratio - 0.03] * 2, color=_tone(row)[0], linewidth=0.9, marker="|", markersize=4)
    held = policies(run)
    for policy in held:
        if policy.start >= rows[0]["update"]:
            above.plot([policy.start, policy.end], [policy.mean] * 2, color=INK, linewidth=1.2, zorder=2.5)
    _draw_rewards(below, rows)
    first, last = int(rows[0]["update"]), max(int(row["window"][1]) for row in rows)
    learned = {int(row["logged_at"]) + 1 for row in finished(run) if first <= row["logged_at"] <= last}
    for axes in (above, below):
        for moment in sorted(learned):
            axes.axvline(moment, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    above.set_ylim(-0.06, 1.03)
    margin = 0.02 * (last - first)
    below.set_xlim(first - margin, last + margin)
    _timeline_key(above, rows, bool(held), bool(learned))
    reading = "Where a look-ahead window closes, the lower panel has the reward of its decision."
    if held:
        reading += " The policy's mean moves toward blue and away from orange."
    words = f"The last {len(rows)} of {len(run.decisions)} decisions, from update {first} to {last}"
    return Chart(f"{scope}-timeline", words, reading, figure)


def _timeline_key(axes: Axes, rows: Sequence[DecisionRow], has_policy: bool, has_learned: bool) -> None:
    """What the marks of the timeline mean; only what is drawn."""
    tones = {_tone(row) for row in rows}
    words = {"^": "earned more than its batch", "v": "earned less", "o": "as its batch, or still open"}
    for tone, marker in sorted(tones, key=lambda one: list(words).index(one[1])):
        axes.plot([], [], color=tone, marker=marker, markersize=4.4, linewidth=3.2, label=words[marker])
    axes.plot([], [], color=PALETTE[4], linewidth=0.9, marker="|", markersize=4, label="its look-ahead window")
    if has_policy:
        axes.plot([], [], color=INK, linewidth=1.2, label="the policy's mean")
    if has_learned:
        axes.plot([], [], color=INK, linewidth=0.8, linestyle=(0, (1, 2)), label="a policy update")
    place_legend(axes)


def decisions_table(run: RunRows, rows: Sequence[DecisionRow], title: str) -> Table:
    """What each decision was drawn from, when it held and was watched, what it earned, and where that pushed."""
    means = {policy.start: policy.mean for policy in policies(run)}
    columns = ("before update", "held", "look-ahead", "policy's mean", "ratio", "effective", "progress", "grounding")
    cells = [
        (
            str(row["update"]),
            f"{_hold(row, run)[0]} to {_hold(row, run)[1] - 1}",
            f"{row['window'][0]} to {row['window'][1]}",
            number(means.get(int(row["update"])), 2),
            number(row["reveal_ratio"], 2),
            number(row.get("effective_ratio"), 2),
            *(signed(row.get(name)) for name in ("progress", "grounding", "reward", "advantage")),
            signed(push(row)),
            "pending" if row.get("status") == "pending" else str(row["logged_at"]),
        )
        for row in rows
    ]
    notes = (
        "Look-ahead: the first and the last update before which the progress signal is read.",
        "Push: the advantage times how far the draw lies above the policy's own mean, on the logit scale. Where it is "
        "positive the decision pushed the policy up; each policy update follows the sum over its decisions.",
        "A pending decision moved nothing: its reward is what its window gave so far.",
    )
    return Table(title, (*columns, "reward", "advantage", "push", "learned after update"), tuple(cells), notes)


def _hold(row: DecisionRow, run: RunRows) -> tuple[int, int]:
    """The updates [start, end) that a decision held."""
    start = int(row["update"])
    return start, min(start + run.config.credit.hold_updates, run.config.train.num_updates)


def _draw_rewards(axes: Axes, rows: Sequence[DecisionRow]) -> None:
    for row in rows:
        reward = finite(row.get("reward"))
        if reward is None:
            continue
        closed, (tone, marker) = int(row["window"][1]), _tone(row)
        filled = "none" if row.get("status") == "pending" else "full"
        axes.vlines(closed, 0, reward, colors=tone, linewidth=1.1)
        axes.plot([closed], [reward], marker, color=tone, markersize=4.4, fillstyle=filled, zorder=3)
    axes.axhline(0, color=INK, linewidth=0.6)
    fit_vertical(axes, is_share=False)


def _tone(row: DecisionRow) -> tuple[str, str]:
    """Colour and marker of a decision by its advantage."""
    advantage = finite(row.get("advantage"))
    if not advantage:
        return PALETTE[4], "o"
    return (PALETTE[0], "^") if advantage > 0 else (PALETTE[1], "v")
