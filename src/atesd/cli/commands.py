"""The verbs of `atesd`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atesd.cli.sides import Sides

if TYPE_CHECKING:
    from atesd.config import Config

STOPPED = 3
EXIT_CODES = (
    "Exit codes: 0 done; 1 failed; 2 bad input (a setting, a row, a model, a wrong option); 3 stopped on request by "
    "Ctrl-C or SIGTERM, with a checkpoint saved: the same command resumes; 130 interrupted at once."
)

app = typer.Typer(
    name="atesd",
    help="Adaptive teacher exposure for on-policy self-distillation (arXiv 2605.11458).",
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


class Resume(StrEnum):
    """What to do with a folder that already holds a run."""

    AUTO = "auto"
    NEVER = "never"


class EvaluationSplit(StrEnum):
    """The splits that training does not touch."""

    TEST = "test"
    VALIDATION = "validation"


class Fetchable(StrEnum):
    """Models that `atesd models fetch` knows."""

    SMOLLM2 = "smollm2"


Recipe = Annotated[str, typer.Argument(metavar="RECIPE_OR_YAML", help="A packaged recipe (atesd recipes) or a file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a setting; checked like the file. Repeatable."),
]


@app.command(epilog=EXIT_CODES)
def train(
    recipe: Recipe,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME after the recipe.")] = None,
    resume: Annotated[Resume, typer.Option(help="auto: go on from the newest valid checkpoint.")] = Resume.AUTO,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build everything, say what is planned, stop.")] = False,
) -> None:
    """Train, with live progress. Ctrl-C saves a checkpoint; the same command resumes. torchrun: one process a card."""
    from atesd.config import load_config

    config = load_config(recipe, settings or [])
    if dry_run:
        _show_plan(config)
        return
    folder = out or Path("runs") / run_name(recipe)

    from atesd.cli.display import closing_lines, display_for
    from atesd.models.ranks import joined

    with joined(config.model.device) as ranks, display_for(config, folder) if ranks.first else nullcontext() as display:
        from atesd import build

        outcome = build.train(config, folder, resume=resume.value, listener=display, command=sys.argv)
    if ranks.first:
        for line in closing_lines(outcome.run, config, outcome.status):
            typer.echo(line)
    if outcome.status == "stopped":
        raise typer.Exit(STOPPED)


def run_name(recipe: str) -> str:
    """The name of a run: the recipe's, or the stem of a file."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else Path(recipe).name


def _show_plan(config: Config) -> None:
    from atesd.build import build, close
    from atesd.cli.plan import plan_lines

    parts = build(config)
    try:
        for line in plan_lines(parts):
            typer.echo(line)
    finally:
        close(parts)


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

    typer.echo(f"evaluating {target}; this may take a while", err=True)
    overrides = [*(settings or []), *([f"evaluation.samples={samples}"] if samples else [])]
    scored = evaluate_target(target, data, split.value, overrides)
    if scored is not None:
        typer.echo(score_table(scored.name, scored.row))
        typer.echo(scored.where)


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

    typer.echo(preview_text(config, problem, wanted))


@app.command()
def profile(
    recipe: Recipe,
    settings: Settings = None,
    problems: Annotated[
        int | None, typer.Option(min=2, help="Rollouts, one a problem. Default: those of 8 updates, at most 256.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: runs/NAME-profile after the recipe.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Before training: what a teacher would be worth at each reveal ratio; suggests one and writes a recipe."""
    from atesd.config import load_config

    config = load_config(recipe, settings or [])
    name = run_name(recipe)

    from atesd.cli.profile import print_profile

    print_profile(config, name, problems, out or Path("runs") / f"{name}-profile", as_json=as_json)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not; or the folder of one sweep.")
    ],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the first folder.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Serve the page on loopback while the runs go on.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Read by --live; 0: any that is free.")] = 8787,
    baseline: Annotated[
        str | None, typer.Option(metavar="ARM", help="Of a sweep: compare with this arm. Default: the plan's first.")
    ] = None,
) -> None:
    """Write one self-contained page about runs or about a whole sweep, or serve that of runs while they go on."""
    from atesd.cli.pages import sweep_among
    from atesd.runs import RunFolder

    sweep = sweep_among(runs, live=live)
    if sweep is not None:
        from atesd.experiments.sweep_report import write_sweep_report

        typer.echo(f"report: {write_sweep_report(sweep, out, baseline)}")
        return
    if baseline is not None:
        raise typer.BadParameter("is read for a sweep's folder alone; leave it out", param_hint="--baseline")
    if live:
        if out is not None:
            raise typer.BadParameter("--live writes no file; leave out one of the two", param_hint="--out")
        from atesd.cli.live import serve

        serve([RunFolder.open(run).path for run in runs], port)
        return
    page = out or RunFolder.open(runs[0]).report

    from atesd.report.page import write_report

    typer.echo(f"report: {write_report(runs, page)}")


@app.command(cls=Sides)
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN... -- RUN...", help="Baseline, then candidate: finished runs.")
    ],
    candidate: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="A run of the candidate, as after --. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; shares, not per cent.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Is one group of runs better than another? Paired by seed if possible; intervals over seeds and problems."""
    from atesd.cli.comparison import print_comparison

    print_comparison(runs, candidate or [], as_json=as_json, as_markdown=as_markdown)


