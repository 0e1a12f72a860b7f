"""The figures of a report: each function draws one panel from the rows of a run, or None where nothing was measured.

Model text never enters a figure. Names of runs do: written out where invisible, in ASCII, and never parsed as maths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from scipy.stats import beta

from atesd.text import duration, finite, number, percent, visible
from atesd_lab.report.canvas import (
    PALETTE,
    Chart,
    colour,
    dash,
    draw_key,
    draw_series,
    empty_panel,
    fit_updates,
    fit_vertical,
    place_legend,
    plain,
    running_mean,
    styled,
)
from atesd_lab.report.decisions import Policy, finished, policies
from atesd_lab.report.rows import RunRows, natural
from atesd_lab.report.svg import INK
from atesd_lab.report.worlds import World, as_world

DENSITY_ROWS = 60
MAX_COLUMNS = 400
ENDS: tuple[Literal["value", "low", "high"], ...] = ("value", "low", "high")
PHASES = ("sample", "teacher", "student", "loss_backward", "control", "evaluate")
CROWDED = 200  # updates or decisions; more of them are drawn finer


@dataclass(frozen=True, slots=True)
class Panel:
    """A metric that is drawn over the updates: its key in metrics.jsonl, its unit, and what healthy looks like."""

    key: str
    title: str
    unit: str
    reading: str
    share: bool = False


LEARNING = (
    Panel("loss", "Loss", "loss", "The training objective, after clipping. A fall need not mean better answers."),
    Panel("kl", "KL(teacher || student)", "nats per token", "Distance to the teacher on the student's own text."),
    Panel(
        "accuracy",
        "Accuracy of the training rollouts",
        "%",
        "Verified share of the update's rollouts: a mean over few samples, so it is noisy.",
        share=True,
    ),
)
SIGNALS = (
    Panel("top1_disagreement", "Top-1 disagreement", "% of tokens", "How often the two would say another token.", True),
    Panel(
        "student_confidence", "Student confidence", "probability", "Mean probability that the student gave its tokens."
    ),
    Panel("student_entropy", "Student entropy", "nats per token", "Near 0: the student has stopped exploring."),
    Panel("teacher_entropy", "Teacher entropy", "nats per token", "Low: the reference leaves the teacher no choice."),
    Panel(
        "probe_nll", "Probe NLL of references", "nats per token", "On fixed held-out problems; misleads across styles."
    ),
    Panel("probe_success", "Probe success", "% verified", "Own samples on fixed probe problems.", True),
    Panel("probe_gain", "Probe gain", "share since the start", "Probe success, by reweighting the student's samples."),
    Panel("probe_kl", "Probe KL", "nats per token", "At one fixed ratio on stored rollouts."),
    Panel("grounding", "Grounding", "nats per token", "Mean log-probability under the teacher's current view."),
)
HEALTH = (
    Panel("completion_tokens", "Completion length", "tokens", "A collapse often comes before accuracy falls."),
    Panel("truncated_share", "Truncated", "% of rollouts", "Cut by the token limit; the answer is then missing.", True),
    Panel("loop_share", "Looping", "% of rollouts", "Rollouts that repeat the same n-gram.", True),
    Panel("grad_norm", "Gradient norm", "before clipping", "Spikes are where training breaks first."),
    Panel("learning_rate", "Learning rate", "per update", "What the schedule gave."),
    Panel("clipped_share", "Clipped", "% of the divergence", "What the clip cut off, before the mean.", True),
    Panel("reversed_mass", "Reversed gradient", "% of mass", "Gradient that per-entry clipping turns around.", True),
)


@styled
def accuracy(runs: Sequence[RunRows] | World, split: str) -> Chart | None:
    """Average@k of one split over updates, in percent, with the intervals as bands; None without evaluations."""
    world = as_world(runs)
    shown = [(line, run, rows) for line, run in world.lines if (rows := run.evaluated(split))]
    if not shown:
        return None
    samples = sorted({int(row["samples"]) for _, _, rows in shown for row in rows})
    title = world.title(f"Average@{'/'.join(map(str, samples))} on {split}")
    figure, axes = empty_panel(visible(title), "%", height=3.1 if len(shown) == 1 else 3.6)
    words = []
    for (index, _), run, rows in shown:
        updates = [int(row["update"]) for row in rows]
        intervals = [row["average"] for row in rows]
        value, low, high = ([100 * one[end] for one in intervals] for end in ENDS)
        axes.fill_between(updates, low, high, color=colour(index), alpha=0.16, linewidth=0)
        axes.plot(updates, value, marker="o", markersize=3.6, linewidth=1.7, color=colour(index), linestyle=dash(index))
        if len(rows) == 1:
            axes.vlines(updates, low, high, color=colour(index), linewidth=1.2)
        words.append(f"{plain(run.name)} from {value[0]:.1f} % at update {updates[0]} to {value[-1]:.1f} %")
    fit_updates(axes, last_update(world.runs))
    if world.name:
        axes.set_ylim(0, 100)  # worlds side by side have one scale
    draw_key(axes, [line for line, _, _ in shown])
    reading = "Band: 95 % bootstrap interval over problems. It does not cover the choice of seed."
    return Chart(world.key(f"accuracy-{split}"), f"{title}: {'; '.join(words)}", reading, figure)


@styled
def metric(runs: Sequence[RunRows] | World, panel: Panel, scope: str = "all") -> Chart | None:
    """A metric over updates; None if no run has measured it. `scope` keeps keys apart when a page draws it twice."""
    world = as_world(runs)
    shown = [(line, run, *run.series(panel.key)) for line, run in world.lines if run.series(panel.key)[0]]
    if not shown:
        return None
    title = world.title(panel.title)
    figure, axes = empty_panel(visible(title), panel.unit, height=2.7 if len(shown) == 1 else 3.1)
    words = []
    for (index, _), run, updates, raw in shown:
        values = np.asarray(raw) * (100 if panel.share else 1)
        draw_series(axes, updates, values, index)
        words.append(f"{plain(run.name)} from {number(float(values[0]))} to {number(float(values[-1]))}")
    fit_vertical(axes, panel.share)
    fit_updates(axes, last_update(world.runs))
    if len(shown) == 1:
        _mark_skipped(axes, shown[0][1])
    draw_key(axes, [line for line, *_ in shown])
    words_of = f"{title}, {panel.unit}: {'; '.join(words)}"
    return Chart(world.key(f"{scope}-{panel.key}"), words_of, panel.reading, figure)


@styled
def exposure(run: RunRows, scope: str = "all") -> Chart | None:
    """The reveal ratio at every update, over the Beta density of each decision; None before the first update."""
    updates, ratios = run.series("reveal_ratio")
    if not updates:
        return None
    figure, axes = empty_panel("Reveal ratio", "share of segments shown", height=3.1)
    last, crowded = updates[-1] + 1, len(updates) > CROWDED
    drawn_from = policies(run)
    width = 0.6 if crowded else 1.4
    axes.step(
        [*updates, last], [*ratios, ratios[-1]], where="post", color=PALETTE[0], linewidth=width, label="ratio in force"
    )
    if drawn_from:
        _draw_density(axes, drawn_from)
        for policy in drawn_from:
            axes.plot([policy.start, policy.end], [policy.mean] * 2, color=PALETTE[1], linewidth=1.5, zorder=2.5)
        axes.plot([], [], color=PALETTE[1], linewidth=1.5, label="the policy's mean")
        axes.fill_between([], [], [], color=PALETTE[1], alpha=0.3, linewidth=0, label="where it draws from")
    _draw_effective(axes, run, size=1.0 if crowded else 5.0)
    axes.set_ylim(-0.03, 1.03)
    fit_updates(axes, last_update([run]))
    place_legend(axes)
    words = f"Reveal ratio: mean {np.mean(ratios):.2f}, last {ratios[-1]:.2f}, {len(run.decisions)} decisions"
    reading = "At 1 the teacher sees the whole reference, at 0 the answer alone. Really shown: where whole segments or "
    reading += "length made the ratio another."
    if drawn_from:
        reading += " The shade is scaled to its own peak in each column."
    return Chart(f"{scope}-exposure", words, reading, figure)


@styled
def exposures(runs: Sequence[RunRows] | World) -> Chart | None:
    """The reveal ratios of several runs over updates."""
    panel = Panel("reveal_ratio", "Reveal ratio", "share shown", "Thin: each update. Thick: mean of recent updates.")
    chart = metric(runs, panel, "several")
    if chart is not None:
        chart.figure.axes[0].set_ylim(-0.03, 1.03)
    return chart


@styled
def credit(run: RunRows, key: str, scope: str = "all") -> Chart | None:
    """A component of the decisions' credit (progress, grounding, reward or advantage) by decision."""
    rows = [(int(row["update"]), finite(row.get(key))) for row in finished(run)]
    known = [(update, value) for update, value in rows if value is not None]
    if not known or not any(value for _, value in known):
        return None
    figure, axes = empty_panel(key.capitalize(), _credit_unit(run, key))
    updates, values = zip(*known, strict=True)
    if key == "grounding" or len(known) > CROWDED:
        axes.scatter(updates, values, s=6, color=PALETTE[0], alpha=0.5, linewidths=0)
        axes.plot(updates, running_mean(np.array(values), max(4, len(values) // 20)), color=PALETTE[0], linewidth=1.6)
        fit_vertical(axes, is_share=False)
    else:
        colours = [PALETTE[0] if value >= 0 else PALETTE[1] for value in values]
        axes.vlines(updates, 0, values, colors=colours, linewidth=1.1)
        axes.scatter(updates, values, s=11, color=colours, zorder=3)
        axes.axhline(0, color=INK, linewidth=0.6)
    fit_updates(axes, last_update([run]))
    mean = float(np.mean(values))
    return Chart(f"{scope}-{key}", f"{key} of {len(known)} decisions: mean {mean:.3g}", _CREDIT_READING[key], figure)


def _credit_unit(run: RunRows, key: str) -> str:
    if key == "advantage":
        return "standardised"
    verified = key != "grounding" and run.config.credit.progress_signal.endswith(("success", "gain"))
    return "share verified" if verified else "nats per token"


_CREDIT_READING = {
    "progress": "Discounted fall of the progress signal over the decision's window.",
    "grounding": "Weighted mean of the grounding over the window. It depends on the ratio alone.",
    "reward": "Progress plus weighted grounding.",
    "advantage": "The reward, standardised in its buffer: what moves the policy.",
}


@styled
def reward_by_ratio(run: RunRows, scope: str = "all") -> Chart | None:
    """Reward against the reveal ratio of the decision; later decisions stronger in colour."""
    triples = [
        (finite(row.get("reveal_ratio")), finite(row.get("reward")), int(row["update"])) for row in finished(run)
    ]
    known = [(ratio, reward, update) for ratio, reward, update in triples if ratio is not None and reward is not None]
    if len(known) < 3:
        return None
    figure, axes = empty_panel("Reward by ratio", "reward", horizontal="reveal ratio", height=3.1)
    first, last = known[0][2], known[-1][2]
    dots = [(*to_rgb(PALETTE[0]), 0.25 + 0.75 * (update - first) / max(1, last - first)) for _, _, update in known]
    axes.scatter([ratio for ratio, _, _ in known], [reward for _, reward, _ in known], s=16, color=dots)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_xlim(-0.03, 1.03)
    reading = "One dot per decision, later ones stronger. A slope that a frozen student shows too is no learning."
    return Chart(f"{scope}-reward-by-ratio", f"Reward against reveal ratio of {len(known)} decisions", reading, figure)


@styled
def by_difficulty(run: RunRows, split: str, scope: str = "all") -> Chart | None:
    """Average@k of the first and the last evaluation at each difficulty, with intervals."""
    rows = run.evaluated(split)
    levels = sorted(rows[-1].get("by_difficulty") or {}, key=natural) if rows else []
    if len(levels) < 2:
        return None
    figure, axes = empty_panel(visible(f"By difficulty, {split}"), "%", horizontal="difficulty")
    for index, row in enumerate(rows[:: len(rows) - 1] if len(rows) > 1 else rows):
        estimates = [(place, row["by_difficulty"].get(level)) for place, level in enumerate(levels)]
        known = [(place, found["average"]) for place, found in estimates if found]
        places = [place + 0.14 * (2 * index - 1) for place, _ in known]
        low, high, value = ([100 * average[part] for _, average in known] for part in ("low", "high", "value"))
        axes.vlines(places, low, high, color=colour(index), linewidth=1.4)
        axes.plot(places, value, "os"[index], color=colour(index), markersize=4.5, label=f"update {int(row['update'])}")
    axes.set_xticks(range(len(levels)), [plain(level) for level in levels])
    axes.set_xlim(-0.5, len(levels) - 0.5)
    place_legend(axes)
    return Chart(
        f"{scope}-difficulty-{split}",
        f"Average@k by difficulty on {split}, first and last evaluation",
        "First and last evaluation. Few problems per level make wide intervals.",
        figure,
    )


@styled
def time_by_phase(run: RunRows, scope: str = "all") -> Chart | None:
    """Seconds spent in each phase of the updates."""
    totals = phase_seconds(run)
    if not totals:
        return None
    figure, axes = empty_panel("Time by phase", "", horizontal="seconds", height=2.2)
    phases = list(totals)
    whole = sum(totals.values()) or 1.0
    axes.barh(range(len(phases)), list(totals.values()), color=PALETTE[0], height=0.62)
    for place, phase in enumerate(phases):
        words = f"{duration(totals[phase])} ({percent(totals[phase] / whole)} %)"
        axes.annotate(words, (totals[phase], place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(phases)), [plain(phase.replace("_", " + ")) for phase in phases])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.45 * max(totals.values()) or 1)
    words = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in totals.items())
    return Chart(f"{scope}-time", f"Time by phase: {words}", "Wall-clock seconds, summed over the updates.", figure)


def phase_seconds(run: RunRows) -> dict[str, float]:
    """Seconds by phase, summed over all updates, in the order in which they come."""
    totals = dict.fromkeys(PHASES, 0.0)
    for row in run.metrics:
        for phase, seconds in (row.get("seconds") or {}).items():
            totals[phase] = totals.get(phase, 0.0) + (finite(seconds) or 0.0)
    return {phase: seconds for phase, seconds in totals.items() if seconds}


def last_update(runs: Sequence[RunRows]) -> int:
    """The number of updates that the longest of the runs has planned, or done."""
    return max(max(run.config.train.num_updates, run.updates_done) for run in runs)


def _mark_skipped(axes: Axes, run: RunRows) -> None:
    for row in run.metrics:
        if row.get("skipped"):
            axes.axvline(int(row["update"]), color=PALETTE[1], linewidth=0.8, linestyle=":")


def _draw_density(axes: Axes, drawn_from: Sequence[Policy]) -> None:
    first, last = drawn_from[0].start, drawn_from[-1].end
    grid = (np.arange(DENSITY_ROWS) + 0.5) / DENSITY_ROWS
    columns = np.linspace(first, last, min(last - first, MAX_COLUMNS), endpoint=False)
    image = np.zeros((DENSITY_ROWS, len(columns), 4))
    image[..., :3] = to_rgb(PALETTE[1])
    for policy in drawn_from:
        density = beta.pdf(grid, policy.concentration1, policy.concentration0)
        held = (columns >= policy.start) & (columns < policy.end)
        image[:, held, 3] = 0.42 * (density / density.max())[:, None]
    axes.imshow(image, extent=(first, last, 0, 1), origin="lower", aspect="auto", interpolation="none", zorder=0.5)


def _draw_effective(axes: Axes, run: RunRows, size: float) -> None:
    pairs = [
        (int(row["update"]) + 0.5, finite(row.get("effective_ratio")), finite(row.get("reveal_ratio")))
        for row in run.metrics
    ]
    moved = [(u, effective) for u, effective, ratio in pairs if effective is not None and effective != ratio]
    if moved:
        places, shown = zip(*moved, strict=True)
        axes.scatter(places, shown, s=size, color=PALETTE[2], zorder=3, linewidths=0, label="really shown")
