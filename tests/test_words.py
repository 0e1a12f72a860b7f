"""Word problems: which templates are taken, how the student writes, pretraining texts, and the gates of a model."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from atesd.cli import app
from atesd.config import DataConfig, load_config
from atesd.data.rows import Row
from atesd.data.sources import load_problems
from atesd.data.splits import split_of
from atesd.data.word_problems import (
    HELD_OUT,
    SHORT,
    TEMPLATES,
    combined,
    plain_steps,
    short_templates,
    steps_of,
    template_row,
)
from atesd.errors import DataError, TrainingError
from atesd.models.load import model_source
from atesd.world.words import pretrain as module
from atesd.world.words.acceptance import (
    WordAcceptance,
    WordFigures,
    encoder_of,
    first_mistake,
    measure_words,
    reader_of,
    renderers_of,
)
from atesd.world.words.model import END, words_config, words_tokenizer
from atesd.world.words.pretrain import Teaching, WordRecipe, pretrain_words, pretrain_words_command, words_record
from atesd.world.words.texts import WordMixture, WordProblem, draw_word_texts, is_unsure, word_problem_of
from atesd.world.words.writing import Equation, computed_places, states, written_out

CONFIG = load_config("micro-words", [])
KEEPING, WITHHOLDING = renderers_of(CONFIG)
SURE = WordMixture(slip=0.0, off_track=0.0, terse=0.0, own_terse=0.0)
TINY = WordRecipe(hidden_size=32, layers=1, steps=2, batch_size=4, micro_batch_size=2)


@pytest.fixture
def gym():
    pytest.importorskip("reasoning_gym", reason='the templates are reasoning-gym\'s: pip install "atesd[gsm]"')


def pens(boxes: int, each: int, given: int) -> Row:
    """A problem of our own, in the shape of the generator's rows."""
    pens, left = boxes * each, boxes * each - given
    solution = f"There are {boxes} boxes x {each} pens/box = {pens} pens.\nMia keeps {pens} - {given} = {left} pens."
    text = f"Mia has {boxes} boxes of {each} pens. She gives {given} away. How many does she keep?"
    return Row(boxes, {"problem": text, "solution": solution, "answer": str(left), "difficulty": 2})


LAST_UNSURE = 62  # a number of which the first line is sure and the second is not
PROBLEMS = [
    word_problem_of(LAST_UNSURE, pens(boxes, each, given))
    for boxes, each, given in ((4, 24, 17), (5, 23, 38), (3, 36, 49))
]


def text_of(pieces) -> str:
    return "".join(text for text, _ in pieces)


def value_of(expression: str) -> int:
    """Of sums and products of whole numbers, and of one quotient."""
    assert re.fullmatch(r"\d+(?:[-+*/]\d+)*", expression)
    return eval(expression.replace("/", "//"))


def equations(text: str) -> list[list[str]]:
    """Every run of expressions joined by =, as they are written."""
    return [match[0].split("=") for match in re.finditer(r"[\d*/+-]+(?:=[\d*/+-]+)+", text)]


def drawn(mixture: WordMixture, size: int = 200, seed: int = 0):
    rng = np.random.default_rng(seed)
    problems = [PROBLEMS[place] for place in rng.integers(len(PROBLEMS), size=size)]
    return list(zip(problems, draw_word_texts(rng, problems, mixture, KEEPING, WITHHOLDING), strict=True))


# Reading references


def test_a_line_gives_its_equation_with_units_prices_and_other_numbers_around_it():
    line = "On day 3 he buys 12 boxes x £4/box + £20 fee = £68 worth of 5 things."
    (step,) = steps_of(line) or ()
    assert (step.operands, step.operators, step.result) == ((12, 4, 20), ("*", "+"), 68)
    assert (step.numbers, step.first) == ((3, 12, 4, 20, 68, 5), 1)


@pytest.mark.parametrize(
    "line",
    [
        "no equation at all",
        "She has 3 + 4 = 8 pens.",  # wrong
        "It is 50% * 20 = 10.",
        "It is 2.5 * 4 = 10.",
        "It is 2 + 3 * 4 = 20.",  # not from left to right
        "So 3 + 4 = 7 and 7 + 1 = 8.",
        "That is 900 + 900 = 1800.",
        "That is 24 * 31 = 744.",  # neither factor has one significant digit
    ],
)
def test_a_line_that_is_not_plain_is_not_read(line):
    assert steps_of(f"She has 1 + 1 = 2 pens.\n{line}") is None


