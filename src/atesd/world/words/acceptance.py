"""The acceptance of a word-problem model: what must be measured before anything is distilled into it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from atesd.config import Config, DataConfig, ModelConfig
from atesd.data.answers import ExactChecker
from atesd.data.sources import load_problems
from atesd.data.views import TextRenderer
from atesd.data.word_problems import steps_of
from atesd.engine.factory import engine_for
from atesd.engine.interface import Request, SamplingParams
from atesd.maths.divergence import forward_kl
from atesd.models.load import LoadedModel
from atesd.models.prompts import PromptEncoder
from atesd.records import Problem

Ids = tuple[int, ...]
_RESULT = re.compile(r"=(\d+)(?!.*=)")


@dataclass(frozen=True)
class WordAcceptance:
    """What a checkpoint must show before anything is distilled from it."""

    student_accuracy: tuple[float, float] = (0.20, 0.60)  # range
    teacher_accuracy: float = 0.90  # at least; the whole reference, with the answer and also without it
    kl_after_mistake: tuple[float, float] = (0.0, 0.15)  # range; nats per token behind the first wrong line


@dataclass(frozen=True)
class WordFigures:
    """Measured at temperature 1 on validation problems; `held_out_*` on templates that were never shown."""

    student_accuracy: float
    student_accuracy_by_lines: dict[int, float]
    teacher_accuracy: float  # the whole reference, answer and all
    teacher_accuracy_withheld: float  # the whole reference without the line that states the answer
    kl_before_mistake: float  # nats per token up to the end of the first wrong line; teacher as in the line above
    kl_after_mistake: float
    held_out_student_accuracy: float
    held_out_teacher_accuracy: float  # answer withheld

    def passed(self, acceptance: WordAcceptance) -> bool:
        """Whether the checkpoint is accepted."""
        low, high = acceptance.student_accuracy
        least, most = acceptance.kl_after_mistake
        able = min(self.teacher_accuracy, self.teacher_accuracy_withheld) >= acceptance.teacher_accuracy
        return able and low <= self.student_accuracy <= high and least <= self.kl_after_mistake <= most


@dataclass(frozen=True)
class Reader:
    """A model, its tokenizer and what a run shows it; one renderer keeps the answer, one withholds it."""

    model: Qwen3ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    encoder: PromptEncoder
    keeping: TextRenderer
    withholding: TextRenderer
    completion_tokens: int


def reader_of(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: Config) -> Reader:
    """A model in the contexts of a config."""
    return Reader(
        model,
        tokenizer,
        encoder_of(tokenizer),
        *renderers_of(config),
        config.sampling.completion_tokens,
    )


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> PromptEncoder:
    """The encoder of a run whose model has this tokenizer."""
    return PromptEncoder(tokenizer, ModelConfig(), frozenset({int(tokenizer.eos_token_id)}))


def renderers_of(config: Config) -> tuple[TextRenderer, TextRenderer]:
    """The renderer of a config with the answer kept, and with it withheld."""
    keep, withhold = (config.views.model_copy(update={"answer": word}) for word in ("keep", "withhold"))
    return TextRenderer(keep), TextRenderer(withhold)


def acceptance_problems(config: DataConfig, size: int) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """`size` validation problems of the short templates, and as many of those held out. Raises as `load_problems`."""
    sizes = {"train_size": 1, "validation_size": size, "probe_size": 1, "test_size": 0}
    known, unknown = (
        load_problems(config.model_copy(update={**sizes, "templates": templates})).validation
        for templates in ("short", "short-held-out")
    )
    return known, unknown


def measure_words(reader: Reader, known: Sequence[Problem], held_out: Sequence[Problem]) -> WordFigures:
    """The acceptance figures of a model on problems of the templates that it was taught, and of the others."""
    students = reader.encoder.students([reader.keeping.student(one) for one in known])
    kept, withheld = (_whole(reader, renderer, known) for renderer in (reader.keeping, reader.withholding))
    by_student = _complete(reader, known, students, "student")
    solved = _solved(reader, by_student, known)
    lines = np.array([len(one.segments) for one in known])
    before, after = _kl(reader, known, withheld, students, by_student)
    others = reader.encoder.students([reader.keeping.student(one) for one in held_out])
    their_whole = _whole(reader, reader.withholding, held_out)
    return WordFigures(
        student_accuracy=float(solved.mean()),
        student_accuracy_by_lines={int(n): float(solved[lines == n].mean()) for n in np.unique(lines)},
        teacher_accuracy=float(_solved(reader, _complete(reader, known, kept, "kept"), known).mean()),
        teacher_accuracy_withheld=float(_solved(reader, _complete(reader, known, withheld, "whole"), known).mean()),
        kl_before_mistake=before,
        kl_after_mistake=after,
        held_out_student_accuracy=float(
            _solved(reader, _complete(reader, held_out, others, "student"), held_out).mean()
        ),
        held_out_teacher_accuracy=float(
            _solved(reader, _complete(reader, held_out, their_whole, "whole"), held_out).mean()
        ),
    )


def _whole(reader: Reader, renderer: TextRenderer, problems: Sequence[Problem]) -> list[Ids]:
    return reader.encoder.teachers([renderer.teacher(one, len(one.segments), True) for one in problems])


def _complete(reader: Reader, problems: Sequence[Problem], prompts: Sequence[Ids], stream: str) -> list[Ids]:
    """One completion for each prompt at temperature 1, with its end token."""
    end, pad = int(reader.tokenizer.eos_token_id), int(reader.tokenizer.pad_token_id)
    loaded = LoadedModel(reader.model, reader.tokenizer, torch.device("cpu"), frozenset({end}), pad)
    requests = [
        Request(problem.id, 0, prompt, (0, "gate", stream, problem.id))
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    params = SamplingParams(1.0, 1.0, 0, 0.0, completion_tokens=reader.completion_tokens)
    engine = engine_for(loaded, "auto", batch_size=64)
    return [rollout.completion_ids for rollout in engine.complete(requests, params)]


def _solved(reader: Reader, completions: Sequence[Ids], problems: Sequence[Problem]) -> np.ndarray:
    pairs = [(reader.encoder.decode(ids), one.answer) for ids, one in zip(completions, problems, strict=True)]
    return np.array([verdict == "correct" for verdict in ExactChecker().check(pairs)])


def first_mistake(pieces: Sequence[str], results: Sequence[int]) -> int:
    """How many tokens end with the first line that states another result than the reference's; all if there is none.

    `pieces` are the texts of the tokens, `results` those of the reference, line by line.
    """
    text = "".join(pieces)
    end = 0
    for line, result in zip(text.splitlines(keepends=True), results, strict=False):
        stated = _RESULT.search(line)
        end += len(line)
        if stated is None or int(stated[1]) != result:
            break
    else:
        return len(pieces)
    lengths = np.cumsum([len(piece) for piece in pieces])
    return int(np.searchsorted(lengths, end)) + 1


def _kl(
    reader: Reader,
    problems: Sequence[Problem],
    teacher: Sequence[Ids],
    student: Sequence[Ids],
    completions: Sequence[Ids],
) -> tuple[float, float]:
    """Mean KL(teacher || student) in nats per token up to the first wrong line with it, and behind it."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    for place, problem in enumerate(problems):
        ids = completions[place]
        kl = _one_kl(reader, teacher[place], student[place], ids)
        results = [step.result for step in steps_of("".join(problem.segments)) or ()]
        cut = first_mistake(reader.encoder.pieces(ids), results)
        before.append(kl[:cut])
        after.append(kl[cut:])
    return float(torch.cat(before).mean()), float(torch.cat(after).mean())


@torch.no_grad()
def _one_kl(reader: Reader, teacher: Ids, student: Ids, completion: Ids) -> Tensor:
    """KL at each completion token [T]."""
    logits = [
        reader.model(torch.tensor([[*prompt, *completion[:-1]]]), logits_to_keep=len(completion), use_cache=False)
        .logits[0]
        .float()
        for prompt in (teacher, student)
    ]
    return forward_kl(logits[0], logits[1])
