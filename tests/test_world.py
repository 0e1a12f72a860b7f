"""The embedded world: problems, leaping references, messages of fixed length, pretraining texts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from atesd.config import DataConfig, ViewsConfig
from atesd.data.ablations import ablated
from atesd.data.answers import last_boxed
from atesd.data.splits import fingerprint, split_of
from atesd.errors import DataError
from atesd.maths.keyed import generator
from atesd.records import Problem
from atesd.world.problems import (
    BOXED,
    COMPLETION_WORDS,
    DIGITS,
    END,
    MESSAGE_WORDS,
    PAD,
    SEPARATOR,
    SKIP,
    VOCABULARY,
    Chain,
    WorldRenderer,
    elided_steps,
    known_facts,
    segments_of,
    world_problem,
    world_problems,
)
from atesd.world.texts import Mixture, draw_texts, training_chains

SMALL = DataConfig(train_size=200, validation_size=50, probe_size=20, test_size=100)
clauses = st.lists(st.tuples(st.sampled_from("+-"), st.integers(1, 9)), min_size=2, max_size=6)
chains = st.builds(lambda start, parts: Chain(start, tuple(parts)), st.integers(0, 9), clauses)


def small(**changes: object) -> DataConfig:
    return SMALL.model_copy(update=changes)


def texts_of(problems: tuple[Problem, ...]) -> list[str]:
    return [problem.text for problem in problems]


def leaps(problem: Problem) -> bool:
    return SKIP in problem.reference.split()


def test_a_chain_reads_and_counts_as_by_hand():
    # 4 + 3 = 7; 7 - 9 = -2 = 8 mod 10
    chain = Chain(4, (("+", 3), ("-", 9)))
    assert (chain.text, chain.values) == ("4 a + 3 b - 9", (7, 8))
    assert world_problem(chain).reference == "a 7 ; b 8 ; \\boxed{8}"


def test_a_leap_is_one_segment_with_the_value_that_folds_it():
    assert segments_of((1, 2, 3, 4), elided=(2,)) == ("a 1 ; ", "b 2 ; ", "c ~ ; d 4 ; ")


@given(chains, st.floats(0, 1))
def test_references_end_in_the_true_answer_whether_or_not_they_leap(chain, share):
    problem = world_problem(chain, elided_steps(chain, small(leap_share=share)))
    total = chain.start + sum(x if op == "+" else -x for op, x in chain.clauses)
    assert last_boxed(problem.reference) == problem.answer == str(total % 10)
    assert problem.difficulty == len(chain.clauses)


@given(chains, st.floats(0, 1))
def test_leaps_anywhere_never_elide_the_last_step_nor_two_neighbours(chain, probability):
    elided = elided_steps(chain, small(leap_probability=probability))
    assert len(chain.clauses) - 1 not in elided
    assert all(later - earlier > 1 for earlier, later in pairwise(elided))


@given(chains, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_share_leaps_on_a_superset_of_the_problems(chain, one, other):
    low, high = sorted((one, other))
    if elided_steps(chain, small(leap_share=low)):
        assert elided_steps(chain, small(leap_share=high))


def test_late_leaps_follow_the_table_of_the_design():
    # 2: none; 3: 1 detailed + 1 fold; 4: 2 + 1; 5: 3 + 1; 6: 2 detailed + 2 folds
    words: dict[int, set[tuple[int, ...]]] = {n: set() for n in range(2, 7)}
    for problem in world_problems(small(leap_share=1.0)).train:
        words[problem.difficulty].add(tuple(len(segment.split()) // 3 for segment in problem.segments))
    assert words == {2: {(1, 1)}, 3: {(1, 2)}, 4: {(1, 1, 2)}, 5: {(1, 1, 1, 2)}, 6: {(1, 1, 2, 2)}}


def test_the_share_of_leaping_references_is_the_dial():
    problems = world_problems(DataConfig(train_size=2000, leap_share=0.5)).train
    able = [problem for problem in problems if problem.difficulty > 2]
    # 1600 draws at 0.5: standard error 0.0125
    assert np.mean([leaps(problem) for problem in able]) == pytest.approx(0.5, abs=0.05)
    assert not any(leaps(problem) for problem in world_problems(SMALL).train)


def test_no_problem_is_in_two_splits_even_across_seeds():
    sets = [world_problems(DataConfig(seed=seed, train_size=1500)) for seed in range(3)]
    for name in ("train", "validation", "probe", "test"):
        drawn = [text for one in sets for text in texts_of(getattr(one, name))]
        assert {split_of(text) for text in drawn} == {name}


def test_problems_of_a_split_are_distinct_and_balanced_over_difficulty():
    test = world_problems(SMALL).test
    assert len(set(texts_of(test))) == len(test) == 100
    assert [sum(p.difficulty == n for p in test) for n in range(2, 7)] == [20] * 5


def test_a_larger_split_begins_with_the_smaller_one():
    assert world_problems(small(train_size=300)).train[:200] == world_problems(SMALL).train


def test_the_leap_share_changes_references_and_no_problem():
    plain, leaping = world_problems(SMALL), world_problems(small(leap_share=1.0))
    assert texts_of(plain.test) == texts_of(leaping.test)
    assert plain.fingerprint != leaping.fingerprint
    assert plain.fingerprint == fingerprint(plain.train, plain.validation, plain.probe, plain.test)


def test_max_difficulty_limits_the_clauses():
    assert {p.difficulty for p in world_problems(small(max_difficulty=3)).train} == {2, 3}


def test_min_difficulty_limits_the_clauses_from_below():
    assert {p.difficulty for p in world_problems(small(min_difficulty=5)).train} == {5, 6}


def facts_of(problem: Problem) -> list[tuple[int, int, int]]:
    """The facts on a problem's true path, read off its text: (value before, operator, operand)."""
    value, facts, words = int(problem.text[0]), [], problem.text.split()
    for operator, operand in zip(words[2::3], map(int, words[3::3]), strict=True):
        facts.append((value, "+-".index(operator), operand))
        value = (value + (operand if operator == "+" else -operand)) % 10
    return facts


