"""Evaluation rows, loops and probes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from atesd.config import DataConfig, ModelConfig, ViewsConfig
from atesd.data.answers import ExactChecker
from atesd.engine.factory import engine_for
from atesd.engine.interface import SamplingParams
from atesd.errors import DataError
from atesd.evaluate.benchmark import Graded, evaluate_problems, is_looping, summarise
from atesd.evaluate.probes import probe_nll, probe_success
from atesd.maths.keyed import uniforms
from atesd.models.load import LoadedModel, load_model
from atesd.models.prompts import PromptEncoder
from atesd.models.score import Scorer
from atesd.records import Problem, Rollout
from atesd.world.problems import WorldRenderer, world_problems

PARAMS = SamplingParams(temperature=1.0, top_p=0.9, top_k=0, min_p=0.0, completion_tokens=40)
RENDERER = SimpleNamespace(student=lambda problem: problem.text)
ENCODER = SimpleNamespace(  # a token is a character
    students=lambda messages: [tuple(map(ord, message)) for message in messages],
    completion=lambda text: (*map(ord, text), 0),
    decode=lambda ids: "".join(map(chr, ids)),
)


def problem(n: int) -> Problem:
    return Problem(
        id=f"p{n}", text=f"{n}=", segments=("so ",), closing=rf"\boxed{{{n}}}", answer=str(n), difficulty=n % 2
    )


PROBLEMS = [problem(n) for n in range(20)]


@dataclass
class Guessing:
    """An engine whose student knows a problem's answer where the first uniform of its key is below `skill`."""

    skill: float
    seen: list[float] = field(default_factory=list)

    def complete(self, requests, params):
        rollouts = []
        for r in requests:
            draw = float(uniforms(params.completion_tokens, *r.key)[0])
            known = "".join(map(chr, r.prompt_ids)).rstrip("=") if draw < self.skill else "-1"
            ids = tuple(map(ord, rf"\boxed{{{known}}}"))
            rollouts.append(Rollout(r.problem_id, r.sample, r.prompt_ids, ids, (0.0,) * len(ids), truncated=False))
            self.seen.append(draw)
        return rollouts

    def publish(self, update): ...

    def close(self): ...


def evaluate(engine=None, problems=PROBLEMS, checker=ExactChecker(), **changes):  # noqa: B008
    arguments = {"samples": 2, "seed": 0, "split": "test", "update": 0, **changes}
    return evaluate_problems(
        engine, problems, encoder=ENCODER, renderer=RENDERER, checker=checker, params=PARAMS, **arguments
    )


def graded(problem_id: str, *verdicts: str, difficulty: int = 2, tokens: int = 10) -> list[Graded]:
    return [Graded(problem_id, difficulty, i, v, tokens, i > 0, looping=False) for i, v in enumerate(verdicts)]


ROWS = [
    *graded("a", "correct", "correct"),
    *graded("b", "correct", "timeout"),
    *graded("c", "wrong", "unparseable", difficulty=4, tokens=16),
]


def test_a_row_says_what_was_measured_and_how():
    # By hand: correct 2, 1, 0 of 2: average (1 + 1/2 + 0) / 3, any correct 2/3; difficulty 2 has a and b: 3/4.
    row = summarise(ROWS, split="test", update=7, sampler={"temperature": 0.5}, seed=3)
    assert [row[key] for key in ("update", "split", "problems", "samples")] == [7, "test", 3, 2]
    assert row["average"]["value"] == pytest.approx(1 / 2)
    assert row["pass_at_k"]["value"] == pytest.approx(2 / 3)
    assert list(row["by_difficulty"]) == ["2", "4"]
    assert row["by_difficulty"]["2"]["average"]["value"] == pytest.approx(3 / 4)
    assert [level["problems"] for level in row["by_difficulty"].values()] == [2, 1]
    assert row["verdicts"] == {"correct": 3, "wrong": 1, "unparseable": 1, "timeout": 1}
    assert (row["mean_tokens"], row["truncated_share"], row["loop_share"]) == (12.0, 0.5, 0.0)
    assert row["sampler"] == {"temperature": 0.5, "seed": 3}
    assert row["correct_counts"] == {"a": 2, "b": 1, "c": 0}


