"""The finished folder of `atesd sweep rules` as a table per world: what each rule came to, whether it found the ratio.

    python -m atesd_lab.paper.rules_results OUT [--baseline full] [--band-seeds 8] [--out PATH]

Read are cells.json and the run folders alone. Written are PATH.md and PATH.json (every number). An arm `NAME-shuffled`
is taken for the null control of the arm NAME.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, pstdev

from atesd.config import Config, config_from_mapping, dump_config, parse_yaml
from atesd.control.factory import make_exposure
from atesd.control.simulation import late_ratio_of_a_frozen_student
from atesd.errors import AtesdError, RunError
from atesd.rows import Estimate
from atesd.runs import write_atomic
from atesd.table import Table
from atesd.text import MISSING, percent_interval
from atesd_lab.paper.aligned_measure import ONE_SEED, WORDS, fixed_ratios
from atesd_lab.paper.aligned_results import WORLDS
from atesd_lab.report.arms import Arms
from atesd_lab.report.groups import shares_at
from atesd_lab.report.honest import markdown
from atesd_lab.report.rows import average
from atesd_lab.stats.contrast import Contrast
from atesd_lab.stats.differences import mean_share
from atesd_lab.sweep.pivot import SweptTable, read_tables

CLOSE = 0.15
"""A late ratio this far from the best fixed one, or from one that cannot be told from it, has found it (ours)."""
NULL, NULL_REWARD = "-shuffled", "-shuffled-reward"
LEVEL = 0.05  # to which the success before training is rounded, so that worlds share their null bands
NOTES = (
    "Accuracy: Average@k on test after the last update, with its 95 % interval over problems and seeds. Differences in "
    "points, paired by seed and problem. Best fixed: of full exposure and the fixed ratios the one with the highest "
    "mean validation after the last update, compared on test; it took a sweep to find.",
    "Late ratio: mean of the last quarter of the updates, and its range over seeds. Null band: mean and two deviations "
    "of it under a student who never learns, solves what it solved before training and gives rewards of nothing but "
    "noise; pure simulation. A late ratio inside it needs no finding.",
    f"Found: the late ratio is within {CLOSE} of the best fixed ratio or of one not told from it, and off the band.",
    "Null: the arm of the same name with shuffled verdicts, rewards or holds.",
)


@dataclass(frozen=True, slots=True)
class ArmOfRules:
    """One arm of a world. `band` is (mean, deviation) of the late ratio under a student who never learns."""

    arm: str
    seeds: tuple[int, ...]
    accuracy: Estimate
    from_best: Contrast | None
    from_null: Contrast | None
    late: tuple[float, ...]
    band: tuple[float, float] | None
    found: bool | None


@dataclass(frozen=True, slots=True)
class WorldOfRules:
    """One world: its best fixed ratio with those not told from it, and every arm in the order of the plan."""

    world: str
    best: str
    as_good: tuple[float, ...]
    arms: tuple[ArmOfRules, ...]
    notes: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the folder, write the page and the numbers, print the page."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("folder", type=Path, help="the --out of a sweep")
    asked.add_argument("--baseline", default="full", help="the arm of full exposure; default full")
    asked.add_argument("--band-seeds", type=int, default=8, help="of each null band; 0: no bands; default 8")
    asked.add_argument("--out", type=Path, help="where to write, without a suffix; default FOLDER/rules")
    given = asked.parse_args(arguments)
    try:
        text = write_results(given.folder, given.baseline, given.band_seeds, given.out or given.folder / "rules")
    except AtesdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def write_results(folder: Path, baseline: str, band_seeds: int, path: Path) -> str:
    """Write PATH.md and PATH.json, and return the page. Raises `RunError` for a folder that cannot be read so."""
    tables = read_tables(folder, table_axis="world", arm_axis="arm")
    worlds = [measure(table, baseline, band_seeds) for table in tables if table.groups]
    if not worlds:
        raise RunError(f"{folder}: no run is finished; `atesd sweep rules --out {folder}` trains them")
    text = "\n".join(map(markdown, [summary(worlds), *map(world_table, worlds)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path.with_name(f"{path.name}.md"), text.encode())
    write_atomic(path.with_name(f"{path.name}.json"), (json.dumps(list(map(asdict, worlds)), indent=1) + "\n").encode())
    return text


def measure_arms(arms: Arms, baseline: str, band_seeds: int, notes: Sequence[str] = ()) -> WorldOfRules:
    """Everything of one world. Raises `RunError` without a finished baseline, or where evaluations do not compare."""
    if baseline not in arms.groups:
        raise RunError(f"{arms.name}: the baseline {baseline!r} has no finished run; finish it first")
    ratios = fixed_ratios(arms.groups, baseline)
    best = arms.best_fixed(ratios)
    level = LEVEL * round(fmean(map(average, arms.base_test())) / LEVEL)
    good = [arm for arm in ratios if arm == best or _difference(arms, best, arm, without=("below",)) is not None]
    as_good = tuple(sorted(ratios[arm] for arm in good))
    rows = tuple(_arm(arms, arm, best, as_good, level, band_seeds) for arm in arms.groups)
    return WorldOfRules(arms.name, best, as_good, rows, tuple(notes))


def measure(table: SweptTable, baseline: str, band_seeds: int) -> WorldOfRules:
    """The same of a world of a sweep, with what is absent among its notes."""
    absent = (f"{arm}: no run is finished." for arm in table.wanted if arm not in table.groups)
    return measure_arms(Arms(table.name, table.groups), baseline, band_seeds, (*absent, *table.notes))


def _arm(arms: Arms, arm: str, best: str, as_good: Sequence[float], level: float, band_seeds: int) -> ArmOfRules:
    """One arm. The mean of its seeds must leave two deviations of single null runs: wider than those of a mean, so that
    `found` errs towards no.
    """
    group = arms.groups[arm]
    config = group.runs[0].config
    late = tuple(arms.late_ratios(arm))
    band = null_band(config, level, band_seeds) if config.decides and band_seeds else None
    near = bool(late) and min(abs(fmean(late) - ratio) for ratio in as_good) <= CLOSE
    decides = config.decides or config.exposure.kind == "aligned"
    inside = band is not None and abs(fmean(late) - band[0]) <= 2 * band[1]
    return ArmOfRules(
        arm,
        group.seeds,
        mean_share(shares_at([group], "test", {arm: group.last})[arm]),
        None if arm == best else _difference(arms, best, arm),
        _difference(arms, f"{arm}{NULL}", arm),
        late,
        band,
        near and not inside if decides else None,
    )


def _difference(arms: Arms, baseline: str, candidate: str, without: Iterable[str] = ()) -> Contrast | None:
    """The candidate less the baseline; None where they share no seed, or the verdict is one of `without`."""
    if not arms.common(baseline, candidate):
        return None
    found = arms.difference(baseline, candidate)
    return None if found.verdict in without else found


def null_band(config: Config, level: float, seeds: int) -> tuple[float, float]:
    """Mean and deviation over seeds of the late ratio of a config's exposure under a student who never learns."""
    seedless = config.model_copy(update={"train": config.train.model_copy(update={"seed": 0})})
    return _null_band(dump_config(seedless), level, seeds)


