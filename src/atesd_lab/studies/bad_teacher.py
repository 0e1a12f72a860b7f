"""`atesd bad-teacher`: which reward leaves a teacher that should not be followed.

The bad world's teacher answers right by itself and is lost after a student's mistake, so that the more it sees the
worse its student becomes. A reward that follows the student's progress should lower the reveal ratio; one that
follows closeness to the teacher has no reason to. Several paired seeds, with full, fixed and random exposure beside
both presets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from atesd.runs import write_atomic
from atesd.table import Table, render_text
from atesd.text import percent
from atesd_lab.report.arms import Arms
from atesd_lab.report.canvas import colour, running_mean, save_figure, styled
from atesd_lab.report.groups import group_of
from atesd_lab.report.honest import results_table
from atesd_lab.report.rows import at_common_updates, average, validated
from atesd_lab.sweep.jobs import Job, Say, train_all

RECIPE = "micro-steps"
SMOOTH = 40  # updates
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


def run_bad_teacher(out: Path, seeds: int, updates: int, processes: int, say: Say) -> str:
    """Train what is missing under `out`, write bad-teacher.svg and .png there, and return the table."""
    jobs = {(arm, seed): job_of(arm, seed, updates, out) for seed in range(seeds) for arm in ARMS}
    train_all(list(jobs.values()), processes, say)
    arms = Arms("bad", {arm: group_of(arm, [jobs[arm, seed].folder for seed in range(seeds)]) for arm in ARMS})
    draw_endings(arms, out)
    honest = render_text(results_table(arms.groups, "full exposure"))
    text = f"{endings_table(arms)}\n{honest}"
    write_atomic(out / "table.txt", text.encode())
    return f"\n{text}\nfigure: {out / 'bad-teacher.svg'}, {out / 'bad-teacher.png'}"


def job_of(arm: str, seed: int, updates: int, out: Path) -> Job:
    """The run of an arm and a seed; runs of one seed share data order, rollout keys and evaluation keys."""
    settings = (*COMMON, *ARMS[arm], f"train.num_updates={updates}", f"train.seed={seed}")
    return Job(RECIPE, settings, out / f"{arm.replace(',', '').replace(' ', '-')}-{seed}")


def endings_table(arms: Arms) -> str:
    """One row per arm."""
    rows = [
        (
            arm,
            percent(fmean(average(run.evaluated("test")[0]) for run in group.runs)),
            _with_seeds([100 * accuracy for accuracy in arms.accuracies(arm)], "{:.1f}"),
            _with_seeds(arms.late_ratios(arm), "{:.2f}"),
        )
        for arm, group in arms.groups.items()
    ]
    first = next(iter(arms.groups.values()))
    title = f"A bad teacher: {first.last} updates, {len(first.seeds)} seeds, accuracy in %"
    return render_text(Table(title, ("exposure", "base", "at the end", "late ratio"), tuple(rows), NOTES))


def _with_seeds(values: Sequence[float], form: str) -> str:
    return f"{form.format(fmean(values))} ({', '.join(form.format(value) for value in values)})"


@styled
def draw_endings(arms: Arms, folder: Path) -> None:
    """Write bad-teacher.svg and .png: accuracy and reveal ratio over the updates, thin lines for single seeds."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    scores, ratios = figure.subplots(1, 2)
    for index, (arm, group) in enumerate(arms.groups.items()):
        updates, each = at_common_updates(f"{arm}: accuracy on validation", list(map(validated, group.runs)))
        curves = [[100 * share for share in one] for one in each]
        for curve in curves:
            scores.plot(updates, curve, color=colour(index), linewidth=0.7, alpha=0.4)
        means = [fmean(column) for column in zip(*curves, strict=True)]
        scores.plot(updates, means, color=colour(index), linewidth=2, marker="o", markersize=3.5, label=arm)
        if arm.startswith("learned"):
            for run in group.runs:
                measured, held = run.series("reveal_ratio")
                ratios.plot(measured, running_mean(np.array(held), SMOOTH), color=colour(index), linewidth=1.4)
            ratios.plot([], [], color=colour(index), label=arm)
    scores.set(title="Validation accuracy under a bad teacher", xlabel="update", ylabel="Average@k, %", ylim=(0, None))
    ratios.set(title=f"Reveal ratio, mean of {SMOOTH} updates", xlabel="update", ylabel="reveal ratio", ylim=(0, 1))
    scores.legend(fontsize=8)
    ratios.legend()
    save_figure(figure, folder / "bad-teacher")
