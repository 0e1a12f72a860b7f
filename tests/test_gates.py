"""Token weights by SDAR's gap, by influence on the policy gradient, by a sigmoid of alignment; and their controls."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atesd.aligned.direction import Attempt
from atesd.aligned.selectors import AlignedGate
from atesd.build import build, close, objective
from atesd.config import load_config, method_name
from atesd.data.presets import PRESETS
from atesd.errors import ConfigError
from atesd.maths.advantages import difficulty_advantages
from atesd.maths.divergence import Objective
from atesd.maths.gates import bounded_weights, influence, sdar_weights, soft_weights
from atesd.models.score import Scorer, completion_tokens
from atesd.train.optimiser import Optimiser
from atesd.train.rollouts import batch_at
from atesd.train.selectors import InfluenceGate, PermutedGate, RandomGate, SdarGate
from atesd.train.update import Example, Selector
from quick import finished, quick
from tiny import tiny_model
from updates import alignment_scorer, batch_of, direction_of, distill, selector_of

FULL = "exposure.kind=full"
SOFT = (FULL, "loss.gate=soft", "alignment.min_correct=1")
PER_TOKEN = ("exposure.kind=aligned", "exposure.granularity=per_token", "loss.gate=aligned")
BY_DIFFICULTY = (FULL, "train.grpo_weight=0.5", "train.baseline=difficulty")


def test_a_soft_weight_is_the_sigmoid_of_alignment_over_its_scale_over_the_mean_of_all() -> None:
    # rms = 2; sigmoid(2 * 1) = .8808, sigmoid(-2) = .1192, whose mean is one half.
    weights = soft_weights(torch.tensor([2.0, -2.0]), 2.0)
    assert weights.tolist() == pytest.approx([2 / (1 + math.exp(-2)), 2 / (1 + math.exp(2))])


def test_a_soft_weight_has_no_cliff_at_0_and_becomes_the_cut_as_it_sharpens() -> None:
    near = torch.tensor([1e-6, -1e-6, 1.0], dtype=torch.float64)
    assert float(soft_weights(near, 4.0)[0] - soft_weights(near, 4.0)[1]) == pytest.approx(0, abs=1e-5)
    sharp = soft_weights(torch.tensor([0.3, -0.2, 0.5, -0.1]), 1e4)
    assert sharp.tolist() == pytest.approx([2, 0, 2, 0])
    assert soft_weights(torch.zeros(3), 4.0).tolist() == [1, 1, 1]
    assert soft_weights(torch.tensor([-1.0, -1.2]), 1e4).tolist() == [2, 0]  # all sigmoids are 0
    assert soft_weights(torch.tensor([-1.0]), 1e4).tolist() == [1]


values = st.lists(st.floats(-10, 10), min_size=1, max_size=30)


@given(values, st.floats(0.1, 1e6))
def test_soft_weights_keep_the_mass_and_the_order(values: list[float], sharpness: float) -> None:
    alignment = torch.tensor(values, dtype=torch.float64)
    weights = soft_weights(alignment, sharpness)
    assert float(weights.mean()) == pytest.approx(1)
    assert bool((weights[alignment.argsort()].diff() >= 0).all())


@given(values, st.floats(0.01, 10), st.floats(0.05, 0.95))
def test_bounded_weights_keep_the_mass_within_their_bounds(values: list[float], scale: float, bound: float) -> None:
    weights = bounded_weights(torch.tensor(values, dtype=torch.float64), scale, bound)
    assert float(weights.mean()) == pytest.approx(1)
    largest = (1 + bound) / (1 - bound)
    assert 1 / largest - 1e-9 <= float(weights.min()) <= float(weights.max()) <= largest + 1e-9


def test_a_bounded_weight_is_what_is_left_of_one_and_a_tangent_after_rescaling() -> None:
    tangent = math.tanh(0.5)
    weights = bounded_weights(torch.tensor([0.05, -0.05, 0.0]), 0.1, 0.8)
    assert weights.tolist() == pytest.approx([1 + 0.8 * tangent, 1 - 0.8 * tangent, 1])


def test_sdar_s_gate_is_the_teacher_s_share_of_both_probabilities_to_the_power_beta() -> None:
    # sigmoid(b (log p - log q)) = p^b / (p^b + q^b): p = .8, q = .2, b = 2 give 16 / 17.
    p, q = torch.tensor([0.8, 0.3]), torch.tensor([0.2, 0.3])
    assert sdar_weights(p.log(), q.log(), 2.0).tolist() == pytest.approx([16 / 17, 0.5])


@pytest.mark.parametrize("clip", ["none", "per_token"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon", "top_k"])
def test_influence_is_the_rise_of_the_surrogate_by_a_small_step_on_the_token_s_divergence(kind: str, clip: str) -> None:
    """By a step on free logits, in float64: (S(z - eta dD/dz) - S(z)) / eta."""
    draws = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 6, 9, generator=draws, dtype=torch.float64)
    tokens, advantages = torch.arange(6), torch.tensor([1, -0.5, 0.3, 2, 0, -1], dtype=torch.float64)
    asked = Objective(kind, clip, 0.3, 1.3, {"jensen_shannon": 0.5, "top_k": 4.0}.get(kind))
    free = student.clone().requires_grad_()
    slope = torch.autograd.grad(asked(teacher, free, tokens)[0].sum(), free)[0]
    eta = 1e-6
    after, before = (
        advantages * (z / 1.3).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        for z in (student - eta * slope, student)
    )
    found = influence(asked, teacher, student, tokens, advantages)
    torch.testing.assert_close(found, (after - before) / eta, rtol=1e-4, atol=1e-6)


def test_for_forward_kl_influence_is_the_advantage_times_what_teacher_and_sampled_token_have_in_common() -> None:
    p, q, y, advantage = [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], 0, -0.5
    by_hand = advantage * sum((p[v] - q[v]) * ((v == y) - q[v]) for v in range(3))
    found = influence(
        Objective(), torch.tensor([p]).log(), torch.tensor([q]).log(), torch.tensor([y]), torch.tensor([advantage])
    )
    assert float(found) == pytest.approx(by_hand)


def scored_rows() -> tuple[list[Example], Scorer]:
    draws = torch.Generator().manual_seed(0)
    rows = [
        Example(
            (7, 8),
            tuple(torch.randint(7, 20, (n,), generator=draws).tolist()),
            (9, 10, 11),
            key=(0, f"p{n}", 0),
            outcome=outcome,
        )
        for n, outcome in ((5, 0.5), (40, -0.5), (3, 0.0))
    ]
    return rows, Scorer(tiny_model())


def selected(gate: Selector, rows: list[Example], scorer: Scorer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A gate's factors, and both sides' log-probabilities of the whole vocabulary."""
    with torch.no_grad():
        student = scorer.scored([row.student_pair for row in rows])
        teacher = scorer.scored([row.teacher_pairs[0] for row in rows])
        tokens = completion_tokens([row.student_pair for row in rows], scorer.device)
        factors = gate.select(rows, student, [teacher], tokens).factors
        assert factors is not None
        return factors, *(side.logits(slice(None)).log_softmax(-1) for side in (teacher, student))


