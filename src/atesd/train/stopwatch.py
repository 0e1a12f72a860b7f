"""Where the seconds of an update go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, final

import torch

Phase = Literal["sample", "teacher", "student", "loss_backward", "control", "evaluate"]


@final
class Stopwatch:
    """Seconds of each phase. Phases nest: the time of an inner one is not counted in the outer.

    What happens in no phase is `control`: bookkeeping and the exposure. On a GPU the queued work is waited for at each
    change of phase.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phases: list[Phase] = ["control"]
        self._seconds: dict[Phase, float] = {}
        self._since = self._now()

    def restart(self) -> None:
        """Forget what was measured; from now on it counts."""
        self._seconds = {}
        self._since = self._now()

    def seconds(self) -> dict[Phase, float]:
        """Seconds by phase so far."""
        self._book()
        return dict(self._seconds)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Inside, time is booked under this phase."""
        self._book()
        self._phases.append(name)
        try:
            yield
        finally:
            self._book()
            self._phases.pop()

    def _book(self) -> None:
        now, phase = self._now(), self._phases[-1]
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
