"""What each rank runs for test_sharding.py: python shard_program.py FOLDER, with torchrun's environment.

`three_updates` is the same code for one process, whose weights are whole, and for several, whose weights are divided.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from atesd.config import (
    EmaTeacher,
    FrozenTeacher,
    LiveTeacher,
    ModelConfig,
    RefreshedTeacher,
    TeacherConfig,
    TrainConfig,
)
from atesd.maths.divergence import Objective
from atesd.models.load import LoadedModel
from atesd.models.ranks import Ranks, process_group
from atesd.models.score import Scorer
from atesd.models.sharding import weights_of
from atesd.models.teacher import Teacher
from atesd.models.weights import Weights
from atesd.train.optimiser import Optimiser
from atesd.train.stopwatch import Stopwatch
from atesd.train.update import BatchPlan, Distillation, Example, Likelihood, Method, StepMeters, accumulate
from tiny import tiny_folder, tiny_model
from weights_contract import adapted, untied

TRAIN = TrainConfig(learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.01, num_updates=4)
TEACHERS: dict[str, TeacherConfig] = {
    "frozen": FrozenTeacher(),
    "ema": EmaTeacher(decay=0.9),
    "live": LiveTeacher(),
    "refresh": RefreshedTeacher(every=2),
}


@dataclass(frozen=True)
class Case:
    """One training of three updates."""

    model: str
    teacher: str = "frozen"
    method: str = "distill"

    @property
    def name(self) -> str:
        return f"{self.model} {self.teacher} {self.method}"


CASES = [Case(model, teacher) for model in ("tied", "untied", "tied adapter", "untied adapter") for teacher in TEACHERS]


def model_of(case: Case, folder: Path) -> LoadedModel:
    """The model of a case in float64."""
    tied = case.model.startswith("tied")
    if "adapter" not in case.model:
        loaded = tiny_model() if tied else untied()
    else:
        loaded = adapted(folder / case.model.replace(" ", "-"))
    loaded.model.double()
    return loaded


def examples_of(seed: int, count: int = 7) -> list[Example]:
    """Rows of very different lengths, an odd number of them."""
    source = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(source.randrange(2, 30) for _ in range(source.randint(least, most)))

    found = []
    for row in range(count):
        context = tokens(3, 20)
        completion, more = tokens(1, 25), tokens(2, 30)
        found.append(Example(context, completion, context + more, 0.0, (), (seed, row)))
    return found


def method_of(case: Case, scorer: Scorer, weights: Weights) -> tuple[Method, Teacher]:
    """The loss of a case, and its teacher."""
    teacher = Teacher(weights, TEACHERS[case.teacher])
    watch = Stopwatch(scorer.device)
    if case.method == "distill":
        return Distillation(scorer, watch, teacher, Objective("forward_kl")), teacher
    return Likelihood(scorer, watch), teacher


def asked(case: Case, examples: Sequence[Example]) -> list[Example]:
    """The examples with what a method wants of them."""
    advantages = {"sft": (1.0,), "grpo": (1.0, -0.5, 0.0), "distill": (0.0,)}[case.method]
    return [replace(e, advantage=advantages[i % len(advantages)]) for i, e in enumerate(examples)]


def whole_of(tensor: Tensor) -> Tensor:
    """All rows of a tensor, copied."""
    found = tensor.detach()
    return (found.full_tensor() if isinstance(found, DTensor) else found).clone()


def three_updates(case: Case, loaded: LoadedModel, config: ModelConfig) -> dict[str, Tensor]:
    """Losses, norms, meters, the second update's gradients and the weights and moments after the third."""
    weights = weights_of(loaded, config)
    scorer = Scorer(loaded, weights)
    method, teacher = method_of(case, scorer, weights)
    optimiser = Optimiser(weights.trained, TRAIN)
    plan = BatchPlan("sequence", 2)
    found: dict[str, Tensor] = {}
    for update in range(3):
        meters = accumulate(method, asked(case, examples_of(update)), plan)
        weights.add_up_gradients()
        if update == 1:
            found |= {f"gradient {name}": whole_of(p.grad) for name, p in weights.trained.items() if p.grad is not None}
        step = optimiser.step(update, meters.loss)
        teacher.after_update(update + 1)
        found |= {f"{name} {update}": value for name, value in numbers(meters, step.grad_norm).items()}
    found |= {f"weight {name}": whole_of(p) for name, p in weights.trained.items()}
    return found


def numbers(meters: StepMeters, norm: float) -> dict[str, Tensor]:
    """What an update measured."""
    told: dict[str, Any] = {"loss": meters.loss, "norm": norm, **meters.means}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in told.items()}


def run_cases(ranks: Ranks, folder: Path) -> None:
    """Every case, its results written by rank 0."""
    for case in CASES:
        loaded = replace(model_of(case, folder), ranks=ranks)
        found = three_updates(case, loaded, ModelConfig(sharding="full"))
        if ranks.first:
            save_file(found, folder / f"{case.name}.safetensors")


def bases(folder: Path) -> None:
    """The models below the adapters, which all ranks read."""
    tiny_folder(folder / "tied-adapter")
    from atesd.models.load import save_model

    save_model(untied(), folder / "untied-adapter")


def main(folder: Path) -> None:
    with process_group("cpu") as ranks:
        run_cases(ranks, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