def test_the_gate_of_sdar_reads_the_sampled_tokens_under_both_contexts() -> None:
    rows, scorer = scored_rows()
    factors, log_p, log_q = selected(SdarGate(5.0, 1.0, 7), rows, scorer)
    tokens = torch.tensor([token for row in rows for token in row.completion])
    gap = (log_p - log_q)[torch.arange(48), tokens]
    torch.testing.assert_close(factors, 1 / (1 + (-5 * gap).exp()), rtol=1e-4, atol=1e-5)
    assert float(factors.std()) > 0.01


def test_the_gate_by_influence_reads_every_rollout_s_own_outcome_and_keeps_its_mass() -> None:
    rows, scorer = scored_rows()
    factors, log_p, log_q = selected(InfluenceGate(0.05, 0.9, Objective(), 7), rows, scorer)
    p, q = log_p.exp(), log_q.exp()
    tokens = torch.tensor([token for row in rows for token in row.completion])
    common = ((p - q) * (torch.nn.functional.one_hot(tokens, p.shape[1]) - q)).sum(-1)
    start = 0
    for row in rows:
        own = common[start : start + len(row.completion)] * row.outcome
        raw = 1 + 0.9 * (own / 0.05).tanh()
        torch.testing.assert_close(factors[start : start + len(own)], raw / raw.mean(), rtol=1e-3, atol=1e-4)
        start += len(own)
    assert factors[-3:].tolist() == [1, 1, 1]  # no outcome, no preference


