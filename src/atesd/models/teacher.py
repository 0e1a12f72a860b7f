"""The teacher's weights: the same model, with other values of its trained parameters during a scoring pass.

Four clocks, independent of the exposure: `frozen` (the initial policy), `live` (the student itself), `ema`, and
`refresh` (a copy of the student every n updates). With LoRA a frozen teacher is the model with its adapter off, so
that no second copy exists and teacher and base model agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast, final

import torch
from torch import Tensor

from atesd.config import EmaTeacher, RefreshedTeacher, TeacherConfig
from atesd.errors import CheckpointError
from atesd.models.weights import Weights, overwrite


@final
class Teacher:
    """Holds the teacher's own values of the trained parameters, as far as they differ from the student's.

    An average is kept in float32 beside weights in bfloat16: there, 1 - decay of a difference is below the rounding.
    """

    def __init__(self, weights: Weights, config: TeacherConfig) -> None:
        self._weights = weights
        self._config = config
        self._adapter_off = config.weights == "frozen" and weights.has_adapter
        own_copy = config.weights != "live" and not self._adapter_off
        kept = torch.float32 if config.weights == "ema" else None
        parts = weights.parts() if own_copy else {}
        self._values = {name: part.tensor.to(kept or part.tensor.dtype, copy=True) for name, part in parts.items()}

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Inside, the model is the teacher, without gradient; afterwards it is the student again, bit for bit."""
        with self._weights.without_adapter() if self._adapter_off else self._weights.exchanged(self._as_student()):
            yield

    @torch.no_grad()
    def after_update(self, updates_done: int) -> None:
        """Move the teacher's clock: average (`ema`) or copy (`refresh`) after a student update."""
        if isinstance(self._config, EmaTeacher):
            for name, part in self._weights.parts().items():
                self._values[name].lerp_(part.tensor.to(self._values[name].dtype), 1 - self._config.decay)
        elif isinstance(self._config, RefreshedTeacher) and updates_done % self._config.every == 0:
            overwrite(self._values, {name: part.tensor for name, part in self._weights.parts().items()})

    def state_dict(self) -> dict[str, object]:
        """The teacher's own tensors; empty for `live` and for a frozen adapter."""
        return {"values": {name: value.clone() for name, value in self._values.items()}}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore `state_dict`. Raises `CheckpointError` if it belongs to other teacher weights."""
        values = cast("dict[str, Tensor]", state["values"])
        if values.keys() != self._values.keys():
            raise CheckpointError(
                f"teacher.weights: {self._config.weights} keeps {len(self._values)} tensors, the checkpoint has "
                f"{len(values)}; resume with the teacher settings of the run"
            )
        overwrite(self._values, values)

    def _as_student(self) -> dict[str, Tensor]:
        """The values in the types of the student's: themselves where these are the same."""
        parts = self._weights.parts() if self._values else {}
        return {name: value.to(parts[name].tensor.dtype) for name, value in self._values.items()}
