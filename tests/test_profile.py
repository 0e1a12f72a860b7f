"""The exposure profile: its numbers by hand and by brute force, the rule of its suggestion, and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from atesd.build import build, close
from atesd.config import DataConfig, FixedSettings, FullSettings, ViewsConfig, dump_config, load_config
from atesd.data.sources import load_problems
from atesd.data.views import TextRenderer
from atesd.errors import ConfigError
from atesd.maths.keyed import uniforms
from atesd.records import Rollout
from atesd.table import Table
from atesd.train.checkpoint import digest
from atesd.train.components import Components
from atesd.train.views import TeacherPrompts
from atesd_lab.cli.commands import laboratory as app
from atesd_lab.cli.profile import print_profile
from atesd_lab.profile.measure import Scores, align, first_shares, score, show, teacher_verdicts
from atesd_lab.profile.profile import (
    Completions,
    Profile,
    completions_of,
    data_profile,
    default_problems,
    measure_profile,
    profiled_config,
)
from atesd_lab.profile.report import (
    draw_profile,
    profile_text,
    recipe_of,
    suggested_config,
    without_flat,
    write_profile,
)
from atesd_lab.profile.suggestion import AlignmentRows, Suggestion, suggest
from atesd_lab.stats.mismatch import mismatch
from quick import quick
from updates import batch_of

RATIOS = (0.0, 0.5, 1.0)
CONFIG = profiled_config(
    quick("train.batch_size=16", "exposure.kind=aligned", "alignment.min_correct=2", "sampling.temperature=0.9")
)


@pytest.fixture(scope="module")
def parts():
    built = build(CONFIG)
    yield built
    close(built)


def logits(parts: Components, context: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """What predicts each completion token, one row at a time, through the model's own forward: [N, V], float64."""
    ids = torch.tensor([[*context, *completion]])
    return parts.loaded.model(ids).logits[0, len(context) - 1 : -1].double()


def test_the_rollouts_are_those_that_training_would_draw(parts: Components) -> None:
    shown = show(parts, 20, RATIOS)
    batches = [batch_of(parts, update) for update in (0, 1)]
    rows = [row for batch in batches for row in batch.rows]
    rollouts = [row.graded.rollout for row in rows]
    assert [one.graded.rollout.completion_ids for one in shown] == [rollout.completion_ids for rollout in rollouts[:20]]
    assert [one.graded.verdict for one in shown] == [row.graded.verdict for row in rows][:20]
    full = [row.example.teacher_context for row in rows]
    assert [one.contexts[-1] for one in shown] == full[:20]  # the profile is built under full exposure


def test_gates_and_other_losses_stay_out_of_the_profile_and_in_the_suggested_recipe(profile: Profile) -> None:
    config = quick("train.grpo_weight=0.5", "train.group_size=2", "loss.gate=aligned", "exposure.kind=staircase")
    plain = profiled_config(config)
    assert (plain.train.grpo_weight, plain.loss.gate.kind, plain.exposure.kind) == (0, "none", "full")
    suggested = suggested_config(profile, config)
    assert (suggested.train.grpo_weight, suggested.loss.gate.kind) == (0.5, "aligned")
    assert suggested.exposure.kind in ("full", "fixed")


def test_kl_disagreement_and_answer_equal_brute_force(parts: Components) -> None:
    shown = show(parts, 4, RATIOS)
    found = score(parts, shown)
    for one, by_ratio in zip(shown, found, strict=True):
        completion = one.graded.rollout.completion_ids
        student = (logits(parts, one.graded.rollout.prompt_ids, completion) / 0.9).log_softmax(-1)
        answer = parts.encoder.completion(f"\\boxed{{{one.problem.answer}}}")[:-1]
        for context, scores in zip(one.contexts, by_ratio, strict=True):
            teacher = (logits(parts, context, completion) / 0.9).log_softmax(-1)
            kl = (teacher.exp() * (teacher - student)).sum(-1)
            assert scores.kl == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
            assert scores.disagreement == tuple((teacher.argmax(-1) != student.argmax(-1)).double().tolist())
            own = logits(parts, context, answer).log_softmax(-1)
            taken = own.detach()[range(len(answer)), list(answer)].tolist()
            assert scores.answer_logprob == pytest.approx(np.mean(taken), rel=1e-4)


