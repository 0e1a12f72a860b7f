"""Makes the embedded world models: pretraining from a seed, the gates a checkpoint must pass, and the shipped folder.

The seed decides whether a tiny model learns to use a reference at all, so a checkpoint is only usable once its gates
are measured: `pretrain_until_gated` tries seed after seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from atesd.config import DataConfig, ViewsConfig
from atesd.data.world import (
    COMPLETION_WORDS,
    DIGITS,
    END,
    MAX_CLAUSES,
    MESSAGE_WORDS,
    MIN_CLAUSES,
    PAD,
    UNKNOWN,
    VOCABULARY,
    WorldRenderer,
    world_problems,
)
from atesd.data.world_text import Mixture, draw_texts, known_facts
from atesd.errors import TrainingError
from atesd.maths.divergence import forward_kl
from atesd.maths.keyed import generator
from atesd.records import Problem

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class PretrainRecipe:
    """How a world model is pretrained."""

    steps: int = 1400
    batch_size: int = 64
    muon_learning_rate: float = 0.02  # matrices
    adamw_learning_rate: float = 3e-3  # embedding and norms
    muon_weight_decay: float = 0.0
    decay_share: float = 0.3  # last share of the steps: linear decay to 0
    curriculum_share: float = 0.5  # first share of the steps: problems grow from 2 to 6 clauses
    mixture: Mixture = field(default_factory=Mixture)


def world_config() -> Qwen3Config:
    """The architecture of every world model: Qwen3 with about 100,000 parameters."""
    ids = {word: place for place, word in enumerate(VOCABULARY)}
    return Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        eos_token_id=ids[END],
        bos_token_id=None,
    )


def world_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; the chat template emits the message and nothing else."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: place for place, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pretrain(
    seed: int, recipe: PretrainRecipe, progress: Callable[[int, float], None] | None = None
) -> Qwen3ForCausalLM:
    """A world model pretrained from `seed`; calls `progress(step, loss in nats per target)` after each step.

    Weights and texts are functions of the seed alone; one thread, so that the bits do not depend on the number of
    cores. Raises `TrainingError` on a non-finite loss.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _pretrain(seed, recipe, progress)
    finally:
        torch.set_num_threads(threads)


def _pretrain(seed: int, recipe: PretrainRecipe, progress: Callable[[int, float], None] | None) -> Qwen3ForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, "pretrain", "weights").integers(2**62)))
        model = Qwen3ForCausalLM(world_config())
    model.train()
    optimisers = _optimisers(model, recipe)
    known = known_facts()
    for step in range(recipe.steps):
        rng = generator(seed, "pretrain", "texts", step)
        texts = draw_texts(rng, recipe.batch_size, _longest(step, recipe), recipe.mixture, known)
        loss = _text_loss(model, torch.from_numpy(texts.ids), torch.from_numpy(texts.targets))
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"pretraining seed {seed}: loss {value} at step {step}; try another seed")
        factor = min(1.0, (recipe.steps - step) / max(1.0, recipe.decay_share * recipe.steps))
        for optimiser, learning_rate in optimisers:
            optimiser.param_groups[0]["lr"] = learning_rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if progress:
            progress(step, value)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _longest(step: int, recipe: PretrainRecipe) -> int:
    """Most clauses of a text at this step: from 2 to 6 over the curriculum."""
    share = step / max(1.0, recipe.curriculum_share * recipe.steps)
    return min(MAX_CLAUSES, MIN_CLAUSES + int(share * (MAX_CLAUSES - MIN_CLAUSES + 1)))


