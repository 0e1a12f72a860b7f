"""`python -m atesd_lab.studies.reader`: teach a language model to read a reference, and measure that it can.

A teacher that cannot read the solution before it harms whoever follows it, whatever the exposure. So all layers of a
model are trained on fresh sums in both contexts, the student's and the teacher's, in one schedule; then a gate on
validation problems says whether anything should be distilled from it: the student solves some, and the teacher nearly
all with the answer withheld.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atesd.config import Config, load_config, with_overrides
from atesd.data.answers import ExactChecker
from atesd.data.sources import load_problems
from atesd.data.views import TextRenderer
from atesd.engine.factory import engine_for
from atesd.engine.interface import Request, SamplingParams
from atesd.errors import AtesdError, ConfigError
from atesd.maths.keyed import generator
from atesd.models.load import LoadedModel, load_model, save_model
from atesd.models.prompts import PromptEncoder
from atesd.records import Problem
from atesd.world.pretrain import Descent, descend, one_thread
from atesd.world.words.pretrain import accumulate

RECIPE = "smollm2-sums"
_IGNORED = -100
_SLIPS = (-10, -2, -1, 1, 2, 10)  # how far a wrong result is off

Ids = tuple[int, ...]
Row = tuple[list[int], list[int]]
"""Ids, and what each position is to predict: `_IGNORED` where nothing is learned."""


@dataclass(frozen=True)
class Lessons:
    """How a model is taught to read."""

    rows: int = 1152
    sums_seed: int = 1  # a run's sums are those of seed 0
    batch_size: int = 16
    micro_batch_size: int = 8  # rows of like length
    most_operations: int = 4
    learning_rate: float = 3e-4  # AdamW, all layers
    warmup_steps: int = 5
    decay_share: float = 0.6  # last share of the steps: linear decay to 0
    reference: float = 0.25  # share of the rows in the teacher's context; the others have the student's
    whole: float = 0.5  # of those, with the whole reference; the others with a part of it
    kept: float = 0.25  # of those, with the answer
    off_track: float = 0.4  # of those, behind a wrong result, which is not learned; what follows from it is


@dataclass(frozen=True)
class ReaderGate:
    """What must be measured before anything is distilled."""

    student_accuracy: tuple[float, float] = (0.25, 0.50)  # range
    teacher_accuracy_withheld: float = 0.85  # at least


@dataclass(frozen=True)
class ReaderFigures:
    """Measured at temperature 1 on validation problems, one completion each."""

    problems: int
    student_accuracy: float
    teacher_accuracy: float  # the whole reference, answer and all
    teacher_accuracy_withheld: float  # the whole reference without its closing line

    def passed(self, gate: ReaderGate) -> bool:
        """Whether something may be distilled."""
        low, high = gate.student_accuracy
        return low <= self.student_accuracy <= high and self.teacher_accuracy_withheld >= gate.teacher_accuracy_withheld


@dataclass(frozen=True)
class Desk:
    """What rows are made of: the contexts of a config, with the answer and without it."""

    encoder: PromptEncoder
    keeping: TextRenderer
    withholding: TextRenderer
    lessons: Lessons = field(default_factory=Lessons)

    def row(self, rng: np.random.Generator, problem: Problem) -> Row:
        """A context and the solution that is to follow it."""
        lessons = self.lessons
        if rng.random() >= lessons.reference:
            return self._row(self.encoder.student(self.keeping.student(problem)), problem.reference, None)
        renderer = self.keeping if rng.random() < lessons.kept else self.withholding
        whole = rng.random() < lessons.whole
        shown = len(problem.segments) if whole else int(rng.integers(len(problem.segments)))
        context = self.encoder.teacher(renderer.teacher(problem, shown, whole))
        if rng.random() < lessons.off_track:
            return self._row(context, *with_a_slip(rng, problem))
        return self._row(context, problem.reference, None)

    def _row(self, context: Ids, solution: str, unlearned: tuple[int, int] | None) -> Row:
        ids = self.encoder.completion(solution)
        targets, end = [_IGNORED] * (len(context) - 1), 0
        for token, piece in zip(ids, self.encoder.pieces(ids), strict=True):
            begin, end = end, end + len(piece)
            inside = unlearned is not None and begin < unlearned[1] and end > unlearned[0]
            targets.append(_IGNORED if inside else token)
        return [*context, *ids[:-1]], targets


def desk_of(loaded: LoadedModel, config: Config, lessons: Lessons) -> Desk:
    """The contexts of a config for a model."""
    keep, withhold = (config.views.model_copy(update={"answer": word}) for word in ("keep", "withhold"))
    encoder = PromptEncoder(loaded.tokenizer, config.model, loaded.end_ids)
    return Desk(encoder, TextRenderer(keep), TextRenderer(withhold), lessons)


def with_a_slip(rng: np.random.Generator, problem: Problem) -> tuple[str, tuple[int, int]]:
    """A solution of a sum with one wrong result, from which all that follows is right; where it stands in the text."""
    steps = [(words[1], int(words[2])) for words in (line.split() for line in problem.segments)]
    start = int(problem.segments[0].split()[0])
    place = int(rng.integers(len(steps)))
    signed = [step if sign == "+" else -step for sign, step in steps]
    right = start + np.cumsum(signed)
    least = int(right[place:].min())
    slip = int(rng.choice([one for one in _SLIPS if one >= -least]))
    text, value, span = "", start, (0, 0)
    for number, (sign, step) in enumerate(steps):
        result = int(right[number]) + (slip if number >= place else 0)
        text += f"{value} {sign} {step} = "
        if number == place:
            span = (len(text), len(text) + len(str(result)))
        text, value = f"{text}{result}\n", result
    return f"{text}\\boxed{{{value}}}", span


def fresh_sums(config: Config, lessons: Lessons) -> list[Problem]:
    """The sums that are taught: of the train share, which texts decide, so that no run is measured on them.

    Raises as `load_problems`.
    """
    sizes = {"train_size": lessons.rows, "validation_size": 1, "probe_size": 1, "test_size": 0}
    taught = {**sizes, "seed": lessons.sums_seed, "max_difficulty": lessons.most_operations}
    return list(load_problems(config.data.model_copy(update=taught)).train)


def teach(
    loaded: LoadedModel,
    desk: Desk,
    problems: Sequence[Problem],
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train all layers on one row for each problem; calls `progress(step, loss in nats per target)`.

    The weights are float32, the passes in bfloat16 where the processor computes in it. Raises `TrainingError` on a
    non-finite loss.
    """
    lessons = desk.lessons
    steps = len(problems) // lessons.batch_size
    order = generator(seed, "reader", "order").permutation(len(problems))
    rate = lessons.learning_rate
    weights = loaded.model.parameters()
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, betas=(0.9, 0.99))

    def gradient(step: int) -> float:
        chosen = order[step * lessons.batch_size : (step + 1) * lessons.batch_size]
        rows = [desk.row(generator(seed, "reader", "row", int(one)), problems[one]) for one in chosen]
        return accumulate(loaded.model, rows, lessons.micro_batch_size, loaded.pad_id)

    with one_thread():
        descent = Descent(seed, steps, lessons.decay_share, lessons.warmup_steps)
        descend(loaded.model, [(optimiser, rate)], descent, gradient, progress)


