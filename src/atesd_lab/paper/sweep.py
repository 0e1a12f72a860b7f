"""Figure 2: five fixed ratios. Final accuracy (A), mismatch of teacher and student (B), by difficulty (C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from operator import attrgetter
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from atesd.errors import RunError
from atesd.table import Table
from atesd.text import MISSING, number, percent
from atesd_lab.paper.bench import RATIOS, Bench, Findings, benchmarks_of, main_world
from atesd_lab.paper.claims import Claim, ends_above
from atesd_lab.paper.drawing import draw_seeds, log_axis, panels
from atesd_lab.paper.numbers import printed
from atesd_lab.report.canvas import colour, dash, styled
from atesd_lab.report.rows import RunRows, at_common_updates, natural, shares, validated
from atesd_lab.stats.contrast import Contrast, over_seeds
from atesd_lab.stats.mismatch import Mismatch, mismatch
from atesd_lab.stats.selection import best_fixed

ARMS = tuple(RATIOS)
CLASSES = ("easy", "medium", "hard")
MEASURES: Mapping[str, Callable[[Mismatch], float]] = {
    "mean": attrgetter("mean"),
    "p95": attrgetter("p95"),
    "p99": attrgetter("p99"),
    "tail mean": attrgetter("tail_mean"),
}


def report(bench: Bench) -> Findings:
    """Tables of accuracy, mismatch and difficulty; figures; the paper's four claims on figure 2."""
    return Findings(
        "Fixed ratios: figure 2 of the paper",
        (
            *(bench[world].table(ARMS, "full", _paper_column()) for world in bench),
            optimum_table(bench),
            mismatch_table(bench),
            difficulty_table(bench, main_world(bench)),
            level_table(bench, main_world(bench)),
        ),
        {
            "accuracy": _draw_accuracy(bench),
            "mismatch": _draw_mismatch(bench, main_world(bench)),
            "difficulty": _draw_difficulty(bench, main_world(bench)),
        },
        (*_accuracy_claims(bench), *mismatch_claims(bench), *_difficulty_claims(bench, main_world(bench))),
        (
            "Mismatch: KL(teacher || student) per token, nats, over the logged rollouts of an update; tail mean: "
            "over the 5 % of tokens with the largest. At the first update all ratios score the same rollouts.",
            "Easy, medium, hard: thirds of the test problems by the base model's pass rate over all seeds. The base "
            "model was sampled with the same random numbers as the trained ones.",
        ),
    )


def _paper_column() -> dict[str, str]:
    ours = printed("exposure_ablation_aime24")
    return {"full": number(ours["full"], 4), "fixed-0.5": number(ours["best_fixed_0.5"], 4)}


def optimum_table(bench: Bench) -> Table:
    """Which fixed ratio is best after how many updates, on validation: where the optimum is, and whether it moves."""
    rows = []
    for world in bench:
        runs = [(arm, run) for arm in ARMS for run in bench[world].runs(arm)]
        updates, each = at_common_updates(f"{world}: accuracy on validation", [validated(run) for _, run in runs])
        for place, update in enumerate(updates):
            found = [(arm, values[place]) for (arm, _), values in zip(runs, each, strict=True)]
            means = {arm: fmean(value for mine, value in found if mine == arm) for arm in ARMS}
            best = f"{RATIOS[best_fixed(RATIOS, means)]:g}" if update else MISSING
            rows.append((world, str(update), *map(percent, means.values()), best))
    columns = ("world", "update", *(f"{ratio:g}" for ratio in RATIOS.values()), "best")
    notes = ("Means over seeds; equal before the first update. The lowest of equals is called best.",)
    return Table("Average@k on validation in %, by fixed ratio and update", columns, tuple(rows), notes)


def token_kl(run: RunRows, update: int) -> list[float]:
    """KL of every logged token of an update's rollouts, those aside at which it was not finite."""
    return [kl for row in run.samples if row["update"] == update for kl in row["token_kl"] if kl is not None]


def logged_updates(bench: Bench, world: str) -> list[int]:
    """The updates whose rollouts every run logged; one that a run skipped is none.

    Raises `RunError` where there is none, or only one though a run logged more.
    """
    runs = [run for arm in ARMS for run in bench[world].runs(arm)]
    each = [_logged(run) for run in runs]
    common, least = set.intersection(*each), min(2, max(map(len, each)))
    if len(common) < max(1, least):
        logged, name = min((sorted(own), run.name) for own, run in zip(each, runs, strict=True))
        raise RunError(
            f"{world}: fewer than two updates have logged rollouts in every run; {name} has those of {logged}; set "
            "train.log_samples above 0, and train anew what skipped an update"
        )
    return sorted(common)


