"""How many problems each split is to have, and what is said where a source has too few."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from atesd.config import DataConfig
from atesd.data.splits import shares_of
from atesd.errors import DataError
from atesd.records import Split


@dataclass(frozen=True)
class Shortage:
    """A split with fewer problems than its size; None: as many as there are, but one at least."""

    found: int
    size: int | None


Shortages = Mapping[Split, Shortage]


def sizes_of(config: DataConfig) -> dict[Split, int | None]:
    """The size of each split; None: all there are."""
    return {
        "train": config.train_size,
        "validation": config.validation_size,
        "probe": config.probe_size,
        "test": config.test_size,
    }


def shortages(found: Mapping[Split, int], config: DataConfig) -> Shortages:
    """The splits with fewer problems than asked for. A test file of its own may have fewer than `data.test_size`."""
    sizes = sizes_of(config)
    least = {split: 1 if size is None else size for split, size in sizes.items()}
    if config.test_source is not None:
        least["test"] = min(1, least["test"])
    return {split: Shortage(found[split], sizes[split]) for split in get_args(Split) if found[split] < least[split]}


def require_enough(short: Shortages, config: DataConfig, name: str, usable: int) -> None:
    """Raise `DataError` for a shortage that `data.on_few_rows` does not allow; training and the probes need a problem.

    `usable` is how many problems the source `name` has.
    """
    shrinks = config.on_few_rows == "shrink"
    lacking = {split: lack for split, lack in short.items() if not shrinks or _is_vital(split, lack)}
    if not lacking:
        return
    sizes = (
        f"{split} {lack.found} of {lack.size or 'at least 1'} (data.{split}_size)" for split, lack in lacking.items()
    )
    advice = ["lower these sizes", "change data.shares, by which a hash of the text splits them"]
    if not shrinks:
        advice.append("set data.on_few_rows: shrink to take what there is")
    if "train" in lacking and config.train_size is not None:
        advice.append("train_size: null to take all there are")
    raise DataError(
        f"{name}: too few problems: {', '.join(sizes)}. {_rows_needed(lacking, config, usable)}; this file has "
        f"{usable:,} usable problems: {', or '.join(advice)}"
    )


def _is_vital(split: Split, lack: Shortage) -> bool:
    return split in ("train", "probe") and not lack.found


def said(short: Shortages, config: DataConfig, name: str) -> tuple[str, ...]:
    """What `data.on_few_rows: shrink` chose."""
    if not short:
        return ()
    sizes = ", ".join(f"{split} {lack.found} of {lack.size}" for split, lack in short.items())
    return (
        f"{name}: few rows, so splits are smaller than their sizes: {sizes} (data.on_few_rows: {config.on_few_rows})",
    )


def _rows_needed(short: Shortages, config: DataConfig, usable: int) -> str:
    """The most that a split needs, by its share and by how many of the usable rows fell into it."""
    shares = dict(shares_of(config.shares))
    nothing = [split for split in short if not shares[split]]
    if nothing:
        return f"data.shares.{nothing[0]}: 0 gives it none"
    rows = 0.0
    for split, lack in short.items():
        size = 1 if lack.size is None or config.on_few_rows == "shrink" else lack.size
        rows = max(rows, size / shares[split], usable * size / lack.found if lack.found else usable + 1)
    step = 10 ** max(0, len(str(math.ceil(rows))) - 2)
    return f"It needs about {math.ceil(rows / step) * step:,} rows"