@app.command()
def recipes() -> None:
    """List the packaged recipes."""
    from atesd.config import recipe_names, recipe_text

    _show_names({name: recipe_text(name) for name in recipe_names()})


def _show_names(texts: dict[str, str]) -> None:
    """Names of packaged files, each with the comment that it begins with."""
    for name, text in texts.items():
        typer.echo(f"{name:<{max(map(len, texts))}}  {text.splitlines()[0].removeprefix('# ')}")


@app.command()
def config(recipe: Recipe, settings: Settings = None) -> None:
    """Print every setting in force, as YAML with units and origins as comments."""
    from atesd.cli.settings import annotated_yaml
    from atesd.config import load_config

    typer.echo(annotated_yaml(load_config(recipe, settings or [])), nl=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo's runs, page and figure.")] = Path("runs/demo"),
    settings: Settings = None,
) -> None:
    """Train OPSD, fixed ratios and ATESD in both embedded worlds and print what came out. Minutes, on two cores."""
    from atesd.experiments.demo import run_demo

    try:
        typer.echo(run_demo(out, typer.echo, settings or []))
    except KeyboardInterrupt:
        typer.echo("stopped, with a checkpoint of every run that was going; the same command goes on")
        raise typer.Exit(STOPPED) from None


@app.command(epilog=EXIT_CODES)
def sweep(
    plan: Annotated[str, typer.Argument(metavar="PLAN_OR_YAML", help="A packaged plan (--list) or a file.")] = "",
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. Default: runs/NAME after the plan.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: as many as GPUs, else as cores.")
    ] = None,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Print one `atesd train` per cell for a scheduler, and stop.")
    ] = False,
    list_plans: Annotated[bool, typer.Option("--list", help="List the packaged plans, and stop.")] = False,
) -> None:
    """Train every cell of a plan (axes x seeds), each an ordinary run. Run it again: what is finished stays."""
    from atesd.errors import ConfigError
    from atesd.experiments.plan import cells_of, load_plan, plan_names, plan_text

    if list_plans:
        _show_names({name: plan_text(name) for name in plan_names()})
        return
    if not plan:
        raise ConfigError("sweep: which plan? Name a packaged one (atesd sweep --list) or a YAML file")
    folder = out or Path("runs") / run_name(plan)
    cells = cells_of(load_plan(plan, settings or []), folder, plan)
    if print_commands:
        from atesd.experiments.grid import command_lines

        for line in command_lines(cells):
            typer.echo(line)
        return

    from atesd.cli.sweep import run_cells

    try:
        text, unfinished = run_cells(cells, jobs, folder)
    except KeyboardInterrupt:
        typer.echo("stopped, with a checkpoint of every run that was going; the same command goes on")
        raise typer.Exit(STOPPED) from None
    typer.echo(text)
    if unfinished:
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES)
def reproduce(
    experiment: Annotated[str, typer.Argument(metavar="NAME", help="An experiment (--list), or all.")] = "all",
    settings: Settings = None,
    scale: Annotated[str, typer.Option(help="Which grid: micro, the embedded worlds.")] = "micro",
    out: Annotated[Path, typer.Option(help="Folder of cells, pages and figures.")] = Path("runs/reproduce"),
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: as many as GPUs, else as cores.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Paired seeds, from 0. Default: the scale's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print cells and expected time, and stop.")] = False,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Print one `atesd train` per cell for a scheduler, and stop.")
    ] = False,
    list_experiments: Annotated[bool, typer.Option("--list", help="List the experiments, and stop.")] = False,
) -> None:
    """The paper's tables and figures, its numbers beside ours, a verdict per claim. Run it again: it goes on."""
    from atesd.experiments.paper.scale import budget, cells_for, load_scale

    grid = load_scale(scale)
    if list_experiments:
        for name in grid.experiments:
            typer.echo(name)
        return

    from atesd.experiments.paper.reproduce import named

    names = named(experiment)
    cells = cells_for(grid, names, out, settings or [], seeds)
    if dry_run:
        from atesd.experiments.workers import slots
        from atesd.report.tables import render_text

        typer.echo(render_text(budget(grid, names, cells, len(slots(jobs)))), nl=False)
        return
    if print_commands:
        from atesd.experiments.grid import command_lines

        for line in command_lines(cells):
            typer.echo(line)
        return

    from atesd.cli.reproduce import run_experiments

    try:
        text, whole = run_experiments(grid, names, cells, jobs, out)
    except KeyboardInterrupt:
        typer.echo("stopped, with a checkpoint of every run that was going; the same command goes on")
        raise typer.Exit(STOPPED) from None
    typer.echo(text)
    if not whole:
        raise typer.Exit(1)


