"""Does alignment foresee what one step does? `python -m validation.foresight --out FOLDER`.

In several worlds, at the start and in the middle of training, two things are found for each of five ratios: the
alignment (direction from some rollouts, scored on others), and what truly happens to the student's success on held-out
problems when it takes one plain gradient step on that ratio's loss. The truth is measured without sampling twice:
completions of the student before the step are weighted by how much likelier the step has made them,

    change = mean of (q'(y) / q(y) - 1) (correct(y) - mean correct at its difficulty).

Printed is Spearman's rank correlation over the ratios, and whether the signs agree where the truth is clear of 0.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import torch
from scipy.stats import spearmanr

from atesd.aligned.direction import SuccessDirection
from atesd.aligned.foresight import AlignedForesight
from atesd.aligned.scorer import AlignmentScorer, grouped
from atesd.build import build, close, objective
from atesd.config import AlignmentConfig, Config, load_config
from atesd.engine.interface import Request
from atesd.evaluate.benchmark import student_prompts
from atesd.models.score import Pair, Scorer, completion_logprobs
from atesd.records import Alignment
from atesd.runs import RunFolder, write_atomic
from atesd.train.components import Components
from atesd.train.listeners import Listeners
from atesd.train.loop import Trainer
from atesd.train.rollouts import GradedRollout, rollout_params
from atesd.train.stopwatch import Stopwatch
from atesd.train.update import Distillation, Example, accumulate
from validation.foresight_figure import draw_foresight

WORLDS: dict[str, tuple[str, ...]] = {
    "steps": ("data.leap_share=0",),
    "leaps, q = .25": ("data.leap_share=0.25",),
    "leaps, q = .5": ("data.leap_share=0.5",),
    "leaps, q = 1": ("data.leap_share=1",),
    "leaps anywhere": ("data.leap_probability=0.2",),
    "EMA teacher": ("data.leap_share=0", "teacher.weights=ema", "teacher.decay=0.98"),
    "bad teacher": ("data.leap_share=0",),
}
Part = Literal["last_layer", "last_half", "last_mlp", "features"]
CHEAPER: tuple[Part, ...] = ("last_layer", "last_half", "last_mlp", "features")
BATCHES_FOR_DIRECTION = 4
BATCHES_SCORED = 8
HELD_OUT_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Held:
    """Held-out completions of the student before any step: with log-probabilities, and what each is worth."""

    pairs: tuple[Pair, ...]
    logprobs: tuple[float, ...]
    worth: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Foresight:
    """What was foreseen and what came, per ratio.

    Foreseen: alignment. True: the change of success after a step with one learning rate for all ratios, that at which
    the last ratio's step has the length of the displacement that gave the alignment.
    """

    world: str
    checkpoint: str
    updates: int
    accuracy: float
    ratios: tuple[float, ...]
    foreseen: tuple[float, ...]
    foreseen_errors: tuple[float, ...]
    true: tuple[float, ...]
    true_errors: tuple[float, ...]
    cheaper: Mapping[str, tuple[float, ...]]
    """The same foreseen by fewer parameters (`alignment.parameters`), from the same rollouts."""

    @property
    def rank_correlation(self) -> float:
        """Spearman's, over the ratios."""
        return float(spearmanr(self.foreseen, self.true).statistic)

    def rank_correlation_of(self, parameters: str) -> float:
        """Spearman's, over the ratios, where fewer parameters are read."""
        return float(spearmanr(self.cheaper[parameters], self.true).statistic)

    @property
    def signs_agree(self) -> tuple[int, int]:
        """(ratios whose sign was foreseen, ratios whose true change is clear of 0 by two standard errors)."""
        clear = [
            f * t > 0
            for f, t, error in zip(self.foreseen, self.true, self.true_errors, strict=True)
            if abs(t) > 2 * error
        ]
        return sum(clear), len(clear)


def check(config: Config, world: str, checkpoint: str, updates: int) -> Foresight:
    """Train so many updates as `config` says, then compare what alignment foresees with what one step brings."""
    with trained(config, updates) as components:
        return _compare(components, world, checkpoint, updates)


@contextmanager
def trained(config: Config, updates: int) -> Iterator[Components]:
    """Inside, a run of plain distillation after so many updates."""
    components = build(config)
    components = replace(components, method=plain_distillation(components))
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(components, RunFolder(Path(folder), "foresight"), Listeners(()))
            for update in range(updates):
                trainer.update(update)
        yield components
    finally:
        close(components)