def _logged(run: RunRows) -> set[int]:
    measured = set(run.series("top1_disagreement")[0])
    return {row["update"] for row in run.samples if row["update"] in measured and token_kl(run, row["update"])}


def mismatch_table(bench: Bench) -> Table:
    """Measures of the per-token KL and top-1 disagreement, per ratio, at the first and last logged update."""
    rows = []
    for world in bench:
        updates = logged_updates(bench, world)
        for arm, ratio in RATIOS.items():
            cells = [world, f"{ratio:g}"]
            for update in (updates[0], updates[-1]):
                by_seed = [mismatch(token_kl(run, update)) for run in bench[world].runs(arm)]
                cells += [number(fmean(map(measure, by_seed))) for measure in MEASURES.values()]
                cells.append(percent(fmean(_disagreement(run, update) for run in bench[world].runs(arm))))
            rows.append(tuple(cells))
    names = (*MEASURES, "top-1 %")
    columns = ("world", "ratio", *(f"{name}, start" for name in names), *(f"{name}, late" for name in names))
    notes = ("Means over seeds. The paper has no numbers for figure 2B; it says that mismatch rises with the ratio.",)
    return Table("Mismatch by ratio: KL per token in nats", columns, tuple(rows), notes)


def _disagreement(run: RunRows, update: int) -> float:
    return dict(zip(*run.series("top1_disagreement"), strict=True))[update]


def difficulty_classes(bench: Bench, world: str) -> dict[str, list[str]]:
    """Test problems in thirds by the base model's pass rate over all seeds, the most often solved first."""
    rows = bench[world].base_test()
    names = sorted(rows[0]["correct_counts"])
    if len(names) < 6:
        raise RunError(f"{world}: {len(names)} test problems leave thirds of fewer than two; set data.test_size to 6")
    rate = dict(zip(names, shares(rows, names).mean(axis=0), strict=True))
    ordered = sorted(names, key=lambda name: (-rate[name], name))
    cuts = np.linspace(0, len(ordered), 4).astype(int)
    return {name: ordered[a:b] for name, a, b in zip(CLASSES, cuts[:-1], cuts[1:], strict=True)}


def difficulty_table(bench: Bench, world: str) -> Table:
    """Accuracy by third of difficulty and ratio."""
    classes = difficulty_classes(bench, world)
    rows = []
    for name, problems in classes.items():
        base = percent(shares(bench[world].base_test(), problems).mean())
        cells = [percent(shares(bench[world].last_test(arm), problems).mean()) for arm in ARMS]
        rows.append((name, _preferred(name), str(len(problems)), base, *cells))
    columns = ("class", "paper: best ratio", "problems", "base", *(f"{ratio:g}" for ratio in RATIOS.values()))
    return Table(f"{world}: Average@k in % by the base model's pass rate and the fixed ratio", columns, tuple(rows))


def level_table(bench: Bench, world: str) -> Table:
    """Accuracy by the world's own level (clauses), or by benchmark, and ratio."""
    base = bench[world].base_test()
    levels = sorted(base[0]["by_difficulty"], key=natural)
    rows = []
    for level in levels:
        tested = [base, *(bench[world].last_test(arm) for arm in ARMS)]
        values = [fmean(row["by_difficulty"][level]["average"]["value"] for row in some) for some in tested]
        rows.append((level, str(base[0]["by_difficulty"][level]["problems"]), *map(percent, values)))
    of_benchmarks = bool(benchmarks_of(bench[world]))
    level, by = ("benchmark", "benchmark") if of_benchmarks else ("clauses", "number of clauses")
    columns = (level, "problems", "base", *(f"{ratio:g}" for ratio in RATIOS.values()))
    return Table(f"{world}: Average@k in % by {by} and the fixed ratio", columns, tuple(rows))


def _preferred(name: str) -> str:
    return str(printed("fixed_sweep", f"{name}_prefers"))


def _accuracy_claims(bench: Bench) -> list[Claim]:
    """An interior ratio beats full exposure: in each world the best interior one, picked on validation."""
    paper = printed("exposure_ablation_aime24")
    gap = f"{paper['best_fixed_0.5'] - paper['full']:+.2f}"
    inside = {arm: ratio for arm, ratio in RATIOS.items() if 0 < ratio < 1}
    words = "a fixed ratio inside (0, 1) beats full exposure (2A)"
    return [ends_above(arms, arms.best_fixed(inside), "full", words, "paper", gap) for arms in bench.values()]


