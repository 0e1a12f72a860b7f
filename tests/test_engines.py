"""The engines under the contract of all engines, and which of them a model gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from atesd.config import LoraConfig, ModelConfig
from atesd.engine.batch import Batch, complete_in_batches
from atesd.engine.builtin import BuiltinEngine
from atesd.engine.captured import CudaGraphDecoder
from atesd.engine.decode import Decoder
from atesd.engine.factory import ShardedEngine, engine_for
from atesd.engine.interface import Engine, Request, SamplingParams
from atesd.engine.layers import read_network, unsupported
from atesd.engine.transformers import TransformersEngine
from atesd.models.load import LoadedModel, load_model
from atesd.models.ranks import SINGLE_PROCESS
from atesd.records import Rollout
from engine_contract import GREEDY, PLAIN, EngineContract, ids_of, requests_of
from tiny import tiny_folder, tiny_model


class TestBuiltin(EngineContract):
    def make(self, loaded: LoadedModel, batch_size: int = 8) -> Engine:
        return BuiltinEngine(loaded, batch_size)


class TestTransformers(EngineContract):
    def make(self, loaded: LoadedModel, batch_size: int = 8) -> Engine:
        return TransformersEngine(loaded, batch_size)


class TestSharded(EngineContract):
    """On one rank; two of them are in test_ranks."""

    def make(self, loaded: LoadedModel, batch_size: int = 8) -> Engine:
        return ShardedEngine(BuiltinEngine(loaded, batch_size), SINGLE_PROCESS)


@dataclass
class Captured:
    """The builtin engine as it decodes on CUDA, with its graphs as plain steps."""

    loaded: LoadedModel
    batch_size: int

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        def open_batch(rows: Sequence[Request]) -> Batch:
            with torch.no_grad():
                network = read_network(self.loaded.model, len(rows))
            decoder = Decoder(network, [len(row.prompt_ids) for row in rows], params.completion_tokens)
            return Batch(self.loaded, rows, params, decoder, partial(CudaGraphDecoder, decoder))

        return complete_in_batches(self.loaded, requests, self.batch_size, open_batch)

    def publish(self, update: int) -> None: ...

    def close(self) -> None: ...


class TestCaptured(EngineContract):
    def make(self, loaded: LoadedModel, batch_size: int = 8) -> Engine:
        return Captured(loaded, batch_size)


@pytest.mark.parametrize(
    ("kind", "made"), [("auto", BuiltinEngine), ("builtin", BuiltinEngine), ("transformers", TransformersEngine)]
)
def test_the_setting_names_the_engine_and_auto_is_builtin_where_it_can_be(kind, made):
    assert type(engine_for(tiny_model(), kind, 8)) is made


def test_no_step_is_spent_after_all_rows_have_ended():
    loaded = replace(tiny_model(), end_ids=frozenset(range(30)))
    steps = []
    handle = loaded.model.register_forward_hook(lambda *_: steps.append(1))
    rollouts = TransformersEngine(loaded, 8).complete(requests_of([3, 5]), PLAIN)
    handle.remove()
    assert [len(r.completion_ids) for r in rollouts] == [1, 1]
    assert len(steps) == 1


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["plain", "adapter"])
def test_checkpointing_changes_neither_engine_nor_draw(tmp_path, lora):
    config = ModelConfig(path=str(tiny_folder(tmp_path)), lora=lora, gradient_checkpointing=True)
    engines = [engine_for(load_model(config), kind, 8) for kind in ("auto", "transformers")]
    assert type(engines[0]) is BuiltinEngine
    plain, requests = engine_for(tiny_model(), "builtin", 8), requests_of([3, 6, 2])
    for engine in engines:
        assert ids_of(engine.complete(requests, PLAIN)) == ids_of(plain.complete(requests, PLAIN))


def test_the_builtin_engine_sees_through_hooks_that_ask_for_a_gradient_and_through_no_others(tmp_path):
    config = ModelConfig(path=str(tiny_folder(tmp_path)), lora=LoraConfig(rank=2))
    model = load_model(config).model
    model.enable_input_require_grads()  # transformers' own
    model.prepare_model_for_gradient_checkpointing(model.get_base_model())  # PEFT's call of it, a second hook
    assert unsupported(model) is None
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: 2 * output)
    assert unsupported(model) == "hooks on its modules"


def test_a_greedy_completion_does_not_depend_on_its_key():
    [request] = requests_of([4])
    requests = [request, replace(request, key=(1, "elsewhere"))]
    first, second = ids_of(BuiltinEngine(tiny_model(), 8).complete(requests, GREEDY))
    assert first == second
