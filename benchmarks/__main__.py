"""The command line: `python -m benchmarks [NAME ...] [--quick | --small] [--device cpu|cuda] [--out FOLDER]`.

`python -m benchmarks gpu` is for a machine with one GPU: what runs there alone is checked, then timed, in 8 minutes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.harness import Result, Settings, Size
from benchmarks.record import RESULTS, ROOT, machine, write
from benchmarks.table import lines, update_docs

ON_CPU = ("loss", "step", "bfloat16", "rollout", "rollout-smollm2", "prefix", "control", "lookahead", "memory", "demo")
ON_GPU = ("gpu-checks", "gpu-calibration", "gpu-loss", "gpu-decode", "gpu-step-1.7B", "gpu-step-8B", "gpu-prefix")


MINUTES_ON_GPU = 8.0
# Guessed seconds of each part on a large GPU: one that might end too late is not begun, and said to be left out.
GUESSED = {"gpu-checks": 240, "gpu-loss": 90, "gpu-decode": 90, "gpu-step-1.7B": 60, "gpu-step-8B": 120}


def main(words: list[str]) -> int:
    """Run what is named, write its JSON and print its tables.

    A missed goal is a finding; 1 if something could not run or a check failed, 2 without the device that was asked for.
    """
    asked = arguments().parse_args(words)
    if asked.names == ["table"]:
        print("docs/performance.md: " + ", ".join(update_docs(asked.out or RESULTS)))
        return 0
    size: Size = "quick" if asked.quick else "small" if asked.small else "full"
    on_gpu = bool(asked.names) and all(name.startswith("gpu") for name in asked.names)
    settings = Settings(size, asked.device or ("cuda" if on_gpu else "cpu"))
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --device cpu --quick runs the same code at toy shapes", file=sys.stderr)
        return 2
    if settings.device == "cpu":
        torch.set_num_threads(1)
    out = asked.out or (RESULTS / machine(settings) if size == "full" else ROOT / "runs" / "benchmarks" / size)
    failed, left, first = 0, [], time.monotonic()
    for name in chosen(asked.names, settings):
        begun = time.monotonic()
        if "gpu" in asked.names and begun - first + GUESSED.get(name, 30) > 60 * MINUTES_ON_GPU:
            left.append(name)
            continue
        try:
            result = run(name, settings)
        except Exception:  # the other benchmarks are worth having all the same
            traceback.print_exc()
            print(f"\n{name}: FAILED", flush=True)
            failed += 1
            continue
        path = write(result, settings, ["python", "-m", "benchmarks", *words], out)
        print(f"\n{name}: {time.monotonic() - begun:.0f} s, {path.name}")
        print("\n".join(lines(result)), flush=True)
        broken = checks_failed(result)
        failed += len(broken)
        print("".join(f"FAILED: {what}\n" for what in broken), end="", flush=True)
    if left:
        print(f"\nleft out after {MINUTES_ON_GPU:g} minutes: {', '.join(left)}; name them to run them")
    if size != "full":
        print(f"\nsize {size}: these figures are not those of the goals")
    return int(failed > 0)


def chosen(names: list[str], settings: Settings) -> list[str]:
    """The benchmarks to run; `gpu` stands for all of its parts, nothing for all that suit the device."""
    asked = names or (["gpu"] if settings.device == "cuda" else list(ON_CPU))
    return [part for name in asked for part in (ON_GPU if name == "gpu" else (name,))]


def checks_failed(result: Result) -> list[str]:
    """The rows of `benchmarks.checks` that did not pass."""
    rows = [(what, row) for case in result.cases for what, row in (case.figures or {}).items()]
    return [what for what, row in rows if isinstance(row, dict) and row.get("verdict") == "failed"]


def run(name: str, settings: Settings) -> Result:
    """One benchmark."""
    if name in ON_GPU:
        found: Result = importlib.import_module("benchmarks.gpu").PARTS[name](settings)
    else:
        module, _, part = name.partition("-")
        found = getattr(importlib.import_module(f"benchmarks.{module}"), f"run_{part}" if part else "run")(settings)
    return found


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="docs/performance.md explains it all.")
    names = (*ON_CPU, "gpu", *ON_GPU, "table")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(names)}; default: all that suit the device"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="smaller shapes, fewer rounds: a few minutes")
    size.add_argument("--small", action="store_true", help="toy shapes: shows that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda for gpu and its parts, else cpu")
    parser.add_argument("--out", type=Path, help="where the JSON goes; full size: benchmarks/results/PROCESSOR")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
