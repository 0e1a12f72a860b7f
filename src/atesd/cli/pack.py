"""Evaluate a run, or any model, on the benchmarks of data/benchmarks.yaml, for `atesd evaluate --benchmark`."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from atesd.build import build, close
from atesd.cli.options import say
from atesd.cli.scores import Scored, finished_run, keep, model_config, told
from atesd.cli.together import say_time, that_fits
from atesd.cli.unfinished import unfinished
from atesd.config import Config, DataConfig, dump_config, with_overrides
from atesd.data.benchmarks import Asked, Content, Family, family_of, load_content
from atesd.data.splits import ProblemSets
from atesd.engine.factory import engine_word
from atesd.errors import ConfigError, RunError
from atesd.importing import is_named
from atesd.maths.statistics import bootstrap_interval, detectable_difference, pass_at_k
from atesd.models.ranks import Ranks, process_group
from atesd.rows import BenchmarkRow, EvaluationRow
from atesd.runs import RunFolder, factory_changes, recorded_factories
from atesd.table import Table
from atesd.text import MISSING, number, percent, percent_interval
from atesd.train.components import Components
from atesd.train.fitting import problems_that_fit
from atesd.train.snapshots import load_student

PINNED = {"pinned": "as pinned", "expected": "as expected", "no": "not pinned yet"}


@dataclass(frozen=True, slots=True)
class _Subject:
    """The model that is evaluated: of a run after `update` updates, or a bare one; what is known of its family."""

    target: str
    run: RunFolder | None
    update: int
    config: Config
    family: Family | None
    released: datetime.date | None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to load into the run's model; None where its folder or its base has the weights."""
        if self.run is None or self.update in (0, self.run.config.train.num_updates):
            return None
        return self.run.checkpoints / f"update-{self.update:06d}"

    @property
    def changes(self) -> list[str]:
        """What to say of functions of the user's that are not as they were when the run ended."""
        return factory_changes(self.run.manifest["sessions"][-1].get("factories"), self.config) if self.run else []

    def key(self, content: Content) -> str:
        """Names everything that the grades depend on but the number of ranks: 16 hexadecimal digits."""
        model = self.config.model
        path = self.run.run_id if self.run else model.path
        config = self.config.model_copy(update={"model": model.model_copy(update={"path": path}), "data": DataConfig()})
        words = [dump_config(config), content.data.checker, content.asked.name, content.sha256, self.update]
        if is_named(content.data.checker):
            files = recorded_factories(config.model_copy(update={"data": content.data}))
            words += [content.data.checker_settings, content.data.checker_seconds, files["data.checker"]]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def evaluate_benchmarks(
    target: str,
    asked: Sequence[Asked],
    overrides: Sequence[str] = (),
    *,
    recipe: str | None = None,
    released: datetime.date | None = None,
    update: int | None = None,
) -> list[Scored] | None:
    """A row for each benchmark, kept in the run under the benchmark's name; what a run holds already is not done again.

    The model is loaded once, after every benchmark was read and checked. `update` 0 is a run's model before training,
    another the checkpoint after so many updates. A model family that can think does so, unless an override says
    otherwise. Raises what `load_content` and `build` raise. Under torchrun all ranks but the first return None.
    """
    subject = _subject(target, recipe, overrides, released, update)
    contents = [load_content(one, subject.config.data) for one in asked]
    with process_group(subject.config.model.device) as ranks:
        held = ranks.broadcast(partial(_held, subject, contents))
        found = {name: Scored(target, subject.run is not None, row, "held already") for name, row in held.items()}
        left = [content for content in contents if content.asked.name not in held]
        for note in subject.changes:
            say(note, err=True)
        if left:
            problems = [one for content in left for one in content.problems.test]
            fitting = that_fits(subject.config, problems, overrides, ranks)
            found |= {one.row["split"]: one for one in _evaluate(subject, fitting, left, ranks)}
        return [found[one.name] for one in asked] if ranks.first else None


