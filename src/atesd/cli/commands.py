"""The verbs of `atesd`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atesd.cli.options import EXIT_CODES, STOPPED, Recipe, Settings, run_name, say, show_names

if TYPE_CHECKING:
    from atesd.config import Config


app = typer.Typer(
    name="atesd",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # user text is never markup, and help needs no rich
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models = typer.Typer(help="Models that are fetched once and kept in the user's cache.", rich_markup_mode=None)
world = typer.Typer(help="The models of the embedded world.", rich_markup_mode=None)
app.add_typer(models, name="models", no_args_is_help=True)
app.add_typer(world, name="world", no_args_is_help=True)


def _show_version(asked: bool) -> None:
    if asked:
        from atesd import __version__

        say(f"atesd {__version__}")
        raise typer.Exit


@app.callback()
def _atesd(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version, and stop.")
    ] = False,
) -> None:
    """Adaptive teacher exposure for on-policy self-distillation (arXiv 2605.11458)."""


class Resume(StrEnum):
    """What to do with a folder that already holds a run."""

    AUTO = "auto"
    NEVER = "never"


class EvaluationSplit(StrEnum):
    """The splits that training does not touch."""

    TEST = "test"
    VALIDATION = "validation"


class Dtype(StrEnum):
    """What weights are written as."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Fetchable(StrEnum):
    """Models that `atesd models fetch` knows."""

    SMOLLM2 = "smollm2"


@app.command(epilog=EXIT_CODES)
def train(
    recipe: Recipe,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME after the recipe.")] = None,
    resume: Annotated[Resume, typer.Option(help="auto: go on from the newest valid checkpoint.")] = Resume.AUTO,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build everything, say what is planned, stop.")] = False,
    devices: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: plan for as many, from the model's config.json alone.")
    ] = None,
    device_kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="With --dry-run: of this kind, such as h100-80gb.")
    ] = None,
    problem_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: the student's context, where no data is at hand.")
    ] = None,
    reference_tokens: Annotated[
        int | None, typer.Option(min=0, help="With --dry-run: what the teacher reads more.")
    ] = None,
    listener: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Who else watches: f(run folder) gives a listener. Repeatable."),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(metavar="TRACKER", help="trackio, wandb or tensorboard; all offline by default. Repeatable."),
    ] = None,
) -> None:
    """Train, with live progress. Ctrl-C saves a checkpoint; the same command resumes. torchrun: one process a card."""
    from atesd.cli.watching import NamedListeners, trackers
    from atesd.config import load_config
    from atesd.errors import ConfigError

    config = load_config(recipe, settings or [])
    named = NamedListeners(listener or [])
    tracked = trackers(track or [])
    asked = {"devices": devices, "device-kind": device_kind}
    asked |= {"problem-tokens": problem_tokens, "reference-tokens": reference_tokens}
    given = [f"--{name} {value}" for name, value in asked.items() if value is not None]
    if dry_run:
        _show_plan(config, devices, device_kind, problem_tokens, reference_tokens)
        return
    if given:
        raise ConfigError(f"{', '.join(given)}: read by --dry-run alone; add it, or start ranks with torchrun")
    folder = out or Path("runs") / run_name(recipe)

    from atesd.cli.display import closing_lines, display_for
    from atesd.models.ranks import process_group

    with (
        process_group(config.model.device) as ranks,
        display_for(config, folder) if ranks.first else nullcontext() as display,
    ):
        from atesd import session

        listeners = [display, *named.made(folder), *tracked] if display is not None else []
        outcome = session.train(config, folder, resume=resume.value, listeners=listeners, command=sys.argv)
    if ranks.first:
        for line in closing_lines(outcome.run, config, outcome.status):
            say(line)
    if outcome.status == "stopped":
        raise typer.Exit(STOPPED)


def _show_plan(
    config: Config, devices: int | None, kind: str | None, problem_tokens: int | None, reference_tokens: int | None
) -> None:
    """What was built here and what it needs; or, for devices that are named, what config.json and arithmetic tell."""
    from atesd.cli.forecast import NOTHING_DONE, Asked, built_lines, described_lines, verdicts_first

    asked = Asked(devices, kind, problem_tokens, reference_tokens)
    if asked.anything:
        for line in described_lines(config, asked):
            say(line)
        return

    from atesd.build import build, close
    from atesd.cli.plan import learning_verdict, plan_lines

    components = build(config)
    try:
        lines = (*plan_lines(components), *learning_verdict(components.config), *built_lines(components), NOTHING_DONE)
        for line in verdicts_first(lines):
            say(line)
    finally:
        close(components)


