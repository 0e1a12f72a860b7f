"""Average@k and pass@k of a student on problems that it was not trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from statistics import fmean
from typing import final, get_args

from atesd.data.answers import Checker
from atesd.data.own_checker import pairs_of
from atesd.data.splits import ProblemSets
from atesd.data.views import Renderer
from atesd.engine.interface import Engine, Request, SamplingParams
from atesd.errors import ConfigError, DataError
from atesd.maths.statistics import average_at_k, bootstrap_interval, is_looping, pass_at_k
from atesd.models.prompts import PromptEncoder
from atesd.records import Graded, Problem, Rollout, Split, Verdict
from atesd.rows import Estimate, EvaluationRow
from atesd.train.components import Grades


def evaluate_problems(
    engine: Engine,
    problems: Sequence[Problem],
    *,
    encoder: PromptEncoder,
    renderer: Renderer,
    checker: Checker | None,
    params: SamplingParams,
    samples: int,
    seed: int,
    split: Split,
    update: int,
    grades: Grades | None = None,
    together: int = 1,
) -> EvaluationRow:
    """Answer every problem `samples` times without a reference and grade it: a row of evaluations.jsonl.

    With `grades` what is known is not done again, and the rest is kept as it comes, some batches of `together` requests
    at a time, so cut that each batch holds what it holds without.

    The draws are keyed by (seed, split, problem, sample) and not by `update`: every evaluation of a run, and of every
    run with this seed, meets the same noise, so that differences between them are paired. `update` counts the updates
    done. Raises `DataError` without problems or without a checker.
    """
    if checker is None:
        raise DataError(
            "evaluation: data.checker none verifies nothing; set data.checker, or train.evaluate_every to 0"
        )
    if not problems:
        raise DataError(f"evaluation of split {split}: no problems; raise data.{split}_size above 0")
    requests = [
        Request(problem.id, number, prompt, (seed, "evaluate", split, problem.id, number))
        for problem, prompt in zip(problems, student_prompts(problems, encoder, renderer), strict=True)
        for number in range(samples)
    ]
    if grades is None:
        graded = grade(engine.complete(requests, params), problems, encoder, checker)
    else:
        graded = _graded_in_parts(engine, requests, problems, encoder, checker, params, samples, grades, together)
    return summarise(graded, split=split, update=update, sampler=params_record(params), seed=seed)


def _graded_in_parts(
    engine: Engine,
    requests: Sequence[Request],
    problems: Sequence[Problem],
    encoder: PromptEncoder,
    checker: Checker,
    params: SamplingParams,
    samples: int,
    grades: Grades,
    together: int,
) -> list[Graded]:
    """The grades of all requests, in order. Parts are whole problems, by length, and the same whatever is known."""
    known = grades.known()
    done = len(known)
    ordered = sorted(requests, key=lambda request: len(request.prompt_ids))
    size = math.lcm(samples, together)
    for part in (ordered[start : start + size] for start in range(0, len(ordered), size)):
        if all(request.problem_id in known for request in part):
            continue
        new = {request.problem_id for request in part} - known.keys()
        graded = [
            one for one in grade(engine.complete(part, params), problems, encoder, checker) if one.problem_id in new
        ]
        for one in graded:
            known.setdefault(one.problem_id, []).append(one)
        done += len(new)
        grades.keep(graded, done, len(problems))
    return [one for problem in problems for one in sorted(known[problem.id], key=lambda one: one.sample)]


@final
class SplitEvaluation:
    """Scores the student on the held-out splits of a run."""

    def __init__(
        self,
        problems: ProblemSets,
        *,
        engine: Engine,
        encoder: PromptEncoder,
        renderer: Renderer,
        checker: Checker | None,
        params: SamplingParams,
        samples: int,
        seed: int,
        together: int = 1,
    ) -> None:
        """`together`: requests that all ranks of the engine complete in one batch."""
        self._together = together
        self._problems, self._engine, self._encoder, self._renderer = problems, engine, encoder, renderer
        self._checker, self._params, self._samples, self._seed = checker, params, samples, seed

    def on(self, problems: ProblemSets) -> SplitEvaluation:
        """The same model and sampler on other problems."""
        other = copy(self)
        other._problems = problems
        return other

    def evaluate(self, split: Split, update: int, grades: Grades | None = None) -> EvaluationRow:
        """The row of evaluations.jsonl of a split, after `update` updates; `ConfigError` without a checker."""
        if self._checker is None:
            raise ConfigError("data.checker: none leaves nothing to evaluate by; set data.checker: math")
        return evaluate_problems(
            self._engine,
            getattr(self._problems, split),
            encoder=self._encoder,
            renderer=self._renderer,
            checker=self._checker,
            params=self._params,
            samples=self._samples,
            seed=self._seed,
            split=split,
            update=update,
            grades=grades,
            together=self._together,
        )


def student_prompts(problems: Sequence[Problem], encoder: PromptEncoder, renderer: Renderer) -> list[tuple[int, ...]]:
    """The student's context of each problem, token ids."""
    return encoder.students([renderer.student(problem) for problem in problems])


