"""What a run would do, for `atesd train --dry-run`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import get_args

from atesd.control.budget import affordable, decisions
from atesd.models.load import trainable_parameters
from atesd.records import Split
from atesd.train.batches import teacher_view
from atesd.train.parts import Parts

MEASURED = 512  # training problems whose contexts are measured
LISTED = 5  # skipped rows that are shown


def plan_lines(parts: Parts) -> Iterator[str]:
    """Data, model, contexts, and what the budget of updates affords."""
    config, train = parts.config, parts.config.train
    problems = {split: getattr(parts.problems, split) for split in get_args(Split)}
    yield "problems: " + ", ".join(f"{split} {len(some):,}" for split, some in problems.items())
    yield from parts.problems.notes
    skipped = parts.problems.skipped
    yield f"rows skipped: {len(skipped)}"
    yield from (f"  {reason}" for reason in skipped[:LISTED])
    if len(skipped) > LISTED:
        yield f"  and {len(skipped) - LISTED} more"
    trained = sum(parameter.numel() for parameter in trainable_parameters(parts.loaded).values())
    total = sum(parameter.numel() for parameter in parts.loaded.model.parameters())
    yield f"model: {config.model.path} on {parts.loaded.device}, {total:,} parameters, {trained:,} trained"
    yield from _contexts(parts)
    yield segment_line([len(problem.segments) for problem in problems["train"]])
    yield f"updates: {train.num_updates}, with {train.num_updates * train.batch_size:,} rollouts ({train.method})"
    yield _evaluations(parts)
    if config.exposure.decides and train.method == "distill":
        finished, updates = affordable(train.num_updates, config.credit, config.policy)
        yield f"exposure decisions: {decisions(train.num_updates, config.credit)}, {finished} of them rewarded in time"
    if config.exposure.kind == "learned" and train.method == "distill":
        yield f"policy updates: {updates}" + ("; fewer than 10 can hardly teach a policy anything" * (updates < 10))
    yield "nothing was trained and nothing was written (--dry-run)"


def segment_line(counts: Sequence[int]) -> str:
    """How many references have how many segments; ranges of ten where there are many kinds."""
    kinds = Counter(counts)
    if len(kinds) > 12:
        kinds = Counter(count // 10 * 10 for count in counts)
        return "segments: " + ", ".join(f"{low}-{low + 9}: {kinds[low]}" for low in sorted(kinds))
    return "segments: " + ", ".join(f"{count}: {kinds[count]}" for count in sorted(kinds))


def _contexts(parts: Parts) -> Iterator[str]:
    """Lengths of both contexts at full exposure."""
    config, encoder, renderer = parts.config, parts.encoder, parts.renderer
    some = parts.problems.train[:MEASURED]
    student = [len(encoder.student(renderer.student(problem))) for problem in some]
    yield f"student context: {_lengths(student)} (first {len(some)} training problems)"
    if config.train.method == "distill":
        seen = [teacher_view(problem, 1.0, config, encoder, renderer, parts.problems.train) for problem in some]
        short = sum(view.effective_ratio < 1 for view, _ in seen)
        note = f", {short} references do not fit whole" * bool(short)
        yield f"teacher context at ratio 1: {_lengths([len(ids) for _, ids in seen])}{note}"
    room = config.sampling.completion_tokens
    yield f"completions: up to {room} tokens; context and completion: up to {config.model.max_context_tokens}"


def _lengths(lengths: Sequence[int]) -> str:
    return f"median {statistics.median(lengths):g}, longest {max(lengths)} tokens"


def _evaluations(parts: Parts) -> str:
    """Validations before, on the way and after; test before and after."""
    train, problems = parts.config.train, parts.problems
    if not train.evaluate_every:
        return "evaluations: none (train.evaluate_every: 0)"
    times = len({*range(0, train.num_updates + 1, train.evaluate_every), train.num_updates})
    answers = (times * len(problems.validation) + 2 * len(problems.test)) * parts.config.evaluation.samples
    return f"evaluations: {times} on validation, 2 on test, with {answers:,} completions"