def test_permuted_weights_are_those_of_the_gate_dealt_anew_within_each_rollout_by_its_key() -> None:
    rows, scorer = scored_rows()
    own = selected(SdarGate(5.0, 1.0, None), rows, scorer)[0]
    dealt = selected(PermutedGate(SdarGate(5.0, 1.0, None), 0), rows, scorer)[0]
    for a, b in zip(torch.split(own, [5, 40, 3]), torch.split(dealt, [5, 40, 3]), strict=True):
        torch.testing.assert_close(a.sort().values, b.sort().values)
    assert not torch.equal(own[5:45], dealt[5:45])
    alone = selected(PermutedGate(SdarGate(5.0, 1.0, None), 0), rows[1:2], scorer)[0]
    torch.testing.assert_close(alone, dealt[5:45])
    other = selected(PermutedGate(SdarGate(5.0, 1.0, None), 1), rows[1:2], scorer)[0]
    assert not torch.equal(alone, other)


def test_a_gate_of_one_probability_keeps_its_share_when_it_is_permuted() -> None:
    rows, scorer = scored_rows()
    own, dealt = (selected(gate, rows, scorer)[0] for gate in (RandomGate(0.5, 0), PermutedGate(RandomGate(0.5, 0), 0)))
    assert torch.split(own, [5, 40, 3])[1].sum() == torch.split(dealt, [5, 40, 3])[1].sum()


@pytest.mark.parametrize(
    "words",
    [SOFT, (*SOFT, "loss.gate.permute=true"), (FULL, "loss.gate=sdar"), (FULL, "loss.gate=influence")],
    ids=["soft", "soft-permuted", "sdar", "influence"],
)
def test_weights_do_not_depend_on_the_micro_batch(words: tuple[str, ...]) -> None:
    parts = build(quick(*words, "train.batch_size=16", "data.max_difficulty=6"))
    if parts.config.looks_ahead:
        direction_of(parts).remember(parts.sampler.rollouts(0))
        direction_of(parts).renew(0)
    rows, kept = batch_of(parts, 1).examples, []
    for size in (3, 16):
        cut = {"reduction": "sequence", "micro_batch_size": size, "chunk_tokens": None}
        with torch.no_grad():
            meters = distill(
                parts.scorer, parts.teacher, rows, objective(parts.config), selector=selector_of(parts), **cut
            )
        kept.append(torch.tensor([value for row in meters.tokens["kept"] for value in row]))
    torch.testing.assert_close(*kept, rtol=1e-3, atol=1e-4)
    assert float(kept[0].std()) > 0.01
    close(parts)


def test_rollouts_whose_mean_alignment_is_negative_are_left_out_and_the_others_keep_their_weights() -> None:
    parts = build(quick(*SOFT, "train.batch_size=16"))
    direction_of(parts).remember(parts.sampler.rollouts(0))
    direction_of(parts).renew(0)
    rows, found = batch_of(parts, 1).examples, []
    for skips in (False, True):
        gate = AlignedGate(alignment_scorer(parts), 4.0, skips_rollouts=skips)
        cut = {"reduction": "sequence", "micro_batch_size": 16, "chunk_tokens": None}
        with torch.no_grad():
            found.append(distill(parts.scorer, parts.teacher, rows, objective(parts.config), selector=gate, **cut))
    whole, some = found
    harms = [sum(row) < 0 for row in whole.tokens["alignment"]]
    assert 0 < sum(harms) < len(rows)
    for harm, before, after in zip(harms, whole.tokens["kept"], some.tokens["kept"], strict=True):
        assert after == ([0.0] * len(before) if harm else before)
    close(parts)


