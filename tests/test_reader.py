"""`atesd_lab.studies.reader`: what a model is taught, that it is learned, and the gate."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from atesd.config import load_config
from atesd.data.sources import load_problems
from atesd.errors import ConfigError
from atesd.models.load import load_model
from atesd.world.words.model import save_words_model, words_config, words_tokenizer
from atesd_lab.studies import reader
from atesd_lab.studies.reader import (
    Lessons,
    ReaderFigures,
    ReaderGate,
    desk_of,
    fresh_sums,
    main,
    measure_folder,
    run_reader,
    teach,
    with_a_slip,
)

FEW = ["data.train_size=40", "data.validation_size=3", "data.test_size=20", "data.probe_size=4"]
SMALL = Lessons(rows=16, batch_size=4, micro_batch_size=3, learning_rate=3e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one layer that knows the signs of sums."""
    tokenizer = words_tokenizer(load_problems(load_config(reader.RECIPE, FEW).data).train)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_words_model(Qwen3ForCausalLM(words_config(tokenizer, 64, 1)), tokenizer, path, {})
    return path


@pytest.fixture(scope="module")
def config(folder):
    return load_config(reader.RECIPE, [f"model.path={folder}", "model.lora=null", *FEW])


def test_a_slip_is_one_wrong_result_and_all_that_follows_is_right_given_it(config):
    for number, problem in enumerate(load_problems(config.data).train):
        text, (begin, end) = with_a_slip(np.random.default_rng(number), problem)
        *lines, box = text.splitlines()
        wrong, value = [], int(problem.reference.split()[0])
        for line in lines:
            left, sign, step, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", line).groups()
            assert int(left) == value  # what the line before states
            value = int(result)
            if value != int(left) + int(sign + step):
                wrong.append(result)
        assert box == f"\\boxed{{{value}}}"
        assert value != int(problem.answer)
        assert wrong == [text[begin:end]]


def test_a_row_teaches_the_whole_solution_but_the_wrong_result(config):
    loaded = load_model(config.model)
    desk = desk_of(loaded, config, Lessons(reference=1.0, off_track=1.0))
    student = replace(desk, lessons=Lessons(reference=0.0))
    for number, problem in enumerate(fresh_sums(config, SMALL)):
        ids, targets = student.row(np.random.default_rng(number), problem)
        context = student.encoder.student(student.keeping.student(problem))
        assert tuple(ids[: len(context)]) == context
        assert tuple(targets[len(context) - 1 :]) == student.encoder.completion(problem.reference)
        assert set(targets[: len(context) - 1]) == {-100}

        ids, targets = desk.row(np.random.default_rng(number), problem)
        begin = next(place for place, one in enumerate(targets) if one != -100)
        solution = [*ids[begin + 1 :], targets[-1]]
        hidden = [a for a, b in zip(solution, targets[begin:], strict=True) if b == -100]
        stated = re.findall(r"= (\d+)", loaded.tokenizer.decode(solution))
        assert loaded.tokenizer.decode(hidden).strip() in stated


def test_the_teachers_rows_show_the_answer_as_often_as_asked(config):
    loaded = load_model(config.model)
    problem = fresh_sums(config, SMALL)[0]
    for kept in (0.0, 1.0):
        desk = desk_of(loaded, config, Lessons(reference=1.0, kept=kept, whole=1.0, off_track=0.0))
        ids, targets = desk.row(np.random.default_rng(0), problem)
        context = loaded.tokenizer.decode(ids[: targets.index(next(t for t in targets if t != -100)) + 1])
        assert ("boxed" in context) == bool(kept)


def test_no_sum_is_taught_that_a_run_is_measured_on(config):
    # The seed that is taught, and many of both, so that without shares by text some would be the same.
    sizes = {"validation_size": 200, "test_size": 200, "probe_size": 100, "seed": Lessons().sums_seed}
    held = load_problems(config.data.model_copy(update=sizes))
    taught = {one.text for one in fresh_sums(config, Lessons(rows=600, most_operations=3))}
    assert len(taught) == 600
    assert taught.isdisjoint(one.text for some in (held.validation, held.test, held.probe) for one in some)


def test_teaching_lowers_the_loss_and_is_a_function_of_the_seed(config):
    problems = fresh_sums(config, replace(SMALL, rows=48))
    losses = []
    for seed in (0, 0, 1):
        loaded, found = load_model(config.model), []
        desk = desk_of(loaded, config, SMALL)
        teach(loaded, desk, problems, seed, lambda _, loss, found=found: found.append(loss))
        losses.append(found)
    assert losses[0] == losses[1] != losses[2]
    assert len(losses[0]) == 12
    assert losses[0][-1] < losses[0][0] - 0.5


@pytest.mark.parametrize(
    ("student", "withheld", "passed"),
    [(0.25, 0.85, True), (0.5, 1.0, True), (0.24, 1.0, False), (0.51, 1.0, False), (0.3, 0.84, False)],
)
def test_the_gate_asks_for_a_student_that_can_learn_and_a_teacher_that_reads(student, withheld, passed):
    assert ReaderFigures(128, student, 1.0, withheld).passed(ReaderGate()) is passed


@pytest.mark.parametrize(
    ("measured", "passed"),
    [
        ([(0.6, 0.9), (0.4, 0.9)], 4),
        ([(0.3, 0.9)], 3),
        ([(0.3, 0.8)], None),  # a teacher that cannot read: harder sums do not help
        ([(0.1, 0.9)], None),
        ([(0.9, 0.9), (0.8, 0.9), (0.7, 0.9)], None),
    ],
)
def test_harder_sums_are_for_a_student_that_is_too_good(folder, monkeypatch, measured, passed):
    figures = iter([ReaderFigures(3, student, 1.0, withheld) for student, withheld in measured])
    monkeypatch.setattr(reader, "measure_reader", lambda *_: next(figures))
    found = measure_folder(folder, FEW)
    assert found["passed"] == passed
    assert len(found["figures"]) == len(measured)


def test_what_is_written_is_what_was_measured(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "reader"
    record = run_reader(out, str(folder), lessons=SMALL, settings=FEW)
    assert json.loads((out / "gates.json").read_text()) == json.loads(json.dumps(record))
    assert record["passed"] is None  # a model of one layer and 16 rows solves nothing
    assert set(record["figures"]) == {"3"}  # so that harder sums are not tried
    assert record["figures"]["3"]["problems"] == 3
    assert measure_folder(out, FEW)["figures"] == record["figures"]
    with pytest.raises(ConfigError, match="--rows 15: give a multiple of 4"):
        run_reader(tmp_path / "other", str(folder), lessons=replace(SMALL, rows=15), settings=FEW)
    assert main(["--out", str(out)]) == 2
    assert f"error: --out {out} exists already" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="exists already"):
        run_reader(out, str(folder), lessons=SMALL, settings=FEW)
    monkeypatch.setattr(reader, "run_reader", lambda *_, **__: {**record, "passed": 3})
    assert main(["--out", str(out)]) == 0
    assert '"passed": 3' in capsys.readouterr().out
