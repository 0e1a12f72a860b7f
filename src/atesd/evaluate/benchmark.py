"""Average@k and pass@k of a student on problems that it was not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, get_args

from atesd.data.answers import Checker
from atesd.data.views import Renderer
from atesd.engine.interface import Engine, Request, SamplingParams
from atesd.errors import DataError
from atesd.maths.statistics import average_at_k, bootstrap_interval, pass_at_k
from atesd.models.prompts import PromptEncoder
from atesd.records import Problem, Rollout, Split, Verdict


@dataclass(frozen=True, slots=True)
class Graded:
    """One completion with its verdict; `tokens` is its length, with the end token."""

    problem_id: str
    difficulty: int
    sample: int
    verdict: Verdict
    tokens: int
    truncated: bool
    looping: bool


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
) -> dict[str, Any]:
    """Answer every problem `samples` times without a reference and grade it: a row of evaluations.jsonl.

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
    graded = grade(engine.complete(requests, params), problems, encoder, checker)
    return summarise(graded, split=split, update=update, sampler=params_record(params), seed=seed)


def student_prompts(problems: Sequence[Problem], encoder: PromptEncoder, renderer: Renderer) -> list[tuple[int, ...]]:
    """The student's context of each problem, token ids."""
    return encoder.students([renderer.student(problem) for problem in problems])


def grade(
    rollouts: Sequence[Rollout], problems: Sequence[Problem], encoder: PromptEncoder, checker: Checker
) -> list[Graded]:
    """Check each rollout's answer against that of its problem. In order."""
    of = {problem.id: problem for problem in problems}
    verdicts = checker.check([(encoder.decode(r.completion_ids), of[r.problem_id].answer) for r in rollouts])
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
    graded: Sequence[Graded], *, split: Split, update: int, sampler: Mapping[str, Any], seed: int
) -> dict[str, Any]:
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
        "pass_at_k": {"value": fmean(passed), **_interval(passed, seed)},
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


def is_looping(ids: Sequence[int], ngram: int = 8, repeats: int = 4) -> bool:
    """Whether some `ngram` consecutive tokens occur at least `repeats` times, anywhere and overlapping or not.

    A loop of period p shows from ngram + (repeats - 1) * p tokens on. Definition and numbers are ours.
    """
    occurrences = Counter(tuple(ids[start : start + ngram]) for start in range(len(ids) - ngram + 1))
    return max(occurrences.values(), default=0) >= repeats


def _correct_counts(graded: Sequence[Graded]) -> dict[str, int]:
    """Correct samples of each problem, in the order in which problems first occur."""
    totals = Counter(one.problem_id for one in graded)
    if len(set(totals.values())) != 1:
        raise ValueError(f"every problem needs the same number of samples, at least one; got {sorted(totals.values())}")
    right = Counter(one.problem_id for one in graded if one.verdict == "correct")
    return {problem_id: right[problem_id] for problem_id in totals}


def _average(correct: Sequence[int], samples: int, seed: int) -> dict[str, float]:
    return {"value": average_at_k(correct, samples), **_interval([count / samples for count in correct], seed)}


def _interval(values: Sequence[float], seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(values, seed=seed, key="problems")
    return {"low": low, "high": high}
