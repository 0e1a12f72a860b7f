"""Makes the embedded world models: pretraining from a seed until a checkpoint is accepted.

The seed decides how well a tiny model learns to use a reference, so a checkpoint is only usable once it is
measured: `pretrain_until_accepted` tries seed after seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

from atesd.errors import TrainingError
from atesd.maths.keyed import generator
from atesd.records import Problem
from atesd.world.acceptance import Acceptance, AcceptanceFigures, measure_acceptance
from atesd.world.model import save_world_model, world_config
from atesd.world.problems import COMPLETION_WORDS, MAX_CLAUSES, MESSAGE_WORDS, MIN_CLAUSES, Bools, known_facts
from atesd.world.texts import Mixture, draw_texts

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Made = TypeVar("Made")
Found = TypeVar("Found", bound="DataclassInstance")


@dataclass(frozen=True)
class PretrainRecipe:
    """How a world model is pretrained, and what its checkpoint must show."""

    steps: int = 1400
    batch_size: int = 64
    muon_learning_rate: float = 0.02  # matrices
    adamw_learning_rate: float = 3e-3  # embedding and norms
    muon_weight_decay: float = 0.0
    decay_share: float = 0.3  # last share of the steps: linear decay to 0
    curriculum_share: float = 0.5  # first share of the steps: problems grow from 2 to 6 clauses
    mixture: Mixture = field(default_factory=Mixture)
    acceptance: Acceptance = field(default_factory=Acceptance)


RECIPES: dict[str, PretrainRecipe] = {
    "good": PretrainRecipe(),
    "bad": PretrainRecipe(
        steps=1200,
        mixture=Mixture(reference=0.3, off_track=0.0, late_leaps=0.0, leaps_anywhere=0.0, own_leaps=0.0),
        acceptance=Acceptance(kl_after_mistake=(1.0, math.inf)),
    ),
}
"""good: one checkpoint serves every leap share. bad: without off-track texts the teacher, right by itself, does not
know what to do after a student's mistake, so that in its hands more exposure is worse."""


def pretrain(
    seed: int, recipe: PretrainRecipe, progress: Callable[[int, float], None] | None = None
) -> Qwen3ForCausalLM:
    """A world model pretrained from `seed`; calls `progress(step, loss in nats per target)` after each step.

    Weights and texts are functions of the seed alone; one thread, so that the bits do not depend on the number of
    cores. Raises `TrainingError` on a non-finite loss.
    """
    with one_thread():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator(seed, "pretrain", "weights").integers(2**62)))
            model = Qwen3ForCausalLM(world_config())
        rates = recipe.muon_learning_rate, recipe.adamw_learning_rate
        optimisers = muon_and_adamw(model, *rates, recipe.muon_weight_decay)
        gradient = partial(_add_gradient, model, seed, recipe, known_facts())
        descend(model, optimisers, Descent(seed, recipe.steps, recipe.decay_share), gradient, progress)
    return model


