"""What the student can do on the fixed probe problems: the progress signals of the `sound` preset.

Neither depends on the reveal ratio, on the teacher, or on the batch being trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from atesd.data.answers import Checker
from atesd.data.own_checker import pairs_of
from atesd.data.views import Renderer
from atesd.engine.interface import Engine, Request, SamplingParams
from atesd.evaluate.benchmark import student_prompts
from atesd.models.prompts import PromptEncoder
from atesd.models.score import Scorer, completion_logprobs
from atesd.records import Problem, Rollout


@dataclass(frozen=True, slots=True)
class Answered:
    """A probe problem as the student once answered it: `logprob` of the whole completion in nats, from scoring it."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    correct: float
    logprob: float


def probe_requests(
    problems: Sequence[Problem],
    *,
    encoder: PromptEncoder,
    renderer: Renderer,
    seed: int,
    key: tuple[int | str, ...] = (),
) -> list[Request]:
    """One request per probe problem, with draws keyed by (seed, problem) and `key`: without it always the same."""
    return [
        Request(problem.id, 0, prompt, (seed, "probe", *(*key, problem.id)))
        for problem, prompt in zip(problems, student_prompts(problems, encoder, renderer), strict=True)
    ]


def probe_success(
    engine: Engine,
    problems: Sequence[Problem],
    *,
    encoder: PromptEncoder,
    renderer: Renderer,
    checker: Checker,
    params: SamplingParams,
    seed: int,
) -> float:
    """The verified share of the student's own completions, one per probe problem, in [0, 1].

    A student that does not change has a signal that does not move (`probe_requests`). What is not `correct` counts as a
    failure.
    """
    requests = probe_requests(problems, encoder=encoder, renderer=renderer, seed=seed)
    return fmean(graded(engine.complete(requests, params), problems, encoder=encoder, checker=checker))


def graded(
    rollouts: Sequence[Rollout], problems: Sequence[Problem], *, encoder: PromptEncoder, checker: Checker
) -> list[float]:
    """1.0 for each rollout whose answer is verified, 0.0 for every other."""
    texts = [encoder.decode(rollout.completion_ids) for rollout in rollouts]
    return [float(verdict == "correct") for verdict in checker.check(pairs_of(problems, texts))]


def probe_nll(
    scorer: Scorer,
    problems: Sequence[Problem],
    *,
    encoder: PromptEncoder,
    renderer: Renderer,
    micro_batch_size: int,
    temperature: float = 1.0,
) -> float:
    """The student's negative log-likelihood of the probe references, nats per token; its context shows no reference.

    Mean over a reference's tokens (with the end token), then over problems: a long one weighs no more than a short one.
    """
    prompts = student_prompts(problems, encoder, renderer)
    pairs = [(prompt, encoder.completion(p.reference)) for prompt, p in zip(prompts, problems, strict=True)]
    logprobs = completion_logprobs(scorer, pairs, temperature=temperature, micro_batch_size=micro_batch_size)
    return -fmean(float(row.double().mean()) for row in logprobs)
