"""The verbs of `atesd`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
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

    config = load_config(recipe, settings or [])
    named = NamedListeners(listener or [])
    tracked = trackers(track or [])
    if dry_run:
        _show_plan(config)
        return
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


def _show_plan(config: Config) -> None:
    from atesd.build import build, close
    from atesd.cli.plan import plan_lines

    components = build(config)
    try:
        for line in plan_lines(components):
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
    data: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE_OR_FILE",
            help="Problems: those of a recipe or YAML, or every row of a .jsonl or .parquet file. Default: the run's.",
        ),
    ] = None,
    split: Annotated[EvaluationSplit, typer.Option(help="Which problems.")] = EvaluationSplit.TEST,
    samples: Annotated[int | None, typer.Option(min=1, help="k of Average@k. Default: evaluation.samples.")] = None,
    settings: Settings = None,
) -> None:
    """Average@k with 95 % intervals. A run's own problems: the row goes into its evaluations.jsonl."""
    from atesd.cli.scores import evaluate_target, score_table

    say(f"evaluating {target}; this may take a while", err=True)
    overrides = [*(settings or []), *([f"evaluation.samples={samples}"] if samples else [])]
    scored = evaluate_target(target, data, split.value, overrides)
    if scored is not None:
        say(score_table(scored))
        say(scored.where)


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
    name: Annotated[str, typer.Argument(help="How: a pretraining recipe, such as good.")] = "good",
    seed: Annotated[int, typer.Option(min=0, help="First seed to try.")] = 0,
    attempts: Annotated[int, typer.Option(min=1, help="Seeds to try until one is accepted.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Model folder. Default: worlds/NAME.")] = None,
) -> None:
    """Pretrain a world model from a seed, seed after seed until one is accepted. Minutes on one core."""
    import json

    from atesd.errors import ConfigError
    from atesd.world.pretrain import RECIPES, pretrain_command

    if name not in RECIPES:
        raise ConfigError(f"world pretrain {name}: expected one of {', '.join(RECIPES)}")
    folder = out or Path("worlds") / name

    def show(candidate: int, step: int, loss: float) -> None:
        if step % 100 == 0:
            say(f"seed {candidate}  step {step}  loss {loss:.3f}")

    say(json.dumps(pretrain_command(seed, attempts, folder, name, show), indent=2))
    say(f"model folder: {folder} (use it with --set model.path={folder})")


@world.callback()
def _world() -> None:
    """A group with one verb stays a group."""