@dataclass(frozen=True)
class Descent:
    """How long a model is pretrained, and how its learning rates rise to their height and fall to 0, linearly."""

    seed: int
    steps: int
    decay_share: float  # the last share of the steps
    warmup_steps: int = 1

    def factor(self, step: int) -> float:
        """That of the learning rates at a step."""
        falling = (self.steps - step) / max(1.0, self.decay_share * self.steps)
        return min(1.0, (step + 1) / self.warmup_steps, falling)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes in one thread, so that the bits do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def descend(
    model: torch.nn.Module,
    optimisers: Sequence[tuple[torch.optim.Optimizer, float]],
    descent: Descent,
    gradient: Callable[[int], float],
    progress: Callable[[int, float], None] | None,
) -> None:
    """Train a model; `gradient(step)` adds the gradient of a step's loss and returns it. Ends in eval mode.

    Raises `TrainingError` on a non-finite loss.
    """
    model.train()
    for step in range(descent.steps):
        value = gradient(step)
        if not math.isfinite(value):
            raise TrainingError(f"pretraining seed {descent.seed}: loss {value} at step {step}; try another seed")
        for optimiser, learning_rate in optimisers:
            optimiser.param_groups[0]["lr"] = learning_rate * descent.factor(step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if progress:
            progress(step, value)
    model.eval()


def _add_gradient(model: Qwen3ForCausalLM, seed: int, recipe: PretrainRecipe, known: Bools, step: int) -> float:
    rng = generator(seed, "pretrain", "texts", step)
    texts = draw_texts(rng, recipe.batch_size, _longest(step, recipe), recipe.mixture, known)
    loss = _text_loss(model, torch.from_numpy(texts.ids), torch.from_numpy(texts.targets))
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _longest(step: int, recipe: PretrainRecipe) -> int:
    """Most clauses of a text at this step: from 2 to 6 over the curriculum."""
    share = step / max(1.0, recipe.curriculum_share * recipe.steps)
    return min(MAX_CLAUSES, MIN_CLAUSES + int(share * (MAX_CLAUSES - MIN_CLAUSES + 1)))


def muon_and_adamw(
    model: Qwen3ForCausalLM, muon_learning_rate: float, adamw_learning_rate: float, muon_weight_decay: float
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms, each with its learning rate."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=muon_weight_decay)
    adamw = torch.optim.AdamW(others, lr=adamw_learning_rate, weight_decay=0.0)
    return [(muon, muon_learning_rate), (adamw, adamw_learning_rate)]


def _text_loss(model: Qwen3ForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the target completion tokens, nats."""
    logits = model(ids[:, :-1], logits_to_keep=COMPLETION_WORDS, use_cache=False).logits
    return F.cross_entropy(logits[targets].float(), ids[:, MESSAGE_WORDS:][targets])


def pretrain_until_accepted(
    seed: int,
    attempts: int,
    recipe: PretrainRecipe,
    problems: Sequence[Problem] = (),
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Qwen3ForCausalLM, int, AcceptanceFigures]:
    """The first checkpoint among seeds `seed`, `seed` + 1, ... that is accepted, its seed and its figures.

    Figures are those of `measure_acceptance`. Calls `progress(seed, step, loss)`. Raises `TrainingError` that lists
    every attempt's figures.
    """
    attempt = partial(_attempt, recipe, problems, progress)
    passes = partial(_passes, recipe.acceptance)
    return first_accepted(range(seed, seed + attempts), attempt, passes, recipe.acceptance)


def _attempt(
    recipe: PretrainRecipe,
    problems: Sequence[Problem],
    progress: Callable[[int, int, float], None] | None,
    seed: int,
) -> tuple[Qwen3ForCausalLM, AcceptanceFigures]:
    model = pretrain(seed, recipe, partial(progress, seed) if progress else None)
    return model, measure_acceptance(model, problems)


def _passes(acceptance: Acceptance, figures: AcceptanceFigures) -> bool:
    return figures.passed(acceptance)


def first_accepted(
    seeds: Sequence[int], attempt: Callable[[int], tuple[Made, Found]], passes: Callable[[Found], bool], asked: object
) -> tuple[Made, int, Found]:
    """What the first seed makes whose figures pass, that seed and its figures.

    Raises `TrainingError` with what was `asked` and the figures of every attempt.
    """
    failures = []
    for seed in seeds:
        made, figures = attempt(seed)
        if passes(figures):
            return made, seed, figures
        failures.append(f"seed {seed}: {asdict(figures)}")
    raise TrainingError(
        f"no checkpoint passed {asked} in {len(seeds)} attempts; raise --attempts\n" + "\n".join(failures)
    )


def pretrain_command(
    seed: int,
    attempts: int,
    out: Path,
    recipe: str = "good",
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """`atesd world pretrain`: make an accepted checkpoint from `seed` on, write it to `out`, return its record.

    The record holds the command that makes it again, the seed that passed, the settings and the figures; it is also
    `out/gates.json`.
    """
    model, passed, figures = pretrain_until_accepted(seed, attempts, RECIPES[recipe], progress=progress)
    record = acceptance_record(recipe, passed, figures)
    save_world_model(model, out, record)
    return record


def acceptance_record(recipe: str, seed: int, figures: AcceptanceFigures) -> dict[str, Any]:
    """What `gates.json` holds: command, seed, figures, settings of the recipe. JSON has no infinity: null."""
    settings = asdict(RECIPES[recipe])
    low, high = RECIPES[recipe].acceptance.kl_after_mistake
    settings["gates"] = settings.pop("acceptance")  # the file's word
    settings["gates"]["kl_after_mistake"] = [low, high if math.isfinite(high) else None]
    command = f"atesd world pretrain {recipe} --seed {seed} --attempts 1"
    return {"command": command, "recipe": recipe, "seed": seed, "figures": asdict(figures), "settings": settings}
