"""What a gate promises along its own direction, and what another direction and the truth make of it."""

from __future__ import annotations

import pytest

from quick import quick
from validation import promise
from validation.promise import measured

SETTINGS = ("exposure.kind=full", "loss.gate=aligned", "alignment.min_correct=1", "alignment.parameters=last_layer")


def test_a_gate_promises_what_helps_and_the_run_is_as_if_nobody_had_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promise, "HOLD", 2)
    monkeypatch.setattr(promise, "MANY", 3)
    monkeypatch.setattr(promise, "SCORED", 2)
    config = quick(*SETTINGS, "data.leap_share=1", "train.batch_size=8")
    both = measured(config, (0, 3))
    assert both[1] == measured(config, (3,))[0]
    for one in both:
        for gate in (one.gate, one.better_gate):
            assert gate.promised is not None
            assert gate.promised > 0
            assert 0 < gate.share < 1
        assert (one.every_token.share, one.every_token.promised) == (1.0, None)
        assert one.better_gate.judged > one.every_token.judged
        assert -1 < one.cosine < 1
        assert 0.3 < one.signs < 1