def test_a_step_that_is_held_back_moves_neither_weights_nor_moments() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimiser = Optimiser({"w": weight}, quick("train.learning_rate=0.1").train)
    weight.grad = torch.ones(2)
    assert not optimiser.step(0, 1.0).held_back
    moved = weight.detach().clone()
    weight.grad = torch.full((2,), 5.0)
    step = optimiser.step(1, 1.0, held_back=True)
    assert (step.held_back, step.taken, step.grad_norm) == (True, True, pytest.approx(50**0.5))
    assert weight.grad is None
    assert torch.equal(weight, moved)
    weight.grad = torch.ones(2)
    optimiser.step(2, 1.0)
    # AdamW's second step on the same gradient: m / sqrt(v) is 1 again; one with the moments of 5 in between is not.
    assert (moved - weight).tolist() == pytest.approx([0.1, 0.1], rel=1e-4)


def test_an_update_whose_mean_alignment_is_negative_takes_no_step_and_says_so(tmp_path: Path) -> None:
    words = ("loss.gate.kind=aligned", "loss.gate.skip=update", "alignment.min_correct=1", "data.leap_share=1")
    run = finished(quick(FULL, *words, "train.batch_size=8", "train.num_updates=12"), tmp_path / "run")
    rows = run.rows("metrics")
    held = [row.get("held_back", False) for row in rows]
    assert 0 < sum(held) < len(rows)
    assert held == [row.get("token_alignment", 0.0) < 0 for row in rows]
    assert all(row["skipped"] is None for row in rows)


def test_an_advantage_by_difficulty_is_the_reward_less_the_mean_of_its_difficulty() -> None:
    found = difficulty_advantages([1.0, 0.0, 1.0, 1.0, 0.0], [2, 2, 2, 5, 7])
    assert found == pytest.approx([1 / 3, -2 / 3, 1 / 3, 0, 0])


def test_by_difficulty_every_rollout_is_of_a_problem_of_its_own_and_has_a_policy_gradient() -> None:
    config = quick(*BY_DIFFICULTY, "train.batch_size=16", "data.max_difficulty=3")
    parts = build(config)
    problems = batch_at(parts.problems.train, config, 0)[0]
    assert len({problem.id for problem in problems}) == 16
    rows = batch_of(parts, 0).rows
    by_level: dict[int, list[float]] = {}
    for row in rows:
        by_level.setdefault(row.graded.problem.difficulty, []).append(row.example.advantage)
        right = row.graded.verdict == "correct"
        assert (row.example.advantage > 0) is right or row.example.advantage == 0
        assert row.example.advantage == pytest.approx(0.5 * row.example.outcome)
    assert any(row.example.advantage for row in rows)
    assert [sum(own) for own in by_level.values()] == pytest.approx([0.0] * len(by_level))
    close(parts)


def test_the_gate_by_influence_reads_groups_where_there_are_some_and_else_difficulties() -> None:
    alone = load_config("micro", [FULL, "loss.gate=influence"])
    assert (alone.centres_by_difficulty, alone.train.samples_per_problem) == (True, 1)
    grouped = load_config("micro", [FULL, "loss.gate=influence", "train.grpo_weight=1"])
    assert (grouped.centres_by_difficulty, grouped.train.samples_per_problem) == (False, 8)


