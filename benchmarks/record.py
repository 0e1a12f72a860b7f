"""Results as JSON, with what is needed to judge and repeat them, and nothing that names a machine or a user."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Case, Goal, Ratio, Result, Settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What decides how fast a product of matrices is; other flags of a processor are left out.
AVX = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16")
INSTRUCTIONS = (*AVX, "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "sve2", "bf16", "i8mm")
PACKAGES = ("torch", "transformers", "peft", "trl", "liger-kernel", "numpy")


def write(result: Result, settings: Settings, command: Sequence[str], folder: Path) -> Path:
    """Write FOLDER/NAME.json and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    body = {**provenance(settings, command), **asdict(result)}
    path.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return path


def read(path: Path) -> tuple[Result, dict[str, Any]]:
    """A written result, and its provenance."""
    body = json.loads(path.read_text("utf-8"))
    cases = [Case(**case) for case in body.pop("cases")]
    goals = [Goal(**{**goal, "measured": Ratio(**goal["measured"])}) for goal in body.pop("goals")]
    return Result(body.pop("name"), cases, goals), body


def provenance(settings: Settings, command: Sequence[str]) -> dict[str, Any]:
    """When, at which commit, by which command, with which packages, on which processor."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": " ".join(command),
        "size": settings.size,
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else "cpu",
        "processor": processor(),
        "instructions": instructions(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def machine(settings: Settings) -> str:
    """A folder's name for the records of this processor or GPU: its model, the last of its `INSTRUCTIONS`."""
    if settings.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = " ".join([processor(), *(instructions() or ())[-1:]]).replace("_", "")
    return "-".join(re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)", "", name.lower())))


def version(package: str) -> str | None:
    """The version installed, None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the working tree, marked `+` if tracked source differs from it; None outside a checkout."""
    try:
        words = ["git", "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The processor's model name."""
    return cpuinfo("model name") or platform.machine()


def instructions() -> list[str] | None:
    """Those of `INSTRUCTIONS` that the processor has; None where the system does not say."""
    flags = cpuinfo("flags") or cpuinfo("Features")
    return None if flags is None else [name for name in INSTRUCTIONS if name in flags.split()]


def cpuinfo(key: str) -> str | None:
    """The first value of a key in /proc/cpuinfo; None without such a file or line."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None
