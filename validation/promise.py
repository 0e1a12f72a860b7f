"""Does the token gate keep what it promises? `python -m validation.promise --set alignment.parameters=last_layer`.

The alignment of the tokens that a gate keeps is what it promises along its own direction, from the rollouts of one
hold. A second direction, from sixteen times as many other rollouts, judges the same gradient: what is left of the
promise is not the noise of the first. The same for a gate along a direction as good as the judge's; and what truly
happens to success on validation problems after one plain step, where first order ends. In leaps and under the bad
teacher, at the start and after some updates of the gated run; right and wrong rollouts also apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from atesd.aligned.scorer import AlignmentScorer
from atesd.aligned.selectors import AlignedGate
from atesd.build import build, close, objective
from atesd.config import Config, load_config
from atesd.runs import RunFolder
from atesd.train.components import Components
from atesd.train.listeners import Listeners
from atesd.train.loop import Trainer
from atesd.train.stopwatch import Stopwatch
from atesd.train.update import Distillation, EveryToken, Example, Selector, StepMeters, accumulate
from validation.foresight import held_out, look_ahead, true_change

WORLDS = {"bad teacher": ("bad", "data.leap_share=0"), "leaps, q = .5": ("b", "data.leap_share=0.5")}
FAR = 10_000
"""Batches from here on are those of no run."""
HOLD, MANY, SCORED = 4, 64, 8
"""Batches that give a direction, as one hold does and far more; batches whose tokens are gated."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Kept:
    """A loss with or without a gate: what its direction promises, what the judge finds, and what a step truly does.

    Per unit of step; `true` in shares of success with its standard error, after a step as long as the displacement.
    """

    share: float
    promised: float | None
    judged: float
    true: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Promise:
    """What became of a gate's promise.

    `cosine`: of its direction with the judge's. `signs`: the share of the tokens on which both gates agree. `right` and
    `wrong`: the mean alignment along the better direction of rollouts that were so.
    """

    updates: int
    accuracy: float
    cosine: float
    signs: float
    right: float
    wrong: float
    every_token: Kept
    gate: Kept
    better_gate: Kept


def promise(components: Components, updates: int) -> Promise:
    """Measure it on the student as it is; the look-ahead's direction is another one afterwards."""
    scorer = look_ahead(components)
    hold, better = _direction(components, FAR, HOLD), _direction(components, FAR + HOLD, MANY)
    judge = _direction(components, FAR + HOLD + MANY, MANY)
    examples = _examples(components, FAR + HOLD + 2 * MANY)
    plain, _ = _gradient(components, examples, EveryToken())
    gated, own = _gated(components, examples, scorer, hold)
    better_gated, found = _gated(components, examples, scorer, better)
    held = held_out(replace(components, problems=replace(components.problems, test=components.problems.validation)))
    rate = judge[1] / float(_dot(plain, plain)) ** 0.5
    kept = [
        Kept(share, promised, -_dot(judge[0], slope), true_change(components, held, slope, rate))
        for share, promised, slope in (
            (1.0, None, dict(plain)),
            (own.means["kept"], -_dot(hold[0], gated), gated),
            (found.means["kept"], -_dot(better[0], better_gated), better_gated),
        )
    ]
    pairs = zip(_flat(own.tokens["kept"]), _flat(found.tokens["kept"]), strict=True)
    by_verdict = {
        right: [fmean(row) for row, e in zip(found.tokens["alignment"], examples, strict=True) if e.correct is right]
        for right in (True, False)
    }
    return Promise(
        updates,
        fmean(example.correct for example in examples),
        _dot(hold[0], judge[0]),
        fmean(a == b for a, b in pairs),
        fmean(by_verdict[True]),
        fmean(by_verdict[False]),
        *kept,
    )


def _direction(components: Components, first: int, batches: int) -> tuple[Tensors, float]:
    """The direction from so many batches of fresh rollouts, and how far it displaces."""
    direction = look_ahead(components).direction
    direction.load_state_dict({"attempts": [], "unit": {}, "epsilon": 0.0})
    for batch in range(first, first + batches):
        direction.remember(components.sampler.rollouts(batch))
    direction.renew(first)
    if not direction.known:
        raise ValueError("success has no direction: no rollout is right; lower alignment.min_correct")
    return dict(direction.unit), direction.epsilon


def _examples(components: Components, first: int) -> list[Example]:
    """The rollouts of some batches at full exposure."""
    rollouts = [one for batch in range(first, first + SCORED) for one in components.sampler.rollouts(batch)]
    return [
        Example(*one.pair, components.prompts.view(one.problem, 1.0).context, correct=one.verdict == "correct")
        for one in rollouts
    ]


def _gated(
    components: Components, examples: Sequence[Example], scorer: AlignmentScorer, along: tuple[Tensors, float]
) -> tuple[dict[str, Tensor], StepMeters]:
    """The gradient of the loss behind a gate along a direction, and its meters."""
    scorer.direction.load_state_dict({"attempts": [], "unit": along[0], "epsilon": along[1]})
    return _gradient(components, examples, AlignedGate(scorer))


def _gradient(
    components: Components, examples: Sequence[Example], selector: Selector
) -> tuple[dict[str, Tensor], StepMeters]:
    watch = Stopwatch(components.scorer.device)
    method = Distillation(components.scorer, watch, components.teacher, objective(components.config), selector)
    meters = accumulate(method, examples, components.plan)
    found = {name: p.grad.clone() for name, p in components.weights.trained.items() if p.grad is not None}
    for parameter in components.weights.trained.values():
        parameter.grad = None
    return found, meters


def _dot(one: Tensors, other: Tensors) -> float:
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one.keys() & other.keys())


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def measured(config: Config, updates: Sequence[int]) -> list[Promise]:
    """The promise after each of so many updates of a run, in ascending order."""
    components, found, done = build(config), [], 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(components, RunFolder(Path(folder), "promise"), Listeners(()))
            for stop in updates:
                for update in range(done, stop):
                    trainer.update(update)
                done = stop
                state = components.foresight.state_dict()
                found.append(promise(components, stop))
                components.foresight.load_state_dict(state)
    finally:
        close(components)
    return found


def main() -> None:
    """Print every world at the start and after some updates, a line of JSON each."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--updates", type=int, default=40, help="the middle of training; default 40")
    asked.add_argument("--set", action="append", default=[], help="a.b=value, for all")
    given = asked.parse_args()
    torch.set_num_threads(1)
    for world, (checkpoint, words) in WORLDS.items():
        gated = ["exposure.kind=full", "loss.gate=aligned", "alignment.min_correct=1", "train.seed=100"]
        config = load_config("micro", [words, f"model.path=world:{checkpoint}", *gated, *given.set])
        for one in measured(config, (0, given.updates)):
            print(json.dumps({"world": world, **asdict(one)}), flush=True)


if __name__ == "__main__":
    main()