def test_the_teachers_own_answers_are_drawn_from_its_view_with_the_problems_uniforms(parts: Components) -> None:
    """Token by token by inversion in the order of ids, without cache, engine or batch."""
    shown = show(parts, 6, RATIOS)
    found = teacher_verdicts(parts, shown)
    assert found is not None
    for one, verdicts in zip(shown, found, strict=True):
        draws = uniforms(CONFIG.sampling.completion_tokens, 0, "profile", one.problem.id)
        for context, right in zip(one.contexts, verdicts, strict=True):
            written: list[int] = []
            for draw in draws:
                last = parts.loaded.model(torch.tensor([[*context, *written]])).logits[0, -1].double() / 0.9
                written.append(int(torch.searchsorted(last.softmax(-1).cumsum(0), float(draw), right=True)))
                if written[-1] in parts.loaded.end_ids:
                    break
            assert right == (f"\\boxed{{{one.problem.answer}}}" in parts.encoder.decode(written))


def gradient(parts: Components, value: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(dict(parts.weights.trained).values()))])


def test_each_half_is_scored_along_the_success_of_the_other_half(parts: Components) -> None:
    """Backpropagation through the real model for both sides of the inner product, against forwards alone."""
    shown = show(parts, 16, RATIOS)
    found = align(parts, shown, RATIOS)
    assert not isinstance(found, str)
    rows, profile = found
    assert profile.groups["all"].values == pytest.approx(np.mean(rows.rows, axis=0).tolist())
    units = []
    for half in (0, 1):
        right = [one for one in shown[half::2] if one.graded.verdict == "correct"]
        assert len(right) == profile.correct[half]
        total = torch.zeros((), dtype=torch.float64)
        for one in right:
            completion = one.graded.rollout.completion_ids
            logprobs = (logits(parts, one.graded.rollout.prompt_ids, completion) / 0.9).log_softmax(-1)
            total = total + logprobs[range(len(completion)), list(completion)].mean()
        ascent = gradient(parts, total)
        units.append(ascent / ascent.norm())
    assert profile.cosine == pytest.approx(float(units[0] @ units[1]), abs=1e-3)
    for place in (0, 1):
        one, half = shown[place], rows.halves[place]
        completion = one.graded.rollout.completion_ids
        for k in range(3):
            teacher = (logits(parts, one.contexts[k], completion).detach() / 0.9).log_softmax(-1)
            student = (logits(parts, one.graded.rollout.prompt_ids, completion) / 0.9).log_softmax(-1)
            loss = (teacher.exp() * (teacher - student)).sum(-1).mean()
            along = -float(gradient(parts, loss) @ units[1 - half])
            assert rows.rows[place][k] == pytest.approx(along, rel=0.05, abs=2e-3)


def test_too_few_correct_rollouts_are_said_and_no_checker_is_too() -> None:
    few = build(profiled_config(quick("exposure.kind=aligned", "alignment.min_correct=500")))
    found = align(few, show(few, 4, RATIOS), RATIOS)
    close(few)
    assert isinstance(found, str)
    assert "alignment.min_correct wants 500 in each; raise --problems" in found
    blind = build(profiled_config(quick("data.checker=none")))
    profile = measure_profile(blind, 4)
    assert profile.student is None
    assert all(row.teacher_correct is None for row in profile.rows)
    assert profile.suggestion.basis == "nothing measurable"
    assert "data.checker: none" in profile_text(profile, "blind")


def test_the_profile_leaves_the_student_bit_for_bit_as_it_was_until_it_takes_its_one_update(parts: Components) -> None:
    student = {name: p.detach() for name, p in parts.loaded.model.named_parameters()}
    before = digest(student)
    shown = show(parts, 8, RATIOS)
    score(parts, shown)
    teacher_verdicts(parts, shown)
    align(parts, shown, RATIOS)
    assert digest(student) == before
    assert all(parameter.grad is None for parameter in dict(parts.weights.trained).values())


