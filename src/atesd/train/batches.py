"""The rows of an update: which problems, what the student wrote, what the teacher sees of each, and the verdicts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from atesd.config import Config
from atesd.control.aligned import LooksAhead
from atesd.data.controls import controlled
from atesd.data.views import Renderer, make_view
from atesd.engine.sample import Request, Sampler, sample
from atesd.errors import NonFiniteError
from atesd.maths.keyed import generator, uniforms
from atesd.models.prompts import PromptEncoder
from atesd.records import Alignment, Problem, Rollout, Verdict, View
from atesd.train.lookahead import grouped
from atesd.train.parts import Parts
from atesd.train.step import Candidate, Row, clock


@dataclass(frozen=True, slots=True)
class Batch:
    """The rollouts of one update with what the teacher sees of each: all lists run over the same rows."""

    problems: list[Problem]
    rollouts: list[Rollout]
    reveal_ratios: list[float]
    views: list[View]
    verdicts: list[Verdict | None]
    rows: list[Row]
    alignment: Alignment | None = None
    lookahead_seconds: float = 0.0


def draw_batch(parts: Parts, update: int) -> Batch:
    """Sample, grade and show to the teacher the rows of this update. SFT takes the references as completions."""
    config = parts.config
    problems, numbers = batch_at(parts.problems.train, config, update)
    if config.train.method == "sft":
        rollouts = [reference_rollout(problem, parts) for problem in problems]
    else:
        prompts = parts.encoder.students([parts.renderer.student(problem) for problem in problems])
        asked = zip(problems, numbers, prompts, strict=True)
        requests = [request(problem, number, prompt, update, parts) for problem, number, prompt in asked]
        rollouts = sample(parts.loaded, requests, rollout_sampler(config))
    verdicts = grade(problems, rollouts, parts)
    begun = clock(parts.loaded.device)
    alignment = look_ahead(problems, rollouts, update, parts)
    lookahead_seconds = clock(parts.loaded.device) - begun
    ratios = [parts.exposure.reveal_ratio(update, group_of(problem, config)) for problem in problems]
    seen = [
        teacher_view(problem, ratio, config, parts.encoder, parts.renderer, parts.problems.train)
        for problem, ratio in zip(problems, ratios, strict=True)
    ]
    rewarded = config.train.samples_per_problem > 1
    advantages = group_advantages(verdicts, config.train.group_size) if rewarded else [0.0] * len(problems)
    grpo = config.train.method == "grpo"
    rows = [
        Row(
            rollout.prompt_ids,
            rollout.completion_ids,
            context,
            advantage if grpo else 1.0,
            key=(update, rollout.problem_id, rollout.sample),
            correct=verdict == "correct",
            advantage=advantage * config.train.grpo_weight,
            candidates=candidates(problem, parts),
        )
        for problem, rollout, (_, context), verdict, advantage in zip(
            problems, rollouts, seen, verdicts, advantages, strict=True
        )
    ]
    views = [view for view, _ in seen]
    return Batch(problems, rollouts, ratios, views, verdicts, rows, alignment, lookahead_seconds)


def look_ahead(problems: Sequence[Problem], rollouts: Sequence[Rollout], update: int, parts: Parts) -> Alignment | None:
    """Tell an exposure that asks for it what every ratio would do; returns the alignment of all rollouts together.

    None where it was not asked for, or where success has no direction yet, which the exposure is told by no groups.
    Raises `NonFiniteError` that names the problem, before the exposure could remember such numbers.
    """
    exposure, lookahead = parts.exposure, parts.lookahead
    if lookahead is None or not isinstance(exposure, LooksAhead) or "alignment" not in exposure.measurements(update):
        return None
    if not lookahead.direction.known:
        exposure.look_ahead(update, {})
        return None

    def see(ratio: float) -> list[tuple[int, ...]]:
        given = parts.config, parts.encoder, parts.renderer, parts.problems.train
        return [teacher_view(problem, ratio, *given)[1] for problem in problems]

    pairs = [(rollout.prompt_ids, rollout.completion_ids) for rollout in rollouts]
    rows = lookahead.by_ratio(pairs, see)
    for problem, values in zip(problems, rows, strict=True):
        if not all(map(math.isfinite, values)):
            raise NonFiniteError(f"the look-ahead gives numbers that are not finite on {problem.id}")
    exposure.look_ahead(update, grouped(lookahead.ratios, rows, [group_of(p, parts.config) for p in problems]))
    return grouped(lookahead.ratios, rows, [""] * len(rows))[""]


def candidates(problem: Problem, parts: Parts) -> tuple[Candidate, ...]:
    """What the teacher reads of a problem at each ratio among which its tokens choose; empty while they cannot."""
    lookahead = parts.lookahead
    if lookahead is None or parts.config.granularity != "per_token" or not lookahead.direction.known:
        return ()
    given = parts.config, parts.encoder, parts.renderer, parts.problems.train
    seen = [(ratio, *teacher_view(problem, ratio, *given)) for ratio in lookahead.ratios]
    return tuple(Candidate(context, ratio, view.effective_ratio) for ratio, view, context in seen)


def request(problem: Problem, number: int, prompt: tuple[int, ...], update: int, parts: Parts) -> Request:
    """What the sampler needs for one rollout; its uniforms belong to (seed, update, problem, number)."""
    train, count = parts.config.train, parts.config.sampling.completion_tokens
    return Request(problem.id, number, prompt, uniforms(count, train.seed, "rollout", update, problem.id, number))


def reference_rollout(problem: Problem, parts: Parts) -> Rollout:
    """The reference as if the student had written it."""
    prompt = parts.encoder.student(parts.renderer.student(problem))
    completion = parts.encoder.completion(problem.reference)
    return Rollout(problem.id, 0, prompt, completion, (0.0,) * len(completion), truncated=False)


def grade(problems: Sequence[Problem], rollouts: Sequence[Rollout], parts: Parts) -> list[Verdict | None]:
    """Verdicts of the student's own completions; None where there is no checker or nothing of the student's own."""
    if parts.checker is None or parts.config.train.method == "sft":
        return [None] * len(rollouts)
    texts = [parts.encoder.decode(rollout.completion_ids) for rollout in rollouts]
    return list(parts.checker.check([(text, p.answer) for text, p in zip(texts, problems, strict=True)]))


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


def group_of(problem: Problem, config: Config) -> str:
    """Which rows share what `reveal_ratio` of the exposure says: all, those of a difficulty, or those of a problem."""
    groups = {"per_difficulty": str(problem.difficulty), "per_problem": problem.id}
    return groups.get(config.granularity, "")


def teacher_view(
    problem: Problem,
    reveal_ratio: float,
    config: Config,
    encoder: PromptEncoder,
    renderer: Renderer,
    others: Sequence[Problem],
) -> tuple[View, tuple[int, ...]]:
    """What the teacher reads of a problem at a ratio, under the control and the length policy, and its context ids.

    `others` are the problems from which a shuffled reference may come. Raises `DataError` if nothing fits.
    """
    if config.train.method != "distill":
        return View("", 0, len(problem.segments)), ()
    if config.exposure.reference_ablation == "none":
        message = renderer.student(problem)
        return View(message, 0, len(problem.segments)), encoder.teacher(message)
    shown = problem
    if config.exposure.reference_ablation != "off":
        shown = controlled(problem, config.exposure.reference_ablation, others, config.train.seed)
    room = config.model.max_context_tokens - config.sampling.completion_tokens
    read: dict[str, tuple[int, ...]] = {}

    def fits(message: str) -> bool:
        read[message] = encoder.teacher(message)
        return len(read[message]) <= room

    view = make_view(shown, reveal_ratio, renderer, fits)
    return view, read[view.text]


def with_answer(row: Row, problem: Problem, view: View, config: Config, encoder: PromptEncoder) -> Row:
    """The row with what g_t is measured on, under the teacher's view: the answer (paper) or the withheld part."""
    withheld = "".join(problem.segments[view.shown_segments :]) + problem.closing
    text = f"\\boxed{{{problem.answer}}}" if config.credit.grounding == "answer" else withheld
    return replace(row, answer=encoder.completion(text)[:-1])  # the end token is no answer


def group_advantages(verdicts: Sequence[Verdict | None], group_size: int) -> list[float]:
    """GRPO's advantage of each rollout: (reward - mean) / (std + 1e-6) in its group, reward 1 if verified, else 0."""
    rewards = torch.tensor([float(verdict == "correct") for verdict in verdicts]).view(-1, group_size)
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages: list[float] = (centred / (rewards.std(1, keepdim=True) + 1e-6)).flatten().tolist()
    return advantages


def rollout_sampler(config: Config) -> Sampler:
    """How rollouts are drawn in training."""
    s = config.sampling
    return Sampler(s.temperature, s.top_p, s.top_k, s.min_p, s.completion_tokens, s.batch_size, s.engine)
