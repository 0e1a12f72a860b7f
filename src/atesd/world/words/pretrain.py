"""Makes the word-problem models: pretraining from a seed, measured before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from atesd.config import Config, load_config
from atesd.data.views import TextRenderer
from atesd.data.word_problems import TEMPLATES
from atesd.maths.keyed import generator
from atesd.models.processor import computes_in_bfloat16
from atesd.models.prompts import PromptEncoder
from atesd.records import Problem
from atesd.world.pretrain import Descent, descend, first_accepted, muon_and_adamw, one_thread
from atesd.world.words.acceptance import (
    WordAcceptance,
    WordFigures,
    acceptance_problems,
    encoder_of,
    measure_words,
    reader_of,
    renderers_of,
)
from atesd.world.words.model import save_words_model, words_config, words_tokenizer
from atesd.world.words.texts import WordMixture, WordProblem, WordText, draw_word_texts, word_problem_pool

_TOKENIZER_SEED = 0  # one tokenizer for all checkpoints
_IGNORED = -100


@dataclass(frozen=True)
class WordRecipe:
    """How a word-problem model is pretrained, and what its checkpoint must show."""

    hidden_size: int = 192
    layers: int = 5
    steps: int = 1600
    batch_size: int = 32
    micro_batch_size: int = 8  # texts of like length
    problems_per_template: int = 1000
    muon_learning_rate: float = 0.02  # matrices
    adamw_learning_rate: float = 3e-3  # embedding and norms
    warmup_steps: int = 50
    decay_share: float = 0.6  # last share of the steps: linear decay to 0
    acceptance_problems: int = 200
    mixture: WordMixture = field(default_factory=WordMixture)
    acceptance: WordAcceptance = field(default_factory=WordAcceptance)


WORDS = WordRecipe()


@dataclass(frozen=True)
class Teaching:
    """What texts are made of: problems, tokenizer, and the contexts of the recipe `micro-words`."""

    problems: Sequence[WordProblem]
    tokenizer: PreTrainedTokenizerFast
    encoder: PromptEncoder
    keeping: TextRenderer
    withholding: TextRenderer

    def texts(self, rng: np.random.Generator, size: int, mixture: WordMixture) -> list[tuple[list[int], list[int]]]:
        """`size` texts as (ids, targets): what each position is to predict, `_IGNORED` where nothing is learned."""
        chosen = [self.problems[place] for place in rng.integers(len(self.problems), size=size)]
        texts = draw_word_texts(rng, chosen, mixture, self.keeping, self.withholding)
        return [self._encoded(text) for text in texts]

    def _encoded(self, text: WordText) -> tuple[list[int], list[int]]:
        context = list(self.encoder.student(text.message))
        written = self.tokenizer([piece for piece, _ in text.pieces], add_special_tokens=False)["input_ids"]
        pairs = [(i, learned) for ids, (_, learned) in zip(written, text.pieces, strict=True) for i in ids]
        pairs.append((int(self.tokenizer.eos_token_id), True))
        targets = [_IGNORED] * (len(context) - 1) + [i if learned else _IGNORED for i, learned in pairs]
        return [*context, *(i for i, _ in pairs[:-1])], targets


def teaching(seed: int, recipe: WordRecipe, config: Config) -> Teaching:
    """The problems of a seed, and the tokenizer that all seeds share. Raises `DataError` without reasoning-gym."""
    templates = TEMPLATES["short"]
    tokenizer = words_tokenizer(one.problem for one in word_problem_pool(_TOKENIZER_SEED, 300, templates))
    problems = word_problem_pool(seed, recipe.problems_per_template, templates)
    return Teaching(problems, tokenizer, encoder_of(tokenizer), *renderers_of(config))


def pretrain_words(
    seed: int, recipe: WordRecipe, taught: Teaching, progress: Callable[[int, float], None] | None = None
) -> Qwen3ForCausalLM:
    """A model pretrained from `seed`, in bfloat16; calls `progress(step, loss in nats per target)` after each step.

    Weights are float32 meanwhile; the passes are in bfloat16 where the processor computes in it, so the bits depend on
    the processor. One thread. Raises `TrainingError` on a non-finite loss.
    """
    config = words_config(taught.tokenizer, recipe.hidden_size, recipe.layers)
    with one_thread():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator(seed, "words", "weights").integers(2**62)))
            config._attn_implementation = "eager"  # on a processor the faster one at these lengths
            model = Qwen3ForCausalLM(config)
        optimisers = muon_and_adamw(model, recipe.muon_learning_rate, recipe.adamw_learning_rate, 0.0)
        descent = Descent(seed, recipe.steps, recipe.decay_share, recipe.warmup_steps)
        descend(model, optimisers, descent, partial(_add_gradient, model, seed, recipe, taught), progress)
    return model.bfloat16()


def _add_gradient(model: Qwen3ForCausalLM, seed: int, recipe: WordRecipe, taught: Teaching, step: int) -> float:
    texts = taught.texts(generator(seed, "words", "texts", step), recipe.batch_size, recipe.mixture)
    return accumulate(model, texts, recipe.micro_batch_size, int(taught.tokenizer.pad_token_id))


def accumulate(model: Any, texts: Sequence[tuple[list[int], list[int]]], size: int, pad: int) -> float:
    """Add the gradient of the mean loss per target, micro-batch by micro-batch; the loss in nats."""
    targets = sum(one != _IGNORED for _, of_text in texts for one in of_text)
    total = 0.0
    ordered = sorted(texts, key=lambda text: len(text[0]))
    for part in (ordered[place : place + size] for place in range(0, len(ordered), size)):
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bfloat16()):
            loss = _loss(model, part, pad) / targets
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _loss(model: Any, texts: Sequence[tuple[list[int], list[int]]], pad: int) -> Tensor:
    """Summed negative log-likelihood of the targets of right-padded texts, nats."""
    longest = max(len(ids) for ids, _ in texts)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in texts])
    targets = torch.tensor([some + [_IGNORED] * (longest - len(some)) for _, some in texts])
    hidden = model.model(ids, use_cache=False).last_hidden_state
    learned = targets != _IGNORED
    return F.cross_entropy(model.lm_head(hidden[learned]).float(), targets[learned], reduction="sum")


def pretrain_words_command(
    seed: int,
    attempts: int,
    out: Path,
    progress: Callable[[int, int, float], None] | None = None,
    recipe: WordRecipe = WORDS,
) -> dict[str, Any]:
    """`atesd world pretrain words`: the first accepted model among `attempts` seeds from `seed` on, written to `out`.

    Returns its record, which is also `out/gates.json`. Raises `TrainingError` with the figures of every attempt if none
    is accepted, and `DataError` without reasoning-gym.
    """
    config = load_config("micro-words", [])
    known, held_out = acceptance_problems(config.data, recipe.acceptance_problems)
    attempt = partial(_attempt, recipe, config, known, held_out, progress)
    passes = partial(_passes, recipe.acceptance)
    seeds = range(seed, seed + attempts)
    (model, tokenizer), passed, figures = first_accepted(seeds, attempt, passes, recipe.acceptance)
    record = words_record(recipe, passed, figures)
    save_words_model(model, tokenizer, out, record)
    return record


def _attempt(
    recipe: WordRecipe,
    config: Config,
    known: Sequence[Problem],
    held_out: Sequence[Problem],
    progress: Callable[[int, int, float], None] | None,
    seed: int,
) -> tuple[tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast], WordFigures]:
    taught = teaching(seed, recipe, config)
    model = pretrain_words(seed, recipe, taught, partial(progress, seed) if progress else None)
    figures = measure_words(reader_of(_in_float32(model), taught.tokenizer, config), known, held_out)
    return (model, taught.tokenizer), figures


def _passes(acceptance: WordAcceptance, figures: WordFigures) -> bool:
    return figures.passed(acceptance)


def _in_float32(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """A copy as a run loads it: the stored bfloat16 in float32."""
    return deepcopy(model).float()  # type: ignore[no-untyped-call, no-any-return]


def words_record(recipe: WordRecipe, seed: int, figures: WordFigures) -> dict[str, Any]:
    """What `gates.json` holds: command, seed, figures, settings of the recipe, templates."""
    settings = asdict(recipe)
    settings["gates"] = settings.pop("acceptance")
    return {
        "command": f"atesd world pretrain words --seed {seed} --attempts 1",
        "recipe": "words",
        "seed": seed,
        "figures": asdict(figures),
        "settings": settings,
        "templates": {name: list(numbers) for name, numbers in TEMPLATES.items()},
    }