def test_the_tail_is_the_largest_five_per_cent() -> None:
    # Forty tokens, two in the tail: mean (38 * 0.5 + 3 + 8) / 40 = 0.75, tail mean 5.5, share 11 / 30.
    found = mismatch([0.5] * 20 + [3.0, 8.0] + [0.5] * 18)
    assert found.mean == pytest.approx(0.75)
    assert (found.tail_mean, found.tail_share) == (pytest.approx(5.5), pytest.approx(11 / 30))
    assert found.p95 == pytest.approx(0.5 + 0.05 * 2.5)  # place 0.95 * 39 = 37.05, between 0.5 and 3
    assert mismatch([2.0, 1.0]).tail_mean == 2.0  # at least one token
    assert mismatch([0.0] * 7).tail_share is None


def test_the_share_of_the_first_tokens_is_pooled_over_rollouts() -> None:
    # 10 nats in all; first tokens 4 + 1, first four 4 + 1 + 1 + 2 (one rollout has three tokens), first sixteen all.
    scores = [Scores((4.0, 0.0, 1.0, 0.0, 2.0), (0.0,) * 5, 0.0), Scores((1.0, 0.0, 2.0), (0.0,) * 3, 0.0)]
    assert first_shares(scores) == pytest.approx((0.5, 0.8, 1.0))
    assert first_shares([Scores((0.0,), (0.0,), 0.0)]) == (None, None, None)


def aligned(*means: float, second: tuple[float, ...] = (), spread: float = 0.1) -> AlignmentRows:
    """Forty rollouts of two halves by turns, with just these means in each half and noise of that deviation."""
    rows = np.empty((40, len(means)))
    for half, centre in enumerate((means, second or means)):
        noise = np.random.default_rng(half).standard_normal((20, len(means)))
        rows[half::2] = np.array(centre) + spread * (noise - noise.mean(0))
    return AlignmentRows(tuple(map(tuple, rows.tolist())), (0, 1) * 20)


def verdicts(*shares: float) -> list[list[bool]]:
    """Forty problems; at each ratio the first share of them is right."""
    return [[i < share * 40 for share in shares] for i in range(40)]


STUDENT = [i < 8 for i in range(40)]
KL = (0.1, 0.2, 0.4)


def test_the_ratio_with_the_largest_alignment_is_suggested_where_it_can_be_told() -> None:
    found = suggest(RATIOS, aligned(0.1, 0.5, -0.2), STUDENT, verdicts(0.2, 0.5, 0.9), KL)
    assert (found.reveal_ratio, found.basis) == (0.5, "alignment")
    assert "told from 0, 1" in found.reasons[0]


def test_ratios_that_cannot_be_told_from_the_best_are_named() -> None:
    rows = aligned(0.1, 0.5, 0.49)
    found = suggest(RATIOS, rows, STUDENT, verdicts(0.2, 0.5, 0.9), KL)
    assert found.reveal_ratio == 0.5
    assert found.reasons[0].endswith("told from 0; not told from it: 1")


@pytest.mark.parametrize(
    "alignment",
    [
        aligned(0.01, 0.02, 0.015),  # the mean is not above the noise
        aligned(-0.3, -0.2, -0.5),  # every step would do harm
        aligned(0.4, 0.4, 0.4, spread=0.0001),  # all alike
        aligned(0.2, 0.9, 0.5, second=(0.5, 0.4, 0.6)),  # the halves contradict each other
        "too few",
    ],
)
def test_without_a_ratio_that_can_be_told_the_teachers_accuracy_decides(alignment: AlignmentRows | str) -> None:
    found = suggest(RATIOS, alignment, STUDENT, verdicts(1.0, 0.5, 0.9), KL)
    assert (found.reveal_ratio, found.basis) == (1.0, "teacher accuracy")  # ratio 0 takes no part
    equal = suggest(RATIOS, alignment, STUDENT, verdicts(0.2, 0.85, 0.9), KL)
    assert (equal.reveal_ratio, equal.basis) == (0.5, "teacher accuracy")  # as good, and nearer to the student
    assert equal.reasons[0].startswith("alignment: ")


def test_where_nothing_can_be_measured_it_is_full_exposure_and_the_reason_says_so() -> None:
    for student, teacher in ((None, None), (STUDENT, verdicts(0.9, 0.2, 0.2))):
        found = suggest(RATIOS, "too few", student, teacher, KL)
        assert (found.reveal_ratio, found.basis) == (1.0, "nothing measurable")
        assert found.reasons[-1].startswith("nothing measurable")


