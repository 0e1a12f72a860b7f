"""A claim, what speaks for or against it, and the verdict by rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atesd_lab.report.arms import Arms
from atesd_lab.stats.contrast import Contrast

Verdict = Literal["agrees", "disagrees", "not distinguishable"]
Origin = Literal["paper", "ours"]


@dataclass(frozen=True, slots=True)
class Claim:
    """What is claimed, by whom, which number the paper prints for it ("-": none), and what was measured here.

    The claim says that every contrast is above 0.
    """

    text: str
    origin: Origin
    printed: str
    contrasts: tuple[Contrast, ...]

    @property
    def verdict(self) -> Verdict:
        """agrees: every interval is above 0. disagrees: one is below 0. Otherwise not distinguishable.

        A claim is about methods: an interval over the problems of one seed is for none and against none.
        """
        found = [one.verdict if one.covers_seeds else "not distinguishable" for one in self.contrasts]
        if "below" in found:
            return "disagrees"
        return "agrees" if set(found) == {"above"} else "not distinguishable"


def ends_above(arms: Arms, better: str, worse: str, words: str, origin: Origin = "ours", printed: str = "-") -> Claim:
    """The claim, in words after the world's name, that one arm ends above another on test after the last update."""
    return Claim(f"{arms.name}: {words}", origin, printed, (arms.difference(worse, better),))
