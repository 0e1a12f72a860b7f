"""The accelerators that a plan can be made for. Numbers are the vendors' own, of dense products without sparsity."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from atesd.errors import ConfigError

PER_NODE = 8
"""Devices of one machine that share the fast link."""
BETWEEN_NODES = 40e9
"""Bytes per second and device between machines: 400 Gb/s each, of which 80 % arrive; assumed."""
RESERVED, RESERVED_ON_CPU = 0.08, 0.25
"""Shares of the memory that are left: for a device's context, kernels' workspaces and gaps between blocks, assumed; and
for Python, the system and freed blocks that glibc keeps, after what was measured (docs/performance.md)."""


OTHERS = {"mig", "pcie", "nvl", "grid", "laptop", "d"}
"""Words of a card's name that is slower than the model it names."""


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """Memory in bytes; per second bfloat16 and float32 operations, bytes read from memory, bytes sent to a neighbour.

    Speeds that are not known are 0: then no seconds are told.
    """

    name: str
    memory: float
    flops: float = 0.0
    flops32: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    source: str = ""

    @property
    def on_cpu(self) -> bool:
        """Whether it is this machine's processor: losses and decoder lay out their memory otherwise there."""
        return self.name == "cpu"

    @property
    def reserved(self) -> float:
        """The share of its memory that a run must leave."""
        return RESERVED_ON_CPU if self.on_cpu else RESERVED

    @property
    def usable(self) -> float:
        """Bytes that a run may fill."""
        return self.memory * (1 - self.reserved)


_GB, _TB, _TFLOP = 1e9, 1e12, 1e12
_TABLE = (  # GB, bfloat16 and float32 TFLOP/s, TB/s of memory, GB/s to a neighbour, each way
    ("a10-24gb", 24, 125, 31.2, 0.6, 32, "NVIDIA A10 data sheet; PCIe 4"),
    ("l4-24gb", 24, 121, 30.3, 0.3, 32, "NVIDIA L4 data sheet; PCIe 4"),
    ("rtx4090-24gb", 24, 165, 82.6, 1.008, 32, "NVIDIA Ada white paper; PCIe 4"),
    ("l40s-48gb", 48, 362, 91.6, 0.864, 32, "NVIDIA L40S data sheet; PCIe 4"),
    ("a100-40gb", 40, 312, 19.5, 1.555, 300, "NVIDIA A100 data sheet; SXM"),
    ("a100-80gb", 80, 312, 19.5, 2.039, 300, "NVIDIA A100 data sheet; SXM"),
    ("h100-80gb", 80, 989, 66.9, 3.35, 450, "NVIDIA H100 data sheet; SXM"),
    ("h200-141gb", 141, 989, 66.9, 4.8, 450, "NVIDIA H200 data sheet; SXM"),
    ("b200-180gb", 180, 2250, 80, 8.0, 900, "NVIDIA HGX B200 data sheet"),
)
KINDS = {
    name: DeviceKind(name, gb * _GB, half * _TFLOP, single * _TFLOP, read * _TB, sent * _GB, source)
    for name, gb, half, single, read, sent, source in _TABLE
}


def kind_named(name: str) -> DeviceKind:
    """The kind of this name. Raises `ConfigError` that lists all, and the name that was probably meant."""
    if name in KINDS:
        return KINDS[name]
    raise ConfigError(f"--device-kind {name}: expected one of {', '.join(KINDS)}{meant(name)}")


def meant(name: str) -> str:
    """`; did you mean NAME?` for the nearest kind, by its model before its memory: `H100` is the h100; else empty."""
    word = "".join(letter for letter in name.lower() if letter.isalnum())
    plain = {kind.replace("-", ""): kind for kind in KINDS}
    begins = [kind for short, kind in plain.items() if word and (short.startswith(word) or word in short)]
    close = begins or [plain[short] for short in difflib.get_close_matches(word, plain, n=1, cutoff=0.6)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def kind_of_card(name: str, memory: int) -> DeviceKind:
    """The kind of the card that a driver calls `name`, such as `NVIDIA H100 80GB HBM3`, with its own `memory` in bytes.

    One that is not in the table has no speeds, nor has a MIG instance of one that is, or its PCIe make.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    whole = set() if OTHERS & set(words) else {*words, *map("".join, pairwise(words))}  # RTX 4090 is one model
    known = [kind for kind in KINDS.values() if kind.name.partition("-")[0] in whole]
    nearest = min(known, key=lambda kind: abs(kind.memory - memory), default=DeviceKind(name, memory))
    return replace(nearest, memory=memory)


def listed(kinds: Iterable[DeviceKind] = KINDS.values()) -> list[tuple[str, ...]]:
    """Rows of a table: name, GB, bfloat16 and float32 TFLOP/s, TB/s of memory, GB/s to a neighbour, source."""
    units = {"memory": _GB, "flops": _TFLOP, "flops32": _TFLOP, "bandwidth": _TB, "link": _GB}
    return [
        (kind.name, *(f"{getattr(kind, name) / unit:g}" for name, unit in units.items()), kind.source) for kind in kinds
    ]
