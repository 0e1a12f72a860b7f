"""What the student writes in an update: which problems, the completions, the verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import final

import numpy as np
from numpy.typing import NDArray

from atesd.config import Config
from atesd.data.answers import Checker
from atesd.data.own_checker import pairs_of
from atesd.data.views import Renderer
from atesd.engine.interface import Engine, Request, SamplingParams
from atesd.maths.keyed import generator
from atesd.models.prompts import PromptEncoder
from atesd.models.score import Pair
from atesd.records import Problem, Rollout, Verdict, View
from atesd.train.views import TeacherPrompts


@dataclass(frozen=True, slots=True)
class Hint:
    """What the writer of a hinted rollout read of its problem, and the context of the problem alone."""

    view: View
    unhinted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GradedRollout:
    """A problem, what the student wrote, and the verdict on it; None where nothing was checked."""

    problem: Problem
    rollout: Rollout
    verdict: Verdict | None
    hint: Hint | None = None

    @property
    def pair(self) -> Pair:
        """The rollout as its writer read it: context and completion."""
        return self.rollout.prompt_ids, self.rollout.completion_ids

    @property
    def unhinted_pair(self) -> Pair:
        """The problem alone and the completion: `pair`, but of a hinted rollout."""
        return self.hint.unhinted if self.hint else self.rollout.prompt_ids, self.rollout.completion_ids


@final
class RolloutSampler:
    """Draws the problems of an update, has the student answer them, and has the answers checked.

    Problems and draws are functions of the seed and the update alone.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        config: Config,
        *,
        engine: Engine,
        encoder: PromptEncoder,
        renderer: Renderer,
        prompts: TeacherPrompts,
        checker: Checker | None,
    ) -> None:
        self._problems, self._config, self._prompts = problems, config, prompts
        self._engine, self._encoder, self._renderer, self._checker = engine, encoder, renderer, checker

    def rollouts(self, update: int, hint_ratio: float | None = None) -> list[GradedRollout]:
        """The graded rollouts of an update. SFT takes the references as completions, and nothing is checked there.

        With a `hint_ratio`, those of `hinted_places` are written under a view of that ratio.
        """
        problems, numbers = self.batch(update)
        if self._config.train.method == "sft":
            return [GradedRollout(problem, self._reference(problem), None) for problem in problems]
        requests = self.requests(problems, numbers, [update] * len(problems))
        hints = self._hints(problems, requests, hint_ratio)
        asked = [replace(r, prompt_ids=hints[i][1]) if i in hints else r for i, r in enumerate(requests)]
        rollouts = self._engine.complete(asked, rollout_params(self._config))
        graded = self.graded(problems, rollouts)
        return [replace(one, hint=hints[i][0]) if i in hints else one for i, one in enumerate(graded)]

    @property
    def drift(self) -> float | None:
        """That of the engine in the last `rollouts` (see `Engine`); None for SFT, whose completions nobody wrote."""
        return None if self._config.train.method == "sft" else self._engine.drift

    def batch(self, update: int) -> tuple[list[Problem], list[int]]:
        """The problems of an update, one per rollout, and the number of each rollout among those of its problem."""
        return batch_at(self._problems, self._config, update)

    def requests(self, problems: Sequence[Problem], numbers: Sequence[int], updates: Sequence[int]) -> list[Request]:
        """What the engine needs for each rollout; its draws belong to (seed, update, problem, number)."""
        prompts = self._encoder.students([self._renderer.student(problem) for problem in problems])
        seed = self._config.train.seed
        return [
            Request(problem.id, number, prompt, (seed, "rollout", update, problem.id, number))
            for problem, number, update, prompt in zip(problems, numbers, updates, prompts, strict=True)
        ]

    def graded(self, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> list[GradedRollout]:
        """The rollouts with their verdicts; None where there is no checker."""
        verdicts: Sequence[Verdict | None] = [None] * len(rollouts)
        if self._checker is not None:
            texts = [self._encoder.decode(rollout.completion_ids) for rollout in rollouts]
            verdicts = self._checker.check(pairs_of(problems, texts))
        return [GradedRollout(*row) for row in zip(problems, rollouts, verdicts, strict=True)]

    def _hints(
        self, problems: Sequence[Problem], requests: Sequence[Request], ratio: float | None
    ) -> dict[int, tuple[Hint, tuple[int, ...]]]:
        """By its place: the hint of a rollout, and the context with it."""
        if ratio is None:
            return {}
        places = hinted_places(self._config)
        prompts = {place: self._prompts.hint(problems[place], ratio) for place in places}
        return {i: (Hint(prompt.view, requests[i].prompt_ids), prompt.context) for i, prompt in prompts.items()}

    def _reference(self, problem: Problem) -> Rollout:
        """The reference as if the student had written it."""
        prompt = self._encoder.student(self._renderer.student(problem))
        completion = self._encoder.completion(problem.reference)
        return Rollout(problem.id, 0, prompt, completion, (0.0,) * len(completion), truncated=False)


def hinted_places(config: Config) -> list[int]:
    """Which rollouts of an update are hinted: the last of the batch; with GRPO the last of each group, equally many."""
    train = config.train
    size = train.group_size if train.method == "grpo" else train.batch_size
    hinted = config.hinted.rollouts * size // train.batch_size
    return [place for place in range(train.batch_size) if place % size >= size - hinted]


def batch_at(problems: Sequence[Problem], config: Config, update: int) -> tuple[list[Problem], list[int]]:
    """The problems of an update and the sample number of each row: a function of the seed and the update alone.

    Epochs are keyed permutations laid end to end; with GRPO each problem comes `group_size` times. The sample number
    counts a problem's rows in the batch, so that one met twice, where epochs meet or are short, is answered afresh.
    """
    train = config.train
    repeats = train.samples_per_problem
    count = train.batch_size // repeats
    chosen = []
    for position in range(update * count, (update + 1) * count):
        epoch, place = divmod(position, len(problems))
        chosen.append(problems[_order(train.seed, epoch, len(problems))[place]])
    rows = [problem for problem in chosen for _ in range(repeats)]
    met: Counter[str] = Counter()
    numbers = []
    for problem in rows:
        numbers.append(met[problem.id])
        met[problem.id] += 1
    return rows, numbers


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return generator(seed, "order", epoch).permutation(count)


def rollout_params(config: Config) -> SamplingParams:
    """How rollouts are drawn in training."""
    s = config.sampling
    return SamplingParams(s.temperature, s.top_p, s.top_k, s.min_p, s.completion_tokens)
