"""The middle rung: every kind of exposure, the gates and the baselines on word problems that nobody here wrote.

Each question of the bench is a claim: does exposure matter, is a part better than the whole, do the rules find the
best ratio, does the gate beat it, has the reference to be the problem's own.
"""

from __future__ import annotations

from collections.abc import Iterator

from atesd_lab.paper.aligned_measure import fixed_ratios
from atesd_lab.paper.bench import Bench, Findings
from atesd_lab.paper.claims import Claim, ends_above
from atesd_lab.paper.drawing import accuracy_dots, contrast_bars
from atesd_lab.paper.rules_results import NOTES, measure_arms, world_table
from atesd_lab.report.arms import Arms

RULES = {
    "learned": "the Beta policy with the paper's reward, rewarded every update",
    "success-setpoint": "a success set-point",
    "aligned": "the look-ahead",
}
NAMES = {**RULES, "gate": "the token gate"}
BAND_SEEDS = 8


def report(bench: Bench) -> Findings:
    """Per world a table with the columns of every experiment and one of what each rule found; the claims; figures."""
    ratios = {world: fixed_ratios(arms.groups, "full") for world, arms in bench.items()}
    best = {world: arms.best_fixed(ratios[world]) for world, arms in bench.items()}
    from_best = [
        arms.difference(best[world], arm) for world, arms in bench.items() for arm in arms.groups if arm != best[world]
    ]
    tables = [
        table
        for world, arms in bench.items()
        for table in (arms.table(list(arms.groups), best[world]), world_table(measure_arms(arms, "full", BAND_SEEDS)))
    ]
    return Findings(
        "The middle rung: word problems",
        tuple(tables),
        {
            "accuracy": accuracy_dots(bench, list(bench), list(next(iter(bench.values())).groups)),
            "regret": contrast_bars("Against the best fixed ratio, which needed a sweep", from_best),
        },
        tuple(claim for world, arms in bench.items() for claim in _claims(arms, best[world], ratios[world])),
        NOTES,
    )


def _claims(arms: Arms, best: str, ratios: dict[str, float]) -> Iterator[Claim]:
    """The questions, in their order."""
    partial = arms.best_fixed({arm: ratio for arm, ratio in ratios.items() if 0 < ratio < 1})
    yield ends_above(arms, "full", "fixed-0", "full exposure ends above the answer alone: exposure matters")
    yield ends_above(
        arms, partial, "full", f"the best part ({ratios[partial]:g}) ends above full exposure: the optimum is interior"
    )
    yield ends_above(arms, "full", "shuffled", "full exposure ends above another problem's reference")
    for arm, words in NAMES.items():
        for rival, name in ((best, f"the best fixed ratio ({ratios[best]:g})"), ("random", "random exposure")):
            yield ends_above(arms, arm, rival, f"{words} ends above {name}")
    yield ends_above(arms, "gate", "gate-shuffled", "the token gate ends above its null control, shuffled verdicts")
    for arm, words in {"full": "full exposure", **NAMES}.items():
        yield ends_above(arms, arm, "grpo", f"{words} ends above GRPO")
    for arm in arms.groups:
        yield Claim(f"{arms.name}: training with {arm} gains over the base model", "ours", "-", (arms.gain(arm),))
