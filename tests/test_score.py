"""Hidden states, heads and log-probabilities against the model's own logits."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from atesd.maths.head import Head
from atesd.models.load import LoadedModel
from atesd.models.score import Scorer, completion_logprobs
from tiny import tiny_model

PAIRS = [((7, 8, 9), (10, 11)), ((12,), (13, 14, 15, 16)), ((9, 9, 9, 9), (1,))]
SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def by_hand(loaded: LoadedModel, context: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
    """One row alone, through the model's own logits."""
    logits = loaded.model(input_ids=torch.tensor([[*context, *completion]])).logits[0].double()
    return [logits[len(context) - 1 + n].log_softmax(-1)[token].item() for n, token in enumerate(completion)]


@torch.no_grad()
def test_logprobs_equal_the_models_own_row_by_row() -> None:
    loaded = tiny_model()
    found = completion_logprobs(Scorer(loaded), PAIRS, micro_batch_size=2, chunk_tokens=3)
    for row, (context, completion) in zip(found, PAIRS, strict=True):
        torch.testing.assert_close(
            row.double(), torch.tensor(by_hand(loaded, context, completion)).double(), atol=1e-5, rtol=1e-5
        )


def test_padding_and_neighbours_do_not_change_a_row() -> None:
    scorer = Scorer(tiny_model())
    together = completion_logprobs(scorer, PAIRS, micro_batch_size=3)
    alone = completion_logprobs(scorer, PAIRS, micro_batch_size=1)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_an_empty_completion_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Scorer(tiny_model()).hidden([((7,), ())])


@pytest.mark.parametrize(
    "model",
    [
        Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=5.0)),
        CohereForCausalLM(CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25)),
        GraniteForCausalLM(GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=4.0)),
    ],
    ids=["soft cap", "logit scale", "logit divisor"],
)
@torch.no_grad()
def test_scaled_and_capped_heads_are_understood(model: torch.nn.Module) -> None:
    loaded = LoadedModel(model.eval(), tiny_model().tokenizer, torch.device("cpu"), frozenset({1}), 0)  # type: ignore[arg-type]
    scorer = Scorer(loaded)
    assert scorer.takes_head_apart
    hidden = scorer.hidden([PAIRS[1]])
    own = model(input_ids=torch.tensor([[12, 13, 14, 15]])).logits[0]
    torch.testing.assert_close(scorer.head().logits(hidden), own, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_unknown_head_falls_back_to_the_models_own_logits() -> None:
    loaded = tiny_model()
    loaded.model.register_forward_hook(lambda _m, _a, out: setattr(out, "logits", out.logits * 3))
    scorer = Scorer(loaded)
    assert not scorer.takes_head_apart
    row = completion_logprobs(scorer, [PAIRS[0]])[0]
    torch.testing.assert_close(row, torch.tensor(by_hand(loaded, *PAIRS[0])).float(), atol=1e-5, rtol=1e-5)


def test_bfloat16_hidden_states_give_float32_logits() -> None:
    # One GEMM in float32 from bfloat16 inputs; rounding the logits themselves would lose small divergences.
    weight, hidden = torch.randn(9, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    logits = Head(weight).logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ weight.float().T)