@app.command()
def serve(
    recipe: Recipe,
    more: Annotated[list[str] | None, typer.Argument(metavar="[-- WORDS]", help="More words for vllm serve.")] = None,
    settings: Settings = None,
    gpus: Annotated[str, typer.Option(metavar="ID,ID", help="GPUs for the servers, dealt out in order.")] = "",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that share one server's model.")] = 1,
    wait: Annotated[float, typer.Option(min=1, help="Seconds until all must be healthy.")] = 900.0,
    show: Annotated[bool, typer.Option("--print", help="Print the commands, and stop.")] = False,
) -> None:
    """The vLLM servers that a recipe's rollouts need (sampling.engine: server): started, watched, ended with Ctrl-C."""
    from atesd.cli import serve as servers
    from atesd.config import load_config

    config = load_config(recipe, settings or [])
    ids = [name for name in gpus.split(",") if name]
    commands = servers.commands_of(config, ids, tensor_parallel, more or [])
    if show:
        for command in commands:
            say(command.line)
        return
    servers.serve(commands, wait, say)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a model folder, or a hub id.")],
    benchmark: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Benchmarks, as in aime24,math500=FILE.jsonl (docs/data.md lists them)."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE_OR_FILE",
            help="Problems: those of a recipe or YAML, or every row of a .jsonl or .parquet file. Default: the run's.",
        ),
    ] = None,
    split: Annotated[EvaluationSplit, typer.Option(help="Which problems of a run or recipe.")] = EvaluationSplit.TEST,
    samples: Annotated[int | None, typer.Option(min=1, help="k of Average@k. Default: evaluation.samples.")] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE_OR_YAML", help="Prompts and sampler for a model that is no run.")
    ] = None,
    update: Annotated[
        int | None, typer.Option(min=0, help="With --benchmark: a run after so many updates; 0: before training.")
    ] = None,
    expect_hash: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SHA256", help="The content that a benchmark must have. Repeatable."),
    ] = None,
    released: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="The day of the model's release, where its name does not say it."),
    ] = None,
    settings: Settings = None,
) -> None:
    """Average@k with 95 % intervals, kept in the run's evaluations.jsonl for compare and report."""
    from atesd.cli.scores import evaluate_target, score_table
    from atesd.errors import ConfigError

    say(f"evaluating {target}; this may take a while", err=True)
    overrides = [*(settings or []), *([f"evaluation.samples={samples}"] if samples else [])]
    if benchmark is None:
        idle = {"--update": update, "--expect-hash": expect_hash, "--released": released}
        for option in (name for name, value in idle.items() if value is not None):
            raise ConfigError(f"{option} is read with --benchmark alone; leave it out, or name a benchmark")
        scored = evaluate_target(target, data, split.value, overrides, recipe)
        if scored is not None:
            say(score_table(scored))
            say(scored.where)
        return
    if data is not None:
        raise ConfigError(f"--data {data}: a benchmark has its own problems; give --benchmark or --data")

    from atesd.cli.pack import evaluate_benchmarks, pack_table
    from atesd.data.benchmarks import asked_for
    from atesd.table import render_text

    asked, day = asked_for(benchmark, expect_hash or []), released.date() if released else None
    found = evaluate_benchmarks(target, asked, overrides, recipe=recipe, released=day, update=update)
    if found is not None:
        say(render_text(pack_table(found)))
        for one in found:
            say(f"{one.row['split']}: {one.where}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    out: Annotated[Path | None, typer.Option(help="Folder, new or empty. Default: RUN-export.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The adapter added into its base: one whole model.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Of a whole model. Default: model.dtype of the run.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to this private repository of the hub.")
    ] = None,
) -> None:
    """The trained model for use elsewhere, its logits checked; sends nothing without --push."""
    from atesd import export as exports
    from atesd.runs import RunFolder

    if push is not None:
        exports.require_hub_name(push)
    folder = RunFolder.open(run)
    target = out or folder.path.with_name(f"{folder.path.resolve().name}-export")
    done = exports.export_run(folder, target, merged=merged, dtype=dtype.value if dtype else None)
    for line in exports.lines(done):
        say(line)
    if push is not None:
        say(f"pushed: {exports.push(done.folder, push)}")


