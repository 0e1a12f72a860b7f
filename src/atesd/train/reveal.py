"""The paper's idea in one place: the exposure's ratio decides what the teacher sees of each rollout's problem.

The ratio is chosen where the exposure is asked for it: `control.learned.LearnedExposure.reveal_ratio` under ATESD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atesd.config import Config
from atesd.control.interface import Exposure
from atesd.control.settings import group_of as control_group
from atesd.maths.advantages import difficulty_advantages, group_advantages
from atesd.records import Alignment, Problem, View
from atesd.train.foresight import Foresight
from atesd.train.rollouts import GradedRollout
from atesd.train.update import Example
from atesd.train.views import TeacherPrompts


@dataclass(frozen=True, slots=True)
class Revealed:
    """A graded rollout, the ratio asked for, the view that the teacher has, and the example made of them."""

    graded: GradedRollout
    reveal_ratio: float
    view: View
    example: Example


@dataclass(frozen=True, slots=True)
class Batch:
    """The rollouts of one update with what the teacher sees of each, and what was foreseen of them.

    `aside` are the hinted ones of a distilled batch, which no loss reads.
    """

    rows: tuple[Revealed, ...]
    alignment: Alignment | None = None
    aside: tuple[GradedRollout, ...] = ()

    @property
    def examples(self) -> list[Example]:
        """What the step is taken on."""
        return [row.example for row in self.rows]


def reveal(
    rollouts: Sequence[GradedRollout],
    exposure: Exposure,
    update: int,
    *,
    prompts: TeacherPrompts,
    foresight: Foresight,
    config: Config,
) -> tuple[Revealed, ...]:
    """Ask the exposure for the ratio of each rollout, and write the teacher's context at that ratio."""
    ratios = [exposure.reveal_ratio(update, group_of(graded.problem, config)) for graded in rollouts]
    outcomes = outcome_advantages(rollouts, config)
    weights = likelihood_weights(outcomes, config)
    rows = []
    for graded, ratio, likelihood_weight, outcome in zip(rollouts, ratios, weights, outcomes, strict=True):
        prompt = prompts.view(graded.problem, ratio)
        context, completion = graded.unhinted_pair if config.hinted.prompt == "student" else graded.pair
        example = Example(
            context,
            completion,
            prompt.context,
            likelihood_weight,
            key=(update, graded.rollout.problem_id, graded.rollout.sample),
            correct=graded.verdict == "correct",
            candidates=foresight.candidates(graded.problem),
            outcome=outcome,
        )
        rows.append(Revealed(graded, ratio, prompt.view, example))
    return tuple(rows)


def outcome_advantages(rollouts: Sequence[GradedRollout], config: Config) -> list[float]:
    """Each rollout's verdict less its baseline (`train.baseline`); 0 where nothing reads it."""
    if not config.reads_advantages:
        return [0.0] * len(rollouts)
    verified = [float(graded.verdict == "correct") for graded in rollouts]
    if config.centres_by_difficulty:
        return difficulty_advantages(verified, [graded.problem.difficulty for graded in rollouts])
    return group_advantages(verified, config.train.group_size)


def likelihood_weights(outcomes: Sequence[float], config: Config) -> list[float]:
    """What the log-likelihood of each rollout is weighted by: 0 in plain distillation, 1 in SFT, or its advantage."""
    train = config.train
    if train.method == "sft":
        return [1.0] * len(outcomes)
    if not train.has_policy_gradient:
        return [0.0] * len(outcomes)
    weight = 1.0 if train.method == "grpo" else train.grpo_weight
    return [weight * outcome for outcome in outcomes]


def group_of(problem: Problem, config: Config) -> str:
    """Which rollouts share a ratio of the exposure: all, those of a difficulty, or those of a problem."""
    return control_group(config.granularity, problem.id, problem.difficulty)
