"""How everything here is measured: the same work in turns, its CPU time, and ratios within a round.

A shared machine changes its pace from minute to minute, by more than most improvements are worth. So nothing is
compared across rounds: the variants take turns within one process, each round gives one ratio, and their median is the
figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Work = Callable[[], object]
Round = dict[str, float]
Size = Literal["full", "quick", "small"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How large and where. `small` shapes show that a benchmark runs; their figures mean nothing."""

    size: Size = "full"
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def rounds(self) -> int:
        """Rounds after the warm-up."""
        return {"full": 5, "quick": 3, "small": 1}[self.size]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median over the rounds, and the lowest and highest round."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure and what it was to be: at most `limit`, or at least."""

    what: str
    bound: Literal["at most", "at least"]
    limit: float
    measured: Ratio
    unit: str = "x"

    @property
    def is_met(self) -> bool:
        """Judged by the median."""
        value = self.measured.median
        return value <= self.limit if self.bound == "at most" else value >= self.limit

    @property
    def verdict(self) -> str:
        """`met`, or by how much of the limit it was missed."""
        short = abs(self.measured.median / self.limit - 1)
        return "met" if self.is_met else f"missed by {short:.0%}" if short >= 0.01 else f"missed by {short:.1%}"


@dataclass(frozen=True, slots=True)
class Case:
    """One piece of work: seconds of every variant in every round, and its peak memory in bytes where measured.

    `peers_absent` names variants that could not run here, with the reason; `figures` holds anything else measured.
    """

    name: str
    rounds: Sequence[Round] = ()
    memory: Mapping[str, int] | None = None
    figures: Mapping[str, Any] | None = None
    peers_absent: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What one benchmark found."""

    name: str
    cases: Sequence[Case]
    goals: Sequence[Goal] = ()


def seconds_of(work: Work, device: str) -> float:
    """Seconds that `work` takes: CPU time of this process, on CUDA the time between two events."""
    if device == "cuda":
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    begun = time.process_time()
    work()
    return time.process_time() - begun


def in_turns(variants: Mapping[str, Work], rounds: int, device: str, warm_up: bool = True) -> list[Round]:
    """Every variant once per round, the order reversed in every other round, after one round that is not counted."""
    order = list(variants)
    if warm_up:
        for name in order:
            variants[name]()
    found = []
    for i in range(rounds):
        taken = {name: seconds_of(variants[name], device) for name in (order if i % 2 == 0 else reversed(order))}
        found.append({name: taken[name] for name in order})
    return found


def ratio(rounds: Sequence[Round], variant: str, base: str) -> Ratio:
    """Time of `variant` over the time of `base`, round by round."""
    return spread([row[variant] / row[base] for row in rounds])


def spread(values: Sequence[float]) -> Ratio:
    """Median and range."""
    return Ratio(statistics.median(values), min(values), max(values))


def single(value: float) -> Ratio:
    """A figure that was measured once."""
    return Ratio(value, value, value)
