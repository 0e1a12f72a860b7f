"""What each rank runs for test_sharding.py: python shard_program.py FOLDER, with torchrun's environment.

`three_updates` is the same code for one process, whose weights are whole, and for several, whose weights are divided.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from atesd.config import (
    Config,
    EmaTeacher,
    FrozenTeacher,
    LiveTeacher,
    ModelConfig,
    RefreshedTeacher,
    TeacherConfig,
    TrainConfig,
)
from atesd.engine.factory import configured_engine
from atesd.engine.layers import unsupported
from atesd.maths.divergence import Objective
from atesd.models.load import LoadedModel, _enable_checkpointing, save_model
from atesd.models.ranks import Ranks, process_group
from atesd.models.score import Scorer
from atesd.models.teacher import Teacher
from atesd.models.weights import Weights, weights_of
from atesd.train.optimiser import Optimiser
from atesd.train.stopwatch import Stopwatch
from atesd.train.update import BatchPlan, Distillation, Example, Likelihood, Method, StepMeters, accumulate
from engine_contract import PLAIN, ids_of, requests_of
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
    rows: int = 7
    checkpointing: bool = False
    answers: bool = False

    @property
    def name(self) -> str:
        options = ["checkpointing"] * self.checkpointing + ["answers"] * self.answers + [f"{self.rows} rows"]
        return " ".join((self.model, self.teacher, self.method, *options))


MODELS = ("tied", "untied", "tied adapter", "untied adapter")
CASES = [
    *(Case(model, teacher) for model in MODELS for teacher in TEACHERS),
    *(Case(model, method=method) for model in MODELS for method in ("sft", "grpo")),
    *(Case(model, "ema", checkpointing=True) for model in MODELS),
    *(Case(model, "ema", answers=True) for model in ("tied", "untied adapter")),
    Case("tied", rows=1),  # rank 1 has none
]


CASES_OF_NODES = [Case("tied", "ema"), Case("untied", "refresh"), Case("tied adapter", rows=2)]


def model_of(case: Case, folder: Path) -> LoadedModel:
    """The model of a case in float64."""
    tied = case.model.startswith("tied")
    if "adapter" not in case.model:
        loaded = tiny_model() if tied else untied()
    else:
        loaded = adapted(folder / case.model.replace(" ", "-"))
    loaded.model.double()
    if case.checkpointing:
        _enable_checkpointing(loaded.model)
    return loaded


def examples_of(seed: int, count: int) -> list[Example]:
    """Rows of very different lengths."""
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
    answers = [e.context[:2] if case.answers and i % 3 else () for i, e in enumerate(examples)]
    return [replace(e, advantage=advantages[i % len(advantages)], answer=answers[i]) for i, e in enumerate(examples)]


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
        meters = accumulate(method, asked(case, examples_of(update, case.rows)), plan)
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
    told: dict[str, Any] = {"loss": meters.loss, "norm": norm, **meters.means, "grounding": meters.grounding or 0.0}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in told.items()}


def run_cases(cases: Sequence[Case], sharding: Literal["full", "hybrid"], ranks: Ranks, folder: Path) -> None:
    """Every case, its results written by rank 0."""
    for case in cases:
        loaded = replace(model_of(case, folder), ranks=ranks)
        found = three_updates(case, loaded, ModelConfig(sharding=sharding))
        if ranks.first:
            save_file(found, folder / f"{case.name}.safetensors")


def bases(folder: Path) -> None:
    """The models below the adapters, which all ranks read."""
    tiny_folder(folder / "tied-adapter")
    save_model(untied(), folder / "untied-adapter")


def divided(name: str, folder: Path, ranks: Ranks) -> tuple[LoadedModel, Weights]:
    """A float64 model whose weights these ranks divide."""
    loaded = replace(model_of(Case(name), folder), ranks=ranks)
    return loaded, weights_of(loaded, ModelConfig(sharding="full"))


def others_of(weights: Weights) -> dict[str, Tensor]:
    """Other values of every trained tensor, the same however it is divided: this rank's rows."""
    found = {}
    for name, part in sorted(weights.parts().items()):
        rows = weights.rows(part.shape[0])
        whole = torch.randn(part.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
        found[name] = 0.1 * whole[rows]
    return found


def states(loaded: LoadedModel, weights: Weights) -> dict[str, Tensor]:
    """Hidden states and logits of the model, as itself and in every other form; what is said of it afterwards."""
    scorer = Scorer(loaded, weights)
    pairs = [example.student_pair for example in examples_of(3, 4)]
    found: dict[str, Tensor] = {}
    contexts = {
        "plain": nullcontext,
        "exchanged": partial(weights.exchanged, others_of(weights)),
        "moved": partial(weights.moved, others_of(weights), 0.5),
        "whole": weights.whole,
        "after": nullcontext,
    }
    with torch.no_grad():
        for name, context in contexts.items():
            with context():
                hidden, head = scorer.hidden(pairs), scorer.head()
                found[f"hidden {name}"] = hidden
            scorer.hidden(pairs)  # other layers are gathered into the memory of these
            found[f"logits {name}"] = head.logits(found[f"hidden {name}"])
        with weights.whole(), weights.exchanged(others_of(weights)):
            found["hidden whole exchanged"] = scorer.hidden(pairs)
    return found


def rollouts_of(loaded: LoadedModel, weights: Weights) -> list[tuple[int, ...]]:
    """What the engine that the settings choose writes with these weights."""
    engine = configured_engine(loaded, Config(), weights)
    return ids_of(engine.complete(requests_of([4, 9, 2, 7, 5]), PLAIN))


def facts(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """What must be as with whole weights, and is written by rank 0."""
    found: dict[str, Any] = {}
    for name in MODELS:
        loaded, weights = divided(name, folder, ranks)
        seen = states(loaded, weights)
        pairs = [example.student_pair for example in examples_of(3, 4)]
        with weights.whole(), torch.no_grad():
            for _ in range(5 if ranks.first else 2):  # uneven numbers of passes
                Scorer(replace(loaded, ranks=Ranks()), weights).hidden(pairs)
        found[name] = {
            "rollouts": rollouts_of(loaded, weights),
            "builtin": unsupported(loaded.model) is None,
        }
        saved = weights.saved()  # of the weights before the update of `held_bytes`
        own_bytes = held_bytes(loaded, weights)
        found[name]["bytes"] = ranks.gather(partial(list, own_bytes))
        if ranks.first:
            save_file(seen, folder / f"{name} states.safetensors")
            save_model(loaded, folder / f"{name} saved", saved)
    return found


def held_bytes(loaded: LoadedModel, weights: Weights) -> list[int]:
    """After an update with an EMA teacher: bytes of this rank's weights, moments and teacher."""
    scorer = Scorer(loaded, weights)
    method, teacher = method_of(Case("tied", "ema"), scorer, weights)
    optimiser = Optimiser(weights.trained, TRAIN)
    accumulate(method, examples_of(0, 3), BatchPlan("sequence", 2))
    gradients = [weights.part(p.grad).tensor for p in weights.trained.values() if p.grad is not None]
    grown = bytes_of(gradients)
    weights.add_up_gradients()
    optimiser.step(0, 0.0)
    state: Any = optimiser.state_dict()
    moments = [weights.part(of[key]).tensor for of in state["state"].values() for key in ("exp_avg", "exp_avg_sq")]
    values: Any = teacher.state_dict()["values"]
    student = [part.tensor for part in weights.parts().values()]
    return [bytes_of(student), grown, bytes_of(moments), bytes_of(values.values())]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def of_nodes(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Whether nodes agree while they hold the same, and once one value of the second node is another."""
    loaded = replace(model_of(Case("tied"), folder), ranks=ranks)
    weights = weights_of(loaded, ModelConfig(sharding="hybrid"))
    before = weights.agreement()
    if ranks.rank == 3:
        weights.parts()["model.norm.weight"].tensor[0] += 1
    after = weights.agreement()
    return {
        "agree": ranks.gather(partial(str, before)),
        "differ": ranks.gather(partial(str, after)),
        "rows": ranks.gather(partial(first_rows, weights)),
    }


def first_rows(weights: Weights) -> list[int]:
    """Where this rank's rows begin and end in the embedding."""
    part = weights.parts()["model.embed_tokens.weight"]
    return [part.first_row, part.first_row + len(part.tensor), part.shape[0]]


def main(folder: Path, sharding: str = "full") -> None:
    with process_group("cpu") as ranks:
        if sharding == "hybrid":
            run_cases(CASES_OF_NODES, "hybrid", ranks, folder)
            found = of_nodes(ranks, folder)
        else:
            run_cases(CASES, "full", ranks, folder)
            found = facts(ranks, folder)
        if ranks.first:
            (folder / "facts.json").write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
