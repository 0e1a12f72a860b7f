"""The acceptance of a world checkpoint: what must be measured before anything is distilled from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from atesd.config import DataConfig, ViewsConfig
from atesd.engine.factory import engine_for
from atesd.engine.interface import Request, SamplingParams
from atesd.maths.divergence import forward_kl
from atesd.models.load import LoadedModel
from atesd.records import Problem
from atesd.world.model import world_tokenizer
from atesd.world.problems import COMPLETION_WORDS, DIGITS, END, PAD, VOCABULARY, WorldRenderer, world_problems

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Acceptance:
    """What a checkpoint must show before anything is distilled from it."""

    teacher_accuracy: float = 0.95  # at least; full exposure, detailed references
    student_accuracy: float = 0.15  # at least, at every number of clauses; chance is 0.10
    kl_after_mistake: tuple[float, float] = (0.0, 0.15)  # range; nats per token after the student's first wrong value


@dataclass(frozen=True)
class AcceptanceFigures:
    """Measured at temperature 1 on problems of the validation split, with detailed references."""

    teacher_accuracy: float
    student_accuracy: float
    student_accuracy_by_clauses: dict[int, float]
    kl_before_mistake: float  # nats per token up to and with the first wrong value, teacher at full exposure
    kl_after_mistake: float

    def passed(self, acceptance: Acceptance) -> bool:
        """Whether the checkpoint is accepted."""
        worst = min(self.student_accuracy_by_clauses.values())
        low, high = acceptance.kl_after_mistake
        able = self.teacher_accuracy >= acceptance.teacher_accuracy and worst >= acceptance.student_accuracy
        return able and low <= self.kl_after_mistake <= high


def measure_acceptance(model: Qwen3ForCausalLM, problems: Sequence[Problem] = ()) -> AcceptanceFigures:
    """The acceptance figures of a checkpoint; by default on 500 validation problems."""
    problems = problems or world_problems(DataConfig(train_size=1, validation_size=500)).validation
    renderer = WorldRenderer(ViewsConfig())
    student = [word_ids(renderer.student(problem)) for problem in problems]
    teacher = [word_ids(renderer.teacher(problem, len(problem.segments), whole=True)) for problem in problems]
    by_teacher = _complete(model, problems, teacher, "teacher")
    by_student = _complete(model, problems, student, "student")
    solved = np.array([_solved(ids, problem) for ids, problem in zip(by_student, problems, strict=True)])
    levels = np.array([problem.difficulty for problem in problems])
    kl, exists = _kl(model, teacher, student, by_student)
    mistakes = [_first_mistake(ids, problem) for ids, problem in zip(by_student, problems, strict=True)]
    after = torch.arange(COMPLETION_WORDS) > torch.tensor(mistakes)[:, None]
    return AcceptanceFigures(
        teacher_accuracy=float(np.mean([_solved(i, p) for i, p in zip(by_teacher, problems, strict=True)])),
        student_accuracy=float(solved.mean()),
        student_accuracy_by_clauses={int(n): float(solved[levels == n].mean()) for n in np.unique(levels)},
        kl_before_mistake=float(kl[exists & ~after].mean()),
        kl_after_mistake=float(kl[exists & after].mean()),
    )


def word_ids(text: str) -> Ids:
    """Token ids of a text of the world; `ValueError` for a word it does not know."""
    return tuple(VOCABULARY.index(word) for word in text.split())


def _complete(model: Qwen3ForCausalLM, problems: Sequence[Problem], prompts: Sequence[Ids], stream: str) -> list[Ids]:
    """One completion for each prompt at temperature 1, with its end token."""
    end, pad = VOCABULARY.index(END), VOCABULARY.index(PAD)
    loaded = LoadedModel(model, world_tokenizer(), torch.device("cpu"), frozenset({end}), pad)
    requests = [
        Request(problem.id, 0, prompt, (0, "gate", stream, problem.id))
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    params = SamplingParams(1.0, 1.0, 0, 0.0, completion_tokens=COMPLETION_WORDS)
    engine = engine_for(loaded, "auto", batch_size=len(requests))
    return [rollout.completion_ids for rollout in engine.complete(requests, params)]


def _solved(completion: Ids, problem: Problem) -> bool:
    """Whether the last boxed answer is the problem's."""
    boxed = [VOCABULARY[token] for token in completion if VOCABULARY[token].startswith("\\boxed")]
    return boxed[-1:] == [problem.closing]


def _first_mistake(completion: Ids, problem: Problem) -> int:
    """Place of the first word that is not the reference's digit at its place; past the end if there is none."""
    pairs = zip((VOCABULARY[token] for token in completion), problem.reference.split(), strict=False)
    wrong = (place for place, (word, true) in enumerate(pairs) if word != true and true in DIGITS)
    return next(wrong, COMPLETION_WORDS)


@torch.no_grad()
def _kl(
    model: Qwen3ForCausalLM, teacher: Sequence[Ids], student: Sequence[Ids], completions: Sequence[Ids]
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) in nats at every completion place [B, completion], and which places exist."""
    lengths = torch.tensor([len(ids) for ids in completions])
    padded = torch.tensor([ids + (0,) * (COMPLETION_WORDS - len(ids)) for ids in completions])
    logits = []
    for prompts in (teacher, student):
        ids = torch.cat([torch.tensor(prompts), padded[:, :-1]], dim=1)
        logits.append(model(ids, logits_to_keep=COMPLETION_WORDS, use_cache=False).logits.flatten(0, 1))
    return forward_kl(logits[0], logits[1]).view(padded.shape), torch.arange(COMPLETION_WORDS) < lengths[:, None]
