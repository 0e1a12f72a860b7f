"""Hinted rollouts: the student writes them with part of the reference in its prompt, where it is seldom right alone.

How much it is shown follows from how often it then succeeds; `aligned/direction.py` and `train/reveal.py` say what
becomes of what it wrote.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import cast, final

from atesd.config import Config
from atesd.errors import DataError
from atesd.records import Problem
from atesd.rows import HintedRow
from atesd.train.rollouts import GradedRollout

START = 0.5
GAIN = 0.25


@final
class HintRatio:
    """The reveal ratio of the hinted rollouts, moved so that `hinted.target_success` of them are right."""

    def __init__(self, config: Config) -> None:
        self._config = config.hinted
        self._ratio = START

    @property
    def ratio(self) -> float | None:
        """That of the next update; None where nothing is hinted."""
        return self._ratio if self._config.rollouts else None

    def observe(self, rollouts: Sequence[GradedRollout]) -> HintedRow | None:
        """Move on from the verdicts of an update: ratio + 0.25 (target - success), within [0, 1].

        `success` is the verified share of its hinted rollouts. Returns what is logged of them, None without any.
        """
        hinted = [graded for graded in rollouts if graded.hint is not None]
        if not hinted:
            return None
        success = statistics.fmean(graded.verdict == "correct" for graded in hinted)
        row: HintedRow = {
            "rollouts": len(hinted),
            "reveal_ratio": self._ratio,
            "effective_ratio": statistics.fmean(g.hint.view.effective_ratio for g in hinted if g.hint is not None),
            "accuracy": success,
        }
        self._ratio = min(1.0, max(0.0, self._ratio + GAIN * (self._config.target_success - success)))
        return row

    def state_dict(self) -> dict[str, object]:
        """The ratio, where there is one."""
        return {"ratio": self._ratio} if self._config.rollouts else {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore `state_dict`."""
        self._ratio = cast(float, state.get("ratio", START))


def require_references(problems: Sequence[Problem], config: Config) -> None:
    """Raise `DataError` if there are hinted rollouts, and problems of which there is nothing to hint at."""
    bare = [problem.id for problem in problems if not problem.reference]
    if config.hinted.rollouts and bare:
        raise DataError(
            f"hinted.rollouts {config.hinted.rollouts}: {len(bare)} of {len(problems)} training problems have no "
            f"reference to show a part of, the first is '{bare[0]}'; set data.on_missing_reference: skip, or "
            "hinted.rollouts: 0"
        )