@pytest.mark.parametrize(
    ("operands", "operators", "value"),
    [((7, 5), "+", 12), ((5, 7), "-", None), ((90, 18), "/", 5), ((90, 7), "/", None), ((5, 0), "/", None)],
)
def test_only_whole_numbers_in_range_have_a_value(operands, operators, value):
    assert combined(operands, tuple(operators)) == value


# The student's style


@pytest.mark.parametrize(("left", "operator", "right"), [(47, "+", 38), (185, "-", 138), (34, "*", 4), (4, "*", 34)])
def test_every_state_on_the_way_has_the_same_value(left, operator, right):
    way = states(left, operator, right)
    texts = [
        "".join([str(s.numbers[0]), *(o + str(n) for o, n in zip(s.operators, s.numbers[1:], strict=True))])
        for s in way
    ]
    assert len({value_of(text) for text in texts}) == 1
    assert len(way) >= 4


def test_arithmetic_is_spelled_out_operation_by_operation():
    pieces, value = written_out(Equation((3, 11, 15), ("+", "+")))
    assert (text_of(pieces), value) == ("3+11=14; 14+15=14+10+5=24+5=29", 29)
    pieces, value = written_out(Equation((34, 4), ("*",)))
    assert (text_of(pieces), value) == ("34*4=30*4+4*4=120+16=136", 136)


def test_a_wrong_sum_is_no_target_and_what_follows_goes_on_from_it():
    equation = Equation((47, 38), ("+",))
    place = computed_places(equation)[0]
    pieces, value = written_out(replace(equation, misread=place, instead=79))
    assert text_of(pieces) == "47+38=47+30+8=79+8=87"
    assert [text for text, learned in pieces if not learned] == ["79"]
    assert value == 87


# Texts


def test_the_contexts_are_those_that_a_run_shows():
    shown = {problem.problem.id: {KEEPING.student(problem.problem)} for problem in PROBLEMS}
    for problem in PROBLEMS:
        for renderer in (KEEPING, WITHHOLDING):
            for lines in range(2):
                shown[problem.problem.id].add(renderer.teacher(problem.problem, lines, False))
            shown[problem.problem.id].add(renderer.teacher(problem.problem, 2, True))
    seen: dict[str, set[str]] = {problem.problem.id: set() for problem in PROBLEMS}
    for problem, text in drawn(WordMixture(), 400):
        seen[problem.problem.id].add(text.message)
    assert seen == shown


def test_without_mistakes_every_text_writes_the_arithmetic_out_and_ends_with_the_answer():
    for problem, text in drawn(SURE):
        written = text_of(text.pieces)
        assert written.endswith(f"\n\\boxed{{{problem.problem.answer}}}")
        assert written.count("\n") == 2
        assert all(len({value_of(one) for one in chain}) == 1 for chain in equations(written))
        assert all(learned for _, learned in text.pieces)
    assert "There are 4*24=20*4+4*4=80+16=96 pens.\n" in {
        text_of(text.pieces).splitlines(keepends=True)[0] for problem, text in drawn(SURE) if problem is PROBLEMS[0]
    }


def test_off_track_texts_hold_one_mistake_that_is_no_target_and_go_on_from_it():
    texts = drawn(replace(SURE, reference=1.0, off_track=1.0))
    unlearned = [[piece for piece, learned in text.pieces if not learned] for _, text in texts]
    assert all(len(pieces) == 1 for pieces in unlearned)
    assert {piece in "+-*/" for (piece,) in unlearned} == {True, False}  # operations, and numbers
    wrong = [not text_of(text.pieces).endswith(f"{{{problem.problem.answer}}}") for problem, text in texts]
    assert np.mean(wrong) > 0.9  # a wrong quantity may come to the same answer
    for _, text in texts:
        first, second = equations(text_of(text.pieces))[:2]
        mistaken = [learned for piece, learned in text.pieces if "\n" in piece or not learned].index(False)
        assert mistaken == 1 or second[0].startswith(first[-1])  # in the second line the quantity itself may be wrong