@dataclass(frozen=True, slots=True)
class Fresh:
    """Rollouts beyond those that were trained on: batches for a direction, and others that are scored in every view."""

    given: list[list[GradedRollout]]
    scored: list[GradedRollout]
    students: list[Pair]
    contexts: list[list[tuple[int, ...]]]


def fresh(components: Components, ratios: Sequence[float]) -> Fresh:
    """Of the student as it is."""
    first = components.config.train.num_updates
    batches = [components.sampler.rollouts(first + n) for n in range(BATCHES_FOR_DIRECTION + BATCHES_SCORED)]
    scored = [one for batch in batches[BATCHES_FOR_DIRECTION:] for one in batch]
    contexts = [[components.prompts.view(one.problem, ratio).context for one in scored] for ratio in ratios]
    return Fresh(batches[:BATCHES_FOR_DIRECTION], scored, [one.pair for one in scored], contexts)


def begin(direction: SuccessDirection, rollouts: Sequence[GradedRollout], update: int) -> None:
    """The direction of these rollouts alone."""
    direction.load_state_dict({"attempts": [], "unit": {}, "epsilon": 0.0})
    direction.remember(rollouts)
    direction.renew(update)


def _compare(components: Components, world: str, checkpoint: str, updates: int) -> Foresight:
    config, scorer = components.config, look_ahead(components)
    direction = scorer.direction
    cheaper = {one: _direction(components, one) for one in CHEAPER}
    seen = fresh(components, scorer.ratios)
    for some in (direction, *cheaper.values()):
        begin(some, [one for batch in seen.given for one in batch], config.train.num_updates)
    students, contexts = seen.students, seen.contexts
    foreseen = _overall(scorer, students, contexts)
    by_fewer: dict[str, tuple[float, ...]] = {}
    for name, scorer.direction in cheaper.items():
        by_fewer[name] = _overall(scorer, students, contexts).values
    gradients = {r: gradient(components, students, own) for r, own in zip(scorer.ratios, contexts, strict=True)}
    held = held_out(components)
    rate = direction.epsilon / length(gradients[scorer.ratios[-1]])
    true = [true_change(components, held, gradients[ratio], rate) for ratio in scorer.ratios]
    return Foresight(
        world,
        checkpoint,
        updates,
        fmean(one.verdict == "correct" for one in seen.scored),
        scorer.ratios,
        foreseen.values,
        foreseen.errors,
        tuple(change for change, _ in true),
        tuple(error for _, error in true),
        by_fewer,
    )


def look_ahead(components: Components) -> AlignmentScorer:
    """The look-ahead of a config that has one."""
    if not isinstance(components.foresight, AlignedForesight):
        raise ValueError("the config has no look-ahead; set exposure.kind: aligned or loss.gate: aligned")
    return components.foresight.scorer


def _direction(components: Components, parameters: Part) -> SuccessDirection:
    """A direction by fewer parameters than the config's."""
    keeps = None if parameters == "features" else parameters
    config, scorer = components.config, Scorer(components.loaded, components.weights, keeps=keeps)
    alignment = AlignmentConfig(parameters=parameters, min_correct=config.alignment.min_correct)
    asked = config.model_copy(update={"alignment": alignment})
    return SuccessDirection(components.weights, scorer, components.encoder, asked)


def _overall(
    scorer: AlignmentScorer, students: Sequence[Pair], contexts: Sequence[Sequence[tuple[int, ...]]]
) -> Alignment:
    rows = scorer.by_ratio(students, contexts)
    return grouped(scorer.ratios, rows, [""] * len(rows))[""]