@pytest.mark.parametrize("unknown", [0, 1, 4])
def test_every_problem_needs_as_many_unknown_facts_as_asked_for(unknown):
    known = known_facts()
    sets = world_problems(small(min_difficulty=5, unknown_facts=unknown))
    for problem in (*sets.train, *sets.test):
        assert sum(not known[fact] for fact in facts_of(problem)) == unknown


def test_unknown_facts_come_at_every_step_alike():
    known = known_facts()
    problems = world_problems(small(min_difficulty=6, unknown_facts=2, train_size=600)).train
    at_step = np.mean([[not known[fact] for fact in facts_of(problem)] for problem in problems], axis=0)
    # 2 of 6 steps: 1/3 each, standard error 0.019
    assert at_step == pytest.approx(np.full(6, 1 / 3), abs=0.08)


def test_every_value_has_known_and_unknown_clauses_to_draw_from():
    unknown = (~known_facts()[:, :, 1:]).sum(axis=(1, 2))
    assert (unknown > 0).all()
    assert (unknown < 18).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_difficulty": 5, "max_difficulty": 4}, "min_difficulty 5 is above max_difficulty 4"),
        ({"unknown_facts": 3}, "unknown_facts 3 is more than the 2 clauses of the shortest problem"),
    ],
)
def test_problems_that_cannot_exist_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        DataConfig(**settings)


def test_more_problems_than_the_world_holds_are_refused_by_name():
    # 10 * 18^2 = 3240 problems of 2 clauses, of which 3 % are probes: about 97
    with pytest.raises(DataError, match=r"data\.probe_size.*2 clauses, 200 were asked for"):
        world_problems(small(max_difficulty=2, probe_size=200))


def test_a_world_without_end_is_refused():
    with pytest.raises(DataError, match=r"data\.train_size"):
        world_problems(small(train_size=None))


@given(chains, st.integers(0, 6), st.booleans(), st.sampled_from(["keep", "withhold", "only"]))
def test_every_message_has_the_same_length(chain, shown, whole, answer):
    problem, renderer = world_problem(chain), WorldRenderer(ViewsConfig(answer=answer))
    for message in (renderer.student(problem), renderer.teacher(problem, shown, whole)):
        words = message.split(" ")
        assert len(words) == MESSAGE_WORDS
        assert set(words) <= set(VOCABULARY)