def test_a_row_is_plain_json_with_every_verdict_even_at_zero():
    row = summarise(graded("a", "correct"), split="test", update=0, sampler={}, seed=0)
    assert json.loads(json.dumps(row)) == row
    assert row["verdicts"] == {"correct": 1, "wrong": 0, "unparseable": 0, "timeout": 0}


def test_intervals_hold_the_value_and_difficulties_have_their_own():
    rows = [row for n in range(30) for row in graded(str(n), *["correct"] * (n % 3), *["wrong"] * (2 - n % 3))]
    row = summarise(rows, split="test", update=0, sampler={}, seed=0)
    for interval in (row["average"], row["pass_at_k"], row["by_difficulty"]["2"]["average"]):
        assert 0 < interval["low"] < interval["value"] < interval["high"] < 1


@pytest.mark.parametrize("rows", [[], [*ROWS, *graded("d", "wrong")]])
def test_uneven_samples_are_refused(rows):
    with pytest.raises(ValueError, match="same number of samples"):
        summarise(rows, split="test", update=0, sampler={}, seed=0)


def test_every_evaluation_of_a_run_meets_the_same_noise():
    seen: list[list[float]] = []
    for arguments in ({}, {"update": 50}, {"seed": 1}, {"split": "validation"}):
        engine = Guessing(0.5)
        evaluate(engine, **arguments)
        seen.append(engine.seen)
    assert seen[0] == seen[1]
    assert len({tuple(draws) for draws in seen}) == 3  # another seed or split is other noise
    assert len(set(seen[0])) == len(PROBLEMS) * 2  # and so is another problem or sample


def test_fewer_samples_are_the_first_of_more():
    engine = Guessing(0.5)
    evaluate(engine, samples=3)
    evaluate(engine, samples=1)
    assert engine.seen[60:] == engine.seen[0:60:3]


def test_a_better_student_is_paired_with_a_worse_one():
    counts = [evaluate(Guessing(skill))["correct_counts"] for skill in (0.3, 0.6)]
    assert all(counts[0][name] <= counts[1][name] for name in counts[0])
    assert 0 < sum(counts[0].values()) < sum(counts[1].values()) < 40


def test_the_sampling_parameters_are_recorded_as_they_were():
    row = evaluate(Guessing(1.0), seed=5)
    settings = {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "completion_tokens": 40, "seed": 5}
    assert row["sampler"] == settings
    assert row["average"] == {"value": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize(
    ("problems", "checker", "setting"), [([], ExactChecker(), "data.test_size"), (PROBLEMS, None, "data.checker")]
)
def test_an_evaluation_of_nothing_names_the_setting(problems, checker, setting):
    with pytest.raises(DataError, match=setting):
        evaluate(problems=problems, checker=checker)


@pytest.mark.parametrize(
    ("ids", "looping"),
    [
        ([], False),
        (range(500), False),
        ([7] * 10, False),  # the 8-gram of sevens occurs 3 times
        ([7] * 11, True),  # 4 times
        ([*range(100), *[1, 2, 3] * 6, *range(100, 200)], True),  # a loop that was left again
        ([*range(8), 50, *range(8), 51, *range(8), 52, *range(8)], True),  # the same sentence over and over
        ([*range(7), 50, *range(7), 51, *range(7), 52, *range(7)], False),  # too short a phrase
    ],
)
def test_a_loop_is_eight_tokens_four_times(ids, looping):
    assert is_looping(ids) is looping


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 4), st.integers(1, 5))
def test_loops_are_found_as_by_comparing_every_window_with_every_other(ids, ngram, repeats):
    windows = [ids[i : i + ngram] for i in range(max(0, len(ids) - ngram + 1))]
    assert is_looping(ids, ngram, repeats) == any(windows.count(window) >= repeats for window in windows)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.lists(st.integers(0, 9), max_size=20))
