"""An exposure of one's own for the comparison. It imports nothing of atesd, so that it is the same on both sides."""

from __future__ import annotations

from typing import Any, final


@final
class FollowsLoss:
    """Shows more after an update of larger loss: the ratio is gain * loss / (gain * loss + 0.02), from 0.5 on."""

    def __init__(self, gain: float) -> None:
        self._gain = gain
        self._ratio = 0.5
        self.dropped: dict[str, int] = {}

    def measurements(self, update: int) -> frozenset[str]:
        """The probe's negative log-likelihood, every third update."""
        return frozenset({"probe_nll"} if update % 3 == 0 else ())

    def reveal_ratio(self, update: int, group: str = "") -> float:  # noqa: ARG002
        """The ratio that the last update left."""
        return self._ratio

    def observe(self, update: int, stats: Any) -> list[Any]:  # noqa: ARG002
        """Set the next ratio; no decision is logged."""
        wanted = self._gain * (stats.loss + 0.001 * (stats.probe_nll or 0.0))
        self._ratio = wanted / (wanted + 0.02)
        return []

    def pending(self) -> list[Any]:
        """None."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The next ratio."""
        return {"ratio": self._ratio}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._ratio = state["ratio"]


def make(config: Any, num_updates: int, seed: int) -> FollowsLoss:  # noqa: ARG001
    """What `exposure.factory` names; `factory_settings` may hold a gain."""
    return FollowsLoss(float(config.exposure.factory_settings.get("gain", 1.0)))
