"""An exposure of your own, named by `exposure.factory`: nothing inside the package is touched (docs/controllers.md)."""

from __future__ import annotations

import importlib
from typing import ClassVar, Literal

from pydantic import Field

from atesd.control.credit import CreditConfig
from atesd.control.interface import Exposure
from atesd.control.settings import ControllerSettings, GranularSettings, Run
from atesd.errors import ConfigError

OFFERED = tuple(name for name in vars(Exposure) if not name.startswith("_"))
"""What an exposure must have."""


class CustomSettings(GranularSettings, ControllerSettings):
    """Whatever your factory makes of the run."""

    kind: Literal["custom"] = Field("custom", description="what your factory makes")
    granularity: Literal["update", "per_difficulty", "per_problem"] = Field(
        "update", description="what has a ratio of its own"
    )
    factory: str = Field(description="module:function that makes your exposure of (config, num_updates, seed)")
    factory_settings: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="whatever your factory reads; kept with the run"
    )

    learns_from_rewards: ClassVar[bool] = True

    def label(self, credit: CreditConfig) -> str:  # noqa: ARG002
        """With the factory."""
        return f"custom ({self.factory})"

    def make(self, run: Run) -> Exposure:
        """What the factory makes. Raises `ConfigError` if it cannot be imported or makes no exposure."""
        name = self.factory
        module, colon, function = name.partition(":")
        if not (colon and module and function):
            raise ConfigError(f"exposure.factory: {name!r} is not allowed; expected module:function")
        try:
            factory = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"exposure.factory: {name} cannot be imported ({error}); install it, or name its folder in PYTHONPATH"
            ) from error
        made: Exposure = factory(run.config, run.num_updates, run.seed)
        missing = [part for part in OFFERED if not hasattr(made, part)]
        if missing:
            raise ConfigError(
                f"exposure.factory: {name} made a {type(made).__name__} without {', '.join(missing)}; a controller "
                "becomes an exposure by atesd.control.factory.controlled(controller, config, seed)"
            )
        return made
