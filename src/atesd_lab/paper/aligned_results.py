"""The finished folders of `atesd sweep aligned` and `aligned-bad-teacher` as tables, verdicts and figures.

    python -m atesd_lab.paper.aligned_results OUT... [--baseline full] [--times FOLDER] [--figure PATH]

Read are cells.json and the run folders alone: one table per world, an arm per row, runs paired by seed within a world.
A sweep on shared cores says little of seconds. `--times` takes them from another folder, of a few cells that were
trained one after another on an idle machine:

    mkdir TIMES && cp OUT/cells.json TIMES
    atesd sweep aligned --out TIMES --print-commands | grep -- "/leaps-half-a-.*-seed-0$" | sh

Written are PATH.md, PATH.json (every number), PATH.svg and .png (the main arms), PATH-worlds.svg and .png (all arms).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atesd.errors import AtesdError, RunError
from atesd.runs import write_atomic
from atesd.table import Table
from atesd.text import MISSING, duration, percent, percent_interval
from atesd_lab.paper.aligned_figure import draw_main, draw_worlds
from atesd_lab.paper.aligned_measure import BEST_FIXED, GRPO, ArmResult, TimedGap, WorldResult, measure, paces_of
from atesd_lab.report.honest import capital, markdown
from atesd_lab.sweep.pivot import SweptTable, commits_of, machine_of, read_cells, read_tables, seconds_of

WORLDS = {
    "steps": "steps",
    "leaps-quarter": "leaps, q = .25",
    "leaps-half": "leaps, q = .5",
    "leaps-all": "leaps, q = 1",
    "leaps-anywhere": "leaps anywhere",
    "ema-teacher": "EMA teacher",
    "aligned-bad-teacher": "bad teacher",
    "bad": "bad teacher",
    "bad-teacher": "bad teacher",
}
RUNS = ("world", "runs", "seeds", "commit", "machine", "time")
ACCURACY_NOTES = (
    "Accuracy: Average@k on test after the last update. Brackets: 95 % interval over problems and seeds (Student's t "
    "on the crossed mean squares). Differences are paired by seed and problem.",
    "Best fixed: of full exposure and the fixed ratios the one with the highest mean validation after the last update; "
    "it is compared on test. It took a sweep to find.",
    "Kept: mean share of the tokens that were distilled, all updates; the first hold, without a direction, keeps all.",
)
TIME_NOTES = (
    "Seconds: mean of an update without evaluations, relative to full exposure in the same world and seed. Of several "
    "such pairs the median and the range, which is that of the machine's other load; no interval has it in it.",
    "At equal time: the slower of the two is stopped when the faster has made all its updates, and both are scored on "
    "validation, between two evaluations on the line; in parentheses the updates of the arm and of its rival. The best "
    "fixed ratio was chosen on this split, which favours it a little.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the folders, write the page, the numbers and the figures, print the page."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("out", type=Path, nargs="+", help="the --out of a finished sweep")
    asked.add_argument("--baseline", default="full", help="the arm of full exposure; default full")
    asked.add_argument("--times", type=Path, help="the folder whose seconds count; default: those of OUT")
    asked.add_argument("--figure", type=Path, help="where to write, without a suffix; default OUT/aligned")
    given = asked.parse_args(arguments)
    try:
        path = given.figure or given.out[0] / "aligned"
        text = write_results(given.out, given.baseline, path, [given.times] if given.times else given.out)
    except AtesdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def write_results(folders: Sequence[Path], baseline: str, path: Path, timed: Sequence[Path]) -> str:
    """Write everything beside `path`, and return the page; the seconds are those of the folders `timed`.

    Raises `RunError` for folders that cannot be read so.
    """
    paces = paces_of([cell for folder in timed for cell in read_cells(folder)], baseline)
    worlds, lines = [], []
    for folder in folders:
        for table in read_tables(folder, table_axis="world", arm_axis="arm"):
            if table.groups:
                worlds.append(measure(table, baseline, paces))
            lines.append(_provenance(table))
    if not worlds:
        raise RunError(f"{', '.join(map(str, folders))}: no run is finished")
    twice = [name for name, count in Counter(world.world for world in worlds).items() if count > 1]
    if twice:
        raise RunError(f"world {twice[0]} is in two of the folders; name each once")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = page(worlds, lines, baseline)
    write_atomic(path.with_name(f"{path.name}.md"), text.encode())
    numbers = {
        "baseline": baseline,
        "provenance": lines,
        "worlds": [asdict(world, dict_factory=_flat) for world in worlds],
    }
    write_atomic(path.with_name(f"{path.name}.json"), (json.dumps(numbers, indent=1) + "\n").encode())
    names = {world.world: _name(world.world) for world in worlds}
    draw_main(worlds, names, baseline, path)
    draw_worlds(worlds, names, path.with_name(f"{path.name}-worlds"))
    return text


def page(worlds: Sequence[WorldResult], provenance: Sequence[tuple[str, ...]], baseline: str) -> str:
    """Where the runs are from, verdicts, the overview, and two tables per world, as Markdown."""
    origin = Table("Runs", RUNS, tuple(provenance), ("Time: of the runs, added up, evaluations included.",))
    lines = [markdown(origin), *(f"- {line}" for line in verdict_lines(worlds)), ""]
    tables = [verdict_table(worlds), overview(worlds)]
    tables += [table for world in worlds for table in (accuracy_table(world, baseline), time_table(world, baseline))]
    return "\n".join([*lines, *map(markdown, tables)])


def verdict_lines(worlds: Sequence[WorldResult]) -> list[str]:
    """A sentence per question: which answer in which worlds."""
    answers: dict[str, dict[str, list[str]]] = {}
    for world in worlds:
        for one in world.verdicts:
            number = f" ({one.gap.contrast.in_points})" if one.gap else f" ({one.detail})"
            answers.setdefault(one.question, {}).setdefault(one.answer, []).append(_name(world.world) + number)
    return [
        f"{capital(question)}: {'; '.join(f'{answer} in ' + ', '.join(some) for answer, some in by_answer.items())}."
        for question, by_answer in answers.items()
    ]


def verdict_table(worlds: Sequence[WorldResult]) -> Table:
    """A row per world and question: the answer by rule, and the difference that it rests on."""
    rows = []
    for question in dict.fromkeys(verdict.question for world in worlds for verdict in world.verdicts):
        for world in worlds:
            for one in (one for one in world.verdicts if one.question == question):
                gap = one.gap
                over = MISSING if gap is None or gap.over_blocks is None else _ends(*gap.over_blocks)
                number = gap.contrast.in_points if gap else MISSING
                rows.append((question, _name(world.world), one.answer, one.detail, number, over))
    columns = ("question", "world", "answer", "rival", "difference, points", "interval, a checkpoint counted once")
    notes = (
        "Ahead of or behind: the 95 % interval over problems and seeds leaves out 0. Each stands for itself: with so "
        "many, one in twenty misses what is true.",
        "A checkpoint counted once: the seeds of one checkpoint are averaged first, so that this interval speaks of a "
        "new checkpoint too; with three it is wide.",
    )
    return Table("Verdicts", columns, tuple(rows), notes)


def overview(worlds: Sequence[WorldResult]) -> Table:
    """Accuracy of every arm in every world."""
    arms = dict.fromkeys(one.arm for world in worlds for one in world.arms)
    rows = [("before training", *(percent(world.arms[0].base) for world in worlds))]
    for arm in arms:
        cells = []
        for world in worlds:
            one = world.arm(arm)
            cells.append(
                MISSING if one is None else percent_interval(one.last) + " (best fixed)" * (arm == world.best_fixed)
            )
        rows.append((arm, *cells))
    columns = ("arm", *(_name(world.world) for world in worlds))
    return Table("Average@k on test after the last update, %", columns, tuple(rows), ACCURACY_NOTES[:1])


def accuracy_table(world: WorldResult, baseline: str) -> Table:
    """Every arm of a world at equal rollouts."""
    rivals = (baseline, BEST_FIXED, GRPO)
    rows = [
        (
            one.arm,
            _seeds(one),
            percent(one.base),
            percent_interval(one.last),
            *(one.gaps[rival].contrast.in_points if rival in one.gaps else MISSING for rival in rivals),
            percent(one.kept_share),
        )
        for one in world.arms
    ]
    rows += [(arm, "0", *(MISSING for _ in range(6))) for arm in world.absent]
    columns = ("arm", "seeds", "base, %", "last, %", *_against(world, baseline), "kept, %")
    sizes = (
        f"Test {world.test[0]} problems x {world.test[1]} samples, validation {world.validation[0]} x "
        f"{world.validation[1]}; {world.updates} updates. Best fixed: {world.best_fixed or 'none has all seeds'}."
    )
    title = f"{_name(world.world)}: equal rollouts"
    return Table(title, columns, tuple(rows), (sizes, *ACCURACY_NOTES, *world.notes))


def time_table(world: WorldResult, baseline: str) -> Table:
    """Every arm of a world at equal time, and how it got there on validation."""
    rivals, updates = (baseline, BEST_FIXED, GRPO), list(world.arms[0].curve)
    rows = []
    for one in world.arms:
        pace = MISSING if one.pace is None else "{value:.2f}".format(**one.pace)
        if one.pace is not None and one.pace["low"] < one.pace["high"]:
            pace += " ({low:.2f} to {high:.2f})".format(**one.pace)
        rows.append(
            (
                one.arm,
                pace,
                *(_timed(one.timed[rival]) if rival in one.timed else MISSING for rival in rivals),
                *(percent(one.curve[update]) for update in updates),
            )
        )
    columns = ("arm", "seconds, relative", *_against(world, baseline), *(f"@{update}, %" for update in updates))
    return Table(f"{_name(world.world)}: equal time", columns, tuple(rows), TIME_NOTES)


def _against(world: WorldResult, baseline: str) -> tuple[str, str, str]:
    return f"- {baseline}", f"- best fixed ({world.best_fixed or MISSING})", f"- {GRPO}"


def _timed(one: TimedGap) -> str:
    return f"{one.gap.contrast.in_points} ({one.candidate_updates:.0f} / {one.baseline_updates:.0f})"


def _seeds(one: ArmResult) -> str:
    return str(len(one.seeds)) if one.seeds == one.wanted else f"{len(one.seeds)} of {len(one.wanted)}"


def _flat(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A record of aligned.json, in which the value and the interval of a contrast stand among its other numbers."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        found |= {end: value[end] for end in ("value", "low", "high")} if name == "contrast" else {name: value}
    return found


def _ends(low: float, high: float) -> str:
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]"


def _name(world: str) -> str:
    return WORLDS.get(world, world)


def _provenance(table: SweptTable) -> tuple[str, ...]:
    """Of one world: runs, commits, seeds, machine and cost."""
    runs = table.runs
    commits = dict.fromkeys(commit for run in runs for commit in commits_of(run))
    machines = dict.fromkeys(map(machine_of, runs))
    seconds = seconds_of(row for run in runs for row in run.metrics)
    places: dict[str, list[str]] = {}
    for seed, block in table.blocks.items():
        places.setdefault(block, []).append(str(seed))
    seeds = "; ".join(", ".join(some) + f" on {block}" * bool(block) for block, some in places.items())
    made = f"{len(runs)} of {sum(map(len, table.wanted.values()))}"
    return _name(table.name), made, seeds, ", ".join(commits), "; ".join(machines), duration(seconds)


if __name__ == "__main__":
    sys.exit(main())
