"""`atesd bad-teacher`: which reward leaves a teacher that should not be followed.

The bad world's teacher answers right by itself and is lost after a student's mistake, so that the more it sees the
worse its student becomes. A reward that follows the student's progress should lower the reveal ratio; one that
follows closeness to the teacher has no reason to. Several paired seeds, with full, fixed and random exposure beside
both presets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from atesd.rows import revealed
from atesd.runs import RunFolder, write_atomic
from atesd.table import Table, render_text
from atesd.text import percent
from atesd_lab.report.canvas import colour, save_figure, styled
from atesd_lab.report.honest import results_table
from atesd_lab.sweep.jobs import Job, Say, train_all

RECIPE = "micro-steps"
COMMON = ("model.path=world:bad", "train.evaluate_every=100")
ARMS: dict[str, tuple[str, ...]] = {
    "full exposure": ("exposure.kind=full",),
    "fixed 0.25": ("exposure.kind=fixed", "exposure.reveal_ratio=0.25"),
    "random": ("exposure.kind=random",),
    "learned, paper": ("exposure.kind=learned", "credit.preset=paper"),
    "learned, sound": ("exposure.kind=learned", "credit.preset=sound"),
}
NOTES = (
    "Mean over seeds, with the seeds in brackets. Late ratio: mean reveal ratio over the last quarter of the updates.",
    "Accuracy: Average@k on held-out test problems before training and after the last update.",
)


@dataclass(frozen=True, slots=True)
class Ending:
    """How one run of an arm went: shares in [0, 1], ratios per update, validation by update."""

    arm: str
    base: float
    last: float
    ratios: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]

    @property
    def late_ratio(self) -> float:
        """Mean reveal ratio over the last quarter of the updates."""
        return fmean(self.ratios[-max(1, len(self.ratios) // 4) :])


def run_bad_teacher(out: Path, seeds: int, updates: int, processes: int, say: Say) -> str:
    """Train what is missing under `out`, write bad-teacher.svg and .png there, and return the table."""
    jobs = {(arm, seed): job_of(arm, seed, updates, out) for seed in range(seeds) for arm in ARMS}
    train_all(list(jobs.values()), processes, say)
    endings = [read_ending(arm, job.folder) for (arm, _), job in jobs.items()]
    draw_endings(endings, out)
    arms = {arm: [RunFolder.open(jobs[arm, seed].folder) for seed in range(seeds)] for arm in ARMS}
    honest = render_text(results_table(arms, "full exposure"))
    text = f"{endings_table(endings, seeds, updates)}\n{honest}"
    write_atomic(out / "table.txt", text.encode())
    return f"\n{text}\nfigure: {out / 'bad-teacher.svg'}, {out / 'bad-teacher.png'}"


def job_of(arm: str, seed: int, updates: int, out: Path) -> Job:
    """The run of an arm and a seed; runs of one seed share data order, rollout keys and evaluation keys."""
    settings = (*COMMON, *ARMS[arm], f"train.num_updates={updates}", f"train.seed={seed}")
    return Job(RECIPE, settings, out / f"{arm.replace(',', '').replace(' ', '-')}-{seed}")


def read_ending(arm: str, folder: Path) -> Ending:
    """What a finished run says."""
    run = RunFolder.open(folder)
    rows = run.rows("evaluations")
    test = {row["update"]: row["average"]["value"] for row in rows if row["split"] == "test"}
    validation = tuple((row["update"], row["average"]["value"]) for row in rows if row["split"] == "validation")
    ratios = tuple(revealed(run.rows("metrics")))
    return Ending(arm, test[min(test)], test[max(test)], ratios, validation)


def endings_table(endings: Sequence[Ending], seeds: int, updates: int) -> str:
    """One row per arm."""
    rows = []
    for arm in ARMS:
        mine = [ending for ending in endings if ending.arm == arm]
        rows.append(
            (
                arm,
                percent(fmean(ending.base for ending in mine)),
                _with_seeds([100 * ending.last for ending in mine], "{:.1f}"),
                _with_seeds([ending.late_ratio for ending in mine], "{:.2f}"),
            )
        )
    title = f"A bad teacher: {updates} updates, {seeds} seeds, accuracy in %"
    return render_text(Table(title, ("exposure", "base", "at the end", "late ratio"), tuple(rows), NOTES))


def _with_seeds(values: Sequence[float], form: str) -> str:
    return f"{form.format(fmean(values))} ({', '.join(form.format(value) for value in values)})"


@styled
def draw_endings(endings: Sequence[Ending], folder: Path) -> None:
    """Write bad-teacher.svg and .png: accuracy and reveal ratio over the updates, thin lines for single seeds."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    scores, ratios = figure.subplots(1, 2)
    for index, arm in enumerate(ARMS):
        mine = [ending for ending in endings if ending.arm == arm]
        updates = [update for update, _ in mine[0].validation]
        curves = [[100 * value for _, value in ending.validation] for ending in mine]
        for curve in curves:
            scores.plot(updates, curve, color=colour(index), linewidth=0.7, alpha=0.4)
        means = [fmean(column) for column in zip(*curves, strict=True)]
        scores.plot(updates, means, color=colour(index), linewidth=2, marker="o", markersize=3.5, label=arm)
        if arm.startswith("learned"):
            for ending in mine:
                smooth = _smoothed(ending.ratios)
                ratios.plot(range(len(smooth)), smooth, color=colour(index), linewidth=1.4)
            ratios.plot([], [], color=colour(index), label=arm)
    scores.set(title="Validation accuracy under a bad teacher", xlabel="update", ylabel="Average@k, %", ylim=(0, None))
    ratios.set(title="Reveal ratio, mean of 40 updates", xlabel="update", ylabel="reveal ratio", ylim=(0, 1))
    scores.legend(fontsize=8)
    ratios.legend()
    save_figure(figure, folder / "bad-teacher")


def _smoothed(ratios: Sequence[float], width: int = 40) -> list[float]:
    return [fmean(ratios[max(0, i - width + 1) : i + 1]) for i in range(len(ratios))]