@app.command()
def preview(
    recipe: Recipe,
    settings: Settings = None,
    problem: Annotated[int, typer.Option(min=0, help="Which training problem, from 0.")] = 0,
    ratios: Annotated[str, typer.Option(help="Reveal ratios, with commas between them.")] = "0,0.5,1",
) -> None:
    """Print what the student and the teacher read at several reveal ratios. Loads no model, only its tokenizer."""
    from atesd.config import load_config
    from atesd.errors import ConfigError

    try:
        wanted = [float(ratio) for ratio in ratios.split(",")]
    except ValueError:
        raise ConfigError(f"--ratios {ratios}: expected numbers with commas between them, such as 0,0.5,1") from None
    if not all(0 <= ratio <= 1 for ratio in wanted):
        raise ConfigError(f"--ratios {ratios}: expected at least 0 and at most 1")
    config = load_config(recipe, settings or [])

    from atesd.cli.preview import preview_text

    say(preview_text(config, problem, wanted))


@app.command(epilog=EXIT_CODES)
def init(
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE_OR_DATASET...", help=".jsonl, .json, .parquet, a folder, or a hub id.")
    ],
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER_OR_ID", help="What to train. Default: Qwen/Qwen3-1.7B.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The recipe, a new file. Default: NAME.yaml after the file.")] = None,
) -> None:
    """Look at a file or data set and write a commented recipe for it. Overwrites nothing."""
    from atesd.cli.init import DEFAULT_MODEL, write_recipe

    for line in write_recipe(sources, model or DEFAULT_MODEL, out):
        say(line)


@app.command()
def recipes() -> None:
    """List the packaged recipes."""
    from atesd.config import recipe_names, recipe_text

    show_names({name: recipe_text(name) for name in recipe_names()})


@app.command()
def config(recipe: Recipe, settings: Settings = None) -> None:
    """Print every setting in force, as YAML with units and origins as comments."""
    from atesd.cli.settings import annotated_yaml
    from atesd.config import load_config

    say(annotated_yaml(load_config(recipe, settings or [])), nl=False)


@models.command()
def fetch(name: Annotated[Fetchable, typer.Argument(help="Which model.")]) -> None:  # noqa: ARG001
    """Fetch a model, check its hash, and convert it."""
    from atesd.models.fetch import fetch_smollm2

    fetch_smollm2(say=say)


@models.callback()
def _models() -> None:
    """A group with one verb stays a group."""


@world.command()
def pretrain(
    name: Annotated[str, typer.Argument(help="How: good or bad, or words (extra gsm).")] = "good",
    seed: Annotated[int, typer.Option(min=0, help="First seed to try.")] = 0,
    attempts: Annotated[int, typer.Option(min=1, help="Seeds to try until one is accepted.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Model folder. Default: worlds/NAME.")] = None,
) -> None:
    """Pretrain a world model, seed after seed until one is accepted. Minutes on one core; words: most of an hour."""
    import json

    from atesd.errors import ConfigError
    from atesd.world.pretrain import RECIPES, pretrain_command
    from atesd.world.words.pretrain import pretrain_words_command

    if name not in (*RECIPES, "words"):
        raise ConfigError(f"world pretrain {name}: expected one of {', '.join(RECIPES)}, words")
    folder = out or Path("worlds") / name

    def show(candidate: int, step: int, loss: float) -> None:
        if step % 100 == 0:
            say(f"seed {candidate}  step {step}  loss {loss:.3f}")

    if name == "words":
        record = pretrain_words_command(seed, attempts, folder, show)
    else:
        record = pretrain_command(seed, attempts, folder, name, show)
    say(json.dumps(record, indent=2))
    say(f"model folder: {folder} (use it with --set model.path={folder})")


@world.callback()
def _world() -> None:
    """A group with one verb stays a group."""