def grade(
    rollouts: Sequence[Rollout], problems: Sequence[Problem], encoder: PromptEncoder, checker: Checker
) -> list[Graded]:
    """Check each rollout's answer against that of its problem. In order."""
    of = {problem.id: problem for problem in problems}
    texts = [encoder.decode(rollout.completion_ids) for rollout in rollouts]
    verdicts = checker.check(pairs_of([of[rollout.problem_id] for rollout in rollouts], texts))
    return [
        Graded(
            problem_id=rollout.problem_id,
            difficulty=of[rollout.problem_id].difficulty,
            sample=rollout.sample,
            verdict=verdict,
            tokens=len(rollout.completion_ids),
            truncated=rollout.truncated,
            looping=is_looping(rollout.completion_ids),
        )
        for rollout, verdict in zip(rollouts, verdicts, strict=True)
    ]


def summarise(
    graded: Sequence[Graded], *, split: Split, update: int, sampler: Mapping[str, float | int], seed: int
) -> EvaluationRow:
    """The row of evaluations.jsonl: Average@k and pass@k at k = samples per problem, with intervals over problems.

    Every verdict but `correct` counts as not solved, and each is counted. Intervals are 95 % bootstrap intervals; they
    say how the mean would move on other problems, not on other seeds. Raises ValueError unless every problem has the
    same number of samples.
    """
    correct = _correct_counts(graded)
    samples = len(graded) // len(correct)
    difficulty = {one.problem_id: one.difficulty for one in graded}
    verdicts = Counter(one.verdict for one in graded)
    levels = sorted(set(difficulty.values()))
    by_level = {level: [correct[name] for name in correct if difficulty[name] == level] for level in levels}
    counts = list(correct.values())
    passed = pass_at_k(counts, samples, samples).tolist()
    return {
        "update": update,
        "split": split,
        "problems": len(correct),
        "samples": samples,
        "average": _average(counts, samples, seed),
        "pass_at_k": _estimate(fmean(passed), passed, seed),
        "by_difficulty": {
            str(level): {"average": _average(some, samples, seed), "problems": len(some)}
            for level, some in by_level.items()
        },
        "verdicts": {verdict: verdicts[verdict] for verdict in get_args(Verdict)},
        "mean_tokens": fmean(one.tokens for one in graded),
        "truncated_share": fmean(one.truncated for one in graded),
        "loop_share": fmean(one.looping for one in graded),
        "sampler": {**sampler, "seed": seed},
        "correct_counts": correct,
    }


def params_record(params: SamplingParams) -> dict[str, float | int]:
    """The settings that decide what is drawn, as they really were."""
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "completion_tokens": params.completion_tokens,
    }


def _correct_counts(graded: Sequence[Graded]) -> dict[str, int]:
    """Correct samples of each problem, in the order in which problems first occur."""
    totals = Counter(one.problem_id for one in graded)
    if len(set(totals.values())) != 1:
        raise ValueError(f"every problem needs the same number of samples, at least one; got {sorted(totals.values())}")
    right = Counter(one.problem_id for one in graded if one.verdict == "correct")
    return {problem_id: right[problem_id] for problem_id in totals}


def _average(correct: Sequence[int], samples: int, seed: int) -> Estimate:
    return _estimate(average_at_k(correct, samples), [count / samples for count in correct], seed)


def _estimate(value: float, values: Sequence[float], seed: int) -> Estimate:
    low, high = bootstrap_interval(values, seed=seed, key="problems")
    return {"value": value, "low": low, "high": high}
