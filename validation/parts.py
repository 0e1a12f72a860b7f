"""Which part of the parameters orders the ratios, and how much of an error is noise? `python -m validation.parts`.

As `validation.foresight`, with every part judged at once: the alignment by a part is a sum of inner products of the
direction with the gradient of a ratio's loss, parameter by parameter. Each direction is found from all rollouts and
from each half of them: where a part, or all parameters, do not agree with themselves, nothing is told of a part.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import torch
from scipy.stats import spearmanr

from atesd.config import Config, load_config
from validation.foresight import (
    WORLDS,
    begin,
    fresh,
    gradient,
    held_out,
    length,
    look_ahead,
    settings,
    trained,
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
    with trained(config, updates) as components:
        scorer, first = look_ahead(components), config.train.num_updates
        seen = fresh(components, scorer.ratios)
        gradients = [gradient(components, seen.students, contexts) for contexts in seen.contexts]

        def foreseen(batches: Sequence[int]) -> dict[str, Row]:
            begin(scorer.direction, [one for n in batches for one in seen.given[n]], first)
            return by_part(scorer.direction.unit, gradients)

        whole, places = foreseen(range(len(seen.given))), set(range(len(seen.given)))
        rate = scorer.direction.epsilon / length(gradients[-1])
        pairs = [half for half in combinations(sorted(places), len(places) // 2) if 0 in half]
        halves = [foreseen(half) for one in pairs for half in (one, sorted(places - set(one)))]
        held = held_out(components)
        true = tuple(true_change(components, held, one, rate)[0] for one in gradients)
        return Orders(true, whole, {part: [one[part] for one in halves] for part in PARTS})


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