def _subject(
    target: str, recipe: str | None, overrides: Sequence[str], released: datetime.date | None, update: int | None
) -> _Subject:
    run = finished_run(target)
    if run is None and update is not None:
        raise ConfigError(
            f"--update {update}: {target} is no run folder, so that nobody knows its updates; leave it out"
        )
    stray = next((o for o in overrides if o.startswith("data.") and not o.startswith("data.checker")), None)
    if stray is not None:
        raise ConfigError(
            f"--set {stray}: the benchmark says what is read; leave it out, or use --data for problems of yours"
        )
    last = run.config.train.num_updates if run else 0
    after = last if update is None else update
    config = model_config(target, run, recipe)
    if run and after != last:
        config = run.config
    family = family_of(run.config.model.path if run else target)
    if family and family.thinking and not any("model.student_template" in override for override in overrides):
        words = {**config.model.student_template, family.thinking: True}
        config = config.model_copy(update={"model": config.model.model_copy(update={"student_template": words})})
    day = released or (family.released if family else None)
    subject = _Subject(target, run, after, with_overrides(config, overrides), family, day)
    if run and subject.checkpoint is not None and not subject.checkpoint.is_dir():
        there = ", ".join(sorted(str(int(path.name[7:])) for path in run.checkpoints.glob("update-*")))
        raise RunError(
            f"{run.path} has no checkpoint after {after} updates; there are 0, {there or 'none'} and {last} "
            "(train.keep_checkpoints says how many are kept)"
        )
    return subject


def _held(subject: _Subject, contents: Sequence[Content]) -> dict[str, EvaluationRow]:
    """The rows that the run holds of these very evaluations, by benchmark."""
    keys = {subject.key(content): content.asked.name for content in contents}
    rows = subject.run.rows("evaluations") if subject.run else []
    return {keys[key]: row for row in rows if "benchmark" in row and (key := row["benchmark"]["key"]) in keys}


def _evaluate(subject: _Subject, fitting: Config, contents: Sequence[Content], ranks: Ranks) -> list[Scored]:
    """Evaluate one benchmark after another with the model loaded once; on rank 0 the rows are kept as they come.

    `fitting`: the subject's config with as many rows together as fit.
    """
    configs = [fitting.model_copy(update={"data": content.data}) for content in contents]
    components = build(configs[0], contents[0].problems, ranks=ranks)
    try:
        if subject.checkpoint is not None and subject.run is not None:
            load_student(subject.checkpoint, subject.run.run_id, components.weights)
            components.engine.publish(subject.update)
        some = [
            problems_that_fit(content.problems, config, components.encoder, components.renderer)
            for content, config in zip(contents, configs, strict=True)
        ]
        pairs = zip(contents, some, strict=True)
        return [_one(subject, content, problems, components, ranks) for content, problems in pairs]
    finally:
        close(components)


def _one(subject: _Subject, content: Content, problems: ProblemSets, components: Components, ranks: Ranks) -> Scored:
    name, run = content.asked.name, subject.run
    key = [subject.key(content), str(ranks.size), str(components.config.sampling.batch_size)]
    say_time(components.config, len(problems.test), ranks)
    with unfinished(run.path if run else None, key, ranks, name) as grades:
        row = components.evaluation.on(problems).evaluate("test", subject.update, grades)
        row = {**row, "split": name, "sampler": {**row["sampler"], **told(subject.config)}}
        row["benchmark"] = _benchmark_row(subject, content, row, components)
        where = "nothing was written: not a run folder"
        if run and ranks.first:
            where = keep(run, row)
        grades.forget()
    if ranks.first and run:
        say(f"{name}: Average@{row['samples']} {percent_interval(row['average'])} %", err=True)
    return Scored(subject.target, run is not None, row, where)


def _benchmark_row(subject: _Subject, content: Content, row: EvaluationRow, components: Components) -> BenchmarkRow:
    entry, family, samples = content.asked.entry, subject.family, row["samples"]
    counts = list(row["correct_counts"].values())
    word = family.thinking if family else None
    template = str(getattr(components.loaded.tokenizer, "chat_template", None) or "")
    thinks = bool(subject.config.model.student_template.get(word)) if word and word in template else None
    some = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < samples] + [samples]
    file = content.asked.file
    return {
        "source": Path(file).name if file else entry.hub,
        "sha256": content.sha256,
        "pinned": content.pinned,
        "held": entry.held,
        "family": family.name if family else None,
        "clean": entry.is_clean(subject.released),
        "thinking": thinks,
        "engine": engine_word(components.loaded, subject.config.sampling.engine),
        "pass_at": {str(k): fmean(pass_at_k(counts, samples, k).tolist()) for k in some},
        "key": subject.key(content),
    }