@pytest.fixture(scope="module")
def profile() -> Profile:
    built = build(CONFIG)
    try:
        return measure_profile(built, 24, ratios=RATIOS)
    finally:
        close(built)


def test_counts_of_the_difficulties_add_up_to_those_of_all(profile: Profile) -> None:
    assert profile.student is not None
    for ratio in RATIOS:
        rows = {row.group: row for row in profile.rows if row.ratio == ratio}
        whole, parts = rows.pop("all"), list(rows.values())
        assert whole.rollouts == sum(row.rollouts for row in parts) == 24
        assert whole.tokens == sum(row.tokens for row in parts)
        assert whole.teacher_correct == sum(row.teacher_correct or 0 for row in parts)
        assert whole.kl.mean == pytest.approx(sum(row.kl.mean * row.tokens for row in parts) / whole.tokens)
        assert whole.shortened_views == 0
    assert profile.student["all"] == sum(profile.student.values()) / 2
    assert [row.effective_ratio for row in profile.rows if row.group == "all"][::2] == [0.0, 1.0]
    assert profile.cost.total > 0
    assert profile.cost.peak_bytes > 1 << 20


def test_how_long_completions_are_is_counted_and_said(profile: Profile) -> None:
    rollouts = [Rollout("p", 0, (1,), (2,) * length, (0.0,) * length, length == 20) for length in range(1, 21)]
    # By hand: of 1 to 20 tokens, mean 10.5; 19 of 20 have up to 19; the one of 20 was cut off.
    assert completions_of(rollouts, 20) == Completions(10.5, 19, 20, 0.05, 20)
    mean = sum(row.tokens for row in profile.rows if row.group == "all" and row.ratio == 0) / 24
    assert profile.completions.mean == pytest.approx(mean)
    assert f"completions: mean {mean:.1f} tokens, 95 % up to" in profile_text(profile, "micro")


def test_the_suggestion_is_what_is_read_first(profile: Profile) -> None:
    assert profile_text(profile, "micro").startswith("suggested reveal ratio: ")


def test_a_column_that_says_the_same_in_every_row_is_said_once() -> None:
    table = Table(
        "t", ("difficulty", "ratio", "KL", "rollouts"), (("all", "0", "1.0", "32"), ("all", "1", "2.0", "32"))
    )
    shown = without_flat(table)
    assert (shown.columns, shown.rows) == (("difficulty", "ratio", "KL"), (("all", "0", "1.0"), ("all", "1", "2.0")))
    assert shown.notes == ("The same in every row: rollouts 32.",)
    one = replace(table, rows=table.rows[:1])
    assert without_flat(one) == one


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_the_suggested_recipe_is_read_back_and_differs_in_the_exposure_alone(
    profile: Profile, ratio: float, tmp_path: Path
) -> None:
    config = quick("exposure.kind=learned", "train.batch_size=16")
    suggested = replace(profile, suggestion=Suggestion(ratio, "alignment", ("because\nof this",)))
    text = recipe_of(suggested, config, "micro")
    (tmp_path / "recipe.yaml").write_text(text)
    read = load_config(str(tmp_path / "recipe.yaml"))
    assert read == suggested_config(suggested, config)
    assert read.exposure.kind == ("full" if ratio == 1 else "fixed")
    assert read.exposure == (FullSettings() if ratio == 1 else FixedSettings(reveal_ratio=ratio))
    back = {"exposure": config.exposure, "credit": config.credit}  # a fixed ratio is not rewarded
    assert dump_config(read.model_copy(update=back)) == dump_config(config)


