"""Peak memory of one call in a fresh process: freed pages are reused, so that a second call in a process shows nothing.

The child makes its inputs, has the kernel forget its high-water mark, makes the call, and reports how far the mark rose
above what was resident before it. `python -m benchmarks.children MODULE:FUNCTION ARGUMENTS` is that child.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a child that trains needs nothing of this at its start
    from benchmarks.harness import Settings, Work

ROOT = Path(__file__).resolve().parents[1]


def in_child(function: Callable[..., Any], source: Path | None = None, **arguments: Any) -> Any:
    """What a function at the top of a module of this package returns in a fresh process; arguments and value are JSON.

    `source` is a folder to import atesd from instead of this checkout's. Raises `RuntimeError` with the last words of
    a child that fails.
    """
    return _answer(_child(function, arguments, {"PYTHONPATH": str(source or ROOT / "src")}))


def in_ranks(
    function: Callable[..., Any], ranks: int, environment: Mapping[str, str] | None = None, **arguments: Any
) -> list[Any]:
    """What a function returns in each of several fresh processes that find one another as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environment or {})}
    children = [
        _child(function, arguments, {"PYTHONPATH": str(ROOT / "src"), **shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(ranks))
    ]
    return [_answer(child) for child in children]


def _child(function: Callable[..., Any], arguments: dict[str, Any], added: dict[str, str]) -> subprocess.Popen[str]:
    target = f"{function.__module__}:{function.__qualname__}"
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.children", target, json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **added},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _answer(child: subprocess.Popen[str]) -> Any:
    out, errors = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{child.args!r}: {(errors.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(out.splitlines()[-1])


def peak_of(measure: Callable[..., int], settings: Settings, **arguments: Any) -> int:
    """Bytes that `measure(device=..., **arguments)` reports from a fresh process; at size `small` from this one."""
    if settings.size == "small":
        return measure(device=settings.device, **arguments)
    return int(in_child(measure, device=settings.device, **arguments))


def peak_here(work: Work, device: str) -> int:
    """Bytes by which this process's peak rises during the call; meaningful once per process."""
    mark = Mark(device)
    work()
    return mark.rise()


class Mark:
    """The memory in use when it was made, and how far the peak has risen above it since."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = int(torch.cuda.memory_allocated())
        else:
            forget_peak()
            self._before = resident("VmRSS")

    def rise(self) -> int:
        """Bytes."""
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
            return int(torch.cuda.max_memory_allocated()) - self._before
        return max(0, resident("VmHWM") - self._before)


def forget_peak() -> None:
    """Give freed pages back and reset the kernel's high-water mark of this process (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", "ascii")


def resident(key: str) -> int:
    """Bytes now resident (`VmRSS`), or at most since the mark was reset (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; peak memory needs Linux")


def main() -> None:
    """The child."""
    module, _, function = sys.argv[1].partition(":")
    found = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    print(f"\n{json.dumps(found)}")


if __name__ == "__main__":
    main()
