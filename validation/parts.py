"""Which part of the parameters orders the ratios, and how much of an error is noise? `python -m validation.parts`.

As `validation.foresight`, with every part judged at once: the alignment by a part is a sum of inner products of the
direction with the gradient of a ratio's loss, parameter by parameter. Each direction is found from all rollouts and
from each half of them: where a part, or all parameters, do not agree with themselves, nothing is told of a part.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch
from scipy.stats import spearmanr

from atesd.build import build, close
from atesd.config import Config, load_config
from atesd.runs import RunFolder
from atesd.train.listeners import Listeners
from atesd.train.loop import Trainer
from validation.foresight import (
    BATCHES_FOR_DIRECTION,
    BATCHES_SCORED,
    WORLDS,
    gradient,
    held_out,
    length,
    look_ahead,
    plain_distillation,
    settings,
    true_change,
)

_MLP = ("layers.1.mlp.", "layers.1.post_attention_layernorm.", "model.norm.")
_OUTPUT, _VALUE = "layers.1.self_attn.o_proj.", "layers.1.self_attn.v_proj."
PARTS: Mapping[str, tuple[str, ...]] = {
    "all": ("",),
    "last_layer": ("layers.1.", "model.norm."),
    "last_mlp": _MLP,
    "last_mlp, output projection": (*_MLP, _OUTPUT),
    "last_mlp, output and value projection": (*_MLP, _OUTPUT, _VALUE),
    "last attention": ("layers.1.self_attn.", "layers.1.input_layernorm."),
    "MLPs of both layers": (".mlp.", ".post_attention_layernorm.", "model.norm."),
    "first layer": ("layers.0.",),
    "embedding and head, tied": ("embed_tokens.",),
}
"""Pieces of the names of their parameters, in the embedded worlds' two layers."""
ENOUGH, KNOWN = 0.8, 0.9
"""Spearman's rank correlation that is asked of a part, where all parameters together have the second."""

Row = tuple[float, ...]
"""A number per ratio."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What each part foresees per ratio, from all rollouts and from halves of them, two that share none in turn."""

    true: Row
    whole: Mapping[str, Row]
    halves: Mapping[str, Sequence[Row]]


def orders(config: Config, updates: int) -> Orders:
    """What the parts foresee after so many updates, and what one step truly does."""
    components = build(config)
    components = replace(components, method=plain_distillation(components))
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(components, RunFolder(Path(folder), "parts"), Listeners(()))
            for update in range(updates):
                trainer.update(update)
        scorer, first = look_ahead(components), config.train.num_updates
        given = [components.sampler.rollouts(first + n) for n in range(BATCHES_FOR_DIRECTION)]
        scored = range(first + BATCHES_FOR_DIRECTION, first + BATCHES_FOR_DIRECTION + BATCHES_SCORED)
        rollouts = [one for update in scored for one in components.sampler.rollouts(update)]
        students = [one.pair for one in rollouts]
        contexts = [[components.prompts.view(one.problem, r).context for one in rollouts] for r in scorer.ratios]
        gradients = [gradient(components, students, seen) for seen in contexts]

        def foreseen(batches: Sequence[int]) -> dict[str, Row]:
            scorer.direction.load_state_dict({"attempts": [], "unit": {}, "epsilon": 0.0})
            scorer.direction.remember([one for n in batches for one in given[n]])
            scorer.direction.renew(first)
            return by_part(scorer.direction.unit, gradients)

        whole, places = foreseen(range(len(given))), set(range(len(given)))
        rate = scorer.direction.epsilon / length(gradients[-1])
        pairs = [half for half in combinations(sorted(places), len(given) // 2) if 0 in half]
        halves = [foreseen(half) for one in pairs for half in (one, sorted(places - set(one)))]
        held = held_out(components)
        true = tuple(true_change(components, held, one, rate)[0] for one in gradients)
        return Orders(true, whole, {part: [one[part] for one in halves] for part in PARTS})
    finally:
        close(components)


def by_part(unit: Mapping[str, torch.Tensor], gradients: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Row]:
    """The alignment of every ratio by each part, up to the length of the direction there."""
    products = [{name: -float((unit[name] * value).sum()) for name, value in one.items()} for one in gradients]
    return {
        part: tuple(sum(value for name, value in one.items() if any(p in name for p in pieces)) for one in products)
        for part, pieces in PARTS.items()
    }


def table(found: Sequence[Orders]) -> list[str]:
    """A line per part, over the cases that all parameters order."""
    known = [one for one in found if _rank(one.whole["all"], one.true) > KNOWN - 0.01]
    lines = [f"{len(known)} of {len(found)} cases have {KNOWN} by all parameters"]
    for part in PARTS:
        whole = [_rank(one.whole[part], one.true) for one in known]
        half = [_rank(row, one.true) for one in known for row in one.halves[part]]
        apart = [_rank(*one.halves[part][n : n + 2]) for one in known for n in range(0, len(one.halves[part]), 2)]
        lines.append(
            f"{part}: at least {ENOUGH} in {sum(map(_enough, whole))}, the lowest {min(whole, default=0):.1f}; from "
            f"half of the rollouts {_share(half)}; both halves agree {_share(apart)}"
        )
    return lines


def _rank(one: Row, other: Row) -> float:
    return float(spearmanr(one, other).statistic)


def _enough(correlation: float) -> bool:
    return correlation > ENOUGH - 0.01


def _share(correlations: Sequence[float]) -> str:
    return f"{fmean(map(_enough, correlations or [0.0])):.2f}"


def main() -> None:
    """Every world, at the start and in the middle, on a tuning seed."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--seed", type=int, default=100)
    asked.add_argument("--checkpoints", default="a,b,c", help="of the good worlds; default a,b,c")
    asked.add_argument("--worlds", nargs="*", default=list(WORLDS), choices=list(WORLDS), help="default: all")
    given = asked.parse_args()
    torch.set_num_threads(1)
    found = []
    for world in given.worlds:
        for checkpoint in ["bad"] if world == "bad teacher" else given.checkpoints.split(","):
            for updates in (0, 50):
                words = [*settings(WORLDS[world], checkpoint), f"train.seed={given.seed}"]
                one = orders(load_config("micro", words), updates)
                ranks = ", ".join(f"{part} {_rank(row, one.true):.1f}" for part, row in one.whole.items())
                print(f"{world}, checkpoint {checkpoint}, after {updates} updates: {ranks}", flush=True)
                found.append(one)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
