"""Pretraining of the world models, their acceptance, and the shipped checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer

from atesd.config import DataConfig, ViewsConfig
from atesd.errors import TrainingError
from atesd.world import acceptance
from atesd.world import pretrain as module
from atesd.world.acceptance import Acceptance, AcceptanceFigures, measure_acceptance, word_ids
from atesd.world.model import save_world_model, world_tokenizer
from atesd.world.pretrain import RECIPES, PretrainRecipe, pretrain, pretrain_command, pretrain_until_accepted
from atesd.world.problems import COMPLETION_WORDS, END, MESSAGE_WORDS, VOCABULARY, Chain, WorldRenderer, world_problem
from atesd.world.problems import world_problems as problems_of

SHIPPED = Path(str(files("atesd") / "world_models"))
GOOD = ("a", "b", "c")
SHORT = PretrainRecipe(steps=3, batch_size=8)


@pytest.fixture(scope="module")
def few():
    return problems_of(DataConfig(train_size=1, validation_size=100)).validation


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_weights_are_a_function_of_the_seed_alone():
    first, again, other = pretrain(0, SHORT), pretrain(0, SHORT), pretrain(1, SHORT)
    assert same(first, again)
    assert not same(first, other)


def test_pretraining_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = pretrain(0, SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first, pretrain(0, SHORT))


def test_progress_is_told_every_step_and_the_loss_starts_near_uniform():
    losses = []
    pretrain(0, SHORT, lambda step, loss: losses.append((step, loss)))
    assert [step for step, _ in losses] == [0, 1, 2]
    assert losses[0][1] == pytest.approx(torch.log(torch.tensor(len(VOCABULARY))).item(), rel=0.1)


def test_problems_grow_from_2_to_6_clauses_over_the_first_half():
    # 5 lengths over 50 of 100 steps: one more clause every 10 steps
    longest = [module._longest(step, PretrainRecipe(steps=100)) for step in range(100)]
    assert longest[:50] == [2 + step // 10 for step in range(50)]
    assert set(longest[50:]) == {6}


def test_targets_alone_enter_the_loss():
    model = pretrain(0, PretrainRecipe(steps=0))
    ids = torch.randint(
        len(VOCABULARY), (4, MESSAGE_WORDS + COMPLETION_WORDS), generator=torch.Generator().manual_seed(0)
    )
    targets = torch.zeros(4, COMPLETION_WORDS, dtype=torch.bool)
    targets[1, 3] = targets[2, 0] = True
    logprobs = model(ids).logits.log_softmax(-1)
    # the token at place t is predicted from place t - 1
    picked = [
        logprobs[1, MESSAGE_WORDS + 2, ids[1, MESSAGE_WORDS + 3]],
        logprobs[2, MESSAGE_WORDS - 1, ids[2, MESSAGE_WORDS]],
    ]
    assert module._text_loss(model, ids, targets).item() == pytest.approx(-sum(p.item() for p in picked) / 2, rel=1e-5)


def test_a_first_mistake_is_the_first_wrong_digit_and_a_right_completion_has_none():
    problem = world_problem(Chain(4, (("+", 3), ("-", 9))))  # a 7 ; b 8 ; \boxed{8}
    rows = ("a 7 ; b 8 ; \\boxed{8} <end>", "a 7 ; b 1 ; \\boxed{1} <end>", "a 0 ; b 1 ; \\boxed{8} <end>", "a 7 ;")
    completions = [word_ids(row) for row in rows]
    assert [acceptance._first_mistake(ids, problem) for ids in completions] == [
        COMPLETION_WORDS,
        4,
        1,
        COMPLETION_WORDS,
    ]
    assert [acceptance._solved(ids, problem) for ids in completions] == [True, False, True, False]


def test_gate_completions_are_samples_of_the_model_that_end_once(few):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "a").eval()
    prompt = word_ids(WorldRenderer(ViewsConfig()).student(few[0]))
    copies = [replace(few[0], id=str(place)) for place in range(600)]
    completions = acceptance._complete(model, copies, [prompt] * 600, "test")
    expected = model(torch.tensor([[*prompt, completions[0][0]]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(torch.tensor([ids[1] for ids in completions]), minlength=len(VOCABULARY)) / 600
    assert (seen - expected).abs().max() < 0.08  # four standard errors of 600 draws at 1/2
    assert all(ids.index(VOCABULARY.index(END)) == len(ids) - 1 for ids in completions)


def test_the_kl_of_a_message_with_itself_is_zero_and_is_measured_on_the_completion_alone(few):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "a").eval()
    renderer = WorldRenderer(ViewsConfig())
    student, teacher = word_ids(renderer.student(few[0])), word_ids(renderer.teacher(few[0], 9, True))
    completion = word_ids(few[0].reference)
    assert acceptance._kl(model, [student], [student], [completion])[0].abs().max() < 1e-6
    kl, exists = acceptance._kl(model, [teacher], [student], [completion])
    assert exists[0].tolist() == [place < len(completion) for place in range(COMPLETION_WORDS)]
    p, q = (
        Categorical(logits=model(torch.tensor([[*prompt, *completion]])).logits[0]) for prompt in (teacher, student)
    )
    expected = kl_divergence(p, q)[MESSAGE_WORDS - 1 : -1]
    assert torch.allclose(kl[0, : len(completion)], expected, atol=1e-5)


def test_a_gate_fails_on_the_worst_difficulty():
    figures = AcceptanceFigures(0.97, 0.4, {2: 0.7, 6: 0.2}, 0.2, 0.05)
    assert figures.passed(Acceptance())
    assert not AcceptanceFigures(0.94, 0.4, {2: 0.7, 6: 0.2}, 0.2, 0.05).passed(Acceptance())
    assert not AcceptanceFigures(0.97, 0.4, {2: 0.7, 6: 0.1}, 0.2, 0.05).passed(Acceptance())
    assert not AcceptanceFigures(0.97, 0.4, {2: 0.7, 6: 0.2}, 0.2, 0.9).passed(Acceptance())


def test_the_bad_recipe_asks_for_a_teacher_that_is_right_alone_and_lost_after_a_mistake():
    lost = AcceptanceFigures(0.97, 0.4, {2: 0.7, 6: 0.2}, 0.2, 1.8)
    sound = replace(lost, kl_after_mistake=0.05)
    assert [figures.passed(RECIPES["bad"].acceptance) for figures in (lost, sound)] == [True, False]
    assert [figures.passed(RECIPES["good"].acceptance) for figures in (lost, sound)] == [False, True]


def test_attempts_are_counted_and_every_failure_is_told(few):
    with pytest.raises(TrainingError, match=r"2 attempts(.|\n)*seed 5(.|\n)*seed 6"):
        pretrain_until_accepted(5, 2, SHORT, problems=few[:10])


def test_the_command_writes_a_folder_with_its_record(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "good", SHORT)
    passing = AcceptanceFigures(0.97, 0.4, {2: 0.7, 6: 0.2}, 0.2, 0.05)
    monkeypatch.setattr(module, "measure_acceptance", lambda *_: passing)
    steps: list[tuple[int, int]] = []
    record = pretrain_command(3, 1, tmp_path, progress=lambda seed, step, _: steps.append((seed, step)))
    assert steps == [(3, 0), (3, 1), (3, 2)]
    assert json.loads((tmp_path / "gates.json").read_text())["seed"] == record["seed"] == 3
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), pretrain(3, SHORT))


def test_the_tokenizer_keeps_every_word_and_the_template_adds_nothing(tmp_path, few):
    save_world_model(pretrain(0, PretrainRecipe(steps=0)), tmp_path, {})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    message = WorldRenderer(ViewsConfig()).teacher(few[4], 6, whole=True)
    assert tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False) == message
    for text in (message, few[4].reference):
        ids = tokenizer(text)["input_ids"]
        assert tuple(ids) == word_ids(text)
        assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<end>")


def test_the_vocabulary_is_the_tokenizers():
    assert world_tokenizer().get_vocab() == {word: place for place, word in enumerate(VOCABULARY)}


@pytest.mark.parametrize("name", [*GOOD, "bad"])
def test_shipped_checkpoints_load_by_the_ordinary_route(name):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / name)
    assert sum(p.numel() for p in model.parameters()) == 101_056
    assert (SHIPPED / name / "model.safetensors").stat().st_size < 500_000
    assert AutoTokenizer.from_pretrained(SHIPPED / name).get_vocab() == world_tokenizer().get_vocab()


@pytest.mark.parametrize("name", [*GOOD, "bad"])
def test_shipped_checkpoints_have_the_gate_figures_they_record(name, few):
    figures = measure_acceptance(AutoModelForCausalLM.from_pretrained(SHIPPED / name).eval(), few)
    record = json.loads((SHIPPED / name / "gates.json").read_text())
    recorded = AcceptanceFigures(**record["figures"])
    assert recorded.passed(RECIPES[record["recipe"]].acceptance)
    # 100 problems against the recorded 500: standard errors .02 and .05
    assert figures.teacher_accuracy == pytest.approx(recorded.teacher_accuracy, abs=0.06)
    assert figures.student_accuracy == pytest.approx(recorded.student_accuracy, abs=0.15)
    low, high = RECIPES[record["recipe"]].acceptance.kl_after_mistake
    assert low <= figures.kl_after_mistake <= high


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GOOD, "bad"])
def test_shipped_checkpoints_are_made_again_by_the_recorded_command(name, tmp_path):
    record = json.loads((SHIPPED / name / "gates.json").read_text())
    again = pretrain_command(record["seed"], 1, tmp_path, record["recipe"])
    assert AcceptanceFigures(**again["figures"]).passed(RECIPES[record["recipe"]].acceptance)
    assert json.loads((tmp_path / "gates.json").read_text())["settings"] == record["settings"]
