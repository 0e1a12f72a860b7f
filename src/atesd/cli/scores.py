"""Evaluate a run or a model, and say it in a table, for `atesd evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atesd.build import build, close, problem_sets
from atesd.cli.options import say
from atesd.cli.together import say_time, that_fits
from atesd.cli.unfinished import unfinished
from atesd.config import Config, acting_settings, dump_config, load_config, with_groups, with_overrides
from atesd.data.benchmarks import content_hash
from atesd.data.sources import load_benchmark
from atesd.errors import ConfigError, RunError
from atesd.importing import is_named
from atesd.models.ranks import process_group
from atesd.records import Split
from atesd.rows import ContentRow, EvaluationRow
from atesd.runs import RunFolder, factory_changes, recorded_factories
from atesd.session import config_of_trained
from atesd.table import Table, render_text
from atesd.text import number, percent, percent_interval
from atesd.train.components import Components

FILES = (".jsonl", ".parquet")
RECIPE_FILES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Scored:
    """An evaluation: of what (a run, whose updates are known, or a model), its row, and where the row went."""

    name: str
    is_run: bool
    row: EvaluationRow
    where: str


def evaluate_target(
    target: str, data: str | None, split: Split, overrides: Sequence[str], recipe: str | None = None
) -> Scored | None:
    """Evaluate the trained model of a run folder, or any model, on a split of a run's, a recipe's or a file's problems.

    The row of a run on its own problems, or on those of a file, is appended to the run, unless it is there already.
    Raises `RunError` for a run that is not finished, `ConfigError` for a model without problems. Under torchrun the
    ranks share the work, and all but the first return None.
    """
    run = finished_run(target)
    if data is None and run and not _holds_out(run.config, split):
        raise ConfigError(
            f"{run.path} holds out no {split} problems (data.{split}_size: 0), so say on which: --benchmark NAMES, or "
            "--data FILE.jsonl, a line for each problem and answer; its row is kept in the run, for compare and report"
        )
    config = with_overrides(_config(target, run, data, recipe), overrides)
    benchmark = load_benchmark(config.data) if data and is_benchmark(data) else None
    wanted: Split = "test" if benchmark else split
    update = run.config.train.num_updates if run else 0
    with process_group(config.model.device) as ranks:
        problems = benchmark or problem_sets(config.data)
        config = that_fits(config, getattr(problems, wanted), overrides, ranks)
        components = build(config, problems, ranks=ranks)
        say_time(config, len(getattr(components.problems, wanted)), ranks)
        key = [dump_config(config), components.problems.fingerprint, wanted, str(update), str(ranks.size)]
        key += [json.dumps(recorded_factories(config))] if config.factories else []
        for note in factory_changes(run.manifest["sessions"][-1].get("factories"), config) if run else ():
            say(note, err=True)
        try:
            with unfinished(run.path if run else None, key, ranks) as grades:
                row = components.evaluation.evaluate(wanted, update, grades)
                scored = _scored(target, data, run, row, components) if ranks.first else None
                grades.forget()
        finally:
            close(components)
    return scored


def finished_run(target: str) -> RunFolder | None:
    """The run of this folder; None: it is none. `RunError` for one that is not finished."""
    run = RunFolder.open(target) if RunFolder.exists(target) else None
    if run and run.manifest["status"] != "finished":
        raise RunError(f"{run.path} is {run.manifest['status']}; let `atesd train` finish it first")
    return run


def model_config(target: str, run: RunFolder | None, recipe: str | None) -> Config:
    """A run's config with its trained model, or that of a bare model with the prompts and sampler of a recipe."""
    if run:
        if recipe is not None:
            raise ConfigError(
                f"--recipe {recipe}: {run.path} is a run and has prompts of its own; leave the recipe out"
            )
        return config_of_trained(run)
    named = load_config(recipe) if recipe else Config()
    return named.model_copy(update={"model": named.model.model_copy(update={"path": target, "lora": None})})


