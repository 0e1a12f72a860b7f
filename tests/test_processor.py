"""The attention that is chosen where none is set."""

import pytest
import torch

from atesd.config import ModelConfig
from atesd.models import processor
from atesd.models.processor import attention_note, attention_of


@pytest.mark.parametrize(
    ("settings", "able", "chosen"),
    [
        ({}, True, "sdpa"),
        ({"dtype": "bfloat16"}, True, "eager"),
        ({"dtype": "bfloat16"}, False, "sdpa"),
        ({"dtype": "bfloat16", "attention": "sdpa"}, True, "sdpa"),
        ({"attention": "eager"}, False, "eager"),
    ],
)
def test_eager_is_chosen_in_bfloat16_on_a_processor_that_computes_in_it(monkeypatch, settings, able, chosen):
    monkeypatch.setattr(processor, "computes_in_bfloat16", lambda: able)
    config = ModelConfig(device="cpu", **settings)
    assert attention_of(config) == chosen
    told = attention_note(config)
    assert (told is not None) == (chosen == "eager" and config.attention is None)
    assert told is None or told.startswith("model.attention: eager")


def test_on_a_gpu_it_stays_sdpa(monkeypatch):
    monkeypatch.setattr(processor, "computes_in_bfloat16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention_of(ModelConfig(dtype="bfloat16")) == "sdpa"
    assert attention_of(ModelConfig(dtype="bfloat16", device="cpu")) == "eager"
