"""What every owner of parameter values must do. A suite for one subclasses `WeightsContract` and says how it is made.

    class TestSharded(WeightsContract):
        def make(self, loaded):
            return ShardedWeights(loaded.model, ...)

The model's own forward is the judge of what its parameters are, never the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atesd.config import LoraConfig, ModelConfig
from atesd.errors import CheckpointError
from atesd.models.load import LoadedModel, load_model
from atesd.models.score import Scorer
from atesd.models.weights import Weights
from tiny import tiny_folder, tiny_model

Make = Callable[[], LoadedModel]
PAIR = ((7, 8, 9), (10, 11, 12))
IDS = torch.tensor([[*PAIR[0], *PAIR[1]]])


def untied() -> LoadedModel:
    """The tiny model with a head of its own, which differs from its embedding."""
    loaded = tiny_model()
    head = loaded.model.lm_head
    head.weight = torch.nn.Parameter(loaded.model.model.embed_tokens.weight.detach().flip(0))
    loaded.model.config.tie_word_embeddings = False
    return loaded


def adapted(folder: Path) -> LoadedModel:
    """The tiny model under an adapter that has left zero."""
    loaded = load_model(ModelConfig(path=str(folder), device="cpu", lora=LoraConfig(rank=2, alpha=4)))
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return loaded


@pytest.fixture(params=["tied", "untied", "adapter"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    """Each kind of model: a head that is the embedding, a head of its own, and one below an adapter."""
    makers: dict[str, Make] = {
        "tied": tiny_model,
        "untied": untied,
        "adapter": lambda: adapted(tiny_folder(tmp_path / "base")),
    }
    return makers[request.param]()


def logits(loaded: LoadedModel) -> Tensor:
    """What the model says now."""
    with torch.no_grad():
        found: Tensor = loaded.model(input_ids=IDS, use_cache=False).logits
    return found


def others(weights: Weights, seed: int = 1) -> dict[str, Tensor]:
    """Other values of every trained tensor."""
    source = torch.Generator().manual_seed(seed)
    return {
        name: part.tensor + 0.1 * torch.randn(part.tensor.shape, generator=source)
        for name, part in weights.parts().items()
    }


def values_of(weights: Weights) -> dict[str, Tensor]:
    """Copies of this rank's parts."""
    return {name: part.tensor.clone() for name, part in weights.parts().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class WeightsContract:
    """Holds for every owner of parameter values."""

    def make(self, loaded: LoadedModel) -> Weights:
        """The weights of a model."""
        raise NotImplementedError

    def test_the_trained_parameters_are_the_models_own_or_the_adapters_alone(self, loaded: LoadedModel) -> None:
        weights = self.make(loaded)
        named = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
        assert set(weights.trained) == named
        assert weights.has_adapter == all("lora_" in name for name in named)

    def test_inside_an_exchange_the_model_is_another_and_afterwards_itself_bit_for_bit(
        self, loaded: LoadedModel
    ) -> None:
        weights, before = self.make(loaded), logits(loaded)
        student, teacher = values_of(weights), others(weights)
        given = {name: value.clone() for name, value in teacher.items()}
        with weights.exchanged(teacher):
            inside = logits(loaded)
            assert_same(values_of(weights), given)
            assert_same(teacher, student)
        assert not torch.allclose(inside, before, atol=1e-3)
        assert torch.equal(logits(loaded), before)
        assert_same(teacher, given)
        weights.load(given)
        assert torch.equal(logits(loaded), inside)

    def test_an_exception_inside_still_gives_both_sides_back(self, loaded: LoadedModel) -> None:
        weights, before = self.make(loaded), logits(loaded)
        teacher, unit = others(weights), others(weights, seed=2)
        given = {name: value.clone() for name, value in teacher.items()}
        for context in (
            partial(weights.exchanged, teacher),
            partial(weights.moved, unit, 0.1),
            weights.whole,
        ):
            with pytest.raises(RuntimeError, match="inside"), context():
                raise RuntimeError("inside")
            assert torch.equal(logits(loaded), before)
        assert_same(teacher, given)

    def test_a_name_that_is_not_trained_is_refused_and_nothing_is_changed(self, loaded: LoadedModel) -> None:
        weights, before = self.make(loaded), logits(loaded)
        teacher = {**others(weights), "nothing_of_that_name": torch.zeros(1)}
        for context in (weights.exchanged(teacher), weights.moved(teacher, 1.0)):
            with pytest.raises(KeyError, match="nothing_of_that_name"), context:
                pass
        assert torch.equal(logits(loaded), before)

    def test_moved_is_the_displaced_model_and_afterwards_itself_bit_for_bit(self, loaded: LoadedModel) -> None:
        weights, before = self.make(loaded), logits(loaded)
        unit, student = others(weights, seed=2), values_of(weights)
        displaced = {name: student[name] - 0.25 * unit[name] for name in unit}
        with weights.moved(unit, -0.25):
            inside = logits(loaded)
            assert_same(values_of(weights), displaced)
        assert torch.equal(logits(loaded), before)
        with weights.exchanged(displaced):
            assert torch.equal(logits(loaded), inside)

    def test_exchanges_and_moves_nest_in_either_order(self, loaded: LoadedModel) -> None:
        weights, before = self.make(loaded), logits(loaded)
        teacher, unit = others(weights), others(weights, seed=2)
        with weights.exchanged(teacher):
            alone = logits(loaded)
            with weights.moved(unit, 0.5):
                moved_teacher = logits(loaded)
            assert torch.equal(logits(loaded), alone)
        with weights.moved(unit, 0.5):
            moved = logits(loaded)
            with weights.exchanged(teacher):
                assert torch.equal(logits(loaded), alone)
            assert torch.equal(logits(loaded), moved)
        assert not torch.equal(moved, moved_teacher)
        assert torch.equal(logits(loaded), before)

    def test_gradients_are_left_as_they_are_and_none_is_recorded_inside(self, loaded: LoadedModel) -> None:
        weights = self.make(loaded)
        loaded.model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in weights.trained.items() if p.grad is not None}
        for context in (weights.exchanged(others(weights)), weights.moved(others(weights), 0.1)):
            with context:
                assert not loaded.model(input_ids=IDS, use_cache=False).logits.requires_grad
        assert_same({name: p.grad for name, p in weights.trained.items() if p.grad is not None}, gradients)
        assert all(parameter.requires_grad for parameter in weights.trained.values())

    def test_a_graph_that_waits_for_its_backward_pass_is_not_disturbed(self, loaded: LoadedModel) -> None:
        # The token gate displaces the student between its forward and its backward pass.
        weights = self.make(loaded)
        found = []
        for disturbed in (False, True):
            loss = loaded.model(input_ids=IDS, use_cache=False).logits.square().mean()
            if disturbed:
                with weights.moved(others(weights), 0.1), weights.exchanged(others(weights, seed=2)):
                    logits(loaded)
            loss.backward()
            found.append({name: p.grad for name, p in weights.trained.items() if p.grad is not None})
            loaded.model.zero_grad(set_to_none=True)
        assert_same(found[1], found[0])

    def test_a_head_that_is_kept_stays_what_it_was_when_the_exchange_ends(self, loaded: LoadedModel) -> None:
        weights = self.make(loaded)
        scorer = Scorer(loaded, weights)
        hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        for context in (weights.exchanged(others(weights)), weights.moved(others(weights), 0.5)):
            with context:
                head = scorer.head()
                inside = head.logits(hidden)
                assert head.trained == []
            with torch.no_grad():
                after = scorer.head().logits(hidden)
            assert torch.equal(head.logits(hidden), inside)
            assert torch.equal(after, inside) == weights.has_adapter  # an adapter leaves the head alone

    def test_a_kept_head_is_not_overwritten_by_a_later_exchange(self, loaded: LoadedModel) -> None:
        weights = self.make(loaded)
        scorer = Scorer(loaded, weights)
        hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            student = scorer.head()
            before = student.logits(hidden)
            with weights.exchanged(others(weights)):
                assert torch.equal(student.logits(hidden), before)

    def test_a_head_that_is_not_kept_is_trained(self, loaded: LoadedModel) -> None:
        weights = self.make(loaded)
        head = Scorer(loaded, weights).head()
        hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        head.logits(hidden).sum().backward() if head.trained else None
        trained = loaded.model.get_output_embeddings().weight
        assert (trained.grad is not None) == (not weights.has_adapter)

    def test_without_its_adapter_the_model_is_the_one_below_bit_for_bit(self, tmp_path: Path) -> None:
        folder = tiny_folder(tmp_path / "base")
        loaded, base = adapted(folder), load_model(ModelConfig(path=str(folder), device="cpu"))
        weights, before = self.make(loaded), logits(loaded)
        with weights.without_adapter():
            assert torch.equal(logits(loaded), logits(base))
        assert torch.equal(logits(loaded), before)
        assert not torch.equal(before, logits(base))
        with pytest.raises(ValueError, match="no adapter"), self.make(base).without_adapter():
            pass

    def test_whole_changes_no_value(self, loaded: LoadedModel) -> None:
        weights, before = self.make(loaded), logits(loaded)
        with weights.whole():
            assert torch.equal(logits(loaded), before)
        assert torch.equal(logits(loaded), before)

    def test_agreement_is_equal_for_equal_values_and_differs_with_one_bit_of_one(self, loaded: LoadedModel) -> None:
        weights = self.make(loaded)
        agreed = weights.agreement()
        assert agreed == weights.agreement()
        values = values_of(weights)
        for name in (min(values), max(values)):
            changed = {**values, name: values[name].clone()}
            flat = changed[name].view(-1)
            flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf))
            weights.load(changed)
            assert weights.agreement() != agreed
        swapped = {name: value.flatten().flip(0).view_as(value) for name, value in values.items()}
        weights.load(swapped)  # the same sums
        assert weights.agreement() != agreed
        weights.load(values)
        assert weights.agreement() == agreed

    def test_the_parts_cover_every_row_of_every_trained_tensor_once(self, loaded: LoadedModel) -> None:
        # With one rank; more of them put their parts together, in the order of `first_row`.
        weights = self.make(loaded)
        parts = weights.parts()
        assert parts.keys() == weights.trained.keys()
        for name, parameter in loaded.model.named_parameters():
            if name in parts:
                part = parts[name]
                assert part.shape == tuple(parameter.shape)
                assert (part.first_row, part.tensor.shape[0]) == (0, part.shape[0])
                assert part.tensor.shape[1:] == part.shape[1:]
                assert not part.tensor.requires_grad

    def test_parts_that_are_loaded_elsewhere_make_the_same_model(self, loaded: LoadedModel) -> None:
        weights, before = self.make(loaded), logits(loaded)
        saved = values_of(weights)
        with torch.no_grad():
            for parameter in weights.trained.values():
                parameter.mul_(1.1)  # as an optimiser does, in place: parts show the values of the moment
        assert not torch.equal(logits(loaded), before)
        assert not torch.equal(weights.parts()[min(saved)].tensor, saved[min(saved)])
        weights.load(saved)
        assert torch.equal(logits(loaded), before)

    def test_a_checkpoint_of_another_model_is_refused_by_a_name(self, loaded: LoadedModel) -> None:
        weights, before = self.make(loaded), logits(loaded)
        saved = values_of(weights)
        first = min(saved)
        with pytest.raises(CheckpointError, match=f"{first} is only on one side"):
            weights.load({name: value for name, value in saved.items() if name != first})
        with pytest.raises(CheckpointError, match="extra is only on one side"):
            weights.load({**saved, "extra": torch.zeros(1)})
        assert torch.equal(logits(loaded), before)

    def test_gradients_of_one_rank_add_up_to_themselves(self, loaded: LoadedModel) -> None:
        weights = self.make(replace(loaded))
        loaded.model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in weights.trained.items() if p.grad is not None}
        weights.add_up_gradients()
        assert_same({name: p.grad for name, p in weights.trained.items() if p.grad is not None}, gradients)
