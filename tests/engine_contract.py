"""What every engine must do. A suite for one subclasses `EngineContract` and says how the engine is made.

    class TestServer(EngineContract):
        def make(self, loaded, batch_size=8):
            return ServerEngine(...)

An engine that runs elsewhere sets `local = False`: it need not see weights before they are published.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from atesd.config import LoraConfig, ModelConfig
from atesd.engine.draw import draw
from atesd.engine.interface import Engine, Request, SamplingParams
from atesd.errors import NonFiniteError
from atesd.maths.keyed import uniforms
from atesd.models.load import LoadedModel, load_model
from atesd.records import Rollout
from tiny import tiny_folder, tiny_model

PLAIN = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, completion_tokens=12)
GREEDY = replace(PLAIN, temperature=0.0)
FILTERED = replace(PLAIN, temperature=1.3, top_k=20, top_p=0.9, min_p=0.02)


def requests_of(lengths: list[int], vocabulary: int = 29, lowest: int = 7) -> list[Request]:
    """Random prompts of these lengths, each with draws of its own."""
    ids = np.random.default_rng(5).integers(lowest, vocabulary, size=(len(lengths), max(lengths)))
    return [Request(f"p{i}", i, tuple(ids[i, :length].tolist()), (0, "test", i)) for i, length in enumerate(lengths)]


def ids_of(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    """The completions."""
    return [rollout.completion_ids for rollout in rollouts]


def step_logits(loaded: LoadedModel, rollout: Rollout) -> torch.Tensor:
    """Logits before each completion token, by one forward pass without cache or padding."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(rollout.prompt_ids) - 1 : -1]


