"""Ablation 1: how a decision is rewarded. Each step of the paper's ladder is a setting of `credit`."""

from __future__ import annotations

from itertools import pairwise

from atesd.text import number
from atesd_lab.paper.bench import Bench, Findings
from atesd_lab.paper.claims import ends_above
from atesd_lab.paper.drawing import accuracy_dots
from atesd_lab.paper.numbers import printed

STEPS = {
    "one-step": "one_step",
    "short-delay": "short_delay",
    "look-ahead": "discounted_lookahead",
    "paper": "with_grounding",
}


def report(bench: Bench) -> Findings:
    """One table, one figure, and each step of the ladder as a claim."""
    (world,) = bench
    values = {arm: float(printed("credit_ablation_aime24", key)) for arm, key in STEPS.items()}
    claims = tuple(
        ends_above(
            bench[world],
            better,
            worse,
            f"{better} ends above {worse}",
            "paper",
            f"{values[better] - values[worse]:+.2f}",
        )
        for worse, better in pairwise(STEPS)
    )
    column = {arm: number(value, 4) for arm, value in values.items()}
    return Findings(
        "How a decision is rewarded: ablation 1",
        (bench[world].table(list(STEPS), "one-step", column),),
        {"accuracy": accuracy_dots(bench, [world], list(STEPS))},
        claims,
        (
            "All with the paper's reward (falls of the training KL), hold 4. one-step: window of 1 update; "
            "short-delay: 2, not discounted; look-ahead: 4, discount 0.9; paper: and grounding with weight 0.1. "
            "The paper does not define the first two; these are ours. Paper: AIME 2024, Qwen3-1.7B.",
        ),
    )