def _optimisers(model: Qwen3ForCausalLM, recipe: PretrainRecipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms, each with its learning rate."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=recipe.muon_learning_rate, weight_decay=recipe.muon_weight_decay)
    adamw = torch.optim.AdamW(others, lr=recipe.adamw_learning_rate, weight_decay=0.0)
    return [(muon, recipe.muon_learning_rate), (adamw, recipe.adamw_learning_rate)]


def _text_loss(model: Qwen3ForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the target completion tokens, nats."""
    logits = model(ids[:, :-1], logits_to_keep=COMPLETION_WORDS, use_cache=False).logits
    return F.cross_entropy(logits[targets].float(), ids[:, MESSAGE_WORDS:][targets])


@dataclass(frozen=True)
class Gates:
    """What a checkpoint must show before anything is distilled from it."""

    teacher_accuracy: float = 0.95  # at least; full exposure, detailed references
    student_accuracy: float = 0.15  # at least, at every number of clauses; chance is 0.10
    kl_after_mistake: float = 0.15  # at most; nats per token that follows the student's first wrong value


@dataclass(frozen=True)
class GateFigures:
    """Measured at temperature 1 on problems of the validation split, with detailed references."""

    teacher_accuracy: float
    student_accuracy: float
    student_accuracy_by_clauses: dict[int, float]
    kl_before_mistake: float  # nats per token up to and with the first wrong value, teacher at full exposure
    kl_after_mistake: float

    def passed(self, gates: Gates) -> bool:
        """Whether every gate is passed."""
        worst = min(self.student_accuracy_by_clauses.values())
        able = self.teacher_accuracy >= gates.teacher_accuracy and worst >= gates.student_accuracy
        return able and self.kl_after_mistake <= gates.kl_after_mistake


@torch.no_grad()
def measure_gates(model: Qwen3ForCausalLM, problems: Sequence[Problem] = ()) -> GateFigures:
    """The gate figures of a checkpoint; by default on 500 validation problems."""
    problems = problems or world_problems(DataConfig(train_size=1, validation_size=500)).validation
    renderer = WorldRenderer(ViewsConfig())
    student = _message_ids([renderer.student(problem) for problem in problems])
    teacher = _message_ids([renderer.teacher(problem, len(problem.segments), whole=True) for problem in problems])
    by_teacher = _complete(model, teacher, generator(0, "pretrain", "gate", "teacher"))
    by_student = _complete(model, student, generator(0, "pretrain", "gate", "student"))
    solved = np.array(_solved(by_student, problems))
    levels = np.array([problem.difficulty for problem in problems])
    kl, exists = _kl(model, teacher, student, by_student)
    after = torch.arange(COMPLETION_WORDS) > torch.tensor(_first_mistakes(by_student, problems))[:, None]
    return GateFigures(
        teacher_accuracy=float(np.mean(_solved(by_teacher, problems))),
        student_accuracy=float(solved.mean()),
        student_accuracy_by_clauses={int(n): float(solved[levels == n].mean()) for n in np.unique(levels)},
        kl_before_mistake=float(kl[exists & ~after].mean()),
        kl_after_mistake=float(kl[exists & after].mean()),
    )


def _message_ids(messages: Sequence[str]) -> Tensor:
    ids = {word: place for place, word in enumerate(VOCABULARY)}
    return torch.tensor([[ids[word] for word in message.split()] for message in messages])


def _complete(model: Qwen3ForCausalLM, prompts: Tensor, rng: np.random.Generator) -> Tensor:
    """One completion per prompt at temperature 1, [B, completion], pad after the end token."""
    end, pad = VOCABULARY.index(END), VOCABULARY.index(PAD)
    cache, ids, written = None, prompts, []
    open_rows = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(COMPLETION_WORDS):
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        mass = output.logits[:, -1].double().softmax(-1).cumsum(-1)
        draw = torch.from_numpy(rng.random((len(prompts), 1)))
        ids = torch.where(open_rows[:, None], torch.searchsorted(mass, draw * mass[:, -1:], right=True), pad)
        open_rows &= ids[:, 0] != end
        written.append(ids)
    return torch.cat(written, dim=1)


def _solved(completions: Tensor, problems: Sequence[Problem]) -> list[bool]:
    """Whether the last boxed answer of each completion is the problem's."""
    boxed = [[VOCABULARY[i] for i in row if VOCABULARY[i].startswith("\\boxed")] for row in completions.tolist()]
    return [bool(row) and row[-1] == problem.closing for row, problem in zip(boxed, problems, strict=True)]


def _first_mistakes(completions: Tensor, problems: Sequence[Problem]) -> list[int]:
    """Place of the first digit that differs from the reference at its place; past the end if there is none."""
    places = []
    for row, problem in zip(completions.tolist(), problems, strict=True):
        pairs = enumerate(zip((VOCABULARY[i] for i in row), problem.reference.split(), strict=False))
        wrong = (place for place, (word, true) in pairs if word != true and true in DIGITS)
        places.append(next(wrong, COMPLETION_WORDS))
    return places


def _kl(model: Qwen3ForCausalLM, teacher: Tensor, student: Tensor, completions: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) in nats at every completion position [B, completion], and which positions exist."""
    logits = []
    for prompts in (teacher, student):
        ids = torch.cat([prompts, completions[:, :-1]], dim=1)
        logits.append(model(ids, logits_to_keep=COMPLETION_WORDS, use_cache=False).logits.flatten(0, 1))
    kl = forward_kl(logits[0], logits[1]).view(completions.shape)
    return kl, completions != VOCABULARY.index(PAD)


def save_world_model(model: Qwen3ForCausalLM, folder: Path, record: dict[str, Any]) -> None:
    """Write an ordinary transformers folder (safetensors, tokenizer, chat template), with `record` as `gates.json`."""
    model.save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    (folder / "gates.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def pretrain_until_gated(
    seed: int,
    attempts: int,
    recipe: PretrainRecipe | None = None,
    gates: Gates | None = None,
    problems: Sequence[Problem] = (),
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Qwen3ForCausalLM, int, GateFigures]:
    """The first checkpoint among seeds `seed`, `seed` + 1, ... that passes the gates, its seed and its figures.

    The gates are measured as in `measure_gates`. Calls `progress(seed, step, loss)`. Raises `TrainingError` that lists
    every attempt's figures.
    """
    recipe, gates = recipe or PretrainRecipe(), gates or Gates()
    failures = []
    for candidate in range(seed, seed + attempts):
        model = pretrain(candidate, recipe, partial(progress, candidate) if progress else None)
        figures = measure_gates(model, problems)
        if figures.passed(gates):
            return model, candidate, figures
        failures.append(f"seed {candidate}: {asdict(figures)}")
    raise TrainingError(
        f"no checkpoint passed {gates} in {attempts} attempts; raise --attempts\n" + "\n".join(failures)
    )


RECIPES: dict[str, PretrainRecipe] = {"good": PretrainRecipe()}


def pretrain_command(
    seed: int,
    attempts: int,
    out: Path,
    recipe: str = "good",
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """`atesd world pretrain`: make a gated checkpoint from `seed` on, write it to `out`, return its record.

    The record holds the seed that passed, the recipe and the gate figures; it is also `out/gates.json`.
    """
    model, passed, figures = pretrain_until_gated(seed, attempts, RECIPES[recipe], progress=progress)
    record = {"recipe": recipe, "seed": passed, "figures": asdict(figures), "settings": asdict(RECIPES[recipe])}
    save_world_model(model, out, record)
    return record
