"""`atesd demo`: the look-ahead, OPSD, fixed ratios and ATESD in both embedded worlds, from the shipped weights.

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
from atesd.text import duration, percent, percent_interval
from atesd_lab.report.arms import Arms
from atesd_lab.report.groups import group_of
from atesd_lab.report.page import Lead, write_report
from atesd_lab.report.rows import average
from atesd_lab.report.tables import paired_points
from atesd_lab.studies.demo_figure import ALIGNED, CALLED, LEARNED, draw_demo, world_chart
from atesd_lab.sweep.jobs import Job, Say, train_all

PROCESSES = 2
FIXED = (0.25, 0.5, 0.75, 1.0)  # the last is OPSD
WORLDS = {"steps": "micro-steps", "leaps": "micro"}
NOTES = (
    "The leap world is designed to make a point: half of its references leap beyond the student, so that",
    "the best ratio is interior. It shows a mechanism; it is no evidence about language models.",
    "at: the reveal ratio; of the look-ahead and of ATESD, which choose it, the mean of the last 25 updates.",
    "The best fixed ratio is picked on the validation problems and reported on the held-out test problems.",
    "Brackets: 95 % bootstrap interval over problems. One seed each: its choice is not in them.",
)


@dataclass(frozen=True, slots=True)
class Arm:
    """One run of the demo: a world, and what decides its reveal ratio: "aligned", "learned", "1" (OPSD), "0.5"."""

    world: str
    ratio: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        words = {ALIGNED: "look-ahead", LEARNED: "atesd", "1": "opsd"}
        return f"{self.world}-{words.get(self.ratio, f'fixed-{self.ratio}')}"

    @property
    def overrides(self) -> list[str]:
        """What differs from the recipe of its world."""
        kinds = {kind: [f"exposure.kind={kind}"] for kind in (ALIGNED, LEARNED)} | {"1": ["exposure.kind=full"]}
        return kinds.get(self.ratio, ["exposure.kind=fixed", f"exposure.reveal_ratio={self.ratio}"])


ARMS = tuple(
    Arm(world, ratio) for world in WORLDS for ratio in (ALIGNED, "1", LEARNED, *(f"{r:g}" for r in FIXED[:-1]))
)


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
    page = write_report([out / arm.name for arm in ARMS], out / "report.html", lead_of(worlds, out))
    text = demo_text(worlds)
    write_atomic(out / "table.txt", text.encode())
    files = f"page: {page}\nfigure: {out / 'demo.svg'}, {out / 'demo.png'}"
    return f"\n{text}\n{files}\ntook {duration(time.monotonic() - started)}"


def job_of(arm: Arm, out: Path, overrides: Sequence[str] = ()) -> Job:
    """The run of an arm, with those of the overrides that act in it."""
    recipe = WORLDS[arm.world]
    return Job(recipe, (*arm.overrides, *shared_overrides(recipe, overrides, arm.overrides)), out / arm.name)


def demo_text(worlds: Sequence[Arms]) -> str:
    """The table base, look-ahead, OPSD, best fixed, ATESD for each world, and the differences that matter."""
    rows, gains = [], []
    for arms in worlds:
        best = best_ratio(arms)
        tested = [arms.base_test()[0], *(arms.last_test(arm)[0] for arm in (ALIGNED, "1", best, LEARNED))]
        base, ahead, full, fixed, learned = (percent_interval(row["average"]) for row in tested)
        own = {arm: f"{arms.late_ratios(arm)[0]:.2f}" for arm in (ALIGNED, LEARNED)}
        rows.append(
            (arms.name, base, f"{ahead} at {own[ALIGNED]}", full, f"{fixed} at {best}", f"{learned} at {own[LEARNED]}")
        )
        pairs = ((2, 1), (3, 1), (2, 3), (0, 2), (2, 4))
        gains.append((arms.name, *(paired_points(tested[old], tested[new]) for old, new in pairs)))
    k = worlds[0].last_test(LEARNED)[0]["samples"]
    columns = ("world", "base", "look-ahead", "OPSD", "best fixed ratio", "ATESD")
    differences = (
        "world",
        "look-ahead - OPSD",
        "look-ahead - best",
        "best - OPSD",
        "OPSD - base",
        "ATESD - OPSD",
    )
    return (
        render_text(Table(f"Average@{k} on held-out problems, %", columns, tuple(rows)))
        + "\n"
        + render_text(Table("Differences in points, paired by problem", differences, tuple(gains), NOTES))
    )


def best_ratio(arms: Arms) -> str:
    """The fixed ratio, OPSD's among them, with the highest validation after the last update."""
    return arms.best_fixed({f"{ratio:g}": ratio for ratio in FIXED})


def lead_of(worlds: Sequence[Arms], out: Path) -> Lead:
    """What the demo's page says first: what each world wants, what was found in one run, and what to type next."""
    return Lead(
        "How much of the reference should the teacher see?",
        tuple(map(_headline, worlds)),
        (
            "The look-ahead (exposure.kind: aligned) chooses its ratio in one run, by what each would do to the "
            "student's verified success. ATESD learns a Beta policy by trying; this run is too short for it: 25 "
            "decisions, 6 policy updates.",
            "A model of 101,056 parameters in two toy worlds. The leap world is designed to make a point: this shows a "
            "mechanism and is no evidence about language models.",
        ),
        tuple(map(world_chart, worlds)),
        (
            (f"atesd report {out / 'leaps-look-ahead'}", "the page of one run: decisions, health, samples"),
            (f"atesd compare {out / 'leaps-opsd'} -- {out / 'leaps-look-ahead'}", "is it better, by an interval?"),
            ("atesd profile micro", "before training: which ratio to start with, and why"),
            ("atesd audit micro", "can the reward be trusted, and is the budget enough?"),
            ("atesd train micro --set exposure.kind=fixed --set exposure.reveal_ratio=0.5", "a run of your own"),
        ),
    )


def _headline(arms: Arms) -> str:
    best = best_ratio(arms)
    score = {arm: f"{percent(average(arms.last_test(arm)[0]))} %" for arm in (ALIGNED, best, "1")}
    base = f"from {percent(average(arms.base_test()[0]))} % before training"
    if best == "1":
        fixed = f"all of the reference is best: {score['1']}, {base}."
    else:
        fixed = f"a share of {best} is best: {score[best]}, {base}; the whole reference ends at {score['1']}."
    ratio = arms.late_ratios(ALIGNED)[0]
    return f"In the {CALLED[arms.name]} {fixed} The look-ahead ends at {score[ALIGNED]}, with a ratio of {ratio:.2f}."
