"""The laboratory's verbs of `atesd`; its entry point in the group `atesd.commands` adds them to the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atesd.cli.options import EXIT_CODES, FAILED, STOPPED, Recipe, Settings, run_name, say, show_names
from atesd_lab.cli.sides import Sides

if TYPE_CHECKING:
    from atesd_lab.sweep.plan import Cell

laboratory = typer.Typer()

Jobs = Annotated[int | None, typer.Option(min=1, help="Runs at a time. Default: as many as GPUs, else as cores.")]
PrintCommands = Annotated[
    bool, typer.Option("--print-commands", help="Print one `atesd train` per cell for a scheduler, and stop.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_to(app: typer.Typer) -> None:
    """Give the command line the laboratory's verbs."""
    app.registered_commands.extend(laboratory.registered_commands)


@contextmanager
def stops_with_checkpoints() -> Iterator[None]:
    """An interrupt ends a set of runs and the command, and says how they go on."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped, with a checkpoint of every run that was going; the same command goes on")
        raise typer.Exit(STOPPED) from None


def print_command_lines(cells: Sequence[Cell]) -> None:
    """One `atesd train` a line."""
    from atesd_lab.sweep.grid import command_lines

    for line in command_lines(cells):
        say(line)


@laboratory.command()
def profile(
    recipe: Recipe,
    settings: Settings = None,
    problems: Annotated[
        int | None, typer.Option(min=2, help="Rollouts, one a problem. Default: those of 8 updates, at most 256.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: runs/NAME-profile after the recipe.")] = None,
    as_json: AsJson = False,
) -> None:
    """Before training: what a teacher would be worth at each reveal ratio; suggests one and writes a recipe."""
    from atesd.config import load_config

    config = load_config(recipe, settings or [])
    name = run_name(recipe)

    from atesd_lab.cli.profile import print_profile

    print_profile(config, name, problems, out or Path("runs") / f"{name}-profile", as_json=as_json)


@laboratory.command()
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
    from atesd.runs import RunFolder
    from atesd_lab.cli.pages import sweep_among

    sweep = sweep_among(runs, live=live)
    if sweep is not None:
        from atesd_lab.sweep.page import write_sweep_report

        say(f"report: {write_sweep_report(sweep, out, baseline)}")
        return
    if baseline is not None:
        raise typer.BadParameter("is read for a sweep's folder alone; leave it out", param_hint="--baseline")
    if live:
        if out is not None:
            raise typer.BadParameter("--live writes no file; leave out one of the two", param_hint="--out")
        from atesd_lab.cli.live import serve

        serve([RunFolder.open(run).path for run in runs], port)
        return
    page = out or RunFolder.open(runs[0]).report

    from atesd_lab.report.page import write_report

    say(f"report: {write_report(runs, page)}")


@laboratory.command(cls=Sides)
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
    from atesd_lab.cli.comparison import print_comparison

    print_comparison(runs, candidate or [], as_json=as_json, as_markdown=as_markdown)


@laboratory.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo's runs, page and figure.")] = Path("runs/demo"),
    settings: Settings = None,
) -> None:
    """Train OPSD, fixed ratios and ATESD in both embedded worlds and print what came out. Minutes, on two cores."""
    from atesd_lab.studies.demo import run_demo

    with stops_with_checkpoints():
        say(run_demo(out, say, settings or []))


@laboratory.command(epilog=EXIT_CODES)
def sweep(
    plan: Annotated[str, typer.Argument(metavar="PLAN_OR_YAML", help="A packaged plan (--list) or a file.")] = "",
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. Default: runs/NAME after the plan.")] = None,
    jobs: Jobs = None,
    print_commands: PrintCommands = False,
    list_plans: Annotated[bool, typer.Option("--list", help="List the packaged plans, and stop.")] = False,
) -> None:
    """Train every cell of a plan (axes x seeds), each an ordinary run. Run it again: what is finished stays."""
    from atesd.errors import ConfigError
    from atesd_lab.sweep.plan import cells_of, load_plan, plan_names, plan_text

    if list_plans:
        show_names({name: plan_text(name) for name in plan_names()})
        return
    if not plan:
        raise ConfigError("sweep: which plan? Name a packaged one (atesd sweep --list) or a YAML file")
    folder = out or Path("runs") / run_name(plan)
    cells = cells_of(load_plan(plan, settings or []), folder, plan)
    if print_commands:
        print_command_lines(cells)
        return

    from atesd_lab.cli.sweep import run_cells

    with stops_with_checkpoints():
        text, unfinished = run_cells(cells, jobs, folder)
    say(text)
    if unfinished:
        raise typer.Exit(FAILED)


@laboratory.command(epilog=EXIT_CODES)
def reproduce(
    experiment: Annotated[str, typer.Argument(metavar="NAME", help="An experiment (--list), or all.")] = "all",
    settings: Settings = None,
    scale: Annotated[
        str, typer.Option(help="Which grid: micro (the embedded worlds), qwen3-1.7b, qwen3-4b or qwen3-8b (GPUs).")
    ] = "micro",
    out: Annotated[
        Path | None, typer.Option(help="Folder of cells, pages and figures. Default: runs/reproduce, -SCALE after it.")
    ] = None,
    jobs: Jobs = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Paired seeds, from 0. Default: the scale's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print cells, time and disk, and stop.")] = False,
    print_commands: PrintCommands = False,
    list_experiments: Annotated[bool, typer.Option("--list", help="List the experiments, and stop.")] = False,
    benchmark: Annotated[
        str | None, typer.Option(metavar="NAMES", help="In place of the scale's benchmarks, as after evaluate.")
    ] = None,
    expect_hash: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SHA256", help="As of evaluate. Repeatable.")
    ] = None,
) -> None:
    """The paper's tables and figures, its numbers beside ours, a verdict per claim. Run it again: it goes on."""
    from atesd_lab.paper.scale import asked_of, budget, cells_for, load_scale

    grid = load_scale(scale)
    if list_experiments:
        for name in grid.experiments:
            say(name)
        return

    from atesd_lab.paper.reproduce import named

    names = named(experiment, grid)
    folder = out or Path("runs") / ("reproduce" if scale == "micro" else f"reproduce-{scale}")
    asked = asked_of(grid, benchmark, expect_hash or [])
    cells = cells_for(grid, names, folder, settings or [], seeds, asked)
    if dry_run:
        from atesd.table import render_text
        from atesd_lab.sweep.workers import slots

        say(render_text(budget(grid, names, cells, len(slots(jobs)))), nl=False)
        return
    if print_commands:
        print_command_lines(cells)
        return

    from atesd_lab.cli.reproduce import run_experiments

    with stops_with_checkpoints():
        text, whole = run_experiments(grid, names, cells, jobs, folder)
    say(text)
    if not whole:
        raise typer.Exit(FAILED)