class EngineContract:
    """Holds for every engine, on any model that it can decode."""

    local = True

    def make(self, loaded: LoadedModel, batch_size: int = 8) -> Engine:
        """An engine for the model as it is."""
        raise NotImplementedError

    def model(self, **arguments: Any) -> LoadedModel:
        """The model of a test, the same at every call; its vocabulary is at least 30 words."""
        return tiny_model(**arguments)

    def folder(self, path: Path) -> Path:
        """`model` as a folder; `path` is free for it."""
        return tiny_folder(path)

    @pytest.mark.parametrize("params", [PLAIN, FILTERED], ids=["plain", "filtered"])
    def test_a_key_gives_the_same_tokens_in_any_batch_and_order(self, params: SamplingParams) -> None:
        loaded, requests = self.model(), requests_of([3, 12, 7, 7, 1, 5, 9])
        engine = self.make(loaded)
        together = ids_of(engine.complete(requests, params))
        assert [ids_of(engine.complete([request], params))[0] for request in requests] == together
        assert ids_of(self.make(loaded, batch_size=3).complete(requests[::-1], params))[::-1] == together
        assert ids_of(engine.complete(requests, params)) == together

    def test_equal_keys_meet_the_same_noise_and_other_keys_other_noise(self) -> None:
        first = requests_of([6])[0]
        same, other = replace(first, problem_id="other", sample=3), replace(first, key=(0, "test", "other"))
        found = ids_of(self.make(self.model()).complete([first, same, other], PLAIN))
        assert found[0] == found[1] != found[2]

    def test_the_nth_token_is_drawn_with_the_nth_uniform_of_the_key(self) -> None:
        # Inversion of the cumulative distribution over token ids, as `draw` does it, on logits read without a cache.
        loaded, requests = self.model(), requests_of([3, 8])
        for request, rollout in zip(requests, self.make(loaded).complete(requests, FILTERED), strict=True):
            logits = step_logits(loaded, rollout)
            drawn, _ = draw(logits, torch.from_numpy(uniforms(len(logits), *request.key)), FILTERED)
            assert rollout.completion_ids == tuple(drawn.tolist())

    def test_a_longer_limit_only_continues_what_a_shorter_one_began(self) -> None:
        engine, requests = self.make(self.model()), requests_of([4, 6, 8])
        short, long = (engine.complete(requests, replace(PLAIN, completion_tokens=n)) for n in (4, 20))
        assert ids_of(short) == [ids[:4] for ids in ids_of(long)]

    def test_rollouts_come_in_the_order_of_the_requests_with_their_names(self) -> None:
        requests = requests_of([9, 2, 5])
        rollouts = self.make(self.model(), batch_size=2).complete(requests, PLAIN)
        assert [(r.problem_id, r.sample, r.prompt_ids) for r in rollouts] == [
            (r.problem_id, r.sample, r.prompt_ids) for r in requests
        ]

    def test_nothing_asked_is_nothing_written(self) -> None:
        assert self.make(self.model()).complete([], PLAIN) == []

    def test_a_completion_ends_with_its_first_end_token_or_is_truncated(self) -> None:
        loaded = replace(self.model(), end_ids=frozenset({10, 11, 12, 13}))
        rollouts = self.make(loaded).complete(requests_of([3, 5] * 10), PLAIN)
        assert {r.truncated for r in rollouts} == {True, False}
        for rollout in rollouts:
            ends = [i for i, token in enumerate(rollout.completion_ids) if token in loaded.end_ids]
            assert ends == ([] if rollout.truncated else [len(rollout.completion_ids) - 1])
            assert len(rollout.completion_ids) == len(rollout.logprobs)
            assert not rollout.truncated or len(rollout.completion_ids) == 12

    def test_an_end_token_at_the_limit_is_no_truncation(self) -> None:
        loaded, request = self.model(), requests_of([6])
        third = ids_of(self.make(replace(loaded, end_ids=frozenset())).complete(request, PLAIN))[0][2]
        [rollout] = self.make(replace(loaded, end_ids=frozenset({third}))).complete(
            request, replace(PLAIN, completion_tokens=3)
        )
        assert rollout.completion_ids[-1] == third
        assert not rollout.truncated

    def test_rows_that_end_early_change_nothing_for_those_that_go_on(self) -> None:
        # 20 rows with many end tokens: rows finish early and leave in several steps. Alone, no row ever leaves a batch.
        loaded, requests = replace(self.model(), end_ids=frozenset(range(10, 14))), requests_of([3, 5, 8, 2] * 5)
        engine = self.make(loaded, batch_size=20)
        alone = [engine.complete([request], PLAIN)[0] for request in requests]
        for together, single in zip(engine.complete(requests, PLAIN), alone, strict=True):
            assert together.completion_ids == single.completion_ids
            assert together.logprobs == pytest.approx(single.logprobs, abs=1e-5)

    @pytest.mark.parametrize("steps", [12, 270], ids=["short", "longer than a block of the cache"])
    @pytest.mark.parametrize("architecture", ["qwen3", "llama"])
    def test_greedy_completions_equal_generate_token_for_token(
        self, architecture: Literal["qwen3", "llama"], steps: int
    ) -> None:
        loaded = replace(self.model(architecture=architecture), end_ids=frozenset())
        requests = requests_of([3, 9, 5, 1, 7] if steps == 12 else [6])
        rollouts = self.make(loaded).complete(requests, replace(GREEDY, completion_tokens=steps))
        for request, rollout in zip(requests, rollouts, strict=True):
            prompt = torch.tensor([request.prompt_ids])
            output = loaded.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=steps, eos_token_id=[]
            )
            assert rollout.completion_ids == tuple(output[0, len(request.prompt_ids) :].tolist())

    @pytest.mark.parametrize(("temperature", "scored_at"), [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)])
    def test_logprobs_are_those_of_the_scaled_distribution_before_any_filter(
        self, temperature: float, scored_at: float
    ) -> None:
        loaded, params = self.model(), replace(PLAIN, temperature=temperature, top_k=4, top_p=0.9)
        for rollout in self.make(loaded).complete(requests_of([3, 8, 5]), params):
            logits = step_logits(loaded, rollout).double() / scored_at
            expected = torch.distributions.Categorical(logits=logits).log_prob(torch.tensor(rollout.completion_ids))
            assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-5)

    def test_an_empty_prompt_is_refused_by_the_name_of_its_problem(self) -> None:
        first, second = requests_of([3, 4])
        with pytest.raises(ValueError, match="prompt of p1 is empty"):
            self.make(self.model()).complete([first, replace(second, prompt_ids=())], PLAIN)

    def test_logits_that_are_not_finite_name_the_problem(self) -> None:
        loaded = self.model()
        with torch.no_grad():
            loaded.model.get_output_embeddings().weight[20] = float("nan")
        # A NaN row of the head spoils every logit vector of every row.
        with pytest.raises(NonFiniteError, match="not finite while it completes p1"):
            self.make(loaded).complete(requests_of([3, 5])[1:], PLAIN)

    def test_it_leaves_the_model_trainable_and_the_global_generator_alone(self) -> None:
        loaded, before = self.model(), torch.random.get_rng_state()
        [rollout] = self.make(loaded).complete(requests_of([4]), PLAIN)
        assert torch.equal(before, torch.random.get_rng_state())
        loaded.model(input_ids=torch.tensor([rollout.completion_ids])).logits.sum().backward()
        assert all(parameter.grad is not None for parameter in loaded.model.parameters())

    def test_a_new_adapter_changes_no_draw(self, tmp_path: Path) -> None:
        config = ModelConfig(path=str(self.folder(tmp_path)), lora=LoraConfig(rank=2))
        requests = requests_of([3, 6, 2])
        adapted, plain = (self.make(loaded).complete(requests, PLAIN) for loaded in (load_model(config), self.model()))
        assert ids_of(adapted) == ids_of(plain)

    def test_after_publish_it_writes_what_an_engine_of_the_new_weights_writes(self) -> None:
        loaded, requests = self.model(), requests_of([4, 7])
        engine = self.make(loaded)
        before = engine.complete(requests, PLAIN)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.mul_(1.1)  # as an optimiser does, in place
        engine.publish(1)
        assert engine.complete(requests, PLAIN) == self.make(loaded).complete(requests, PLAIN) != before

    def test_publishing_twice_is_publishing_once_and_closing_twice_is_closing_once(self) -> None:
        engine, requests = self.make(self.model()), requests_of([4, 7])
        before = engine.complete(requests, PLAIN)
        engine.publish(0)
        engine.publish(0)
        assert engine.complete(requests, PLAIN) == before
        engine.close()
        engine.close()