def test_only_unsure_lines_slip_and_only_where_no_reference_shows_them():
    unsure = {line for line in range(2) if is_unsure(LAST_UNSURE, line, SURE.unsure)}
    assert unsure == {1}
    slipping = replace(SURE, slip=1.0)
    alone = drawn(replace(slipping, reference=0.0))
    assert all(not text_of(text.pieces).endswith(f"{{{problem.problem.answer}}}") for problem, text in alone)
    assert all(learned for _, text in alone for _, learned in text.pieces)
    whole = drawn(replace(slipping, reference=1.0, whole=1.0))
    assert all(text_of(text.pieces).endswith(f"{{{problem.problem.answer}}}") for problem, text in whole)


def test_an_answer_that_is_shown_is_reached_and_one_that_is_withheld_is_not():
    mixture = replace(SURE, slip=1.0, reference=1.0, whole=0.0)
    for withheld in (0.0, 1.0):
        ends = [
            text_of(text.pieces).endswith(f"{{{problem.problem.answer}}}")
            for problem, text in drawn(replace(mixture, withheld=withheld))
        ]
        assert set(ends) == {not withheld}


def test_terse_texts_write_the_lines_that_they_are_shown_as_the_reference_does():
    for problem, text in drawn(replace(SURE, reference=1.0, whole=1.0, terse=1.0)):
        assert text_of(text.pieces).startswith("".join(problem.problem.segments) + "\n")


# Tokens and the model


@pytest.fixture(scope="module")
def taught():
    tokenizer = words_tokenizer(one.problem for one in PROBLEMS)
    return Teaching(PROBLEMS, tokenizer, encoder_of(tokenizer), KEEPING, WITHHOLDING)


def test_every_digit_is_a_token_and_any_text_comes_back(taught):
    assert [taught.tokenizer.decode([i]) for i in taught.tokenizer("4027")["input_ids"]] == ["4", "0", "2", "7"]
    for text in (PROBLEMS[0].problem.reference, "£12 ≠ émigré\n", "47+38=47+30+8"):
        assert taught.tokenizer.decode(taught.tokenizer(text)["input_ids"]) == text


def test_a_text_is_the_context_of_a_run_and_the_tokens_that_a_student_would_write(taught):
    rng = np.random.default_rng(0)
    for ids, targets in taught.texts(rng, 20, replace(SURE, reference=0.0)):
        begin = next(place for place, target in enumerate(targets) if target != -100)
        (problem,) = [
            one for one in PROBLEMS if taught.encoder.student(KEEPING.student(one.problem)) == tuple(ids[: begin + 1])
        ]
        completion = targets[begin:]
        assert completion[:-1] == ids[begin + 1 :]
        assert taught.tokenizer.decode(completion[-1:]) == END
        joined = taught.tokenizer.decode(completion[:-1])
        assert joined.endswith(f"{{{problem.problem.answer}}}")
        assert taught.tokenizer(joined)["input_ids"] == completion[:-1]


def test_weights_are_a_function_of_the_seed(taught):
    first, again, other = (pretrain_words(seed, TINY, taught) for seed in (0, 0, 1))
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].dtype == torch.bfloat16


def test_the_architecture_of_the_recipe_has_two_million_parameters(taught):
    config = words_config(taught.tokenizer, WordRecipe().hidden_size, WordRecipe().layers)
    with torch.device("meta"):
        model = module.Qwen3ForCausalLM(config)
    rest = sum(p.numel() for p in model.parameters()) - config.vocab_size * config.hidden_size
    assert 2_000_000 < rest < 2_100_000


# Gates


FIGURES = WordFigures(0.45, {2: 0.5, 3: 0.4}, 0.96, 0.94, 0.3, 0.05, 0.02, 0.3)


def test_a_gate_asks_for_a_student_that_can_learn_and_a_teacher_that_reads():
    assert FIGURES.passed(WordAcceptance())
    for worse in (
        {"student_accuracy": 0.19},
        {"student_accuracy": 0.61},
        {"teacher_accuracy": 0.89},
        {"teacher_accuracy_withheld": 0.89},
        {"kl_after_mistake": 0.5},
    ):
        assert not replace(FIGURES, **worse).passed(WordAcceptance())


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_model_that_comes_with_the_code_passed_the_gates_of_its_command(name):
    folder = Path(model_source(f"words:{name}"))
    record = json.loads((folder / "gates.json").read_text("utf-8"))
    assert WordFigures(**record["figures"]).passed(WordRecipe().acceptance)
    asked = json.loads(json.dumps(words_record(WordRecipe(), record["seed"], WordFigures(**record["figures"]))))
    assert asked == record
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 2_000_000


