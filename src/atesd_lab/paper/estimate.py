"""What the cells of a scale on real models would take, from arithmetic alone: `atesd reproduce --dry-run`.

Decoding a token of a batch reads all weights (2 bytes each) and the cache of every row so far; scoring takes 2 N
floating-point operations per token, a student's pass with its gradient and recomputed activations 8 N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, Strict, model_validator

from atesd.config import Component, Config, with_overrides
from atesd.forecast.devices import kind_named
from atesd.table import Table
from atesd.text import span
from atesd_lab.sweep.jobs import Scoring
from atesd_lab.sweep.plan import Cell

GIB = 2**30
BYTES = 4  # of a trained parameter and of each of its two moments
SUNDRIES = 20 * 2**20  # bytes of a run folder's rows, samples and tokenizer; micro's take up to 2.4 MB


Share = Annotated[float, Field(gt=0, le=1)]


class Card(Component):
    """One accelerator, the shares of its speeds that are reached, lowest first, and lengths not known before a run."""

    bytes_per_second: float = Field(gt=0)
    flops_per_second: float = Field(gt=0)
    efficiency: Annotated[tuple[Share, Share], Strict(False)]
    benchmark_tokens: int = Field(ge=1)
    teacher_tokens: int = Field(ge=1)

    @model_validator(mode="before")
    @classmethod
    def _of_a_kind(cls, values: dict[str, object]) -> dict[str, object]:
        """With `device` the speeds are those of a kind that plans are made for."""
        if "device" not in values:
            return values
        kind = kind_named(str(values["device"]))
        rest = {name: value for name, value in values.items() if name != "device"}
        return {"bytes_per_second": kind.bandwidth, "flops_per_second": kind.flops, **rest}


class Size(Component):
    """A model: parameters, bytes of keys and values per token, and trained parameters per rank of its adapter."""

    parameters: float = Field(gt=0)
    cache_bytes_per_token: int = Field(ge=1)
    lora_parameters_per_rank: int = Field(ge=1)


def estimated(groups: Mapping[str, Sequence[Cell]], card: Card, size: Size, processes: int) -> Table:
    """Cells, GPU-hours and disk of each group of cells."""
    rows = []
    for name, cells in groups.items():
        training = sum(training_seconds(cell.job.config, card, size) for cell in cells) / 3600
        scoring = sum(_scoring_hours(cell, card, size) for cell in cells)
        updates = sum(cell.job.config.train.num_updates for cell in cells)
        disk = sum(disk_bytes(cell.job.config, size) for cell in cells) / GIB
        slow, fast = card.efficiency
        hours = (span(each / fast, each / slow) for each in (training, scoring, training + scoring))
        rows.append((name, str(len(cells)), f"{updates:,}", *hours, f"{disk:,.0f}"))
    columns = ("experiment", "cells", "updates", "training", "benchmarks", "GPU-hours", "disk, GiB")
    speed = f"{card.bytes_per_second / 1e12:g} TB/s and {card.flops_per_second / 1e12:g} TFLOP/s"
    notes = (
        f"AN ESTIMATE, from arithmetic; nothing of it was measured. A GPU of {speed},",
        f"between {card.efficiency[1]:.0%} and {card.efficiency[0]:.0%} of both, which is assumed;",
        f"answers on benchmarks of {card.benchmark_tokens:,} tokens, teacher's contexts of {card.teacher_tokens:,},",
        "completions as long as allowed; look-aheads and the checks of answers are not counted.",
        f"Here {processes} at a time: divide by the number of GPUs for the wall clock. Finished cells are counted.",
    )
    return Table("What it takes", columns, tuple(rows), notes)


def decoding_seconds(tokens: float, length: float, batch: int, card: Card, size: Size) -> float:
    """So many tokens in all, in batches of rows that come to `length` tokens each, at the full speed of the card."""
    read = 2 * size.parameters + batch * (length / 2) * size.cache_bytes_per_token
    return tokens / batch * read / card.bytes_per_second


def training_seconds(config: Config, card: Card, size: Size) -> float:
    """Rollouts, probes, both passes and the evaluations on the way, at the full speed of the card."""
    train, length = config.train, config.sampling.completion_tokens
    rows = 0.0 if train.method == "sft" else float(train.batch_size)
    if config.decides:
        rows += config.data.probe_size / config.credit.hold_updates
    passed = train.batch_size * (8 * length + (2 * (length + card.teacher_tokens) if config.distils else 0))
    compute = passed * size.parameters / card.flops_per_second
    decode = decoding_seconds(rows * length, length, config.sampling.batch_size, card, size)
    times = train.num_updates // train.evaluate_every + 1 if train.evaluate_every else 0
    answers = times * config.data.validation_size * config.evaluation.samples
    tokens = config.evaluation_tokens
    held_out = decoding_seconds(answers * tokens, tokens, config.sampling.batch_size, card, size)
    return train.num_updates * (compute + decode) + held_out


def scoring_seconds(config: Config, scoring: Scoring, card: Card, size: Size) -> float:
    """One or two evaluations (before training too) on all benchmarks."""
    asked = with_overrides(config, scoring.settings)
    answers = sum(one.entry.problems for one in scoring.asked) * asked.evaluation.samples
    length = min(card.benchmark_tokens, asked.evaluation_tokens)
    once = decoding_seconds(answers * length, length, asked.sampling.batch_size, card, size)
    return once * (2 if scoring.base else 1)


def disk_bytes(config: Config, size: Size) -> float:
    """Checkpoints with their moments, the adapter, and sundries; of a run without adapter all weights are trained."""
    lora = config.model.lora
    trained = size.parameters if lora is None else lora.rank * size.lora_parameters_per_rank
    return trained * BYTES * (1 + 3 * config.train.keep_checkpoints) + SUNDRIES


def _scoring_hours(cell: Cell, card: Card, size: Size) -> float:
    scoring = cell.job.scoring
    return 0.0 if scoring is None else scoring_seconds(cell.job.config, scoring, card, size) / 3600
