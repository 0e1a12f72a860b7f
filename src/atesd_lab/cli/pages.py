"""Which kind of page the folders after `atesd report` are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atesd.errors import ConfigError
from atesd.runs import RunFolder
from atesd_lab.sweep.pivot import INDEX, is_sweep


def sweep_among(folders: Sequence[Path], *, live: bool) -> Path | None:
    """The one sweep's folder that was named, or None for run folders. Raises `ConfigError` for any mixture."""
    sweeps = [folder for folder in folders if is_sweep(folder)]
    inside = next((folder for folder in folders if is_sweep(folder / "cells") and not is_sweep(folder)), None)
    if inside is not None and not RunFolder.exists(inside):
        raise ConfigError(f"report: {inside} is no run folder; the runs are in {inside / 'cells'}, so name that")
    if not sweeps:
        return None
    if len(folders) > 1:
        other = next((folder for folder in folders if folder != sweeps[0]), sweeps[0])
        raise ConfigError(
            f"report: {sweeps[0]} is the folder of a sweep (it holds {INDEX}) and has a page to itself; leave out "
            f"{other}, or name run folders only"
        )
    if live:
        raise ConfigError(
            f"report: --live serves run folders, and {sweeps[0]} is the folder of a sweep; name some of its runs, or "
            "leave out --live: the same command writes the page anew"
        )
    return sweeps[0]
