"""The teacher's weights: the same model, with other values of its trainable parameters during a scoring pass.

Four clocks, independent of the exposure: `frozen` (the initial policy), `live` (the student itself), `ema`, and
`refresh` (a copy of the student every n updates). With LoRA a frozen teacher is the model with its adapter off, so
that no second copy exists and teacher and base model agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from atesd.config import EmaTeacher, RefreshedTeacher, TeacherConfig
from atesd.errors import CheckpointError


@final
class Teacher:
    """Holds the teacher's own values of the trainable parameters, as far as they differ from the student's."""

    def __init__(self, model: nn.Module, config: TeacherConfig) -> None:
        self._model = model
        self._config = config
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._adapter_off = config.weights == "frozen" and hasattr(model, "peft_config")
        own_copy = config.weights != "live" and not self._adapter_off
        self._values = {name: p.detach().clone() for name, p in self._trained.items()} if own_copy else {}

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Inside, the model is the teacher, without gradient; afterwards it is the student again, bit for bit."""
        with torch.no_grad():
            if self._adapter_off:
                with self._model.disable_adapter():  # type: ignore[operator]
                    yield
                return
            self._swap()
            try:
                yield
            finally:
                self._swap()

    @torch.no_grad()
    def after_update(self, updates_done: int) -> None:
        """Move the teacher's clock: average (`ema`) or copy (`refresh`) after a student update."""
        if isinstance(self._config, EmaTeacher):
            for name, value in self._values.items():
                value.lerp_(self._trained[name].detach(), 1 - self._config.decay)
        elif isinstance(self._config, RefreshedTeacher) and updates_done % self._config.every == 0:
            for name, value in self._values.items():
                value.copy_(self._trained[name])

    def state_dict(self) -> dict[str, Any]:
        """The teacher's own tensors; empty for `live` and for a frozen adapter."""
        return {"values": {name: value.clone() for name, value in self._values.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. Raises `CheckpointError` if it belongs to other teacher weights."""
        values: dict[str, Tensor] = state["values"]
        if values.keys() != self._values.keys():
            raise CheckpointError(
                f"teacher.weights: {self._config.weights} keeps {len(self._values)} tensors, the checkpoint has "
                f"{len(values)}; resume with the teacher settings of the run"
            )
        for name, value in self._values.items():
            value.copy_(values[name])

    def _swap(self) -> None:
        for name, value in self._values.items():
            parameter = self._trained[name]
            self._values[name], parameter.data = parameter.data, value
