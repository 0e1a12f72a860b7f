"""Table 1: the base model, SFT, GRPO, OPSD (full exposure) and ATESD; on the paper's benchmarks, one by one too."""

from __future__ import annotations

from statistics import fmean

from atesd.rows import EvaluationRow
from atesd.table import Table
from atesd.text import MISSING, number, percent
from atesd_lab.paper.bench import Bench, Findings, benchmarks_of, main_world, paper_model
from atesd_lab.paper.claims import Claim, ends_above
from atesd_lab.paper.drawing import accuracy_dots
from atesd_lab.paper.numbers import printed
from atesd_lab.report.arms import Arms

ROWS = {"base": "base", "sft": "sft", "grpo": "grpo", "full": "opsd", "paper": "atesd", "sound": "atesd"}
ARMS = ("sft", "grpo", "full", "paper", "sound", "shuffled")
"""`shuffled`, OPSD with another problem's reference, where a scale has it."""
COLUMNS = {"aime24": 0, "aime25": 1, "hmmt-feb25": 2}
"""Where the paper's table has a benchmark."""


def report(bench: Bench) -> Findings:
    """A table per world, a figure, and table 1's order of the methods as claims."""
    model = paper_model(bench)
    averages = {arm: float(printed("main", model, row)[3]) for arm, row in ROWS.items()}
    column = {arm: number(value, 4) for arm, value in averages.items()}
    claims = [claim for arms in bench.values() for claim in _claims(arms, averages)]
    names = benchmarks_of(bench[main_world(bench)])
    on_benchmarks, on_its_own = bool(names), set(names) in (set(), set(COLUMNS))
    return Findings(
        "The methods: table 1 of the paper",
        (
            *(bench[world].table(_arms(bench[world]), "full", column) for world in bench),
            *(benchmark_table(arms, model) for arms in bench.values() if on_benchmarks),
        ),
        {"accuracy": accuracy_dots(bench, list(bench), ARMS, averages if on_benchmarks and on_its_own else {})},
        tuple(claims),
        (
            f"Paper: average of three benchmarks, {model}, Average@12. full: OPSD. "
            "paper and sound: ATESD with either reward.",
            "shuffled: OPSD whose teacher sees another problem's reference."
            if on_benchmarks
            else "SFT has only one valid path to learn in these worlds, the reference: it is at an advantage here.",
        ),
    )


def benchmark_table(arms: Arms, model: str) -> Table:
    """Ours beside the paper's on each benchmark: means over seeds, after the last update."""
    names = benchmarks_of(arms)
    rows = [_row("base", arms.base_test(), names, model)]
    rows += [_row(arm, arms.last_test(arm), names, model) for arm in _arms(arms)]
    columns = [column for name in names for column in (f"{name}, paper", name)]
    k = arms.base_test()[0]["samples"]
    return Table(
        f"{arms.name}: Average@{k} in % on each benchmark",
        ("arm", *columns, "average, paper", "average", "truncated, %"),
        tuple(rows),
        (
            f"Paper: {model}, Average@12; its baselines are each at the best checkpoint of each benchmark, ours after "
            "the last update.",
        ),
    )


def _row(arm: str, tested: list[EvaluationRow], names: tuple[str, ...], model: str) -> tuple[str, ...]:
    paper = printed("main", model, ROWS[arm]) if arm in ROWS else None
    cells = [arm]
    for name in names:
        cells.append(number(paper[COLUMNS[name]], 4) if paper and name in COLUMNS else MISSING)
        cells.append(percent(fmean(row["by_difficulty"][name]["average"]["value"] for row in tested)))
    whole = set(names) == set(COLUMNS)
    cells.append(number(paper[3], 4) if paper and whole else MISSING)
    cells.append(percent(fmean(row["average"]["value"] for row in tested)))
    return (*cells, percent(fmean(row["truncated_share"] for row in tested)))


def _arms(arms: Arms) -> list[str]:
    return [arm for arm in ARMS if arm in arms.groups]


def _claims(arms: Arms, averages: dict[str, float]) -> list[Claim]:
    orders = [("full", "paper"), ("full", "sound"), ("grpo", "full"), ("sft", "full")]
    names = {
        **{arm: arm.upper() for arm in ("sft", "grpo")},
        "full": "OPSD",
        "paper": "ATESD (paper)",
        "sound": "ATESD (sound)",
    }
    claims = [
        ends_above(
            arms,
            better,
            worse,
            f"{names[better]} ends above {names[worse]}",
            "paper",
            f"{averages[better] - averages[worse]:+.2f}",
        )
        for worse, better in orders
    ]
    printed_gain = f"{averages['full'] - averages['base']:+.2f}"
    claims.append(Claim(f"{arms.name}: OPSD ends above the base model", "paper", printed_gain, (arms.gain("full"),)))
    if "shuffled" in arms.groups:
        claims += [
            ends_above(arms, arm, "shuffled", f"{names[arm]} ends above OPSD with another problem's reference")
            for arm in ("full", "paper", "sound")
        ]
    return claims
