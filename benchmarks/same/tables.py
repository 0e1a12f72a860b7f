"""Whether `atesd reproduce` writes the same pages and figures, byte for byte, before and after a change.

Each side trains a toy grid of its own in the same relative folder, so that no path differs. Then the side after makes
its pages once more from a copy of the runs of the side before, where it can read them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

EXPERIMENTS = ("sweep", "credit", "policy", "granularity", "controls")
TOY = (
    "data.train_size=64",
    "data.validation_size=8",
    "data.test_size=8",
    "data.probe_size=8",
    "data.max_difficulty=3",
    "train.num_updates=8",
    "train.batch_size=8",
    "train.evaluate_every=4",
    "evaluation.samples=1",
)
PAGES = (".md", ".svg", ".png")


def reproduce(folder: Path, environment: Mapping[str, str]) -> None:
    """Write pages and figures of every experiment into `folder`/NAME. Raises `RuntimeError` with the last words."""
    for name in EXPERIMENTS:
        words = [word for setting in TOY for word in ("--set", setting)]
        command = [sys.executable, "-W", "ignore", "-m", "atesd.cli", "reproduce", name, "--out", name]
        done = subprocess.run(
            [*command, "--seeds", "2", "--jobs", "1", *words],
            cwd=folder,
            env=dict(environment),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise RuntimeError(f"atesd reproduce {name}: {(said or ['no message'])[-1]}")


def pages(folder: Path) -> dict[str, bytes]:
    """The pages and figures of all experiments, by path; what lies among the runs is not of them."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in PAGES]
    own = [path for path in files if "cells" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in own}


def page_differences(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """Every page that differs or is on one side only."""
    names = [*before, *(name for name in after if name not in before)]
    return [
        f"{name}: {_difference(before.get(name), after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def copied_runs(before: Path, after: Path) -> Path:
    """A copy of what `before` trained, without its pages."""
    shutil.rmtree(after, ignore_errors=True)
    shutil.copytree(before, after, ignore=shutil.ignore_patterns(".lock", ".owner.json"))
    for name in pages(after):
        (after / name).unlink()
    return after


def _difference(before: bytes | None, after: bytes | None) -> str:
    if before is None or after is None:
        return "only after" if before is None else "only before"
    lines = zip(before.splitlines(), after.splitlines(), strict=False)
    first = next(((old, new) for old, new in lines if old != new), (b"(its end)", b"(its end)"))
    return " -> ".join(line[:80].decode("utf-8", "replace") for line in first)