def mismatch_claims(bench: Bench) -> list[Claim]:
    """The mean KL per token rises from each ratio to the next: at the first and at the last logged update."""
    claims = []
    for world in bench:
        updates = logged_updates(bench, world)
        for when, update in (("at the start", updates[0]), ("late in training", updates[-1])):
            text = f"{world}: the mean KL per token rises with the ratio, {when} (2B)"
            claims.append(Claim(text, "paper", str(printed("fixed_sweep", "mismatch")), _steps(bench, world, update)))
    return claims


def _steps(bench: Bench, world: str, update: int) -> tuple[Contrast, ...]:
    """The rise of the mean KL from each ratio to the next, over seeds."""
    means = {arm: [fmean(token_kl(run, update)) for run in bench[world].runs(arm)] for arm in ARMS}
    return tuple(
        over_seeds(
            f"{RATIOS[low]:g} to {RATIOS[high]:g}",
            [b - a for a, b in zip(means[low], means[high], strict=True)],
            "nats per token",
        )
        for low, high in pairwise(ARMS)
    )


def _difficulty_claims(bench: Bench, world: str) -> list[Claim]:
    """Each third of the problems does best at the ratio that the paper names: against every other ratio."""
    named = {"1.0": "full", "0.5": "fixed-0.5", "lowest": "fixed-0"}
    claims = []
    for name, problems in difficulty_classes(bench, world).items():
        best = named[_preferred(name)]
        contrasts = tuple(bench[world].difference(arm, best, problems) for arm in ARMS if arm != best)
        text = f"{world}: {name} problems do best at the ratio {_preferred(name)} (2C)"
        claims.append(Claim(text, "paper", _preferred(name), contrasts))
    return claims


@styled
def _draw_accuracy(bench: Bench) -> Figure:
    figure, (axes,) = panels(1, width=5.6, height=3.8)
    for index, world in enumerate(bench):
        by_seed = np.array([[100 * value for value in bench[world].accuracies(arm)] for arm in ARMS]).T
        draw_seeds(axes, list(RATIOS.values()), by_seed.tolist(), index, world)
    axes.set(title="Accuracy by fixed ratio", xlabel="reveal ratio", ylabel="Average@k on test, %")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@styled
def _draw_mismatch(bench: Bench, world: str) -> Figure:
    figure, (early, late, disagreement) = panels(3, width=4.0)
    updates = logged_updates(bench, world)
    for axes, update, when in ((early, updates[0], "start"), (late, updates[-1], f"update {updates[-1]}")):
        for index, (name, measure) in enumerate(MEASURES.items()):
            by_seed = [
                [measure(mismatch(token_kl(bench[world].runs(arm)[seed], update))) for arm in ARMS]
                for seed in range(len(bench[world].seeds))
            ]
            draw_seeds(axes, list(RATIOS.values()), by_seed, index, name)
        log_axis(axes)
        axes.set(title=f"KL per token, {when}", xlabel="reveal ratio", ylabel="nats")
    figure.legend(*early.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    for index, (arm, ratio) in enumerate(RATIOS.items()):
        series = [run.series("top1_disagreement") for run in bench[world].runs(arm)]
        shared, each = at_common_updates(f"{world}, {arm}: top-1 disagreement", series)
        smooth = 100 * np.mean(each, axis=0)
        width = max(1, len(smooth) // 10)
        kernel = np.convolve(smooth, np.ones(width) / width, mode="valid")
        disagreement.plot(
            shared[width - 1 :], kernel, label=f"ratio {ratio:g}", color=colour(index), linestyle=dash(index)
        )
    disagreement.set(title="Top-1 disagreement", xlabel=f"update (mean of {width})", ylabel="% of tokens")
    figure.legend(*disagreement.get_legend_handles_labels(), loc="outside lower right", ncols=5, columnspacing=1)
    return figure


@styled
def _draw_difficulty(bench: Bench, world: str) -> Figure:
    figure, (axes,) = panels(1, width=5.6, height=3.8)
    for index, (name, problems) in enumerate(difficulty_classes(bench, world).items()):
        by_seed = np.array([100 * shares(bench[world].last_test(arm), problems).mean(axis=1) for arm in ARMS]).T
        draw_seeds(axes, list(RATIOS.values()), by_seed.tolist(), index, f"{name} (paper: {_preferred(name)})")
    axes.set(title=f"{world}: by the base model's pass rate", xlabel="reveal ratio", ylabel="Average@k on test, %")
    axes.legend()
    return figure
