"""Figure 4A: KL per token of one fixed correct rollout, scored by teachers who see different shares of the reference.

At the first update all fixed ratios of a seed score the same rollouts, so nothing is measured anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from atesd.errors import RunError
from atesd.rows import SampleRow
from atesd.table import Table
from atesd.text import MISSING, number
from atesd_lab.paper.bench import RATIOS, Bench, Findings
from atesd_lab.paper.claims import Claim
from atesd_lab.paper.drawing import panels
from atesd_lab.paper.numbers import printed
from atesd_lab.report.canvas import plain, styled
from atesd_lab.report.svg import INK
from atesd_lab.stats.contrast import over_seeds

Floats = NDArray[np.float64]
LOW = "fixed-0.25"


Rollout = Mapping[str, SampleRow]
"""One rollout of the student: its row of every arm."""


def report(bench: Bench) -> Findings:
    """Mean, max and argmax per ratio of the fixed rollout; the heat map; the same over all correct rollouts."""
    (world,) = bench
    by_seed = correct_rollouts(bench, world)
    shown = max((one for some in by_seed for one in some), key=lambda one: len(one["full"]["tokens"]))
    paper = printed("one_rollout_kl")
    return Findings(
        "One rollout under several ratios: figure 4A",
        (rollout_table(shown), all_rollouts_table(world, by_seed)),
        {"heat": _draw_heat(shown)},
        (
            _claim(world, by_seed, "mean", f"{paper['ratio_1.0']['mean']} against {paper['ratio_0.3']['mean']}"),
            _claim(world, by_seed, "max", f"{paper['ratio_1.0']['max']} against {paper['ratio_0.3']['max']}"),
        ),
        (
            "The rollout: the correct one with the most tokens in the first update, the first seed's and then the "
            "first of equals. Paper: one rollout of a language model at the ratios 1.0 and 0.3; ours at 1 and 0.25.",
        ),
    )


def correct_rollouts(bench: Bench, world: str) -> list[list[Rollout]]:
    """By seed, the correct rollouts of the first logged update that have a finite KL under every ratio.

    A seed of which one ratio's run skipped that update has none. Raises `RunError` where no seed has one.
    """
    runs = [bench[world].runs(arm) for arm in RATIOS]
    first = min((row["update"] for some in runs for run in some for row in run.samples), default=None)
    found: list[list[Rollout]] = []
    for by_arm in zip(*runs, strict=True):
        logged = [[row for row in run.samples if row["update"] == first] for run in by_arm]
        alike = len(set(map(len, logged))) == 1
        rollouts = [dict(zip(RATIOS, rows, strict=True)) for rows in zip(*logged, strict=True)] if alike else []
        found.append([one for one in rollouts if all(map(_counts, one.values()))])
    if not any(found):
        raise RunError("no logged rollout of the first update is correct; raise train.log_samples or train.batch_size")
    return found


def _counts(row: SampleRow) -> bool:
    return row["verdict"] == "correct" and bool(_finite(row).size)


def _kl(row: SampleRow) -> Floats:
    """KL per token, NaN where it was not finite."""
    return np.array(row["token_kl"], dtype=float)


def _finite(row: SampleRow) -> Floats:
    kl = _kl(row)
    return kl[np.isfinite(kl)]


def rollout_table(shown: Rollout) -> Table:
    """Per ratio: mean, max, and the token at which the KL is largest."""
    paper = {"full": printed("one_rollout_kl", "ratio_1.0"), LOW: printed("one_rollout_kl", "ratio_0.3")}
    rows = []
    for arm, row in shown.items():
        kl, at = _finite(row), int(np.nanargmax(_kl(row)))
        theirs = paper.get(arm)
        cells = [number(theirs[key]) if theirs else MISSING for key in ("mean", "max")]
        token = f"{at}: {row['tokens'][at].strip()}"
        rows.append((f"{RATIOS[arm]:g}", cells[0], number(float(kl.mean())), cells[1], number(float(kl.max())), token))
    columns = ("ratio", "paper: mean", "mean", "paper: max", "max", "largest at")
    first = next(iter(shown.values()))
    return Table(
        "KL per token of one correct rollout, nats", columns, tuple(rows), (f"Rollout: {first['completion']}",)
    )


def all_rollouts_table(world: str, by_seed: Sequence[Sequence[Rollout]]) -> Table:
    """Mean over all correct rollouts of the first update of the rollout's mean, max and their ratio."""
    rows = []
    for arm, ratio in RATIOS.items():
        some = [_finite(one[arm]) for rollouts in by_seed for one in rollouts]
        peaked = [float(kl.max() / kl.mean()) for kl in some if kl.mean() > 0]
        mean, most = fmean(float(kl.mean()) for kl in some), fmean(float(kl.max()) for kl in some)
        ratio_of_both = number(fmean(peaked)) if peaked else MISSING
        rows.append((f"{ratio:g}", str(len(some)), number(mean), number(most), ratio_of_both))
    columns = ("ratio", "rollouts", "mean", "max", "max / mean")
    return Table(f"{world}: KL per token of every correct rollout of the first update, nats", columns, tuple(rows))


def _claim(world: str, by_seed: Sequence[Sequence[Rollout]], what: str, words: str) -> Claim:
    """The mean (or max) of the KL over a correct rollout is larger at full exposure than at the low ratio."""

    def of(rollouts: Sequence[Rollout], arm: str) -> float:
        each = [_finite(one[arm]) for one in rollouts]
        return float(np.mean([kl.mean() if what == "mean" else kl.max() for kl in each]))

    gaps = [of(rollouts, "full") - of(rollouts, LOW) for rollouts in by_seed if rollouts]
    contrast = over_seeds(f"{what} at 1 - at {RATIOS[LOW]:g}", gaps, "nats per token")
    text = f"{world}: the {what} of a correct rollout's KL per token is larger at full exposure"
    return Claim(text, "paper", words, (contrast,))


@styled
def _draw_heat(shown: Rollout) -> Figure:
    tokens = [plain(token.strip()) for token in next(iter(shown.values()))["tokens"]]
    kl = np.array(list(map(_kl, shown.values())))
    figure, (axes,) = panels(1, width=max(5.0, 1.6 + 0.34 * len(tokens)), height=0.42 * len(shown) + 1.7)
    image = axes.imshow(kl, aspect="auto", cmap="Oranges", norm=PowerNorm(0.4, vmin=0))
    for place, row in enumerate(kl):
        most = np.nanmax(row)
        shade = "white" if most > 0.4 * np.nanmax(kl) else INK
        axes.text(int(np.nanargmax(row)), place, f"{most:.2g}", ha="center", va="center", fontsize=7.5, color=shade)
    axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(shown)), [f"{RATIOS[arm]:g}" for arm in shown])
    axes.set(title="KL(teacher || student) per token of one correct rollout", ylabel="reveal ratio")
    axes.grid(False)
    figure.colorbar(image, label="nats")
    return figure
