"""`atesd demo`: OPSD, fixed ratios and ATESD in both embedded worlds, from the shipped weights.

Two runs at a time, one thread each. What is finished is not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atesd.config import shared_overrides
from atesd.runs import write_atomic
from atesd.table import Table, render_text
from atesd.text import duration, percent_interval
from atesd_lab.report.arms import Arms
from atesd_lab.report.groups import group_of
from atesd_lab.report.page import write_report
from atesd_lab.report.tables import paired_points
from atesd_lab.studies.demo_figure import LEARNED, draw_demo
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


ARMS = tuple(Arm(world, ratio) for world in WORLDS for ratio in ("1", LEARNED, *(f"{r:g}" for r in FIXED)))


def run_demo(out: Path, say: Say, overrides: Sequence[str] = ()) -> str:
    """Train what is missing under `out`, write report.html, demo.svg and demo.png there, and return the table.

    Raises `RunError` with the end of its log if a run fails. An interrupt stops the children with a checkpoint each.
    """
    started = time.monotonic()
    train_all([job_of(arm, out, overrides) for arm in ARMS], PROCESSES, say)
    worlds = [
        Arms(world, {arm.ratio: group_of(arm.ratio, [out / arm.name]) for arm in ARMS if arm.world == world})
        for world in WORLDS
    ]
    draw_demo(worlds, out)
    page = write_report([out / arm.name for arm in ARMS], out / "report.html")
    text = demo_text(worlds)
    write_atomic(out / "table.txt", text.encode())
    files = f"page: {page}\nfigure: {out / 'demo.svg'}, {out / 'demo.png'}"
    return f"\n{text}\n{files}\ntook {duration(time.monotonic() - started)}"


def job_of(arm: Arm, out: Path, overrides: Sequence[str] = ()) -> Job:
    """The run of an arm, with those of the overrides that act in it."""
    recipe = WORLDS[arm.world]
    return Job(recipe, (*arm.overrides, *shared_overrides(recipe, overrides, arm.overrides)), out / arm.name)


def demo_text(worlds: Sequence[Arms]) -> str:
    """The table base, OPSD, best fixed, ATESD for each world, and the differences that matter."""
    rows, gains = [], []
    for arms in worlds:
        best = arms.best_fixed({f"{ratio:g}": ratio for ratio in FIXED})
        tested = [arms.base_test()[0], *(arms.last_test(arm)[0] for arm in ("1", best, LEARNED))]
        base, full, fixed, learned = (percent_interval(row["average"]) for row in tested)
        (late,) = arms.late_ratios(LEARNED)
        rows.append((arms.name, base, full, f"{fixed} at {best}", learned, f"{late:.2f}"))
        pairs = ((0, 1), (1, 2), (1, 3), (2, 3))
        gains.append((arms.name, *(paired_points(tested[old], tested[new]) for old, new in pairs)))
    k = worlds[0].last_test(LEARNED)[0]["samples"]
    columns = ("world", "base", "OPSD", "best fixed ratio", "ATESD", "its late ratio")
    differences = ("world", "OPSD - base", "best fixed - OPSD", "ATESD - OPSD", "ATESD - best fixed")
    return (
        render_text(Table(f"Average@{k} on held-out problems, %", columns, tuple(rows)))
        + "\n"
        + render_text(Table("Differences in points, paired by problem", differences, tuple(gains), NOTES))
    )
