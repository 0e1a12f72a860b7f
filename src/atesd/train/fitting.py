"""Which problems fit into the model's context; no problem and no answer is ever cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

from atesd.config import Config
from atesd.data.splits import ProblemSets
from atesd.data.views import Renderer
from atesd.errors import DataError
from atesd.models.prompts import PromptEncoder
from atesd.records import Problem, Split
from atesd.train.views import TeacherPrompts

_LISTED = 20  # problems that an error message shows


def problems_that_fit(problems: ProblemSets, config: Config, encoder: PromptEncoder, renderer: Renderer) -> ProblemSets:
    """The problems whose contexts fit `model.max_context_tokens` even with nothing of the reference in them.

    A problem and an answer are never cut: a row that does not fit is refused (`DataError`), or skipped and listed where
    `data.on_bad_row` says so. References that have to lose segments are no reason to refuse. Room is left for the
    completions that a split's problems get, so that no setting of the evaluation decides what is trained on; a probe
    problem, and in SFT a training problem, needs room for its whole reference, which is scored as a completion. How
    many of a split are left is noted; that none is left to train on, or to probe where ratios are decided, is a
    `DataError` too.
    """
    reasons = {
        **_teacher_contexts(problems, config, encoder, renderer),
        **_student_contexts(problems, config, encoder, renderer),
        **_references(problems, config, encoder, renderer),
    }
    if not reasons:
        return problems
    if config.data.on_bad_row == "refuse":
        listed = "\n  ".join(list(reasons.values())[:_LISTED])
        raise DataError(
            f"{len(reasons)} problems do not fit model.max_context_tokens {config.model.max_context_tokens}; raise it, "
            "lower the completion_tokens of sampling or evaluation, or set data.on_bad_row: skip\n  "
            f"{listed}"
        )
    fitting: dict[Split, tuple[Problem, ...]] = {
        split: _others(getattr(problems, split), reasons) for split in get_args(Split)
    }
    counts = [(split, len(some), len(getattr(problems, split))) for split, some in fitting.items()]
    lost = ", ".join(f"{split} {left} of {before}" for split, left, before in counts if left < before)
    vital = ("train", "probe") if config.decides else ("train",)
    if any(split in vital and before and not left for split, left, before in counts):
        raise DataError(
            f"too few problems fit model.max_context_tokens {config.model.max_context_tokens}: {lost}; raise it, or "
            f"lower sampling.completion_tokens; the first that does not: {next(iter(reasons.values()))}"
        )
    note = f"problems that fit model.max_context_tokens {config.model.max_context_tokens}: {lost}"
    return replace(
        problems,
        train=fitting["train"],
        validation=fitting["validation"],
        probe=fitting["probe"],
        test=fitting["test"],
        skipped=(*problems.skipped, *reasons.values()),
        notes=(*problems.notes, note),
    )


def _teacher_contexts(
    problems: ProblemSets, config: Config, encoder: PromptEncoder, renderer: Renderer
) -> dict[str, str]:
    """Why training problems leave no room beside their shortest teacher context, by id."""
    prompts = TeacherPrompts(config, encoder, renderer, problems.train)
    reasons = {}
    for problem in _perhaps_too_long(problems.train, config, encoder, renderer):
        try:
            prompts.view(problem, 0.0)
        except DataError as error:
            reasons[problem.id] = str(error)
    return reasons


def _perhaps_too_long(
    problems: Sequence[Problem], config: Config, encoder: PromptEncoder, renderer: Renderer
) -> Sequence[Problem]:
    """The problems whose shortest teacher context is too long; all of them where an ablation changes what it holds."""
    if not config.distils or config.exposure.reference_ablation != "off":
        return problems
    room = config.model.max_context_tokens - config.sampling.completion_tokens
    shortest = encoder.teachers([renderer.teacher(problem, 0, False) for problem in problems])
    return [problem for problem, context in zip(problems, shortest, strict=True) if len(context) > room]


def _student_contexts(
    problems: ProblemSets, config: Config, encoder: PromptEncoder, renderer: Renderer
) -> dict[str, str]:
    """Why problems leave no room for the completions that they get, by id."""
    lengths = {
        "sampling": (config.sampling.completion_tokens, (*problems.train, *problems.probe)),
        "evaluation": (config.evaluation_tokens, (*problems.validation, *problems.test)),
    }
    reasons = {}
    for group, (completion_tokens, some) in lengths.items():
        room = config.model.max_context_tokens - completion_tokens
        prompts = encoder.students([renderer.student(problem) for problem in some])
        for problem, prompt in zip(some, prompts, strict=True):
            if len(prompt) > room:
                reasons[problem.id] = (
                    f"problem {problem.id}: its student context has {len(prompt)} tokens, {group}.completion_tokens "
                    f"{completion_tokens} leaves room for {max(room, 0)}"
                )
    return reasons


def _references(problems: ProblemSets, config: Config, encoder: PromptEncoder, renderer: Renderer) -> dict[str, str]:
    """Why references that are scored as completions do not fit whole, by id."""
    reasons = {}
    for problem in (*problems.probe, *(problems.train if config.train.method == "sft" else ())):
        length = len(encoder.student(renderer.student(problem))) + len(encoder.completion(problem.reference))
        if length > config.model.max_context_tokens:
            reasons[problem.id] = f"problem {problem.id}: its student context and reference have {length} tokens"
    return reasons


def _others(split: tuple[Problem, ...], reasons: Mapping[str, str]) -> tuple[Problem, ...]:
    return tuple(problem for problem in split if problem.id not in reasons)
