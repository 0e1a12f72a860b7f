"""Table 1: the base model, SFT, GRPO, OPSD (full exposure) and ATESD."""

from __future__ import annotations

from atesd.text import number
from atesd_lab.paper.bench import Bench, Findings
from atesd_lab.paper.claims import Claim, ends_above
from atesd_lab.paper.drawing import accuracy_dots
from atesd_lab.paper.numbers import printed
from atesd_lab.report.arms import Arms

ROWS = {"base": "base", "sft": "sft", "grpo": "grpo", "full": "opsd", "paper": "atesd", "sound": "atesd"}
ARMS = ("sft", "grpo", "full", "paper", "sound")
MODEL = "qwen3-1.7b"


def report(bench: Bench) -> Findings:
    """A table per world, a figure, and table 1's order of the methods as claims."""
    averages = {arm: float(printed("main", MODEL, row)[3]) for arm, row in ROWS.items()}
    column = {arm: number(value, 4) for arm, value in averages.items()}
    claims = [claim for arms in bench.values() for claim in _claims(arms, averages)]
    return Findings(
        "The methods: table 1 of the paper",
        tuple(bench[world].table(ARMS, "full", column) for world in bench),
        {"accuracy": accuracy_dots(bench, list(bench), ARMS)},
        tuple(claims),
        (
            f"Paper: average of three benchmarks, {MODEL}, Average@12. full: OPSD. "
            "paper and sound: ATESD with either reward.",
            "SFT has only one valid path to learn in these worlds, the reference: it is at an advantage here.",
        ),
    )


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
    return [
        *claims,
        Claim(f"{arms.name}: OPSD ends above the base model", "paper", printed_gain, (arms.gain("full"),)),
    ]
