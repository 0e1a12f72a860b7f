"""The controller's probes as one object: fixed problems, keyed draws, and the rollouts that some of them keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypedDict, cast, final

import torch

from atesd.control.interface import Measurement
from atesd.data.answers import Checker
from atesd.data.views import Renderer
from atesd.engine.interface import Engine, SamplingParams
from atesd.errors import ConfigError
from atesd.evaluate.probes import Answered, graded, probe_nll, probe_requests, probe_success
from atesd.maths.credit import reweighted_gain
from atesd.maths.divergence import Objective
from atesd.maths.fused import divergence_profile
from atesd.models.prompts import PromptEncoder
from atesd.models.score import Pair, Scored, Scorer, completion_logprobs, completion_tokens
from atesd.models.teacher import Teacher
from atesd.records import Problem
from atesd.train.views import TeacherPrompts


class ProbeState(TypedDict):
    """What a checkpoint holds of the probes; an answer is its fields in order."""

    completions: list[list[int]]
    answered: list[tuple[list[int], list[int], bool, float]]
    gain: float
    gains_measured: int


@final
class ProbeSet:
    """Measures the student on the probe problems: an unchanged student gives exactly the same values again."""

    def __init__(
        self,
        *,
        engine: Engine,
        scorer: Scorer,
        teacher: Teacher,
        problems: Sequence[Problem],
        encoder: PromptEncoder,
        renderer: Renderer,
        checker: Checker | None,
        params: SamplingParams,
        objective: Objective,
        prompts: TeacherPrompts,
        probe_ratio: float,
        seed: int,
        micro_batch_size: int,
    ) -> None:
        self._engine, self._scorer, self._teacher = engine, scorer, teacher
        self._problems, self._encoder, self._renderer = problems, encoder, renderer
        self._checker, self._params, self._objective = checker, params, objective
        self._prompts, self._probe_ratio = prompts, probe_ratio
        self._seed, self._micro_batch_size = seed, micro_batch_size
        self._completions: list[tuple[int, ...]] = []
        self._answered: list[Answered] = []
        self._gain, self._gains_measured = 0.0, 0

    def measure(self, wanted: frozenset[Measurement]) -> dict[str, float]:
        """What is wanted of `probe_nll`, `probe_kl` (nats per token), `probe_success` and `probe_gain` (shares)."""
        measured = {}
        if "probe_nll" in wanted:
            measured["probe_nll"] = self._nll()
        if "probe_success" in wanted:
            measured["probe_success"] = self._success()
        if "probe_gain" in wanted:
            measured["probe_gain"] = self._next_gain()
        if "probe_kl" in wanted:
            measured["probe_kl"] = self._kl()
        return measured

    def state_dict(self) -> dict[str, object]:
        """The stored probe rollouts."""
        return {
            "completions": [list(completion) for completion in self._completions],
            "answered": [[list(a.prompt_ids), list(a.completion_ids), a.correct, a.logprob] for a in self._answered],
            "gain": self._gain,
            "gains_measured": self._gains_measured,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore `state_dict`."""
        kept = cast(ProbeState, state)
        self._completions = [tuple(completion) for completion in kept["completions"]]
        self._answered = [Answered(tuple(p), tuple(c), correct, logprob) for p, c, correct, logprob in kept["answered"]]
        self._gain, self._gains_measured = kept["gain"], kept["gains_measured"]

    def _nll(self) -> float:
        return probe_nll(
            self._scorer,
            self._problems,
            encoder=self._encoder,
            renderer=self._renderer,
            micro_batch_size=self._micro_batch_size,
        )

    def _checker_for(self, signal: Measurement) -> Checker:
        if self._checker is None:
            raise ConfigError(f"credit.progress_signal: {signal} needs a checker; set data.checker or use probe_nll")
        return self._checker

    def _success(self) -> float:
        return probe_success(
            self._engine,
            self._problems,
            encoder=self._encoder,
            renderer=self._renderer,
            checker=self._checker_for("probe_success"),
            params=self._params,
            seed=self._seed,
        )

    def _next_gain(self) -> float:
        """The sum of the gains from each measurement to the next: success now relative to that at the first.

        Each gain is estimated on what the student wrote, with draws of its own, at the measurement before.
        """
        if self._answered:
            now = self._logprobs([(a.prompt_ids, a.completion_ids) for a in self._answered])
            self._gain += reweighted_gain([a.correct for a in self._answered], [a.logprob for a in self._answered], now)
        requests = probe_requests(
            self._problems,
            encoder=self._encoder,
            renderer=self._renderer,
            seed=self._seed,
            key=("gain", self._gains_measured),
        )
        rollouts = self._engine.complete(requests, self._params)
        correct = graded(rollouts, self._problems, encoder=self._encoder, checker=self._checker_for("probe_gain"))
        pairs = [(rollout.prompt_ids, rollout.completion_ids) for rollout in rollouts]
        self._answered = [
            Answered(*pair, c, p) for pair, c, p in zip(pairs, correct, self._logprobs(pairs), strict=True)
        ]
        self._gains_measured += 1
        return self._gain

    def _logprobs(self, pairs: Sequence[Pair]) -> list[float]:
        """Log-probability of each whole completion, nats: to the bit the same as long as the student is."""
        rows = completion_logprobs(
            self._scorer, pairs, temperature=self._params.temperature, micro_batch_size=self._micro_batch_size
        )
        return [float(row.double().sum()) for row in rows]

    def _kl(self) -> float:
        """Mean over stored rollouts of the mean divergence per token from the teacher at its fixed ratio."""
        requests = probe_requests(self._problems, encoder=self._encoder, renderer=self._renderer, seed=self._seed)
        if not self._completions:
            self._completions = [rollout.completion_ids for rollout in self._engine.complete(requests, self._params)]
        contexts = [self._prompts.view(problem, self._probe_ratio).context for problem in self._problems]
        students = [(r.prompt_ids, c) for r, c in zip(requests, self._completions, strict=True)]
        teachers = list(zip(contexts, self._completions, strict=True))
        pairs = list(zip(students, teachers, strict=True))
        means = self._scorer.map_sharded(pairs, self._divergences, exchanges=True)
        return fmean(means)

    @torch.no_grad()
    def _divergences(self, pairs: Sequence[tuple[Pair, Pair]]) -> list[float]:
        """One exchange of weights, however many pairs: the ranks that divide them exchange together."""
        size = self._micro_batch_size
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        with self._teacher.weights():
            head = self._scorer.head()
            teachers = [Scored(self._scorer.hidden([pair for _, pair in batch]), head) for batch in batches]
        students = [[pair for pair, _ in batch] for batch in batches]
        return [mean for sides in zip(students, teachers, strict=True) for mean in self._batch_divergences(*sides)]

    def _batch_divergences(self, students: list[Pair], teacher: Scored) -> list[float]:
        student = self._scorer.scored(students)
        tokens = completion_tokens(students, self._scorer.device)
        sides = student.hidden, student.head, [teacher.hidden], teacher.head
        (meters,) = divergence_profile(self._objective, *sides, tokens)
        rows = torch.split(meters["kl"], [len(completion) for _, completion in students])
        return [float(row.double().mean()) for row in rows]