def measure_reader(loaded: LoadedModel, desk: Desk, config: Config, problems: Sequence[Problem]) -> ReaderFigures:
    """The gate's figures on these problems."""

    def accuracy(contexts: Sequence[Ids], stream: str) -> float:
        requests = [
            Request(one.id, 0, context, (0, "gate", stream, one.id))
            for one, context in zip(problems, contexts, strict=True)
        ]
        params = SamplingParams(1.0, 1.0, 0, 0.0, completion_tokens=config.sampling.completion_tokens)
        rollouts = engine_for(loaded, "auto", batch_size=64).complete(requests, params)
        texts = [desk.encoder.decode(one.completion_ids) for one in rollouts]
        verdicts = ExactChecker().check([(text, one.answer) for text, one in zip(texts, problems, strict=True)])
        return float(np.mean([verdict == "correct" for verdict in verdicts]))

    def whole(renderer: TextRenderer) -> list[Ids]:
        return desk.encoder.teachers([renderer.teacher(one, len(one.segments), True) for one in problems])

    return ReaderFigures(
        problems=len(problems),
        student_accuracy=accuracy(desk.encoder.students([desk.keeping.student(one) for one in problems]), "student"),
        teacher_accuracy=accuracy(whole(desk.keeping), "kept"),
        teacher_accuracy_withheld=accuracy(whole(desk.withholding), "withheld"),
    )


