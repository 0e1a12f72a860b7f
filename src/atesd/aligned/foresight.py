"""The first-order look-ahead as the loop knows it: `atesd.train.foresight.Foresight`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

from atesd.aligned.scorer import AlignmentScorer, grouped
from atesd.config import Config
from atesd.control.aligned import LooksAhead
from atesd.control.interface import Exposure
from atesd.errors import NonFiniteError
from atesd.records import Alignment, Problem
from atesd.train.reveal import group_of
from atesd.train.rollouts import GradedRollout
from atesd.train.update import Candidate
from atesd.train.views import TeacherPrompts


@final
class AlignedForesight:
    """Renews the success direction at every hold, and tells an exposure that asks what each ratio would do."""

    def __init__(self, scorer: AlignmentScorer, prompts: TeacherPrompts, config: Config) -> None:
        self.scorer = scorer
        self._prompts, self._config = prompts, config

    def before(self, update: int) -> None:
        """At the first update of a hold, make its direction from the rollouts of the last one."""
        if self._config.credit.hold(update)[0] == update:
            self.scorer.direction.renew(update)

    def look(self, update: int, rollouts: Sequence[GradedRollout], exposure: Exposure) -> Alignment | None:
        """Tell an exposure that asks for it what every ratio would do; returns the alignment of all rollouts together.

        None where it was not asked for, or where success has no direction yet, which the exposure is told by no
        groups. Raises `NonFiniteError` that names the problem, before the exposure could remember such numbers.
        """
        if not isinstance(exposure, LooksAhead) or "alignment" not in exposure.measurements(update):
            return None
        if not self.scorer.direction.known:
            exposure.look_ahead(update, {})
            return None
        ratios = self.scorer.ratios
        contexts = [[self._prompts.view(graded.problem, ratio).context for graded in rollouts] for ratio in ratios]
        rows = self.scorer.by_ratio([graded.pair for graded in rollouts], contexts)
        for graded, values in zip(rollouts, rows, strict=True):
            if not all(map(math.isfinite, values)):
                raise NonFiniteError(f"the look-ahead gives numbers that are not finite on {graded.problem.id}")
        exposure.look_ahead(
            update, grouped(ratios, rows, [group_of(graded.problem, self._config) for graded in rollouts])
        )
        return grouped(ratios, rows, [""] * len(rows))[""]

    def candidates(self, problem: Problem) -> tuple[Candidate, ...]:
        """The teacher's contexts at the ratios among which a token chooses; none while success has no direction."""
        if self._config.granularity != "per_token" or not self.scorer.direction.known:
            return ()
        prompts = [(ratio, self._prompts.view(problem, ratio)) for ratio in self.scorer.ratios]
        return tuple(Candidate(prompt.context, ratio, prompt.view.effective_ratio) for ratio, prompt in prompts)

    def after(self, rollouts: Sequence[GradedRollout]) -> None:
        """Remember the rollouts for the next direction."""
        self.scorer.direction.remember(rollouts)

    def state_dict(self) -> dict[str, object]:
        """The direction's state."""
        return self.scorer.direction.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore `state_dict`."""
        self.scorer.direction.load_state_dict(state)