@app.command("bad-teacher")
def bad_teacher(
    out: Annotated[Path, typer.Option(help="Folder of the runs and the figure.")] = Path("runs/bad-teacher"),
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds of each arm.")] = 3,
    updates: Annotated[int, typer.Option(min=4, help="Updates of each run.")] = 400,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
) -> None:
    """Train both reward presets under a teacher that should not be followed, beside full, fixed and random exposure."""
    from atesd.experiments.bad_teacher import run_bad_teacher

    typer.echo(run_bad_teacher(out, seeds, updates, jobs, typer.echo))


@app.command("null-test")
def null_test(
    recipe: Recipe,
    settings: Settings = None,
    decisions: Annotated[int, typer.Option(min=20, help="Exposure decisions per seed.")] = 100,
    seeds: Annotated[int, typer.Option(min=2, help="Independent controllers.")] = 10,
    batches: Annotated[int, typer.Option(min=2, help="Batches on which the frozen student is measured.")] = 24,
    out: Annotated[Path | None, typer.Option(help="A name: write NAME.json, NAME.svg and NAME.png.")] = None,
) -> None:
    """Does the controller move although the student never learns? Measures noise, trains nothing."""
    import json

    from atesd.config import load_config

    config = load_config(recipe, settings or [])

    from atesd.experiments.null_report import draw_null, run_null_test

    text, figures = run_null_test(config, decisions, seeds, batches)
    typer.echo(text, nl=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(figures) + "\n", "utf-8")
        draw_null(figures, out)
        typer.echo(f"figures: {', '.join(str(out.with_suffix(suffix)) for suffix in ('.json', '.svg', '.png'))}")


@app.command()
def audit(
    recipe: Recipe,
    settings: Settings = None,
    rollouts: Annotated[
        int | None, typer.Option(min=8, help="Rollouts scored at 5 ratios. Default: 16, or two batches if fewer.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Fresh answers to each probe problem.")] = 3,
    decisions: Annotated[int, typer.Option(min=20, help="Simulated decisions per seed.")] = 100,
    seeds: Annotated[int, typer.Option(min=2, help="Simulated controllers per reward.")] = 10,
    effect: Annotated[
        float | None,
        typer.Option(help="Expected difference of a hold's progress between ratio 0 and 1, in the signal's unit."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Before a long run: whether the reward drifts without any learning, how noisy it is, what the budget affords."""
    from atesd.config import load_config
    from atesd.errors import ConfigError

    if effect is not None and effect <= 0:
        raise ConfigError(f"--effect {effect}: expected more than 0, in the unit of the progress signal")
    config = load_config(recipe, settings or [])

    from atesd.cli.audit import print_audit

    print_audit(
        config,
        rollouts=rollouts or max(8, min(16, 2 * config.train.batch_size)),
        repeats=repeats,
        decisions=decisions,
        seeds=seeds,
        effect=effect,
        as_json=as_json,
    )


@models.command()
def fetch(name: Annotated[Fetchable, typer.Argument(help="Which model.")]) -> None:  # noqa: ARG001
    """Fetch a model, check its hash, and convert it."""
    from atesd.models.fetch import fetch_smollm2

    fetch_smollm2(say=typer.echo)


@models.callback()
def _models() -> None:
    """A group with one verb stays a group."""


@world.command()
def pretrain(
    name: Annotated[str, typer.Argument(help="How: a pretraining recipe, such as good.")] = "good",
    seed: Annotated[int, typer.Option(min=0, help="First seed to try.")] = 0,
    attempts: Annotated[int, typer.Option(min=1, help="Seeds to try until one passes the gates.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Model folder. Default: worlds/NAME.")] = None,
) -> None:
    """Pretrain a world model from a seed, seed after seed until one passes the gates. Minutes on one core."""
    import json

    from atesd.errors import ConfigError
    from atesd.train.pretrain import RECIPES, pretrain_command

    if name not in RECIPES:
        raise ConfigError(f"world pretrain {name}: expected one of {', '.join(RECIPES)}")
    folder = out or Path("worlds") / name

    def show(candidate: int, step: int, loss: float) -> None:
        if step % 100 == 0:
            typer.echo(f"seed {candidate}  step {step}  loss {loss:.3f}")

    typer.echo(json.dumps(pretrain_command(seed, attempts, folder, name, show), indent=2))
    typer.echo(f"model folder: {folder} (use it with --set model.path={folder})")


@world.callback()
def _world() -> None:
    """A group with one verb stays a group."""
