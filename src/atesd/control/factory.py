"""From the settings of a run to its exposure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from atesd.control.controlled import ControlledExposure, Controller, as_exposure
from atesd.control.credit import CreditConfig
from atesd.control.fixed import FixedExposure
from atesd.control.interface import Exposure
from atesd.control.settings import ControllerSettings, ExposureSettings, Run
from atesd.errors import ConfigError


class RunConfig(Protocol):
    """What is read here of the config of a run."""

    @property
    def exposure(self) -> ExposureSettings:
        """The settings of the kind that decides."""
        ...

    @property
    def credit(self) -> CreditConfig:
        """When and how decisions are rewarded."""
        ...

    @property
    def distils(self) -> bool:
        """Whether there is a teacher to whom something is shown."""
        ...


def make_exposure(
    config: RunConfig, num_updates: int, seed: int, replay: Sequence[float] = (), replay_hold: int = 1
) -> Exposure:
    """The exposure that `exposure.kind` names.

    `replay` holds the per-update ratios of `exposure.replay_run`, whose decisions held for `replay_hold` updates.
    The baselines (sft, grpo) have no teacher to show anything to: nothing is decided there and nothing is measured.
    Raises `ConfigError` if the recorded run is shorter than `num_updates`, or if no exposure comes of
    `exposure.factory`.
    """
    if not config.distils:
        return FixedExposure(1.0)
    return config.exposure.make(Run(config.credit, num_updates, seed, replay, replay_hold, config))


def controlled(controller: Controller, config: RunConfig, seed: int) -> ControlledExposure:
    """The exposure of a controller under the settings of a run: its holds, rewards, bounds and granularity.

    Raises `ConfigError` where `exposure.kind` is none that asks a controller.
    """
    settings = config.exposure
    if not isinstance(settings, ControllerSettings):
        raise ConfigError(f"exposure.kind: {settings.kind} asks no controller; set it to custom, and exposure.factory")
    return as_exposure(controller, settings, Run(config.credit, 0, seed))
