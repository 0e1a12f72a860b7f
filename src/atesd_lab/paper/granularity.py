"""The paper's stated limit, one ratio per update, beside one per difficulty and one per problem."""

from __future__ import annotations

from atesd_lab.paper.bench import Bench, Findings
from atesd_lab.paper.claims import ends_above
from atesd_lab.paper.drawing import accuracy_dots

ARMS = ("sound", "per-difficulty", "per-problem")


def report(bench: Bench) -> Findings:
    """One table against a ratio per update, one figure, two claims."""
    (world,) = bench
    claims = tuple(ends_above(bench[world], arm, "sound", f"{arm} ends above one ratio per update") for arm in ARMS[1:])
    return Findings(
        "One ratio per update, per difficulty, per problem",
        (bench[world].table(ARMS, "sound"),),
        {"accuracy": accuracy_dots(bench, [world], ARMS)},
        claims,
        ("The paper names the single ratio per update as a limit and measures nothing finer. sound: one per update.",),
    )
