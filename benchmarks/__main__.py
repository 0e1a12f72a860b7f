"""The command line: `python -m benchmarks [NAME ...] [--quick | --small] [--device cpu|cuda] [--out FOLDER]`."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import Settings, Size
from benchmarks.record import RESULTS, ROOT, write
from benchmarks.table import lines, update_docs

ON_CPU = ("loss", "step", "control", "demo")


def main(words: list[str]) -> int:
    """Run what is named, write its JSON and print its tables. A missed goal is a finding, not a failure: returns 0."""
    asked = arguments().parse_args(words)
    if asked.names == ["table"]:
        print("docs/performance.md: " + ", ".join(update_docs(asked.out or RESULTS)))
        return 0
    size: Size = "quick" if asked.quick else "small" if asked.small else "full"
    settings = Settings(size, asked.device)
    if settings.device == "cpu":
        torch.set_num_threads(1)
    out = asked.out or (RESULTS if size == "full" else ROOT / "runs" / "benchmarks" / size)
    for name in asked.names or (["gpu"] if asked.device == "cuda" else ON_CPU):
        begun = time.monotonic()
        result = importlib.import_module(f"benchmarks.{name}").run(settings)
        path = write(result, settings, ["python", "-m", "benchmarks", *words], out)
        print(f"\n{name}: {time.monotonic() - begun:.0f} s, {path.name}")
        print("\n".join(lines(result)), flush=True)
    if size != "full":
        print(f"\nsize {size}: these figures are not those of the goals")
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="docs/performance.md explains it all.")
    names = (*ON_CPU, "gpu", "table")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(names)}; default: all that suit the device"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="smaller shapes, fewer rounds: a few minutes")
    size.add_argument("--small", action="store_true", help="toy shapes: shows that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="where the JSON goes; default: benchmarks/results at full size")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