@given(chains, st.integers(0, 6))
def test_the_teacher_sees_the_shown_segments_and_the_answer_and_nothing_else(chain, shown):
    problem = world_problem(chain, elided_steps(chain, small(leap_share=1.0)))
    message = WorldRenderer(ViewsConfig()).teacher(problem, shown, whole=False)
    before, after = message.split(" ref ")
    reference, answer = after.split(" ans ")
    assert before.rstrip("_ ") == problem.text
    assert reference.rstrip("_ ") == "".join(problem.segments[:shown]).rstrip()
    assert answer == f"{problem.closing} go"


def test_answer_policies_show_the_segments_the_answer_or_both():
    problem = world_problem(Chain(4, (("+", 3), ("-", 9))))
    shown = {a: WorldRenderer(ViewsConfig(answer=a)).teacher(problem, 2, True) for a in ("keep", "withhold", "only")}
    assert ["a 7 ; b 8 ;" in shown[a] for a in shown] == [True, True, False]
    assert ["\\boxed{8}" in shown[a] for a in shown] == [True, False, True]


def test_a_teacher_that_sees_nothing_reads_the_students_message():
    problem = world_problem(Chain(4, (("+", 3), ("-", 9))))
    renderer = WorldRenderer(ViewsConfig(answer="withhold"))
    assert renderer.teacher(problem, 0, whole=False) == renderer.student(problem)


def test_the_segments_of_a_longer_problem_and_unknown_words_fit_the_same_slots():
    long = world_problem(Chain(1, tuple([("+", 1)] * 6)))
    short = world_problem(Chain(4, (("+", 3), ("-", 9))))
    foreign = Problem("x", short.text, long.segments + long.segments, long.closing, long.answer)
    filler = Problem("x", short.text, ("... ... ... ", "......"), short.closing, short.answer)
    renderer = WorldRenderer(ViewsConfig())
    assert "a 2 ; b 3 ; c 4 ; d 5 ; e 6 ; f 7 ; ans" in renderer.teacher(foreign, 12, True)
    assert renderer.teacher(filler, 2, True) == renderer.teacher(short, 0, False)


def test_the_filler_control_shows_neither_reasoning_nor_answer():
    problem = world_problem(Chain(4, (("+", 3), ("-", 9))))
    renderer = WorldRenderer(ViewsConfig())
    shown = ablated(problem, "filler", (), seed=0)
    assert renderer.teacher(shown, 2, True) == renderer.student(problem)


def test_a_fifth_of_the_facts_is_unknown_to_the_student():
    known = known_facts()
    assert known[:, :, 1:].size == 180
    assert (~known).sum() == 36
    assert ((~known[:, :, 1:]).sum(axis=0) == 2).all()


def written(**mixture: float) -> tuple[list[tuple[list[str], list[str], list[bool]]], np.ndarray]:
    """1000 texts as (message words, completion words without pads, targets), and the known facts."""
    known = known_facts()
    texts = draw_texts(generator(1, "test", "texts"), 1000, 6, Mixture(**mixture), known)
    rows = []
    for ids, targets in zip(texts.ids, texts.targets, strict=True):
        words = [VOCABULARY[i] for i in ids]
        completion = [word for word in words[MESSAGE_WORDS:] if word != PAD]
        assert not targets[len(completion) :].any()
        rows.append((words[:MESSAGE_WORDS], completion, targets[: len(completion)].tolist()))
    return rows, known


def chain_of(message: list[str]) -> Chain:
    words = " ".join(message).split(" ref ")[0].rstrip("_ ").split()
    return Chain(int(words[0]), tuple(zip(words[2::3], map(int, words[3::3]), strict=True)))


def fact(known: np.ndarray, value: int, clause: tuple[str, int]) -> tuple[bool, int]:
    """Whether the student can know the result, and the result."""
    operator, operand = clause
    sign = 1 if operator == "+" else -1
    return bool(known[value, "+-".index(operator), operand]), (value + sign * operand) % 10


