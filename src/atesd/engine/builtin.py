"""The engine that runs Llama, Qwen2 and Qwen3 networks itself (`decode`, `layers`; on CUDA `captured`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import final

import torch

from atesd.engine.batch import Batch, complete_in_batches
from atesd.engine.captured import CudaGraphDecoder
from atesd.engine.decode import Decoder
from atesd.engine.interface import Request, SamplingParams
from atesd.engine.layers import Network, read_network, unsupported
from atesd.errors import ModelError
from atesd.models.load import LoadedModel
from atesd.records import Rollout


@final
class BuiltinEngine:
    """Decodes with weights that are read anew at every call, so that no optimiser step is missed."""

    def __init__(self, loaded: LoadedModel, batch_size: int) -> None:
        """`batch_size` rows are decoded together; it changes no draw. Raises `ModelError` for an unknown network."""
        self._loaded, self._batch_size = loaded, batch_size
        self._require_supported()

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        """See `Engine`. Raises `ModelError` if the model has changed into one that cannot be decoded."""
        if not requests:
            return []
        self._require_supported()
        with torch.no_grad():
            network = read_network(self._loaded.model, min(len(requests), self._batch_size))
        open_batch = partial(_open_batch, self._loaded, network, params)
        return complete_in_batches(self._loaded, requests, self._batch_size, open_batch)

    @property
    def drift(self) -> None:
        """None: it reads the model's own weights."""

    def publish(self, update: int) -> None:
        """Nothing to do: the weights are the model's own."""

    def close(self) -> None:
        """Nothing is held."""

    def _require_supported(self) -> None:
        why_not = unsupported(self._loaded.model)
        if why_not is not None:
            raise ModelError(
                f"sampling.engine: builtin cannot decode this model ({why_not}); set sampling.engine: auto"
            )


def _open_batch(loaded: LoadedModel, network: Network, params: SamplingParams, requests: Sequence[Request]) -> Batch:
    decoder = Decoder(network, [len(request.prompt_ids) for request in requests], params.completion_tokens)
    capture = partial(CudaGraphDecoder, decoder) if loaded.device.type == "cuda" else None
    return Batch(loaded, requests, params, decoder, capture)