def test_any_period_is_found_once_it_has_gone_round_often_enough(block, before):
    tail = (block * 44)[: 8 + 3 * len(block)]
    assert is_looping([*before, *tail])


def success(engine, seed=0):
    return probe_success(
        engine, PROBLEMS, encoder=ENCODER, renderer=RENDERER, checker=ExactChecker(), params=PARAMS, seed=seed
    )


def test_probe_success_moves_only_with_the_student_or_the_seed():
    engine = Guessing(0.5)
    first, second = success(engine), success(engine)
    assert first == second == sum(draw < 0.5 for draw in engine.seen[:20]) / 20
    success(engine, seed=1)
    assert engine.seen[:20] == engine.seen[20:40] != engine.seen[40:]


def test_probe_and_evaluation_have_noise_of_their_own():
    probe, test = Guessing(0.5), Guessing(0.5)
    success(probe)
    evaluate(test, split="probe")
    assert not set(probe.seen) & set(test.seen)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_probe_nll_is_the_models_own_loss_on_the_references_without_a_reference_in_context(micro_batch_size):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    expected = []
    for one in PROBLEMS[:7]:
        context, completion = list(map(ord, one.text)), [*map(ord, one.reference), 0]
        ids = torch.tensor([context + completion])
        labels = torch.tensor([[-100] * len(context) + completion])
        expected.append(model(input_ids=ids, labels=labels).loss.item())
    loaded = LoadedModel(model, None, torch.device("cpu"), frozenset({0}), 0)
    found = probe_nll(
        Scorer(loaded), PROBLEMS[:7], encoder=ENCODER, renderer=RENDERER, micro_batch_size=micro_batch_size
    )
    assert found == pytest.approx(sum(expected) / 7, abs=1e-5)


@pytest.fixture(scope="module")
def world():
    """The packaged model on 30 problems of its world: called with changes, it evaluates and gives the row."""
    model = ModelConfig(path="world:a", device="cpu")
    loaded = load_model(model)
    encoder, renderer = PromptEncoder(loaded.tokenizer, model), WorldRenderer(ViewsConfig())
    problems = world_problems(DataConfig(train_size=1, test_size=30, validation_size=0)).test
    plain = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, completion_tokens=32)

    def evaluate(seed=0, samples=2, batch_size=64, **changes):
        engine = engine_for(loaded, "auto", batch_size)
        return evaluate_problems(
            engine, problems, encoder=encoder, renderer=renderer, checker=ExactChecker(),
            params=replace(plain, **changes), samples=samples, seed=seed, split="test", update=0,
        )  # fmt: skip

    return evaluate


def test_a_world_model_solves_some_problems_and_ends_what_it_writes(world):
    row = world()
    assert 0.1 < row["average"]["value"] < 0.9
    assert row["truncated_share"] == row["loop_share"] == 0
    assert sum(row["verdicts"].values()) == 60
    assert set(row["by_difficulty"]) == {"2", "3", "4", "5", "6"}


def test_neither_batches_nor_further_samples_change_what_is_measured(world):
    row = world()
    assert world(batch_size=7) == row
    more = world(samples=3)["correct_counts"]
    assert all(0 <= more[name] - count <= 1 for name, count in row["correct_counts"].items())
    assert world(seed=1)["correct_counts"] != row["correct_counts"]


def test_temperature_zero_is_greedy(world):
    greedy = world(temperature=0.0)
    assert set(greedy["correct_counts"].values()) == {0, 2}  # both samples are the same
    assert greedy["correct_counts"] == world(temperature=0.0, seed=1)["correct_counts"]
    assert greedy["correct_counts"] == world(temperature=1.0, top_k=1)["correct_counts"]
