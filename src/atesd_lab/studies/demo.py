"""`atesd demo`: OPSD, fixed ratios and ATESD in both embedded worlds, from the shipped weights.

Two runs at a time, one thread each. What is finished is not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atesd.config import shared_overrides
from atesd.rows import revealed
from atesd.runs import RunFolder, write_atomic
from atesd.table import Table, render_text
from atesd.text import duration, percent_interval
from atesd_lab.report.page import write_report
from atesd_lab.report.tables import paired_points
from atesd_lab.studies.demo_figure import Curve, Point, draw_demo
from atesd_lab.sweep.jobs import Job, Say, train_all

PROCESSES = 2
FIXED = (0.25, 0.5, 0.75)
WORLDS = {"steps": "micro-steps", "leaps": "micro"}
NOTES = (
    "The leap world is designed to make a point: half of its references leap beyond the student, so that",
    "the best ratio is interior. It shows a mechanism; it is no evidence about language models.",
    "The best fixed ratio is picked on the validation problems and reported on the held-out test problems.",
    "Brackets: 95 % bootstrap interval over problems. One seed each: its choice is not in them.",
)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Arm:
    """One run of the demo: a world, and what decides its reveal ratio ("learned", "1" for OPSD, "0.5" and so on)."""

    world: str
    ratio: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        words = {"learned": "atesd", "1": "opsd"}
        return f"{self.world}-{words.get(self.ratio, f'fixed-{self.ratio}')}"

    @property
    def overrides(self) -> list[str]:
        """What differs from the recipe of its world."""
        kinds = {"learned": ["exposure.kind=learned"], "1": ["exposure.kind=full"]}
        return kinds.get(self.ratio, ["exposure.kind=fixed", f"exposure.reveal_ratio={self.ratio}"])


ARMS = tuple(Arm(world, ratio) for world in WORLDS for ratio in ("1", "learned", *(f"{r:g}" for r in FIXED)))


@dataclass(frozen=True, slots=True)
class Scores:
    """What one arm came to: rows of evaluations.jsonl, and the reveal ratio of every update."""

    arm: Arm
    base: Row
    last: Row
    validation: Row
    ratios: tuple[float, ...]

    @property
    def late_ratio(self) -> float:
        """The mean reveal ratio over the last quarter of the updates."""
        late = self.ratios[-max(1, len(self.ratios) // 4) :]
        return sum(late) / len(late)


def run_demo(out: Path, say: Say, overrides: Sequence[str] = ()) -> str:
    """Train what is missing under `out`, write report.html, demo.svg and demo.png there, and return the table.

    Raises `RunError` with the end of its log if a run fails. An interrupt stops the children with a checkpoint each.
    """
    started = time.monotonic()
    train_all([job_of(arm, out, overrides) for arm in ARMS], PROCESSES, say)
    scores = [read_scores(arm, out / arm.name) for arm in ARMS]
    draw_demo([curve(world, scores) for world in WORLDS], out)
    page = write_report([out / arm.name for arm in ARMS], out / "report.html")
    text = demo_text(scores)
    write_atomic(out / "table.txt", text.encode())
    files = f"page: {page}\nfigure: {out / 'demo.svg'}, {out / 'demo.png'}"
    return f"\n{text}\n{files}\ntook {duration(time.monotonic() - started)}"


def job_of(arm: Arm, out: Path, overrides: Sequence[str] = ()) -> Job:
    """The run of an arm, with those of the overrides that act in it."""
    recipe = WORLDS[arm.world]
    return Job(recipe, (*arm.overrides, *shared_overrides(recipe, overrides, arm.overrides)), out / arm.name)


def read_scores(arm: Arm, folder: Path) -> Scores:
    """The scores of a finished arm."""
    run = RunFolder.open(folder)
    rows = {(row["split"], row["update"]): row for row in run.rows("evaluations")}
    ratios, end = tuple(revealed(run.rows("metrics"))), run.config.train.num_updates
    return Scores(arm, rows["test", 0], rows["test", end], rows["validation", end], ratios)


def demo_text(scores: Sequence[Scores]) -> str:
    """The table base, OPSD, best fixed, ATESD for each world, and the differences that matter."""
    found = {world: {score.arm.ratio: score for score in scores if score.arm.world == world} for world in WORLDS}
    rows, gains = [], []
    for world, by_ratio in found.items():
        opsd, atesd, best = by_ratio["1"], by_ratio["learned"], best_fixed(by_ratio)
        cells = (percent_interval(row["average"]) for row in (opsd.base, opsd.last, best.last, atesd.last))
        base, full, fixed, learned = cells
        rows.append((world, base, full, f"{fixed} at {best.arm.ratio}", learned, f"{atesd.late_ratio:.2f}"))
        gains.append(
            (
                world,
                paired_points(opsd.base, opsd.last),
                paired_points(opsd.last, best.last),
                paired_points(opsd.last, atesd.last),
                paired_points(best.last, atesd.last),
            )
        )
    k = scores[0].last["samples"]
    columns = ("world", "base", "OPSD", "best fixed ratio", "ATESD", "its late ratio")
    differences = ("world", "OPSD - base", "best fixed - OPSD", "ATESD - OPSD", "ATESD - best fixed")
    return (
        render_text(Table(f"Average@{k} on held-out problems, %", columns, tuple(rows)))
        + "\n"
        + render_text(Table("Differences in points, paired by problem", differences, tuple(gains), NOTES))
    )


def curve(world: str, scores: Sequence[Scores]) -> Curve:
    """What the figure shows of a world."""
    mine = {score.arm.ratio: score for score in scores if score.arm.world == world}
    learned = mine.pop("learned")
    return Curve(
        world=world,
        base=float(learned.base["average"]["value"]),
        fixed=tuple(_point(float(ratio), mine[ratio]) for ratio in sorted(mine, key=float)),
        learned=_point(learned.late_ratio, learned),
        learned_ratios=learned.ratios,
    )


def _point(ratio: float, score: Scores) -> Point:
    return Point(ratio, *(float(score.last["average"][key]) for key in ("value", "low", "high")))


def best_fixed(by_ratio: Mapping[str, Scores]) -> Scores:
    """The fixed ratio below 1 with the highest validation score; the lowest of equals."""
    candidates = [by_ratio[f"{ratio:g}"] for ratio in FIXED]
    return max(candidates, key=lambda score: float(score.validation["average"]["value"]))
