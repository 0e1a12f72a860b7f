"""atesd: adaptive teacher exposure for on-policy self-distillation (arXiv 2605.11458).

    from atesd import load_config
    from atesd.build import build
    from atesd.session import evaluate, train

    outcome = train(load_config("micro", ["train.num_updates=50"]), Path("runs/first"))

The names below are imported when they are first asked for, so that `import atesd` stays light. `train` and `evaluate`
live in `atesd.session`, because `atesd.train` and `atesd.evaluate` are the packages of these names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atesd.config import Config, load_config
    from atesd.control.fixed import FixedExposure
    from atesd.control.interface import Exposure
    from atesd.control.learned import LearnedExposure
    from atesd.errors import AtesdError
    from atesd.records import UpdateStats
    from atesd.runs import RunFolder

__version__ = "0.1.0"
__all__ = [
    "AtesdError",
    "Config",
    "Exposure",
    "FixedExposure",
    "LearnedExposure",
    "RunFolder",
    "UpdateStats",
    "__version__",
    "load_config",
]

_HOMES = {
    "AtesdError": "atesd.errors",
    "Config": "atesd.config",
    "Exposure": "atesd.control.interface",
    "FixedExposure": "atesd.control.fixed",
    "LearnedExposure": "atesd.control.learned",
    "RunFolder": "atesd.runs",
    "UpdateStats": "atesd.records",
    "load_config": "atesd.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atesd' has no attribute '{name}'; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