@laboratory.command("bad-teacher")
def bad_teacher(
    out: Annotated[Path, typer.Option(help="Folder of the runs and the figure.")] = Path("runs/bad-teacher"),
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds of each arm.")] = 3,
    updates: Annotated[int, typer.Option(min=4, help="Updates of each run.")] = 400,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
) -> None:
    """Train both reward presets under a teacher that should not be followed, beside full, fixed and random exposure."""
    from atesd_lab.studies.bad_teacher import run_bad_teacher

    say(run_bad_teacher(out, seeds, updates, jobs, say))


@laboratory.command("null-test")
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

    from atesd.runs import write_atomic
    from atesd_lab.audit.null_report import draw_null, run_null_test

    text, figures = run_null_test(config, decisions, seeds, batches)
    say(text, nl=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        written = [out.with_name(f"{out.name}{suffix}") for suffix in (".json", ".svg", ".png")]
        write_atomic(written[0], (json.dumps(figures) + "\n").encode())
        draw_null(figures, out)
        say(f"figures: {', '.join(map(str, written))}")


@laboratory.command()
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
    as_json: AsJson = False,
) -> None:
    """Before a long run: whether the reward drifts without any learning, how noisy it is, what the budget affords."""
    from atesd.config import load_config
    from atesd.errors import ConfigError

    if effect is not None and effect <= 0:
        raise ConfigError(f"--effect {effect}: expected more than 0, in the unit of the progress signal")
    config = load_config(recipe, settings or [])

    from atesd_lab.cli.audit import print_audit

    print_audit(
        config,
        rollouts=rollouts or max(8, min(16, 2 * config.train.batch_size)),
        repeats=repeats,
        decisions=decisions,
        seeds=seeds,
        effect=effect,
        as_json=as_json,
    )