def test_pretraining_messages_are_laid_out_as_the_renderer_does():
    rows, _ = written()
    renderer = WorldRenderer(ViewsConfig())
    for message, _, _ in rows:
        problem = world_problem(chain_of(message))
        reference = " ".join(message).split(" ref ")[1].split(" ans ")[0].rstrip("_ ").split()
        elided = [place // 3 for place, word in enumerate(reference) if word == SKIP]
        if message[-2] == "_":
            assert " ".join(message) == renderer.student(problem)
        else:
            problem = world_problem(chain_of(message), elided)
            shown = len([s for s in problem.segments if "".join(problem.segments).index(s) < len(" ".join(reference))])
            assert " ".join(message) == renderer.teacher(problem, shown, whole=False)


def test_pretraining_problems_come_from_the_train_split_alone():
    rows, _ = written()
    assert {split_of(chain_of(message).text) for message, _, _ in rows} == {"train"}


def test_without_a_reference_known_facts_are_right_and_unknown_ones_are_guessed():
    rows, known = written(reference=0.0, own_leaps=0.0)
    guesses = []
    for message, completion, targets in rows:
        chain = chain_of(message)
        state = chain.start
        for clause, word in zip(chain.clauses, completion[1::3], strict=False):
            sure, result = fact(known, state, clause)
            assert not sure or int(word) == result
            guesses += [] if sure else [int(word) == result]
            state = int(word)
        assert completion[-2:] == [BOXED[state], END]
        assert all(targets)
    # about 800 guesses, right 1 time in 10: standard error 0.011
    assert np.mean(guesses) == pytest.approx(0.1, abs=0.04)


def test_where_only_the_answer_helps_the_last_unknown_step_takes_it():
    rows, known = written(reference=1.0, off_track=0.0, own_leaps=0.0)
    taken = 0
    for message, completion, _ in rows:
        if "ref _" in " ".join(message):
            before = int(completion[-7])  # a 7 ; b 8 ; \boxed{8} <end>: the last value but one
            sure, result = fact(known, before, chain_of(message).clauses[-1])
            assert completion[-2] == (BOXED[result] if sure else message[-2])
            taken += not sure
    assert taken > 20


def test_on_track_texts_copy_what_is_revealed():
    rows, _ = written(reference=1.0, off_track=0.0, written_out=0.0)
    for message, completion, _ in rows:
        revealed = " ".join(message).split(" ref ")[1].split(" ans ")[0].rstrip("_ ")
        assert " ".join(completion).startswith(revealed)


def test_every_wrong_value_on_a_revealed_step_is_no_target_and_the_chain_goes_on_from_it():
    rows, known = written(reference=1.0, off_track=1.0, late_leaps=0.0, leaps_anywhere=0.0, own_leaps=0.0)
    masked = 0
    for message, completion, targets in rows:
        chain = chain_of(message)
        states = [chain.start, *map(int, completion[1:-2:3])]
        masked += targets.count(False)
        for step, clause in enumerate(chain.clauses):
            sure, result = fact(known, states[step], clause)
            if targets[1 + 3 * step] and sure:
                assert states[step + 1] == result
        assert completion[-2] == BOXED[states[-1]]
    assert masked == len(rows)


def test_a_revealed_leap_is_followed_or_written_out_without_a_target():
    for share, seen in ((0.0, True), (1.0, False)):
        rows, _ = written(
            reference=1.0, off_track=0.0, late_leaps=1.0, leaps_anywhere=0.0, own_leaps=0.0, written_out=share
        )
        leaping = [row for row in rows if SKIP in row[0]]
        assert len(leaping) > 100
        for message, completion, targets in leaping:
            places = [i for i, word in enumerate(message[message.index("ref") + 1 :]) if word == SKIP]
            assert all((completion[place] == SKIP) == seen == targets[place] for place in places)


def test_completions_are_steps_a_boxed_answer_and_an_end():
    rows, _ = written()
    for message, completion, _ in rows:
        steps = len(chain_of(message).clauses)
        assert len(completion) == 3 * steps + 2 <= COMPLETION_WORDS
        assert completion[0 : 3 * steps : 3] == list("abcdef"[:steps])
        assert set(completion[2 : 3 * steps : 3]) == {SEPARATOR}
        assert set(completion[1 : 3 * steps : 3]) <= {*DIGITS, SKIP}


def test_texts_are_a_function_of_their_generator():
    draws = [draw_texts(generator(s, "test"), 8, 4, Mixture(), known_facts()).ids for s in (0, 0, 1)]
    assert (draws[0] == draws[1]).all()
    assert not (draws[0] == draws[2]).all()
    assert training_chains(generator(0, "test"), 50, 3).clauses.max() == 3
