"""Results as JSON, with what is needed to judge and repeat them, and nothing that names a machine or a user."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Case, Goal, Ratio, Result, Settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
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
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


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
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