def run_reader(
    out: Path,
    model: str = "smollm2",
    seed: int = 0,
    lessons: Lessons | None = None,
    settings: Sequence[str] = (),
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Teach `model`, write it in bfloat16 to `out`, measure what was written, and return its record (`gates.json`).

    `passed` is the most operations of the easiest sums on which the gate is passed; None if there are none.
    Raises `ConfigError` for a folder that exists, and for rows that are no whole number of steps.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists already; give another folder")
    lessons = lessons or Lessons()
    if lessons.rows < 1 or lessons.rows % lessons.batch_size:
        raise ConfigError(f"--rows {lessons.rows}: give a multiple of {lessons.batch_size}, the rows of a step")
    began, cpu = time.perf_counter(), time.process_time()
    config = load_config(RECIPE, [f"model.path={model}", "model.lora=null", "data.validation_size=128", *settings])
    eager = with_overrides(config, ["model.attention=eager", "model.device=cpu"])  # eager: faster at these lengths
    loaded = load_model(eager.model)
    problems = fresh_sums(config, lessons)
    desk = desk_of(loaded, config, lessons)
    teach(loaded, desk, problems, seed, progress)
    taught = time.perf_counter() - began, time.process_time() - cpu
    loaded.model.bfloat16()
    save_model(loaded, out)
    record = {
        "seed": seed,
        "model": model,
        "rows": len(problems),
        "settings": {**asdict(lessons), "gate": asdict(ReaderGate())},
        "seconds": round(taught[0], 1),
        "cpu_seconds": round(taught[1], 1),
        **measure_folder(out, settings),
    }
    (out / "gates.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def measure_folder(folder: Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The gate's figures of a saved model on sums of 3 operations; of up to 4, 5 while its student is too good."""
    figures: dict[str, Any] = {}
    for operations in (3, 4, 5):
        tokens = 12 * operations + 12
        own = [f"model.path={folder}", "model.lora=null", "data.validation_size=128"]
        own += [f"data.max_difficulty={operations}", f"sampling.completion_tokens={tokens}", *settings]
        config = load_config(RECIPE, own)
        loaded = load_model(config.model)
        problems = load_problems(config.data).validation
        measured = measure_reader(loaded, desk_of(loaded, config, Lessons()), config, problems)
        figures[str(operations)] = asdict(measured)
        if measured.passed(ReaderGate()):
            return {"passed": operations, "figures": figures}
        if measured.student_accuracy <= ReaderGate().student_accuracy[1]:
            break  # harder sums are for a student that is too good, and mend nothing else
    return {"passed": None, "figures": figures}


def main(words: Sequence[str]) -> int:
    """The command; its exit code is 0 where the gate is passed, 1 where it is missed, 2 on an error."""
    parser = argparse.ArgumentParser(prog="python -m atesd_lab.studies.reader", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the taught model")
    parser.add_argument("--model", default="smollm2", help="model.path of the model that is taught")
    parser.add_argument("--seed", type=int, default=0)
    given = Lessons()
    parser.add_argument("--sums-seed", type=int, default=given.sums_seed, help="of the sums that are taught")
    parser.add_argument("--rows", type=int, default=given.rows, help="fresh rows, each seen once")
    parser.add_argument("--operations", type=int, default=given.most_operations, help="most of a sum that is taught")
    parser.add_argument("--learning-rate", type=float, default=given.learning_rate)
    asked = parser.parse_args(words)
    lessons = replace(
        given,
        rows=asked.rows,
        sums_seed=asked.sums_seed,
        most_operations=asked.operations,
        learning_rate=asked.learning_rate,
    )
    try:
        record = run_reader(asked.out, asked.model, asked.seed, lessons, progress=_tell)
    except AtesdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told = {name: record[name] for name in ("rows", "seconds", "cpu_seconds", "passed", "figures")}
    print(json.dumps(told, indent=2))
    return 0 if record["passed"] is not None else 1


def _tell(step: int, loss: float) -> None:
    print(f"step {step}: {loss:.3f} nats per target", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