def gradient(
    components: Components, students: Sequence[Pair], contexts: Sequence[tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The gradient of the loss on these rollouts under these teacher contexts."""
    examples = [
        Example(context, completion, seen) for (context, completion), seen in zip(students, contexts, strict=True)
    ]
    accumulate(plain_distillation(components), examples, components.plan)
    found = {}
    for name, parameter in components.weights.trained.items():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


def plain_distillation(components: Components) -> Distillation:
    """Distillation of every token, whatever gate the config has."""
    config, scorer = components.config, components.scorer
    watch, chunk = Stopwatch(scorer.device), config.loss.chunk_tokens
    return Distillation(scorer, watch, components.teacher, objective(config), chunk_tokens=chunk)


def held_out(components: Components) -> Held:
    """Completions of the test problems by the student as it is, keyed, graded, each at the worth of its verdict."""
    if components.checker is None:
        raise ValueError("success is what a checker says; set data.checker")
    problems = components.problems.test
    prompts = student_prompts(problems, components.encoder, components.renderer)
    seed = components.config.train.seed
    requests = [
        Request(problem.id, k, prompt, (seed, "foresight", problem.id, k))
        for problem, prompt in zip(problems, prompts, strict=True)
        for k in range(HELD_OUT_SAMPLES)
    ]
    rollouts = components.engine.complete(requests, rollout_params(components.config))
    asked = [problem for problem in problems for _ in range(HELD_OUT_SAMPLES)]
    texts = [components.encoder.decode(rollout.completion_ids) for rollout in rollouts]
    verdicts = components.checker.check([(text, p.answer) for text, p in zip(texts, asked, strict=True)])
    correct = [float(verdict == "correct") for verdict in verdicts]
    by_level: dict[int, list[float]] = defaultdict(list)
    for problem, value in zip(asked, correct, strict=True):
        by_level[problem.difficulty].append(value)
    worth = tuple(value - fmean(by_level[p.difficulty]) for value, p in zip(correct, asked, strict=True))
    pairs = tuple((rollout.prompt_ids, rollout.completion_ids) for rollout in rollouts)
    return Held(pairs, _sums(components, pairs), worth)


def true_change(
    components: Components, held: Held, gradient: dict[str, torch.Tensor], rate: float
) -> tuple[float, float]:
    """Change of success on the held-out problems after one step of -rate * gradient, and its standard error."""
    with components.weights.moved(gradient, -rate):
        after = _sums(components, held.pairs)
    weights = (torch.tensor(after) - torch.tensor(held.logprobs)).exp() - 1
    changes = (weights * torch.tensor(held.worth)).tolist()
    return fmean(changes), stdev(changes) / len(changes) ** 0.5


def _sums(components: Components, pairs: Sequence[Pair]) -> tuple[float, ...]:
    """Log-probability of each completion under the student at the rollout temperature, nats."""
    found = completion_logprobs(
        components.scorer, pairs, temperature=components.config.sampling.temperature, micro_batch_size=64
    )
    return tuple(float(row.double().sum()) for row in found)


def length(gradient: dict[str, torch.Tensor]) -> float:
    """Of all tensors as one vector."""
    return float(torch.stack([value.double().square().sum() for value in gradient.values()]).sum().sqrt())


def main() -> None:
    """Check every world and checkpoint, at the start and in the middle; write foresight.json and the figure."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--out", type=Path, default=Path("runs/foresight"))
    asked.add_argument("--checkpoints", default="a,b,c", help="of the good worlds; default a,b,c")
    asked.add_argument("--updates", type=int, default=50, help="the middle of training; default 50")
    asked.add_argument("--set", action="append", default=[], help="a.b=value, for all")
    given = asked.parse_args()
    torch.set_num_threads(1)
    found = []
    for world, overrides in WORLDS.items():
        checkpoints = ["bad"] if world == "bad teacher" else given.checkpoints.split(",")
        for checkpoint in checkpoints:
            for updates in (0, given.updates):
                config = load_config("micro", [*settings(overrides, checkpoint), *given.set])
                seen = check(config, world, checkpoint, updates)
                agree, clear = seen.signs_agree
                print(
                    f"{world}, checkpoint {checkpoint}, after {updates} updates: rank correlation "
                    f"{seen.rank_correlation:.2f}"
                    f"{''.join(f', {one} {seen.rank_correlation_of(one):.2f}' for one in CHEAPER)}; "
                    f"signs {agree} of {clear}, foreseen {_row(seen.foreseen)}, "
                    f"true {_row(seen.true)}",
                    flush=True,
                )
                found.append(seen)
    given.out.mkdir(parents=True, exist_ok=True)
    write_atomic(given.out / "foresight.json", json.dumps([asdict(seen) for seen in found], indent=1).encode())
    draw_foresight(found, given.out)
    print(f"figure: {given.out / 'foresight.svg'}, {given.out / 'foresight.png'}")


def settings(overrides: Sequence[str], checkpoint: str) -> list[str]:
    """The run whose middle is looked at: half of the reference shown, so that no ratio has been used up."""
    return [
        *overrides,
        f"model.path=world:{checkpoint}",
        "exposure.kind=fixed",
        "exposure.reveal_ratio=0.5",
        "loss.gate=aligned",
        "alignment.min_correct=1",
        "train.num_updates=100",
        "train.seed=50",
    ]


def _row(values: Sequence[float]) -> str:
    return " / ".join(f"{1e3 * value:.1f}" for value in values)


if __name__ == "__main__":
    main()