def test_the_presets_that_have_a_difficulty_are_known_without_reading_them() -> None:
    for name, preset in PRESETS.items():
        config = load_config("qwen3-1.7b", [f"data.preset={name}"])
        assert config.data.has_difficulties == (preset.columns.difficulty is not None), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            (FULL, "data.source=mine.jsonl", "model.path=x", "train.grpo_weight=1", "train.baseline=difficulty"),
            "train.baseline: difficulty compares a verdict .* mine.jsonl names none; set data.columns.difficulty",
        ),
        ((FULL, "data.source=mine.jsonl", "model.path=x", "loss.gate=influence"), "loss.gate: influence compares"),
        ((FULL, "data.checker=none", "loss.gate=influence"), "loss.gate: influence needs verified rollouts"),
        ((FULL, "data.checker=none", "loss.gate=soft"), "loss.gate: aligned or soft need verified rollouts"),
        (
            (FULL, "loss.gate.kind=soft", "loss.gate.skip=update", "train.grpo_weight=1"),
            "loss.gate.skip: update would skip the policy gradient of train.grpo_weight 1 too; set loss.gate.skip",
        ),
        ((FULL, "loss.gate=sdar", "loss.gate.sharpness=2"), "loss.gate.kind: soft would read it"),
        ((FULL, "loss.gate=none", "loss.gate.permute=true"), "loss.gate.permute"),
        ((FULL, "train.baseline=difficulty"), "it acts with train.method: grpo"),
        (("train.method=grpo", "train.baseline=difficulty", "train.group_size=4"), "with train.baseline: group"),
        (("exposure.kind=aligned", "exposure.granularity=per_token", "loss.gate=soft"), "own alignment or not at all"),
        (
            (*PER_TOKEN, "loss.gate.permute=true"),
            "loss.gate.permute: true does not go with exposure.granularity: per_tok",
        ),
        ((*PER_TOKEN, "loss.gate.skip=rollouts"), "loss.gate.skip: rollouts does not go with exposure.granularity"),
        ((FULL, "loss.gate={kind: influence, bound: 1}"), "bound"),
    ],
)
def test_what_a_gate_or_baseline_cannot_do_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("micro", list(words))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ((FULL, "loss.gate=sdar", "loss.gate.permute=true"), "by the teacher's gap .SDAR, beta 5., permuted"),
        ((FULL, "loss.gate=soft", "loss.gate.skip=rollouts"), "sharpness 4., misaligned rollouts skipped"),
        ((FULL, "loss.gate=influence"), "influence on the policy gradient"),
        (BY_DIFFICULTY, "plus 0.5 x REINFORCE with a baseline per difficulty"),
        (("train.method=grpo", "train.baseline=difficulty"), "^REINFORCE with a baseline per difficulty$"),
    ],
)
def test_a_gate_and_a_baseline_have_a_name_in_every_table(words: tuple[str, ...], name: str) -> None:
    assert re.search(name, method_name(load_config("micro", list(words))))


def attempts(start: int) -> list[Attempt]:
    return [Attempt(2, (7, 8), (start + i, 9, 10), (), correct=i % 2 == 0) for i in range(4)]


def test_a_direction_with_memory_is_that_of_this_hold_turned_towards_those_before() -> None:
    words = (FULL, "loss.gate=aligned", "alignment.min_correct=1")
    plain, remembering = (build(quick(*words, *more)) for more in ((), ("alignment.memory=0.5",)))
    units = []
    for hold in range(3):
        for parts in (plain, remembering):
            direction_of(parts)._attempts = attempts(11 + 4 * hold)
            direction_of(parts).renew(hold)
        units.append(torch.cat([value.flatten() for value in direction_of(plain).unit.values()]))
    total = units[2] + 0.5 * (units[1] + 0.5 * units[0])
    found = torch.cat([value.flatten() for value in direction_of(remembering).unit.values()])
    torch.testing.assert_close(found, total / total.norm(), rtol=1e-4, atol=1e-6)
    direction_of(remembering).renew(3)  # nothing was remembered: no direction, and nothing of it later
    assert not direction_of(remembering).known
    direction_of(remembering)._attempts = attempts(11)
    direction_of(remembering).renew(4)
    alone = torch.cat([value.flatten() for value in direction_of(remembering).unit.values()])
    torch.testing.assert_close(alone, units[0], rtol=1e-4, atol=1e-6)
    close(plain)
    close(remembering)