def pack_table(found: Sequence[Scored]) -> Table:
    """A row per benchmark, their mean, and those together that no model of the family can have been trained on."""
    first = found[0]
    rows = [_cells(one.row["split"], one.row) for one in found]
    if len(found) > 1:
        rows.append(
            ("mean of the benchmarks", "", "", percent(fmean(one.row["average"]["value"] for one in found)), *[""] * 5)
        )
        clean = [one.row for one in found if one.row["benchmark"]["clean"]]
        if 0 < len(clean) < len(found):
            rows.append(_together("clean by date, together", clean))
    k = first.row["samples"]
    sizes = ("problems", "clean by date", f"Average@{k}, %", f"pass@{k}, %", "mean tokens", "truncated, %")
    columns = ("benchmark", *sizes, "tells apart, points", "content")
    after = f", after {first.row['update']} updates" if first.is_run else ""
    return Table(f"{first.name} on benchmarks{after}", columns, tuple(rows), tuple(_notes(found)))


def _cells(name: str, row: EvaluationRow) -> tuple[str, ...]:
    about = row["benchmark"]
    return (
        name,
        str(row["problems"]),
        {True: "yes", False: "no", None: "not known"}[about["clean"]],
        percent_interval(row["average"]),
        percent_interval(row["pass_at_k"]),
        number(row["mean_tokens"]),
        percent(row["truncated_share"]),
        tells_apart(list(row["correct_counts"].values()), row["samples"]),
        PINNED[about["pinned"]],
    )


def _together(name: str, rows: Sequence[EvaluationRow]) -> tuple[str, ...]:
    samples = rows[0]["samples"]
    counts = [count for row in rows for count in row["correct_counts"].values()]
    shares = [count / samples for count in counts]
    low, high = bootstrap_interval(shares, seed=int(rows[0]["sampler"]["seed"]), key="problems")
    average = percent_interval({"value": fmean(shares), "low": low, "high": high})
    return (name, str(len(shares)), "yes", average, "", "", "", tells_apart(counts, samples), "")


def tells_apart(counts: Sequence[int], samples: int) -> str:
    """`detectable_difference` in points; a dash where no noise was seen."""
    share = detectable_difference(counts, samples)
    return MISSING if share is None else f"{100 * share:.1f}"


def _notes(found: Sequence[Scored]) -> list[str]:
    row = found[0].row
    about = row["benchmark"]
    sampler = ", ".join(f"{setting} {value}" for setting, value in row["sampler"].items())
    thinking = {True: "thinking mode on", False: "thinking mode off", None: "no thinking mode known"}[about["thinking"]]
    notes = [
        f"Sampled by {about['engine']} with {sampler}; {thinking}.",
        "Brackets: 95 % intervals over problems. Tells apart: the difference that two such models show with 80 % power "
        "on these problems, from the sampling alone; another seed of training is not in it.",
    ]
    for one in found:
        pass_at = ", ".join(f"@{k} {percent(share)}" for k, share in one.row["benchmark"]["pass_at"].items())
        notes.append(f"{one.row['split']}: pass {pass_at}.")
        if one.row["benchmark"]["pinned"] == "no":
            notes.append(
                f"{one.row['split']}: nobody has pinned its content; {one.row['benchmark']['source']} hashes to "
                f"{one.row['benchmark']['sha256']}, and --expect-hash {one.row['split']}=THAT refuses any other."
            )
    family = about["family"]
    if about["clean"] is None:
        notes.append(
            "When this model was released is not known here; --released YYYY-MM-DD says which are clean by date."
        )
    elif family:
        notes.append(f"Clean by date: held after the month in which {family} was released.")
    return notes