def _scored(target: str, data: str | None, run: RunFolder | None, row: EvaluationRow, components: Components) -> Scored:
    """Keep the row in its run, if it has one and belongs there."""
    if run is None:
        return Scored(target, False, row, "nothing was written: not a run folder")
    if data is not None and is_benchmark(data):
        row = _of_benchmark(row, data, components)
    elif components.problems.fingerprint != run.manifest["data_fingerprint"]:
        return Scored(target, True, row, f"nothing was written: these are not the problems of {run.path}")
    return Scored(target, True, row, keep(run, row))


def score_table(scored: Scored) -> str:
    """Average@k and pass@k over all problems, Average@k per difficulty, and how the completions ended."""
    row = scored.row
    k, levels = row["samples"], row["by_difficulty"]
    rows = [("all", str(row["problems"]), percent_interval(row["average"]), percent_interval(row["pass_at_k"]))]
    if len(levels) > 1:
        rows += [
            (f"difficulty {level}", str(some["problems"]), percent_interval(some["average"]), "")
            for level, some in levels.items()
        ]
    verdicts = ", ".join(f"{verdict} {count}" for verdict, count in row["verdicts"].items())
    sampler = ", ".join(f"{setting} {value}" for setting, value in row["sampler"].items())
    notes = (
        f"Verdicts: {verdicts}. Mean length {number(row['mean_tokens'])} tokens, truncated "
        f"{percent(row['truncated_share'])} %, looping {percent(row['loop_share'])} %.",
        f"Sampler: {sampler}. Brackets: 95 % bootstrap interval over problems.",
    )
    columns = ("problems of", "number", f"Average@{k}, %", f"pass@{k}, %")
    after = f", after {row['update']} updates" if scored.is_run else ""
    return render_text(Table(f"{scored.name} on {row['split']}{after}", columns, tuple(rows), notes))


def _config(target: str, run: RunFolder | None, data: str | None, recipe: str | None) -> Config:
    """The model to evaluate, with the problems to evaluate it on."""
    if data is None:
        if run is None:
            raise ConfigError(
                f"{target} is no run folder, so say on which problems: --benchmark NAME, --data RECIPE or --data "
                "FILE.jsonl"
            )
        return model_config(target, run, recipe)
    if is_benchmark(data):
        return _on_benchmark(model_config(target, run, recipe), data)
    return model_config(target, run, recipe or (None if run else data)).model_copy(
        update={"data": load_config(data).data}
    )


def is_benchmark(data: str) -> bool:
    """Whether this names a file or a data set with problems, and not a recipe."""
    return data.endswith(FILES) or ("/" in data and not data.endswith(RECIPE_FILES))


def _on_benchmark(config: Config, source: str) -> Config:
    """The same model on every row of a file or data set; its columns by `--set data.columns...`.

    A run whose checker is the user's own is judged by it here too.
    """
    own = acting_settings(config)["data"] if is_named(config.checker) else {}
    kept = {name: value for name, value in own.items() if name.startswith("checker")}
    return with_groups(config, {"data": {"source": source, "test_source": source, **kept}}, "--data")


def _holds_out(config: Config, split: Split) -> bool:
    sizes = {"test": config.data.test_size, "validation": config.data.validation_size}
    return sizes.get(split, 1) > 0


def _of_benchmark(row: EvaluationRow, source: str, components: Components) -> EvaluationRow:
    """The row under the name of its file or data set, with its content and what the student's template was told."""
    config, name = components.config, Path(source).name if source.endswith(FILES) else source
    content: ContentRow = {"sha256": content_hash(components.problems.test), "checker": config.checker}
    return {**row, "split": name, "content": content, "sampler": {**row["sampler"], **told(config)}}


def told(config: Config) -> dict[str, bool | int | float]:
    """What the student's template was told, as the sampler of a row has it."""
    words = config.model.student_template
    return {f"student_template.{name}": value for name, value in words.items() if not isinstance(value, str)}


def keep(run: RunFolder, row: EvaluationRow) -> str:
    """Append the row to its run if it is new; says what was done."""
    if row in run.rows("evaluations"):
        return f"nothing was written: {run.path} holds this very evaluation"
    with run.lock():
        run.append("evaluations", row)
    return f"written to {run.path / 'evaluations.jsonl'}"
