"""The success direction, the look-ahead on real rollouts, the aligned exposure and the token gates."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atesd.aligned.direction import Attempt, drawn, weighted_rows
from atesd.aligned.scorer import grouped
from atesd.aligned.selectors import AlignedGate
from atesd.build import build, close, objective
from atesd.config import Config, load_config
from atesd.control.aligned import AlignedExposure
from atesd.control.fixed import FixedExposure
from atesd.errors import ConfigError, ModelError, NonFiniteError
from atesd.maths.advantages import group_advantages
from atesd.maths.divergence import Objective
from atesd.models.score import Scorer, completion_tokens
from atesd.records import Alignment, UpdateStats
from atesd.session import train
from atesd.train.checkpoint import digest
from atesd.train.components import Components
from atesd.train.rollouts import batch_at
from atesd.train.rows import update_stats
from atesd.train.selectors import RandomGate, RankedGate
from atesd.train.update import BatchPlan, Example, accumulate
from quick import cut_after, fingerprint, finished, quick
from tiny import tiny_model
from updates import alignment_scorer, batch_of, direction_of, distill, maximise_likelihood, selector_of

ALIGNED = ("exposure.kind=aligned", "alignment.min_correct=1")
GATED = ("exposure.kind=full", "loss.gate=aligned", "alignment.min_correct=1")
FEATURES = "alignment.parameters=features"
LAST = "alignment.parameters=last_layer"
MLP, HALF = "alignment.parameters=last_mlp", "alignment.parameters=last_half"
LORA = 'model.lora={"rank": 4, "alpha": 8, "target_modules": "all-linear"}'


def with_direction(config: Config) -> Components:
    """A run's parts after one remembered batch, its direction made."""
    parts = build(config)
    direction = direction_of(parts)
    direction.remember(parts.sampler.rollouts(0))
    direction.renew(0)
    assert direction.known
    return parts


def read_by(words: tuple[str, ...], parts: Components) -> set[str]:
    """Names of the trained parameters that give the direction, as the embedded worlds name them."""
    places = {
        (): [""],
        LAST: ["layers.1.", "model.norm.weight"],
        MLP: ["layers.1.mlp.", "layers.1.post_attention_layernorm.", "model.norm.weight"],
        HALF: [
            "layers.1.self_attn.o_proj.",
            "layers.1.mlp.",
            "layers.1.post_attention_layernorm.",
            "model.norm.weight",
        ],
    }[words[0] if words else ()]
    return {name for name in parts.weights.trained if any(place in name for place in places)}


@pytest.mark.parametrize("words", [(), (LAST,), (LAST, LORA), (MLP,), (MLP, LORA), (HALF,), (HALF, LORA)], ids=str)
def test_the_direction_is_the_gradient_of_the_likelihood_of_the_correct_rollouts(words: tuple[str, ...]) -> None:
    parts = build(quick(*GATED, *words, "train.batch_size=16"))
    batch = batch_of(parts, 0)
    direction = direction_of(parts)
    direction.remember([row.graded for row in batch.rows])
    direction.renew(0)
    right = [row.example for row in batch.rows if row.graded.verdict == "correct"]
    assert 0 < len(right) < len(batch.rows)
    total = torch.zeros(())
    for row in right:
        ids = torch.tensor([[*row.context, *row.completion]])
        logprobs = parts.loaded.model(ids).logits[0].log_softmax(-1)
        places = range(len(row.context) - 1, ids.shape[1] - 1)
        own = torch.stack([logprobs[place, ids[0, place + 1]] for place in places])
        total = total + own.mean()
    parameters = {n: p for n, p in parts.weights.trained.items() if n in read_by(words, parts)}
    assert parameters
    gradients = torch.autograd.grad(total, list(parameters.values()))
    length = torch.cat([g.flatten() for g in gradients]).norm()
    found = direction.state_dict()["unit"]
    assert set(found) == set(parameters)
    for name, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient / length, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in parts.weights.trained.values())
    close(parts)