def test_rows_without_gold_and_rows_that_contradict_their_reference_are_counted(
    profile: Profile, parts: Components, tmp_path: Path
) -> None:
    good = [{"problem": f"{i} + 1", "solution": f"so \\boxed{{{i + 1}}}", "answer": i + 1} for i in range(200)]
    bad = [
        {"problem": "2 + 2", "solution": "it is four", "answer": ""},
        {"problem": "3 + 3", "solution": "so \\boxed{7}", "answer": 6},
        {"problem": "", "solution": "so \\boxed{7}", "answer": 7},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in good + bad))
    data = {"source": str(file), "columns": {"answer": "answer"}, "on_bad_row": "skip", "train_size": 100}
    sizes = {"validation_size": 1, "probe_size": 1, "test_size": 1}
    problems = load_problems(DataConfig(**data, **sizes))
    found = data_profile(replace(parts, problems=replace(parts.problems, skipped=problems.skipped)))
    assert (found.gold_missing, found.gold_disagrees, found.other_faults) == (1, 1, 1)
    config = quick("data.on_bad_row=refuse")
    with_faults = replace(profile, data=found)
    assert suggested_config(with_faults, config).data.on_bad_row == "skip"
    assert "data.on_bad_row is skip here" in recipe_of(with_faults, config, "micro")
    assert "1 without a gold answer" in profile_text(with_faults, "micro")


def test_short_references_are_called_a_step_function(profile: Profile) -> None:
    short = replace(profile, data=replace(profile.data, segments={0: 1, 1: 2, 2: 1, 3: 4}))
    text = " ".join(profile_text(short, "any").split())
    assert "37.5 % of the references have one or two segments" in text
    assert "12.5 % have no segment" in text
    assert "step function" not in profile_text(replace(short, data=replace(short.data, segments={3: 4})), "any")


def test_views_that_have_to_lose_segments_are_counted(parts: Components) -> None:
    # Without the answer a whole reference is its segments, three words each, so that every segment less is shorter.
    written = replace(parts, renderer=TextRenderer(ViewsConfig(answer="withhold", wording="constant")))
    whole = [written.encoder.teacher(written.renderer.teacher(p, 0, whole=True)) for p in parts.problems.train]
    lengths = sorted(len(ids) for ids in whole)
    room = lengths[0]
    longest = room + CONFIG.sampling.completion_tokens
    model = CONFIG.model.model_copy(update={"max_context_tokens": longest})
    config = CONFIG.model_copy(update={"model": model})
    prompts = TeacherPrompts(config, written.encoder, written.renderer, parts.problems.train)
    tight = replace(written, config=config, prompts=prompts)
    assert 0 < data_profile(tight).too_long == sum(length > room for length in lengths)
    shown = show(tight, 24, RATIOS)
    assert sum(one.shortened[2] for one in shown) == data_profile(tight).too_long
    assert max(len(one.contexts[2]) for one in shown) <= room


def test_bad_input_is_named_with_what_is_allowed(parts: Components, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*file: cannot make this folder: File exists; choose another"):
        print_profile(CONFIG, "micro", 4, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"--problems 25: expected 2 to 24"):
        measure_profile(parts, 25)
    with pytest.raises(ConfigError, match=r"exposure.ratios: 0.5 alone"):
        measure_profile(parts, ratios=(0.5, 0.5))
    with pytest.raises(ConfigError, match=r"train.method: sft has no teacher"):
        profiled_config(quick("train.method=sft"))
    assert default_problems(parts) == 24


def test_the_command_writes_its_files_and_prints_json(tmp_path: Path) -> None:
    settings = [word for one in ("train.batch_size=8", "data.train_size=40") for word in ("--set", one)]
    words = ["profile", "micro", *settings, "--problems", "8", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr.startswith("8 rollouts at ratios 0, 0.25, 0.5, 0.75, 1")
    written = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert json.loads(result.stdout) == written
    assert {row["group"] for row in written["rows"]} >= {"all"}
    assert load_config(str(tmp_path / "out" / "recipe.yaml")).train.batch_size == 8
    assert "suggested reveal ratio" in (tmp_path / "out" / "profile.txt").read_text()
    assert (tmp_path / "out" / "profile.png").stat().st_size > 10_000


def test_the_figure_is_the_same_bytes_for_the_same_profile(profile: Profile, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        draw_profile(profile, "micro", tmp_path / name / "profile")
    drawn = (tmp_path / "a" / "profile.svg").read_bytes()
    assert drawn == (tmp_path / "b" / "profile.svg").read_bytes()
    assert b"Teacher right" in drawn
    assert all(path.is_file() for path in write_profile(profile, CONFIG, "micro", tmp_path / "a"))
