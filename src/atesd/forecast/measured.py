"""How long completions are where somebody has measured it, of a model and its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atesd.config import Config


@dataclass(frozen=True, slots=True)
class Completions:
    """Of a student before training: mean tokens, the share cut off at `most` tokens if it is known, and by what."""

    mean: float
    truncated: float | None
    most: int
    by: str


COMPLETIONS: Mapping[tuple[str, str], Completions] = {
    ("world", "world"): Completions(14.0, 0.0, 40, "600 completions of the embedded worlds"),
    ("smollm2", "gsm_symbolic"): Completions(146, 0.75, 160, "48 problems, greedy; docs/results.md"),
    ("runs/smollm2-sums-start/adapter", "arithmetic"): Completions(38, None, 48, "600 completions; docs/results.md"),
}
"""By `model.path` (all of the embedded worlds are one) and `data.source`."""


def completions_line(config: Config) -> str:
    """Whether `sampling.completion_tokens` is known to be enough, or a guess and what measures it; empty for SFT."""
    if config.train.method == "sft":
        return ""
    key = config.model.path.partition(":")[0], config.data.source_name
    most, found = config.sampling.completion_tokens, COMPLETIONS.get(key)
    if found is None:
        return (
            f"completions: {most:,} tokens is a guess for this model and data; `atesd profile` of this recipe measures "
            "how long they are and how many are cut off"
        )
    cut = "" if found.truncated is None else f", {found.truncated:.0%} cut off at {found.most}"
    return f"completions: measured before training, mean {found.mean:g} tokens{cut} ({found.by})"
