"""Hidden states, heads and log-probabilities against the model's own logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atesd.maths.head import Head
from atesd.models.load import LoadedModel
from atesd.models.score import Scorer, completion_logprobs, micro_batches
from tiny import tiny_model

PAIRS = [((7, 8, 9), (10, 11)), ((12,), (13, 14, 15, 16)), ((9, 9, 9, 9), (1,))]


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


def test_micro_batches_take_the_longest_rows_first_and_up_to_so_many() -> None:
    assert micro_batches([3, 9, 5, 7], 2) == [[1, 3], [2, 0]]
    assert micro_batches([4, 4, 4], 8) == [[0, 1, 2]]
    assert micro_batches([], 8) == []


def test_a_token_budget_counts_the_padding_and_takes_the_place_of_the_rows() -> None:
    # Budget 20: 9 + 7 -> 2 rows of 9 (18); then 5, 3, 3 -> 4 rows of 5 would fit, there are 3.
    assert micro_batches([3, 9, 5, 7, 3], 1, 20) == [[1, 3], [2, 0, 4]]
    assert micro_batches([30, 2, 25], 8, 20) == [[0], [2], [1]]  # at least one row, however long


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8), st.none() | st.integers(1, 120))
def test_micro_batches_hold_every_row_once_and_keep_to_the_limit(
    lengths: list[int], rows: int, tokens: int | None
) -> None:
    batches = micro_batches(lengths, rows, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or (len(batch) <= rows if tokens is None else len(batch) * longest <= tokens)


@pytest.mark.parametrize("budget", [1, 9, 1000])
def test_logprobs_come_back_in_the_order_of_the_pairs_however_they_are_cut(budget: int) -> None:
    scorer = Scorer(tiny_model())
    plain = completion_logprobs(scorer, PAIRS, micro_batch_size=1)
    cut = completion_logprobs(scorer, PAIRS, micro_batch_size=1, micro_batch_tokens=budget)
    for a, b in zip(plain, cut, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_an_empty_completion_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Scorer(tiny_model()).hidden([((7,), ())])


def test_bfloat16_hidden_states_give_float32_logits() -> None:
    # One GEMM in float32 from bfloat16 inputs; rounding the logits themselves would lose small divergences.
    weight, hidden = torch.randn(9, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    logits = Head(weight).logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ weight.float().T)
