"""The probe gain: success followed by importance weights, against enumeration, resampling and a second probe set."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from atesd.build import build, close
from atesd.config import CreditConfig, PolicyConfig
from atesd.maths.credit import WEIGHT_CAP, reweighted_gain
from atesd_lab.audit.null_simulation import MeasuredBatch, MeasuredRatio, simulate
from quick import quick

GAIN = frozenset({"probe_gain"})


@pytest.fixture
def parts():
    made = build(quick("data.probe_size=12", "train.micro_batch_size=5"))
    yield made
    close(made)


def train_a_little(parts) -> None:
    """Every weight a little different, in a keyed way."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in parts.loaded.model.parameters():
            parameter += 0.02 * torch.from_numpy(rng.standard_normal(parameter.shape)).float()


def test_the_gain_by_hand():
    # Two correct of four; one became 1.5 times as likely, one half as likely: (0.5 - 0.5) / 4, then (0.5 + 1) / 4
    then, log = [-1.0, -2.0, -3.0, -4.0], math.log
    assert reweighted_gain([1.0, 1.0, 0.0, 0.0], then, [-1 + log(1.5), -2 + log(0.5), 0.0, 0.0]) == pytest.approx(0.0)
    assert reweighted_gain([1.0, 1.0, 0.0, 0.0], then, [-1 + log(1.5), -2 + log(2.0), 0.0, 0.0]) == pytest.approx(0.375)


def test_the_expected_gain_is_the_true_change_of_success():
    # Every pair of rollouts that a student over four completions can write, with its probability.
    before, after, correct = [0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.1, 0.3], [1.0, 0.0, 1.0, 0.0]
    expected = 0.0
    for pair in itertools.product(range(4), repeat=2):
        then, now = ([math.log(p[i]) for i in pair] for p in (before, after))
        chance = math.prod(before[i] for i in pair)
        expected += chance * reweighted_gain([correct[i] for i in pair], then, now)
    assert expected == pytest.approx((0.5 + 0.1) - (0.4 + 0.2))


def nucleus(probabilities: list[float], top_p: float = 0.9) -> list[float]:
    """The distribution from which top-p draws: the most likely completions that together reach `top_p`."""
    kept, reached = [0.0] * len(probabilities), 0.0
    for i in sorted(range(len(kept)), key=lambda i: -probabilities[i]):
        if reached < top_p:
            kept[i] = probabilities[i]
            reached += probabilities[i]
    return [p / reached for p in kept]


def expected_gain(drawn: list[float], then: list[float], now: list[float], correct: list[float]) -> float:
    """The mean estimate over every completion that `drawn` can write, weighed by then and now."""
    log = [[math.log(p) if p else -math.inf for p in side] for side in (then, now)]
    written = [i for i, p in enumerate(drawn) if p]
    return sum(drawn[i] * reweighted_gain([correct[i]], [log[0][i]], [log[1][i]]) for i in written)


@pytest.mark.parametrize(
    ("after", "correct", "truth", "by_whole", "by_filtered"),
    [
        # The filter admits what it admitted: filtered probabilities would do, those of the whole softmax would not.
        ([0.50, 0.41, 0.06, 0.03], [1.0, 0.0, 1.0, 1.0], 0.5 / 0.91 - 0.5 / 0.9, 0.0, 0.5 / 0.91 - 0.5 / 0.9),
        # It forbids one more: weight 0 for that one is right.
        ([0.95, 0.02, 0.02, 0.01], [0.0, 1.0, 1.0, 1.0], -0.4 / 0.9, 0.4 / 0.9 * (0.02 / 0.4 - 1.0), -0.4 / 0.9),
        # It admits one more: neither sees what that one adds, and no weight of the two it drew can.
        ([0.50, 0.30, 0.15, 0.05], [0.0, 0.0, 1.0, 0.0], 0.15 / 0.95, 0.0, 0.0),
    ],
    ids=["same support", "smaller support", "larger support"],
)
def test_the_gain_under_a_filter_is_wrong_however_it_is_weighed(after, correct, truth, by_whole, by_filtered):
    before = [0.50, 0.40, 0.06, 0.04]
    old, new = nucleus(before), nucleus(after)
    assert sum(c * (q - p) for c, p, q in zip(correct, old, new, strict=True)) == pytest.approx(truth)
    assert expected_gain(old, before, after, correct) == pytest.approx(by_whole)
    assert expected_gain(old, old, new, correct) == pytest.approx(by_filtered)
    assert expected_gain(before, before, after, correct) == pytest.approx(
        sum(c * (q - p) for c, p, q in zip(correct, before, after, strict=True))
    )


def test_one_rollout_counts_for_at_most_ten():
    assert reweighted_gain([1.0], [-2000.0], [-1.0]) == WEIGHT_CAP - 1


def test_a_student_that_does_not_change_has_gained_exactly_nothing(parts):
    assert [parts.probes.measure(GAIN) for _ in range(3)] == [{"probe_gain": 0.0}] * 3


def test_each_measurement_writes_rollouts_of_its_own(parts):
    written = []
    for _ in range(2):
        parts.probes.measure(GAIN)
        written.append([completion for _, completion, _, _ in parts.probes.state_dict()["answered"]])
    assert written[0] != written[1]


def test_a_changed_student_gains_what_the_models_own_probabilities_say(parts):
    parts.probes.measure(GAIN)
    answered = parts.probes.state_dict()["answered"]
    train_a_little(parts)
    expected = []
    for prompt, completion, correct, then in answered:
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logprobs = parts.loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
        now = sum(float(logprobs[len(prompt) - 1 + n, token]) for n, token in enumerate(completion))
        expected.append(correct * (min(math.exp(now - then), 10.0) - 1.0))
    assert any(expected)
    assert parts.probes.measure(GAIN)["probe_gain"] == pytest.approx(sum(expected) / 12, abs=1e-5)


def test_the_sum_of_the_gains_goes_on_after_a_resume(parts):
    parts.probes.measure(GAIN)
    train_a_little(parts)
    parts.probes.measure(GAIN)
    state = json.loads(json.dumps(parts.probes.state_dict()))
    train_a_little(parts)
    expected = parts.probes.measure(GAIN)
    parts.probes.load_state_dict(state)
    assert parts.probes.measure(GAIN) == expected != {"probe_gain": 0.0}


def test_under_the_null_the_probe_gain_moves_no_policy():
    batches = tuple(MeasuredBatch(0.1 * n, 0.1 * n, 0.1, -0.5) for n in range(1, 4))
    frozen = [MeasuredRatio(ratio, batches) for ratio in (0.0, 1.0)]
    result = simulate(frozen, CreditConfig(progress_signal="probe_gain"), PolicyConfig(), decisions=40, seed=0)
    assert (result.end_mean, result.policy_updates) == (pytest.approx(0.5), 0)
