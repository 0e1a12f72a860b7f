"""The Beta policy beside a bandit, the aligned exposure, a set-point, a search, schedules: same updates, same log."""

from __future__ import annotations

from atesd_lab.paper.bench import Bench, Findings, best_fixed
from atesd_lab.paper.claims import ends_above
from atesd_lab.paper.drawing import accuracy_dots, contrast_bars

CONTROLLERS = ("sound", "bandit", "aligned", "setpoint", "search", "linear-up", "linear-down", "random", "full")


def report(bench: Bench) -> Findings:
    """One table against the best fixed ratio, and what each controller adds to full exposure and to random ratios."""
    (world,) = bench
    best = best_fixed(bench[world])
    arms = [best, *(arm for arm in CONTROLLERS if arm != best)]
    others = [arm for arm in arms if arm not in ("random", "full", best)]
    claims = [
        ends_above(bench[world], arm, rival, f"{arm} ends above {rival} exposure")
        for arm in others
        for rival in ("full", "random")
    ]
    claims += [
        ends_above(bench[world], arm, "sound", f"{arm} ends above the Beta policy") for arm in others if arm != "sound"
    ]
    from_best = [bench[world].difference(best, arm) for arm in arms if arm != best]
    return Findings(
        "Controllers on one bench",
        (bench[world].table(arms, best),),
        {
            "accuracy": accuracy_dots(bench, [world], arms),
            "regret": contrast_bars("Against the best fixed ratio, which needed a sweep", from_best),
        },
        tuple(claims),
        ("All have the same number of updates and rollouts. search: a staircase per problem.",),
    )