@cache
def _null_band(settings: str, level: float, seeds: int) -> tuple[float, float]:
    config = config_from_mapping(parse_yaml(settings, "config"))
    updates, rollouts = config.train.num_updates, config.train.batch_size
    ends = [
        late_ratio_of_a_frozen_student(
            make_exposure(config, updates, seed), config.granularity, updates, rollouts, level, seed
        )
        for seed in range(seeds)
    ]
    return fmean(ends), pstdev(ends)


def summary(worlds: Sequence[WorldOfRules]) -> Table:
    """Every arm against the best fixed ratio of each world, and in how many worlds it found that ratio."""
    rows = []
    for arm in dict.fromkeys(one.arm for world in worlds for one in world.arms):
        mine = [next((one for one in world.arms if one.arm == arm), None) for world in worlds]
        judged = [one.found for one in mine if one is not None and one.found is not None]
        found = f"{sum(judged)} of {len(judged)}" if judged else MISSING
        rows.append((arm, *(_gap(one, world) for one, world in zip(mine, worlds, strict=True)), found))
    columns = ("arm", *(f"{_name(world)}: best {world.best}" for world in worlds), "found in")
    return Table("Less the best fixed ratio, in every world", columns, tuple(rows), NOTES)


def _gap(one: ArmOfRules | None, world: WorldOfRules) -> str:
    if one is None:
        return MISSING
    if one.arm == world.best:
        return "best fixed"
    return one.from_best.in_points if one.from_best else MISSING


def world_table(world: WorldOfRules) -> Table:
    """Every arm of a world: accuracy, differences, late ratio over its band, verdicts."""
    rows = tuple(
        (
            one.arm,
            str(len(one.seeds)),
            percent_interval(one.accuracy),
            _gap(one, world),
            _word(one.from_best),
            one.from_null.in_points if one.from_null else MISSING,
            _word(one.from_null),
            f"{fmean(one.late):.2f} ({min(one.late):.2f} to {max(one.late):.2f})" if one.late else MISSING,
            MISSING if one.band is None else f"{one.band[0]:.2f} ± {2 * one.band[1]:.2f}",
            MISSING if one.found is None else "yes" if one.found else "no",
        )
        for one in world.arms
    )
    columns = ("arm", "seeds", "accuracy, %", f"- best fixed ({world.best})", "is", "- null", "is", "late ratio")
    good = ", ".join(f"{ratio:g}" for ratio in world.as_good)
    told = f"Best fixed ratio, with those that cannot be told from it: {good}."
    return Table(_name(world), (*columns, "null band", "found"), rows, (told, *world.notes))


def _word(gap: Contrast | None) -> str:
    if gap is None:
        return MISSING
    return WORDS[gap.verdict] if gap.covers_seeds else ONE_SEED


def _name(world: WorldOfRules) -> str:
    return WORLDS.get(world.world, world.world)


if __name__ == "__main__":
    sys.exit(main())
