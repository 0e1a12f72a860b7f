"""What in the reference helps: full exposure beside none, another's, a wrong answer, filler, the answer only."""

from __future__ import annotations

from atesd_lab.paper.bench import Bench, Findings
from atesd_lab.paper.claims import Claim, ends_above
from atesd_lab.paper.drawing import accuracy_dots

CONTROLS = {
    "no-reference": "no reference at all",
    "shuffled": "another problem's reference",
    "wrong-answer": "a wrong answer at the end",
    "filler": "filler of equal length",
    "fixed-0": "the answer only",
}


def report(bench: Bench) -> Findings:
    """A table per world against full exposure, a figure, and for each control what the true reference adds to it."""
    arms = ["full", *CONTROLS]
    claims = [
        ends_above(arms_of_world, "full", arm, f"full exposure ends above {words}")
        for arms_of_world in bench.values()
        for arm, words in CONTROLS.items()
    ]
    claims += [
        Claim(f"{world}: training with {words} gains over the base model", "ours", "-", (bench[world].gain(arm),))
        for world in bench
        for arm, words in CONTROLS.items()
    ]
    return Findings(
        "What in the reference helps",
        tuple(bench[world].table(arms, "full") for world in bench),
        {"accuracy": accuracy_dots(bench, list(bench), arms)},
        tuple(claims),
        (
            "The paper has no such controls. fixed-0: the teacher sees the answer and no segment.",
            "Views of the embedded worlds have one length, and their filler word stands wherever nothing is shown: no "
            "reference and filler are the same view there, that of the student, and train nothing.",
        ),
    )
