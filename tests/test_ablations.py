"""Reference ablations: another reference, a wrong answer, or filler; keyed, never the true thing."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.config import ViewsConfig
from atesd.data.ablations import ablated
from atesd.data.answers import last_boxed
from atesd.data.numbers import another_number, plain_value
from atesd.data.spelling import normalise
from atesd.data.views import TextRenderer
from atesd.errors import DataError
from atesd.maths.keyed import generator
from atesd.records import Problem
from atesd.world.problems import VOCABULARY, draw_chain, world_problem


def problem(name: str, answer: str = "12", difficulty: int = 0) -> Problem:
    return Problem(
        name, f"text {name}", (f"{name} one\n", f"{name}  two\n"), f"so \\boxed{{{answer}}}.", answer, difficulty
    )


A, B, C, D = problem("a"), problem("b", "34"), problem("c", "56", 1), problem("d", "x+1")
numbers = (
    st.integers(-(10**9), 10**9).map(str)
    | st.decimals(-999, 999, places=2).map(str)
    | st.integers(0, 10**9).map("{:,}".format)
)


def test_shuffled_shows_the_whole_reference_and_answer_of_another_problem():
    assert ablated(A, "shuffled", [A, B], seed=0) == replace(B, id="a", text="text a")


def test_shuffled_never_shows_the_problem_its_own_reference_nor_that_of_a_duplicate():
    twin = replace(A, id="twin")
    assert all(ablated(A, "shuffled", [A, twin, B, D], seed).segments != A.segments for seed in range(50))


def test_shuffled_prefers_the_same_difficulty_and_does_without_it():
    others = [A, B, C, problem("e", "78", 1)]
    assert {ablated(C, "shuffled", others, seed).answer for seed in range(20)} == {"78"}
    assert ablated(C, "shuffled", [A, C], seed=0).segments == A.segments


def test_every_other_problem_has_its_turn():
    others = [problem(name) for name in "abcdef"]
    firsts = [ablated(A, "shuffled", others, seed).segments[0][0] for seed in range(300)]
    assert set(firsts) == set("bcdef")
    assert min(firsts.count(name) for name in "bcdef") > 30  # 60 expected, standard deviation 7


@pytest.mark.parametrize("control", ["shuffled", "wrong_answer"])
def test_a_control_is_a_function_of_seed_and_problem(control):
    others = [problem(name, str(i)) for i, name in enumerate("abcdefghij")]
    once = [ablated(p, control, others, seed=1) for p in others]
    assert once == [ablated(p, control, others, seed=1) for p in reversed(others)][::-1]
    assert once != [ablated(p, control, others, seed=2) for p in others]


def test_shuffled_alone_in_the_world_is_refused():
    with pytest.raises(DataError, match="shuffled needs a problem besides 'a'"):
        ablated(A, "shuffled", [A], seed=0)


@given(answer=numbers, seed=st.integers(0, 100))
def test_a_wrong_number_looks_like_the_true_one(answer, seed):
    true = problem("a", answer)
    seen = ablated(true, "wrong_answer", [], seed)
    assert plain_value(seen.answer) != plain_value(answer)
    assert last_boxed(seen.closing) == seen.answer
    assert seen.segments == true.segments
    assert len(seen.answer) == len(answer) or abs(plain_value(answer)) < 1  # -0.00 has fewer digits than it writes
    assert [c for c in seen.answer if c in "-,."] == [c for c in answer if c in "-,."]


def test_every_other_digit_of_the_world_is_drawn_and_no_other_word():
    drawn = {another_number("7", generator(seed, "test")) for seed in range(400)}
    assert drawn == set("012345689")


def test_a_wrong_number_is_near():
    values = [plain_value(another_number("1,000", generator(seed, "test"))) for seed in range(200)]
    assert all(value is not None and 1000 < value <= 1100 for value in values)  # four digits, a tenth away at most


def test_an_answer_that_is_no_number_becomes_another_problems():
    answers = {ablated(D, "wrong_answer", [A, B, D, replace(A, answer="x + 1")], seed).answer for seed in range(30)}
    assert answers == {"12", "34"}


def test_the_same_value_written_otherwise_is_no_wrong_answer():
    half = problem("h", "\\frac{1}{2}")
    with pytest.raises(DataError, match=r"besides '\\frac\{1\}\{2\}'"):
        ablated(half, "wrong_answer", [problem("i", "0.5"), problem("j", "1/2")], seed=0)


@pytest.mark.parametrize("closing", ["so \\boxed{12}.", "\\boxed{1} or \\fbox{ 12 }!", "\\boxed 12", "12 it is"])
def test_only_the_last_box_of_the_closing_changes(closing):
    seen = ablated(replace(A, closing=closing), "wrong_answer", [], seed=0)
    if last_boxed(closing) is None:
        assert seen.closing == closing
    else:
        assert last_boxed(seen.closing) == seen.answer
        assert seen.closing.startswith(closing[: closing.rindex("12")].rstrip(" {"))


@given(text=st.text(max_size=60))
def test_filler_has_the_words_and_the_white_space_of_the_reference_and_nothing_else(text):
    seen = ablated(replace(A, segments=(text, "b\n")), "filler", [], seed=0, filler="_")
    filled = seen.segments[0]
    assert filled.split() == ["_"] * len(text.split())
    assert "".join(filled.split("_")) == "".join(c for c in text if c.isspace())
    assert (seen.closing, seen.answer) == ("_ _", "_")


def test_no_view_of_filler_holds_the_reasoning_or_the_answer():
    seen = ablated(A, "filler", [], seed=0)
    renderer = TextRenderer(ViewsConfig())
    for text in (renderer.teacher(seen, 2, True), renderer.teacher(seen, 1, False)):
        assert "one" not in text
        assert "12" not in text
    assert "<<<\n... ...\n...  ...\n... ...\n>>>" in renderer.teacher(seen, 2, True)


def test_controls_of_the_world_speak_its_language():
    chains = [draw_chain(generator(0, "test", i), 4) for i in range(20)]
    problems = [world_problem(chain) for chain in chains]
    for control in ("shuffled", "wrong_answer", "filler"):
        seen = ablated(problems[0], control, problems, seed=0, filler="_")
        assert set(seen.reference.split()) <= set(VOCABULARY)
        assert seen.text == problems[0].text


@pytest.mark.parametrize("control", ["off", "none", "shuffle"])
def test_another_control_is_refused_by_name(control):
    with pytest.raises(ValueError, match=f"'{control}'; allowed: shuffled, wrong_answer, filler"):
        ablated(A, control, [B], seed=0)


@pytest.mark.parametrize("filler", ["", "a b"])
def test_filler_is_one_word(filler):
    with pytest.raises(ValueError, match="one word"):
        ablated(A, "filler", [], seed=0, filler=filler)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("12", 12),
        ("-3.50", Fraction(-7, 2)),
        ("1,234", 1234),
        ("3/4", Fraction(3, 4)),
        ("-\\frac{3}{6}", Fraction(-1, 2)),
    ],
)
def test_plain_numbers_have_an_exact_value(answer, value):
    assert plain_value(answer) == value


@pytest.mark.parametrize("answer", ["", "x", "1,23", "1/0", "2\\sqrt{3}", "1e5", "٣", "9" * 400])
def test_other_answers_have_none(answer):
    assert plain_value(answer) is None
    assert answer.isdigit() or another_number(answer, generator(0, "test")) is None


def test_normalised_answers_differ_from_the_true_one():
    assert normalise(ablated(D, "wrong_answer", [A, D], seed=0).answer) != normalise(D.answer)
