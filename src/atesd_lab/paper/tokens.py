"""Figure 4A: KL per token of one fixed correct rollout, scored by teachers who see different shares of the reference.

At the first update all fixed ratios of a seed score the same rollouts, so nothing is measured anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from atesd.errors import RunError
from atesd.rows import SampleRow
from atesd.table import Table
from atesd.text import MISSING, number
from atesd_lab.paper.bench import RATIOS, Bench, Findings
from atesd_lab.paper.claims import Claim
from atesd_lab.paper.drawing import panels
from atesd_lab.paper.numbers import printed
from atesd_lab.report.canvas import plain, styled
from atesd_lab.report.rows import RunRows
from atesd_lab.report.svg import INK
from atesd_lab.stats.contrast import over_seeds

LOW = "fixed-0.25"


def report(bench: Bench) -> Findings:
    """Mean, max and argmax per ratio of the fixed rollout; the heat map; the same over all correct rollouts."""
    (world,) = bench
    chosen = the_rollout(bench[world].runs("full"))
    seed, place = chosen
    shown = {arm: _correct(bench[world].runs(arm)[seed])[place] for arm in RATIOS}
    paper = printed("one_rollout_kl")
    return Findings(
        "One rollout under several ratios: figure 4A",
        (rollout_table(shown), all_rollouts_table(bench, world)),
        {"heat": _draw_heat(shown)},
        (
            _claim(bench, world, "mean", f"{paper['ratio_1.0']['mean']} against {paper['ratio_0.3']['mean']}"),
            _claim(bench, world, "max", f"{paper['ratio_1.0']['max']} against {paper['ratio_0.3']['max']}"),
        ),
        (
            "The rollout: the correct one with the most tokens in the first update, the first seed's and then the "
            "first of equals. Paper: one rollout of a language model at the ratios 1.0 and 0.3; ours at 1 and 0.25.",
        ),
    )


def the_rollout(runs: Sequence[RunRows]) -> tuple[int, int]:
    """(seed's place, place among its correct rollouts) of the longest correct rollout of the first update.

    Raises `RunError` if no seed has a correct one among those logged.
    """
    found = [
        (-len(row["tokens"]), seed, place) for seed, run in enumerate(runs) for place, row in enumerate(_correct(run))
    ]
    if not found:
        raise RunError("no logged rollout of the first update is correct; raise train.log_samples or train.batch_size")
    _, seed, place = min(found)
    return seed, place


def rollout_table(shown: dict[str, SampleRow]) -> Table:
    """Per ratio: mean, max, and the token at which the KL is largest."""
    paper = {"full": printed("one_rollout_kl", "ratio_1.0"), LOW: printed("one_rollout_kl", "ratio_0.3")}
    rows = []
    for arm, row in shown.items():
        kl = np.array(row["token_kl"])
        at = int(kl.argmax())
        theirs = paper.get(arm)
        cells = [number(theirs[key]) if theirs else MISSING for key in ("mean", "max")]
        token = f"{at}: {row['tokens'][at].strip()}"
        rows.append((f"{RATIOS[arm]:g}", cells[0], number(float(kl.mean())), cells[1], number(float(kl.max())), token))
    columns = ("ratio", "paper: mean", "mean", "paper: max", "max", "largest at")
    first = next(iter(shown.values()))
    return Table(
        "KL per token of one correct rollout, nats", columns, tuple(rows), (f"Rollout: {first['completion']}",)
    )


def all_rollouts_table(bench: Bench, world: str) -> Table:
    """Mean over all correct rollouts of the first update of the rollout's mean, max and their ratio."""
    rows = []
    for arm, ratio in RATIOS.items():
        some = [np.array(row["token_kl"]) for run in bench[world].runs(arm) for row in _correct(run)]
        peaked = fmean(float(kl.max() / kl.mean()) for kl in some if kl.mean() > 0)
        mean, most = fmean(float(kl.mean()) for kl in some), fmean(float(kl.max()) for kl in some)
        rows.append((f"{ratio:g}", str(len(some)), number(mean), number(most), number(peaked)))
    columns = ("ratio", "rollouts", "mean", "max", "max / mean")
    return Table(f"{world}: KL per token of every correct rollout of the first update, nats", columns, tuple(rows))


def _correct(run: RunRows) -> list[SampleRow]:
    first = min(int(row["update"]) for row in run.samples)
    return [row for row in run.samples if row["update"] == first and row["verdict"] == "correct"]


def _claim(bench: Bench, world: str, what: str, words: str) -> Claim:
    """The mean (or max) of the KL over a correct rollout is larger at full exposure than at the low ratio."""

    def of(run: RunRows) -> float:
        each = [np.array(row["token_kl"], dtype=float) for row in _correct(run)]
        values = [kl.mean() if what == "mean" else kl.max() for kl in each]
        return float(np.mean(values)) if values else float("nan")

    gaps = [of(full) - of(low) for full, low in zip(bench[world].runs("full"), bench[world].runs(LOW), strict=True)]
    known = [gap for gap in gaps if np.isfinite(gap)]
    contrast = over_seeds(f"{what} at 1 - at {RATIOS[LOW]:g}", known, "nats per token")
    text = f"{world}: the {what} of a correct rollout's KL per token is larger at full exposure"
    return Claim(text, "paper", words, (contrast,))


@styled
def _draw_heat(shown: dict[str, SampleRow]) -> Figure:
    tokens = [plain(token.strip()) for token in next(iter(shown.values()))["tokens"]]
    kl = np.array([row["token_kl"] for row in shown.values()])
    figure, (axes,) = panels(1, width=max(5.0, 1.6 + 0.34 * len(tokens)), height=0.42 * len(shown) + 1.7)
    image = axes.imshow(kl, aspect="auto", cmap="Oranges", norm=PowerNorm(0.4, vmin=0))
    for place, row in enumerate(kl):
        shade = "white" if row.max() > 0.4 * kl.max() else INK
        axes.text(int(row.argmax()), place, f"{row.max():.2g}", ha="center", va="center", fontsize=7.5, color=shade)
    axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(shown)), [f"{RATIOS[arm]:g}" for arm in shown])
    axes.set(title="KL(teacher || student) per token of one correct rollout", ylabel="reveal ratio")
    axes.grid(False)
    figure.colorbar(image, label="nats")
    return figure
