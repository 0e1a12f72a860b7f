"""The engine that decodes through transformers: any architecture whose forward takes a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from atesd.engine.batch import Batch, complete_in_batches
from atesd.engine.cache import cache_argument, preallocated_cache
from atesd.engine.interface import Request, SamplingParams
from atesd.models.load import LoadedModel
from atesd.records import Rollout


@final
class TransformersEngine:
    """Decodes with the model's own forward."""

    def __init__(self, loaded: LoadedModel, batch_size: int) -> None:
        """`batch_size` rows are decoded together; it changes no draw."""
        self._loaded, self._batch_size = loaded, batch_size

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        """See `Engine`. Raises `ModelError` if the model's forward takes no KV cache."""

        def open_batch(rows: Sequence[Request]) -> Batch:
            return Batch(self._loaded, rows, params, _Reader(self._loaded, rows, params.completion_tokens))

        return complete_in_batches(self._loaded, requests, self._batch_size, open_batch)

    @property
    def drift(self) -> None:
        """None: it reads the model's own weights."""

    def publish(self, update: int) -> None:
        """Nothing to do: the weights are the model's own."""

    def close(self) -> None:
        """Nothing is held."""


class _Reader:
    """The model's own forward, for any architecture."""

    def __init__(self, loaded: LoadedModel, requests: Sequence[Request], steps: int) -> None:
        self._model, self._length = loaded.model, 0
        lengths = [len(request.prompt_ids) for request in requests]
        places = torch.arange(max(lengths) + steps) - (max(lengths) - torch.tensor(lengths))[:, None]
        self._mask = (places >= 0).long().to(loaded.device)
        self._positions = places.clamp(min=0).to(loaded.device)
        self._cache, self._cache_argument = preallocated_cache(loaded.model.config), cache_argument(loaded.model)

    def logits(self, ids: Tensor) -> Tensor:
        start, self._length = self._length, self._length + ids.shape[1]
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask[:, : self._length],
            position_ids=self._positions[:, start : self._length],
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self._cache},
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]
