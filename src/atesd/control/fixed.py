"""Exposure fixed before the run: a constant (OPSD at 1), random ratios, a ramp, or a recorded run's ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, final

from atesd.control.interface import Measurement
from atesd.errors import ConfigError
from atesd.maths import keyed
from atesd.records import FinishedDecision, UpdateStats

Plan = Callable[[int, str], float]
"""(update, group) -> reveal ratio in [0, 1]."""


@final
class FixedExposure:
    """Follows a plan and learns nothing. `FixedExposure(1.0)` is OPSD (arXiv 2601.18734). It has no state."""

    def __init__(self, plan: float | Plan) -> None:
        self._plan: Plan = plan if callable(plan) else lambda _update, _group: plan

    @property
    def dropped(self) -> dict[str, int]:
        """No decision was taken."""
        return {}

    def reveal_ratio(self, update: int, group: str = "") -> float:
        """The planned ratio."""
        return self._plan(update, group)

    def measurements(self, update: int) -> frozenset[Measurement]:  # noqa: ARG002
        """Nothing."""
        return frozenset()

    def observe(self, update: int, stats: UpdateStats) -> list[FinishedDecision]:  # noqa: ARG002
        """Ignored: no decision was taken."""
        return []

    def pending(self) -> list[FinishedDecision]:
        """No decision was taken."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Empty: a plan depends on the update alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def random_ratios(ratio_min: float, ratio_max: float, hold_updates: int, seed: int) -> Plan:
    """Uniform on [ratio_min, ratio_max], one draw per hold and group: the control of a learned exposure."""

    def plan(update: int, group: str) -> float:
        uniform = float(keyed.uniforms(1, seed, "exposure", update // hold_updates, group)[0])
        return ratio_min + (ratio_max - ratio_min) * uniform

    return plan


def ramp(shape: Literal["linear", "cosine"], start: float, end: float, num_updates: int) -> Plan:
    """(1 - w) * start + w * end; down if start > end.

    w = p (linear) or (1 - cos(pi p)) / 2 (cosine), with p = update / (num_updates - 1), so the last update has `end`.
    """

    def plan(update: int, _group: str) -> float:
        done = min(update / max(num_updates - 1, 1), 1.0)
        weight = done if shape == "linear" else (1.0 - math.cos(math.pi * done)) / 2.0
        return (1.0 - weight) * start + weight * end

    return plan


def replayed(ratios: Sequence[float], order: Literal["recorded", "shuffled"], num_updates: int, seed: int) -> Plan:
    """The per-update ratios of a recorded run, in order or in a keyed permutation of all of them.

    Raises `ConfigError` if they are fewer than `num_updates`.
    """
    if len(ratios) < num_updates:
        raise ConfigError(
            f"exposure.replay_run: it recorded {len(ratios)} ratios, but train.num_updates is {num_updates}; "
            f"allowed are at most {len(ratios)} updates: lower train.num_updates or replay a longer run"
        )
    used = list(ratios)
    if order == "shuffled":
        used = [ratios[i] for i in keyed.generator(seed, "replay").permutation(len(ratios))]
    return lambda update, _group: used[update]