@pytest.mark.parametrize("adapter", [(), (LORA,)], ids=["full", "lora"])
def test_displacing_the_student_leaves_it_bit_for_bit_as_it_was(adapter: tuple[str, ...]) -> None:
    parts = with_direction(quick(*GATED, *adapter, "train.batch_size=16"))
    direction, parameters = direction_of(parts), dict(parts.loaded.model.named_parameters())
    before = digest({name: p.detach() for name, p in parameters.items()})
    trained = dict(parts.weights.trained)
    with direction.displaced(1):
        inside = {name: p.detach() - 0 for name, p in trained.items()}
    assert digest({name: p.detach() for name, p in parameters.items()}) == before
    moved = torch.cat([(inside[name] - p.detach()).flatten() for name, p in trained.items()])
    assert float(moved.norm()) == pytest.approx(direction.epsilon, rel=1e-2)
    with pytest.raises(RuntimeError), direction.displaced(-1):
        raise RuntimeError
    assert digest({name: p.detach() for name, p in parameters.items()}) == before
    close(parts)


def test_the_displacement_changes_logits_by_what_the_setting_says() -> None:
    parts = with_direction(quick(*GATED, "train.batch_size=16", "alignment.logit_change=0.02"))
    pairs = [row.student_pair for row in batch_of(parts, 0).examples]
    logits = []
    for side in (1, -1):
        with direction_of(parts).displaced(side):
            scored = parts.scorer.scored(pairs)
            logits.append(scored.logits(slice(None)))
    assert float((logits[0] - logits[1]).std() / 2) == pytest.approx(0.02, rel=0.5)
    close(parts)


def test_beside_bfloat16_weights_the_displacement_is_more_than_their_rounding() -> None:
    # The direction is taken in float32, so that only the two points differ; a step scaled from a tiny trial gives .3.
    slopes: list[torch.Tensor] = []
    for dtype in ("float32", "bfloat16"):
        parts = build(quick(*GATED, LORA, "train.batch_size=32", f"model.dtype={dtype}"))
        draws = torch.Generator().manual_seed(0)
        for name, parameter in parts.loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=draws)
        if not slopes:
            batch = batch_of(parts, 0)
        direction = direction_of(parts)
        direction.remember([row.graded for row in batch.rows])
        direction.renew(0)
        if not slopes:
            unit = direction.state_dict()
        direction.load_state_dict({**unit, "epsilon": direction.epsilon})
        logits = []
        for side in (1, -1):
            with direction.displaced(side):
                logits.append(parts.scorer.scored([row.student_pair for row in batch.examples]).logits(slice(None)))
        slopes.append(((logits[0] - logits[1]) / direction.epsilon).flatten())
        close(parts)
    assert float(torch.corrcoef(torch.stack(slopes))[0, 1]) > 0.95


@pytest.mark.parametrize(
    ("reduction", "words"),
    [
        ("sequence", ()),
        ("token", ()),
        ("sequence", (LAST,)),
        ("sequence", (MLP,)),
        ("token", (MLP, LORA)),
        ("token", (HALF,)),
    ],
    ids=str,
)
def test_the_alignment_of_a_ratio_is_the_inner_product_of_direction_and_gradient_of_its_loss(
    reduction: str, words: tuple[str, ...]
) -> None:
    """By backpropagation through the real model, against forwards alone."""
    config = quick(
        *ALIGNED,
        *words,
        "train.batch_size=16",
        *([] if MLP in words or HALF in words else ["alignment.logit_change=0.01"]),
        "credit.hold_updates=1",
        f"loss.reduction={reduction}",
    )
    parts = with_direction(config)
    batch = batch_of(parts, 1)
    assert batch.alignment is not None
    unit = direction_of(parts).state_dict()["unit"]
    parameters = dict(parts.weights.trained)
    for ratio, value in zip(batch.alignment.ratios, batch.alignment.values, strict=True):
        lora = [LORA] if LORA in words else []
        fixed = build(quick("exposure.kind=fixed", f"exposure.reveal_ratio={ratio}", "train.batch_size=16", *lora))
        contexts = [row.teacher_context for row in batch_of(fixed, 1).examples]
        close(fixed)
        rows = [Example(r.context, r.completion, c) for r, c in zip(batch.examples, contexts, strict=True)]
        cut = {"reduction": reduction, "micro_batch_size": 16, "chunk_tokens": None}
        distill(parts.scorer, parts.teacher, rows, objective(config), **cut)
        along = sum(float((parameters[name].grad * u).sum()) for name, u in unit.items())
        for parameter in parameters.values():
            parameter.grad = None
        exact = MLP in words or HALF in words
        assert value == pytest.approx(-along, rel=1e-4 if exact else 0.02, abs=1e-6 if exact else 2e-4)
    close(parts)


