"""`atesd null-test`: both reward presets over the measured noise of a frozen student, beside pure noise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from atesd.build import build, close
from atesd.config import Config, CreditConfig
from atesd.table import Table, render_text
from atesd_lab.audit.audit import notes_of, require_teacher
from atesd_lab.audit.null_measure import measure
from atesd_lab.audit.null_simulation import MeasuredRatio, drift_verdict, null_band, simulate, with_clock
from atesd_lab.report.canvas import colour, save_figure, styled

NOISE_SEEDS = 100
"""Controllers in the null band: single ones wander far, so that few would not show where their mean is."""

NOTES = (
    "The student never learns here, so nothing a controller does can be right: what moves it is an artefact of its "
    "reward. Mean ratio: the mean of the Beta policy over the last quarter of the decisions; it starts at 0.50.",
    "Pure noise: every signal is a fresh normal draw whatever the ratio; after the last decision, mean ± sd (in the "
    "figure ± 2 sd).",
)


@dataclass(frozen=True, slots=True)
class Drift:
    """Where a reward took the mean ratio: its end per seed, and the mean after each decision per seed."""

    reward: str
    ends: tuple[float, ...]
    policy_updates: float
    means: tuple[tuple[float, ...], ...]

    @property
    def verdict(self) -> str:
        """In words."""
        return drift_verdict(self.ends)


def run_null_test(config: Config, decisions: int, seeds: int, batches: int) -> tuple[str, dict[str, Any]]:
    """Measure the recipe's frozen student on `batches` batches, drive both presets, and return table and figures.

    Raises `ConfigError` where there is no teacher.
    """
    require_teacher(config, "null-test")
    parts = build(config)
    try:
        measured = measure(parts, batches)
    finally:
        close(parts)
    rewards = {
        "sound": with_clock(config.credit, preset="sound"),
        "sound, probe_nll": with_clock(config.credit, preset="sound", progress_signal="probe_nll"),
        "paper": with_clock(config.credit, preset="paper"),
        "paper, no grounding": with_clock(config.credit, preset="paper", grounding_weight=0.0),
    }
    drifts = [drift(name, config, measured, credit, decisions, seeds) for name, credit in rewards.items()]
    noise = null_band(rewards["sound"], config.policy, decisions, range(NOISE_SEEDS), config.bounds)
    centre, spread = noise.mean[-1], noise.deviation[-1]
    rows = [
        (
            d.reward,
            f"{fmean(d.ends):.2f}",
            f"{min(d.ends):.2f} to {max(d.ends):.2f}",
            f"{d.policy_updates:.0f}",
            d.verdict,
        )
        for d in drifts
    ]
    rows.append(("pure noise", f"{centre:.2f}", f"{centre - spread:.2f} to {centre + spread:.2f} (± sd)", "", ""))
    title = f"Null test: {decisions} decisions, {seeds} seeds, frozen student measured on {batches} batches"
    columns = ("reward", "mean ratio at the end", "over seeds", "policy updates", "verdict")
    figures = {
        "decisions": decisions,
        "batches": batches,
        "drifts": [asdict(d) for d in drifts],
        "noise": asdict(noise),
        "loss_by_ratio": {str(row.reveal_ratio): fmean(b.loss for b in row.batches) for row in measured},
        "loss_deviation": {str(row.reveal_ratio): stdev(b.loss for b in row.batches) for row in measured},
    }
    return render_text(Table(title, columns, tuple(rows), (*NOTES, *notes_of(config)))), figures


def drift(
    name: str, config: Config, measured: list[MeasuredRatio], credit: CreditConfig, decisions: int, seeds: int
) -> Drift:
    """One reward over all seeds, with the policy and the bounds of a config."""
    results = [simulate(measured, credit, config.policy, decisions, seed, config.bounds) for seed in range(seeds)]
    ends, means = tuple(r.end_mean for r in results), tuple(r.means for r in results)
    return Drift(name, ends, fmean(r.policy_updates for r in results), means)


@styled
def draw_null(figures: dict[str, Any], path: Path) -> None:
    """Write PATH as SVG and PNG: the mean ratio over the decisions, each seed a line, the null band (± 2 sd) behind."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    mean, deviation = figures["noise"]["mean"], figures["noise"]["deviation"]
    low, high = ([m + sign * 2 * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
    label = f"pure noise, mean ± 2 sd, {NOISE_SEEDS} seeds"
    axes.fill_between(range(len(mean)), low, high, color="#7d7f86", alpha=0.2, label=label)
    for index, drawn in enumerate(("paper", "sound")):
        curves = next(d["means"] for d in figures["drifts"] if d["reward"] == drawn)
        for curve in curves:
            axes.plot(range(len(curve)), curve, color=colour(index), linewidth=1, alpha=0.7)
        axes.plot([], [], color=colour(index), label=f"{drawn} reward, {len(curves)} seeds")
    axes.set(title="A student that never learns", xlabel="decision", ylabel="mean of the Beta policy", ylim=(0, 1))
    axes.legend(loc="lower right")
    save_figure(figure, path)
