"""An exposure of your own, named by `exposure.factory`: nothing inside the package is touched (docs/controllers.md)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from atesd.component import OwnSettings
from atesd.control.credit import CreditConfig
from atesd.control.interface import Exposure
from atesd.control.settings import ControllerSettings, GranularSettings, Run
from atesd.importing import made_by, require_offers


class CustomSettings(GranularSettings, ControllerSettings):
    """Whatever your factory makes of the run."""

    kind: Literal["custom"] = Field("custom", description="what your factory makes")
    granularity: Literal["update", "per_difficulty", "per_problem"] = Field(
        "update", description="what has a ratio of its own"
    )
    factory: str = Field(description="module:function that makes your exposure of (config, num_updates, seed)")
    factory_settings: OwnSettings = Field(
        default_factory=dict, description="whatever your factory reads; kept with the run"
    )

    learns_from_rewards: ClassVar[bool] = True

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With the factory."""
        return f"custom ({self.factory})"

    def make(self, run: Run) -> Exposure:
        """What the factory makes. Raises `ConfigError` if it cannot be imported or makes no exposure."""
        name = self.factory
        made: Exposure = made_by(
            name,
            "exposure.factory",
            "it is called with (config, num_updates, seed)",
            (run.config, run.num_updates, run.seed),
            {},
        )
        require_offers(
            made,
            Exposure,
            f"exposure.factory: {name}",
            "a controller becomes an exposure by atesd.control.factory.controlled(controller, config, seed)",
        )
        return made