def likelihood_by_gain(parts: Components, rows: list[Example], gain: torch.Tensor) -> torch.Tensor:
    """The mean log-likelihood per token of some rows as a function of a factor of each entry of the last states."""
    with torch.no_grad():
        head = parts.scorer.head()
        hidden = torch.split(parts.scorer.hidden([r.student_pair for r in rows]), [len(r.completion) for r in rows])
    means = []
    for row, states in zip(rows, hidden, strict=True):
        logprobs = head.logits(states * gain).log_softmax(-1)
        means.append(logprobs[range(len(row.completion)), list(row.completion)].mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("adapter", [(), (LORA,)], ids=["full", "lora"])
def test_by_the_features_alone_direction_and_alignment_are_the_gradients_of_their_scale(
    adapter: tuple[str, ...],
) -> None:
    """By autograd through a factor of the last states, against products of matrices."""
    config = quick(*ALIGNED, FEATURES, *adapter, "train.batch_size=16", "credit.hold_updates=1")
    parts = build(config)
    first = batch_of(parts, 0)
    direction = direction_of(parts)
    direction.remember([row.graded for row in first.rows])
    before = digest(dict(parts.loaded.model.state_dict()))
    direction.renew(0)
    gain = torch.ones(parts.loaded.model.config.hidden_size, requires_grad=True)
    right = [row.example for row in first.rows if row.graded.verdict == "correct"]
    ascent = torch.autograd.grad(likelihood_by_gain(parts, right, gain), gain)[0]
    unit = direction.unit["features"]
    torch.testing.assert_close(unit, ascent / ascent.norm(), rtol=1e-4, atol=1e-6)

    batch = batch_of(parts, 1)
    assert batch.alignment is not None
    students, tokens = [row.student_pair for row in batch.examples], [r.completion for r in batch.examples]
    ids = torch.tensor([token for completion in tokens for token in completion])
    each = torch.cat([torch.full((len(c),), 1 / (len(tokens) * len(c))) for c in tokens])
    for ratio, value in zip(batch.alignment.ratios, batch.alignment.values, strict=True):
        contexts = [parts.prompts.view(row.graded.problem, ratio).context for row in batch.rows]
        with torch.no_grad(), parts.teacher.weights():
            teacher = parts.scorer.scored(list(zip(contexts, tokens, strict=True))).logits(slice(None))
        with torch.no_grad():
            student = parts.scorer.scored(students)
        losses, _ = objective(config)(teacher, student.head.logits(student.hidden * gain), ids)
        slope = torch.autograd.grad((losses * each).sum(), gain)[0]
        assert value == pytest.approx(-float((slope * unit).sum()), rel=1e-3, abs=1e-6)
    assert digest(dict(parts.loaded.model.state_dict())) == before
    assert all(p.grad is None for p in parts.loaded.model.parameters())
    close(parts)


@pytest.mark.parametrize("which", [FEATURES, LAST, MLP, HALF])
def test_by_fewer_parameters_the_student_is_not_read_again_for_the_gate(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = with_direction(quick(*GATED, which, "train.batch_size=16"))
    examples = batch_of(parts, 1).examples
    tokens = completion_tokens([e.student_pair for e in examples], parts.scorer.device)
    with torch.no_grad():
        student = parts.scorer.scored([e.student_pair for e in examples])
        teacher = parts.scorer.scored([e.teacher_pairs[0] for e in examples])
    for name in ("hidden", "scored"):
        monkeypatch.setattr(Scorer, name, None)
    selection = selector_of(parts).select(examples, student, [teacher], tokens)
    assert selection.factors is not None
    assert 0 < float(selection.factors.mean()) < 1
    assert ("curvature" in selection.meters) == (which == LAST)
    close(parts)


def test_what_only_a_displacement_reads_is_refused_where_there_is_none() -> None:
    for which, override, where in (
        (FEATURES, "alignment.logit_change=0.01", "all or last_layer"),
        (FEATURES, "alignment.metric=optimiser", "all, last_layer, last_half or last_mlp"),
        (MLP, "alignment.logit_change=0.01", "all or last_layer"),
    ):
        with pytest.raises(ConfigError, match=rf"alignment\.parameters: {where}"):
            load_config("micro", ["exposure.kind=aligned", which, override])


def test_alignments_that_are_not_finite_are_refused_before_the_exposure_remembers_them() -> None:
    parts = with_direction(quick(*ALIGNED, "train.batch_size=16"))
    direction, before = direction_of(parts), parts.exposure.state_dict()
    direction.load_state_dict({**direction.state_dict(), "epsilon": float("nan")})
    first = batch_at(parts.problems.train, parts.config, 0)[0][0]
    with pytest.raises(NonFiniteError, match=re.escape(f"on {first.id}")):
        batch_of(parts, 0)
    assert parts.exposure.state_dict() == before
    close(parts)


def attempts(*correct: bool) -> list[Attempt]:
    """Attempts of two difficulties in turn."""
    return [Attempt(i % 2, (1,), (2 + i,), (50 + i,), correct=ok) for i, ok in enumerate(correct)]


def settings(*overrides: str) -> Config:
    return load_config("micro", ["exposure.kind=aligned", *overrides])


def test_too_few_correct_rollouts_give_no_direction() -> None:
    some = attempts(True, False, True, False)
    assert not weighted_rows(some, settings("alignment.min_correct=3"), 0)
    assert len(weighted_rows(some, settings("alignment.min_correct=2"), 0)) == 2


def test_centred_success_weighs_a_rollout_against_the_mean_of_its_difficulty() -> None:
    rows = weighted_rows(
        attempts(True, True, False, True), settings("alignment.min_correct=1", "alignment.success=centred"), 0
    )
    assert [row.advantage for row in rows] == [0.5, 0.0, -0.5, 0.0]  # difficulty 0: 1, 0; difficulty 1: 1, 1
    assert not weighted_rows(attempts(True, True), settings("alignment.min_correct=1", "alignment.success=centred"), 0)


def test_shuffled_success_keeps_the_number_and_changes_the_owners() -> None:
    some = attempts(*[True] * 8, *[False] * 24)
    config = settings("alignment.success=shuffled")
    completions = [{row.completion for row in weighted_rows(some, config, update)} for update in (0, 4)]
    assert [len(found) for found in completions] == [8, 8]
    assert completions[0] != completions[1]
    assert completions[0] != {attempt.completion for attempt in some[:8]}


def test_the_misleading_direction_reads_the_references() -> None:
    rows = weighted_rows(attempts(*[True] * 8), settings("alignment.success=references"), 0)
    assert [row.completion for row in rows] == [(50 + i,) for i in range(8)]


def exposure(**options: object) -> AlignedExposure:
    """With a fallback of .9."""
    given: dict[str, object] = {"hold_updates": 4, "granularity": "update", "fallback": FixedExposure(0.9)} | options
    return AlignedExposure(0.5, **given)


def found(*values: float) -> Alignment:
    return Alignment((0.0, 0.5, 1.0), values, (0.0, 0.0, 0.0), 4)


def test_it_takes_the_best_ratio_of_the_smoothed_alignments_each_at_its_own_scale() -> None:
    aligned = exposure()
    assert aligned.reveal_ratio(0) == 0.9
    aligned.look_ahead(4, {"": found(0.0, 1.0, 0.5)})
    assert aligned.reveal_ratio(5) == 0.5
    aligned.look_ahead(8, {"": found(0.0, 0.0006, 0.001)})  # half of (0, 1, .5) and half of (0, .6, 1): (0, .8, .75)
    assert aligned.reveal_ratio(8) == 0.5
    aligned.look_ahead(12, {"": found(0.0, 60.0, 100.0)})  # half of (0, .8, .75) and half of (0, .6, 1)
    assert aligned.reveal_ratio(12) == 1.0


def test_without_a_direction_the_fallback_decides_and_what_was_learned_is_kept() -> None:
    aligned = exposure()
    aligned.look_ahead(4, {"": found(0.0, 1.0, 0.5)})
    aligned.look_ahead(8, {})
    assert aligned.reveal_ratio(8) == 0.9
    other = exposure()
    other.load_state_dict(aligned.state_dict())
    for one in (aligned, other):
        one.look_ahead(12, {"": found(0.0, 0.5, 1.0)})
    assert aligned.reveal_ratio(12) == other.reveal_ratio(12) == 0.5  # (0, .75, .75): the first of equals


def test_it_asks_for_alignment_once_a_hold_and_per_problem_always() -> None:
    assert [bool(exposure().measurements(update)) for update in range(6)] == [True, False, False, False, True, False]
    assert all(exposure(granularity="per_problem").measurements(update) for update in range(6))


def test_per_problem_each_problem_has_its_own_ratio_of_the_moment() -> None:
    aligned = exposure(granularity="per_problem")
    aligned.look_ahead(0, {"a": found(1.0, 0.0, 0.0), "b": found(0.0, 0.0, 1.0)})
    assert (aligned.reveal_ratio(0, "a"), aligned.reveal_ratio(0, "b")) == (0.0, 1.0)
    aligned.look_ahead(1, {"a": found(0.0, 0.6, 0.5)})
    assert (aligned.reveal_ratio(1, "a"), aligned.reveal_ratio(1, "b")) == (0.5, 0.9)
    aligned.observe(1, UpdateStats(0.5, 0.5, 0.1, 0.1, 0.1, 0.9))


def test_grouped_alignments_have_the_mean_and_its_standard_error() -> None:
    groups = grouped((0.0, 1.0), [[1.0, 4.0], [3.0, 4.0], [7.0, 0.0]], ["a", "a", "b"])
    assert groups["a"] == Alignment((0.0, 1.0), (2.0, 4.0), (1.0, 0.0), 2)
    assert groups["b"] == Alignment((0.0, 1.0), (7.0, 0.0), (0.0, 0.0), 1)


def test_a_gate_takes_tokens_out_of_the_gradient_and_leaves_the_weights_of_the_others() -> None:
    parts = with_direction(quick(*GATED, "train.batch_size=16"))
    batch = batch_of(parts, 1)
    cut = {"reduction": "sequence", "micro_batch_size": 16, "chunk_tokens": None}
    meters = distill(
        parts.scorer, parts.teacher, batch.examples, objective(parts.config), selector=selector_of(parts), **cut
    )
    kept = meters.tokens["kept"]
    assert {value for row in kept for value in row} == {0.0, 1.0}
    signs = [[float(value > 0) for value in row] for row in meters.tokens["alignment"]]
    assert kept == signs
    weights = BatchPlan().weights(batch.examples)
    by_hand = sum(
        w * sum(k * x for k, x in zip(keep, losses, strict=True))
        for w, keep, losses in zip(weights, kept, meters.tokens["loss"], strict=True)
    )
    assert meters.loss == pytest.approx(by_hand, rel=1e-5)
    close(parts)


@pytest.mark.parametrize("gate", ["none", "aligned"])
def test_per_token_every_token_is_distilled_from_the_view_that_helps_it_most(gate: str) -> None:
    """Against one gated step at each ratio: the largest alignment is chosen, and the loss is that of its teacher."""
    parts = with_direction(quick(*ALIGNED, "exposure.granularity=per_token", f"loss.gate={gate}"))
    batch = batch_of(parts, 1)
    cut = {"reduction": "sequence", "micro_batch_size": 5, "chunk_tokens": 7}
    given = parts.scorer, parts.teacher
    loss = objective(parts.config)
    meters = distill(*given, batch.examples, loss, selector=selector_of(parts), **cut)
    ratios = parts.config.exposure.ratios
    alone = []
    for k in range(len(ratios)):
        rows = [replace(row, teacher_context=row.candidates[k].context, candidates=()) for row in batch.examples]
        with torch.no_grad():
            alone.append(distill(*given, rows, loss, selector=AlignedGate(alignment_scorer(parts)), **cut).tokens)
    for i, row in enumerate(batch.examples):
        values = torch.tensor([tokens["alignment"][i] for tokens in alone])
        best = values.amax(0)
        assert meters.tokens["alignment"][i] == pytest.approx(best.tolist(), abs=1e-6)
        for n, ratio in enumerate(meters.tokens["token_ratio"][i]):
            chosen = ratios.index(round(ratio, 6))
            assert values[chosen, n] == pytest.approx(float(best[n]), abs=1e-6)
            assert meters.tokens["loss"][i][n] == pytest.approx(alone[chosen]["loss"][i][n], abs=1e-6)
            assert meters.tokens["token_effective_ratio"][i][n] == pytest.approx(row.candidates[chosen].effective_ratio)
        wanted = (best > 0).float().tolist() if gate == "aligned" else [1.0] * len(best)
        assert meters.tokens["kept"][i] == wanted
    chosen = {round(ratio, 6) for row in meters.tokens["token_ratio"] for ratio in row}
    assert len(chosen) > 2
    close(parts)


def test_a_ratio_per_token_is_logged_and_falls_back_without_a_direction(tmp_path: Path) -> None:
    config = quick(
        *ALIGNED,
        "exposure.granularity=per_token",
        "exposure.fallback=fixed",
        "exposure.fallback.reveal_ratio=0.3",
        "train.evaluate_every=1",
    )
    run = finished(config, tmp_path / "run")
    rows = {row["update"]: row for row in run.rows("metrics")}
    hold = config.credit.hold_updates
    assert all(rows[update]["reveal_ratio"] == pytest.approx(0.3) for update in range(hold))
    assert all(rows[update]["kept_share"] is None for update in range(hold))
    assert rows[hold]["reveal_ratio"] not in (0.3, *config.exposure.ratios)
    assert rows[hold]["curvature"] is not None
    samples = [row for row in run.rows("samples") if row["update"] == hold]
    assert samples
    assert all(len(row["token_ratio"]) == len(row["tokens"]) for row in samples)


def test_a_ratio_per_token_is_for_the_aligned_exposure_and_its_own_gate() -> None:
    with pytest.raises(ConfigError, match="granularity: 'per_token' is not allowed; expected 'update'"):
        settings("exposure.kind=learned", "exposure.granularity=per_token")
    with pytest.raises(ConfigError, match="own alignment or not at all"):
        settings("exposure.kind=aligned", "exposure.granularity=per_token", "loss.gate=random")


def test_a_gate_without_a_number_stops_the_update_and_names_the_rollout() -> None:
    parts = with_direction(quick(*GATED, "train.batch_size=4"))
    direction = direction_of(parts)
    direction.load_state_dict({**direction.state_dict(), "epsilon": float("nan")})
    rows = batch_of(parts, 1).examples
    cut = {"reduction": "sequence", "micro_batch_size": 4, "chunk_tokens": None}
    with pytest.raises(NonFiniteError, match="not finite on rollout"):
        distill(parts.scorer, parts.teacher, rows, objective(parts.config), selector=selector_of(parts), **cut)
    close(parts)


def test_a_direction_that_is_not_finite_is_said_and_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = with_direction(quick(*GATED, "train.batch_size=4"))
    direction = direction_of(parts)
    direction.remember(parts.sampler.rollouts(1))
    some = next(iter(parts.weights.trained.values()))
    handle = some.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match=r"gradient of the correct rollouts, .*, is not finite"):
        direction.renew(1)
    handle.remove()
    assert not direction.known
    assert all(parameter.grad is None for parameter in parts.weights.trained.values())
    direction.remember(parts.sampler.rollouts(1))
    monkeypatch.setattr(direction, "_scaled_epsilon", lambda _: float("nan"))
    with pytest.raises(NonFiniteError, match="step of the look-ahead is not finite"):
        direction.renew(2)
    assert not direction.known
    close(parts)


@pytest.mark.parametrize("part", [MLP, HALF, LAST])
def test_a_part_that_no_adapter_trains_is_refused_before_the_first_update(part: str) -> None:
    lora = 'model.lora={"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}'
    if part == LAST:
        lora = 'model.lora={"rank": 4, "alpha": 8, "target_modules": ["layers.0.self_attn.q_proj"]}'
    with pytest.raises(ModelError, match=r"has none of the weights that are trained .model\.lora.*q_proj"):
        build(quick(*GATED, part, lora))


def test_at_most_so_many_rollouts_give_the_direction() -> None:
    rows = weighted_rows(attempts(*[True] * 9), settings("alignment.min_correct=1"), 0)
    assert drawn(rows, settings(), 0) == rows
    some = settings("alignment.direction_rollouts=4")
    first = drawn(rows, some, 0)
    assert len(first) == 4
    assert all(row in rows for row in first)
    assert drawn(rows, some, 0) == first
    assert any(drawn(rows, some, update) != first for update in range(1, 5))


def test_neither_the_gate_nor_its_draws_depend_on_the_micro_batch() -> None:
    for overrides in (
        GATED,
        ("exposure.kind=full", "loss.gate=random"),
        ("exposure.kind=full", "loss.gate=entropy"),
    ):
        parts = build(quick(*overrides, "train.batch_size=16"))
        if overrides == GATED:
            direction_of(parts).remember(parts.sampler.rollouts(0))
            direction_of(parts).renew(0)
        rows = batch_of(parts, 1).examples
        kept = []
        for size in (3, 16):
            cut = {"reduction": "sequence", "micro_batch_size": size, "chunk_tokens": None}
            with torch.no_grad():
                meters = distill(
                    parts.scorer, parts.teacher, rows, objective(parts.config), selector=selector_of(parts), **cut
                )
            kept.append(meters.tokens["kept"])
        assert kept[0] == kept[1]
        close(parts)


def scored_rows() -> tuple[list[Example], Scorer]:
    generator = torch.Generator().manual_seed(0)
    rows = [
        Example(
            (7, 8), tuple(torch.randint(7, 20, (n,), generator=generator).tolist()), (9, 10, 11), key=(0, f"p{n}", 0)
        )
        for n in (5, 40, 3)
    ]
    return rows, Scorer(tiny_model())


@pytest.mark.parametrize("side", ["high", "low"])
@pytest.mark.parametrize("by", ["disagreement", "entropy"])
def test_a_ranked_gate_keeps_the_share_of_each_rollout_that_its_meter_ranks_first(by: str, side: str) -> None:
    rows, scorer = scored_rows()
    with torch.no_grad():
        student = scorer.scored([row.student_pair for row in rows])
        teacher = scorer.scored([row.teacher_pairs[0] for row in rows])
        tokens = completion_tokens([row.student_pair for row in rows], scorer.device)
        factors = (
            RankedGate(by, 0.4, side, Objective(), chunk_tokens=3).select(rows, student, [teacher], tokens).factors
        )
        log_p, log_q = teacher.logits(slice(None)).log_softmax(-1), student.logits(slice(None)).log_softmax(-1)
    kl, entropy = (log_p.exp() * (log_p - log_q)).sum(-1), -(log_q.exp() * log_q).sum(-1)
    meter = kl if by == "disagreement" else entropy
    for keep, values in zip(torch.split(factors, [5, 40, 3]), torch.split(meter, [5, 40, 3]), strict=True):
        assert int(keep.sum()) == {5: 2, 40: 16, 3: 2}[len(values)]
        kept, left = values[keep == 1], values[keep == 0]
        assert kept.min() >= left.max() if side == "high" else kept.max() <= left.min()


def test_a_random_gate_keeps_about_its_share_and_draws_by_the_rollout() -> None:
    rows, scorer = scored_rows()
    scored = scorer.scored([row.student_pair for row in rows])
    tokens = torch.zeros(48, dtype=torch.long)
    first = RandomGate(0.5, 0).select(rows, scored, [scored], tokens).factors
    again = RandomGate(0.5, 0).select(rows[1:2], scored, [scored], tokens[:40]).factors
    assert first is not None
    assert again is not None
    assert torch.equal(first[5:45], again)
    assert 10 <= int(again.sum()) <= 30
    other = RandomGate(0.5, 1).select(rows[1:2], scored, [scored], tokens[:40]).factors
    assert other is not None
    assert not torch.equal(again, other)


@pytest.mark.parametrize(
    "overrides",
    [
        ALIGNED,
        (*ALIGNED, "exposure.granularity=per_problem", "alignment.metric=optimiser"),
        (*ALIGNED, "exposure.granularity=per_token", "loss.gate=aligned", "alignment.direction_rollouts=4"),
        (*GATED, "alignment.success=centred"),
        (
            "exposure.kind=full",
            "loss.gate.kind=soft",
            "loss.gate.skip=update",
            "alignment.min_correct=1",
            "alignment.memory=0.9",
        ),
        (*GATED, LORA),
        (*GATED, LORA, FEATURES),
        (*GATED, LORA, LAST),
    ],
    ids=["ratio", "per-problem", "per-token", "gate", "soft", "gate-lora", "gate-features", "gate-last-layer"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = quick(*overrides, "train.batch_size=8", "model.path=world:b")
    whole = finished(config, tmp_path / "whole")
    measured = [row for row in whole.rows("metrics") if row["alignment"] or (row["kept_share"] or 1) < 1]
    assert measured
    wanted = fingerprint(whole)
    for update in (1, 3, 6):
        cut = cut_after(whole, update, tmp_path / f"cut-{update}")
        assert fingerprint(train(config, cut).run) == wanted


def test_a_bfloat16_student_that_would_be_displaced_itself_is_refused() -> None:
    for override in ("exposure.kind=aligned", "loss.gate=aligned"):
        with pytest.raises(ConfigError, match="rounds away"):
            load_config("micro", [override, "model.dtype=bfloat16"])
        assert load_config("micro", [override, "model.dtype=bfloat16", LORA]).model.lora is not None
        for part in ("features", "last_mlp", "last_half"):  # nothing is displaced
            words = [override, "model.dtype=bfloat16", f"alignment.parameters={part}"]
            assert load_config("micro", words).alignment.parameters == part


def test_what_needs_verified_rollouts_is_refused_without_a_checker() -> None:
    for override in ("exposure.kind=aligned", "loss.gate=aligned"):
        with pytest.raises(ConfigError, match="verified rollouts"):
            load_config("micro", [override, "data.checker=none"])


def test_the_correct_gate_distils_verified_rollouts_only() -> None:
    parts = build(quick("exposure.kind=full", "loss.gate=correct", "train.batch_size=16"))
    batch = batch_of(parts, 0)
    cut = {"reduction": "sequence", "micro_batch_size": 16, "chunk_tokens": None}
    meters = distill(
        parts.scorer, parts.teacher, batch.examples, objective(parts.config), selector=selector_of(parts), **cut
    )
    kept = [set(row) for row in meters.tokens["kept"]]
    assert kept == [{float(row.graded.verdict == "correct")} for row in batch.rows]
    assert {0.0, 1.0} == set.union(*kept)
    close(parts)


def test_grpo_s_loss_is_added_to_distillation_on_the_same_rollouts() -> None:
    """The gradient is the sum of that of distillation and that of GRPO alone."""
    shared = ("exposure.kind=full", "train.batch_size=16", "train.group_size=4", "data.max_difficulty=6")
    parts = build(quick(*shared, "train.grpo_weight=0.5"))
    batch = next(
        b for b in (batch_of(parts, update) for update in range(9)) if any(row.advantage for row in b.examples)
    )
    problems = [row.graded.problem.id for row in batch.rows]
    assert problems == [problem for problem in dict.fromkeys(problems) for _ in range(4)]
    parameters = dict(parts.weights.trained)

    def gradient(rows: list[Example], how: str) -> dict[str, torch.Tensor]:
        cut = {"reduction": "sequence", "micro_batch_size": 16, "chunk_tokens": None}
        if how == "distill":
            distill(parts.scorer, parts.teacher, rows, objective(parts.config), **cut)
        else:
            maximise_likelihood(parts.scorer, rows, temperature=1.0, **cut)
        found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        for parameter in parameters.values():
            parameter.grad = None
        return found

    both = gradient(batch.examples, "distill")
    alone = gradient([replace(row, advantage=0.0) for row in batch.examples], "distill")
    advantages = group_advantages([float(row.graded.verdict == "correct") for row in batch.rows], 4)
    grpo = gradient([replace(r, advantage=0.5 * a) for r, a in zip(batch.examples, advantages, strict=True)], "grpo")
    for name, value in both.items():
        torch.testing.assert_close(value, alone[name] + grpo[name], rtol=1e-4, atol=1e-6)
    close(parts)


def test_grpo_beside_another_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="grpo_weight"):
        load_config("micro", ["train.method=sft", "train.grpo_weight=1"])


@pytest.mark.parametrize("beside", ["loss.gate={kind: random, share: 0.5}", "train.grpo_weight=1"])
def test_a_controller_is_told_the_divergence_of_all_tokens_without_gate_and_grpo_s_term(beside: str) -> None:
    parts = build(quick("exposure.kind=full", "train.batch_size=16", beside))
    batch = batch_of(parts, 0)
    meters = accumulate(parts.method, batch.examples, parts.plan)
    by_hand = sum(sum(row) / len(row) for row in meters.tokens["loss"]) / len(batch.rows)
    assert update_stats(batch, meters, parts.config, {}).loss == pytest.approx(by_hand, rel=1e-6)
    assert meters.loss != pytest.approx(by_hand, rel=1e-3)
    close(parts)