def test_the_first_mistake_ends_with_the_first_line_that_states_another_result():
    pieces = ["So 4*34", "=136", " pens.\n", "136-28=", "1", "18", " pens", ".\n", "\\boxed{118}"]
    assert first_mistake(pieces, [136, 108]) == 8
    assert first_mistake(pieces, [135, 108]) == 3
    assert first_mistake(pieces, [136, 118]) == len(pieces)


def test_an_untrained_model_fails_its_gates_and_its_figures_are_told(taught, tmp_path, monkeypatch):
    problems = [one.problem for one in PROBLEMS]
    reader = reader_of(pretrain_words(0, TINY, taught).float(), taught.tokenizer, CONFIG)
    figures = measure_words(reader, problems, problems)
    assert (figures.student_accuracy, figures.teacher_accuracy, figures.student_accuracy_by_lines) == (0, 0, {2: 0})
    assert figures.kl_before_mistake > 0
    monkeypatch.setattr(module, "acceptance_problems", lambda *_: (problems, problems))
    monkeypatch.setattr(module, "teaching", lambda *_: taught)
    with pytest.raises(TrainingError, match=r"2 attempts(.|\n)*seed 5(.|\n)*seed 6"):
        pretrain_words_command(5, 2, tmp_path, recipe=TINY)


def test_the_command_writes_a_folder_that_a_run_can_load(taught, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "acceptance_problems", lambda *_: ((), ()))
    monkeypatch.setattr(module, "teaching", lambda *_: taught)
    monkeypatch.setattr(module, "measure_words", lambda *_: FIGURES)
    record = pretrain_words_command(3, 1, tmp_path, recipe=TINY)
    assert json.loads((tmp_path / "gates.json").read_text())["seed"] == record["seed"] == 3
    assert record["command"] == "atesd world pretrain words --seed 3 --attempts 1"
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, pretrain_words(3, TINY, taught).lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == taught.tokenizer.get_vocab()


def test_without_reasoning_gym_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    from atesd.data import word_problems

    word_problems._generators.cache_clear()
    with pytest.raises(DataError, match=r'reasoning_gym; install it with: pip install "atesd\[gsm\]"'):
        template_row(6, 0, 1)
    result = CliRunner().invoke(app, ["world", "pretrain", "words"])
    assert isinstance(result.exception, DataError)
    word_problems._generators.cache_clear()


# What the generator gives


@pytest.mark.usefixtures("gym")
def test_the_written_rule_takes_these_templates():
    assert short_templates() == SHORT
    assert set(TEMPLATES["short"]) | set(HELD_OUT) == set(SHORT)
    assert not set(TEMPLATES["short"]) & set(HELD_OUT)


@pytest.mark.usefixtures("gym")
def test_a_row_is_a_function_of_template_seed_and_number():
    assert template_row(6, 1, 5) == template_row(6, 1, 5)
    assert len({template_row(6, seed, number).values["problem"] for seed in (1, 2) for number in (5, 6)}) == 4


@pytest.mark.usefixtures("gym")
@pytest.mark.parametrize("templates", ["short", "short-held-out"])
def test_a_run_gets_plain_problems_of_its_templates(templates):
    config = DataConfig(source="gsm_symbolic", templates=templates, train_size=30, validation_size=5, segmenter="line")
    sets = load_problems(config.model_copy(update={"probe_size": 2, "test_size": 5}))
    assert [len(some) for some in (sets.train, sets.validation, sets.test)] == [30, 5, 5]
    for problem in sets.train:
        steps = steps_of("".join(problem.segments))
        assert steps is not None
        assert str(steps[-1].result) == problem.answer
        assert len(problem.segments) == problem.difficulty == len(steps)
        assert split_of(problem.text) == "train"


@pytest.mark.usefixtures("gym")
def test_the_models_problems_are_train_problems_with_links_to_their_results():
    problems = module.word_problem_pool(0, 20, TEMPLATES["short"])
    assert {problem.template for problem in problems} == set(TEMPLATES["short"])
    for problem in problems:
        assert isinstance(problem, WordProblem)
        assert split_of(problem.problem.text) == "train"
        assert any(link is not None for links in problem.links[1:] for link in links)
    row = template_row(6, 0, 1)
    assert plain_steps(row) is not None
