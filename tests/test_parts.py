"""Parts of the parameters, judged by the order that they foresee."""

from __future__ import annotations

import pytest
import torch

from quick import quick
from validation import foresight, parts
from validation.parts import Orders, by_part, orders, table


def test_the_parts_add_up_and_the_whole_is_the_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = {"model.layers.1.mlp.x": torch.tensor([1.0, 2.0]), "model.embed_tokens.weight": torch.tensor([3.0])}
    step = {"model.layers.1.mlp.x": torch.tensor([1.0, -1.0]), "model.embed_tokens.weight": torch.tensor([-1.0])}
    found = by_part(unit, [step])
    assert (found["all"], found["last_mlp"], found["first layer"]) == ((4.0,), (1.0,), (0.0,))
    monkeypatch.setattr(foresight, "BATCHES_SCORED", 1)
    config = quick("exposure.kind=full", "loss.gate=aligned", "alignment.min_correct=1", "train.batch_size=8")
    seen = orders(config, 0)
    ratios = len(seen.true)
    assert {len(row) for row in seen.whole.values()} == {ratios}
    assert {len(rows) for rows in seen.halves.values()} == {6}
    attention, mlp = seen.whole["last attention"], seen.whole["last_mlp"]
    assert [a + b for a, b in zip(attention, mlp, strict=True)] == pytest.approx(seen.whole["last_layer"], abs=1e-6)


def test_the_table_counts_only_what_all_parameters_order() -> None:
    true = (1.0, 2.0, 3.0, 4.0, 5.0)
    back = tuple(reversed(true))
    known = Orders(true, {p: true if p == "all" else back for p in parts.PARTS}, {p: [true, back] for p in parts.PARTS})
    unknown = Orders(true, dict.fromkeys(parts.PARTS, back), {p: [true, true] for p in parts.PARTS})
    first, every, layer, *_ = table([known, unknown])
    assert first.startswith("1 of 2 cases")
    assert every.endswith("at least 0.8 in 1, the lowest 1.0; from half of the rollouts 0.50; both halves agree 0.00")
    assert "in 0, the lowest -1.0" in layer
