"""One self-contained page from run folders: no script, no remote content, and a policy that forbids both."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from atesd.config import dump_config, method_name
from atesd.refusals import refusals_told
from atesd.runs import write_atomic
from atesd.table import Table
from atesd.text import MISSING, duration, visible
from atesd_lab.report import figures, lookahead
from atesd_lab.report.alarms import Alarm, find_alarms
from atesd_lab.report.canvas import Chart
from atesd_lab.report.decisions import LATEST, decisions_table, ridge, timeline
from atesd_lab.report.rows import Manifest, RunRows, read_runs
from atesd_lab.report.samples import (
    ALIGNMENT_LEVELS,
    KL_LEVELS,
    RATIO_LEVELS,
    SampleView,
    cuts_by_alignment,
    sample_views,
)
from atesd_lab.report.seeds import seeds_table
from atesd_lab.report.tables import changed_settings, differences_table, evaluation_table, results_table
from atesd_lab.report.worlds import World, worlds_of

NAMED = 4
"""So many runs are named in the title of a page, and have all their tables open."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart as the template sees it."""

    svg: Markup
    reading: str


@dataclass(frozen=True, slots=True)
class RunView:
    """Everything that the page says of one run."""

    anchor: str
    name: str
    status: str
    has_updates: bool
    unrewarded: str
    learning: tuple[Figure, ...]
    exposure: tuple[Figure, ...]
    lookahead: tuple[Figure, ...]
    decisions: tuple[Figure, ...]
    latest_decisions: Table
    all_decisions: Table | None
    credit: tuple[Figure, ...]
    signals: tuple[Figure, ...]
    health: tuple[Figure, ...]
    time: tuple[Figure, ...]
    alarms: tuple[Alarm, ...]
    evaluations: Table
    samples: tuple[SampleView, ...]
    samples_logged: int
    has_alignment: bool
    has_ratio: bool
    has_gate: bool
    settings: Table
    config_text: str


@dataclass(frozen=True, slots=True)
class Lead:
    """What stands before everything else on a page: its title, what the runs say, what to know of it, and how to go on.

    A command comes with what it does, in words.
    """

    title: str
    headline: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()


def write_report(runs: Sequence[Path], out: Path, lead: Lead | None = None) -> Path:
    """Read run folders, write the page to `out` (whole or not at all), and return `out`.

    Raises `RunError` for a folder that holds no run and for a damaged row. The same folders give the same bytes.
    """
    page = render_page(read_runs(runs), lead)
    with refusals_told(out, "written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, page.encode())
    return out


def render_page(runs: Sequence[RunRows], lead: Lead | None = None) -> str:
    """The page as HTML text."""
    style = (importlib.resources.files("atesd_lab.report") / "templates" / "page.css").read_text("utf-8")
    splits = sorted({split for run in runs for split in run.splits}, key=lambda split: (split != "test", split))
    several = len(runs) > 1
    worlds = worlds_of(runs)
    first, more = _result_tables(worlds, splits)
    seeds = [table for split in splits if (table := seeds_table(runs, split))]
    shown = _notes_once([*first, *seeds, *more])
    open_tables, folded = shown[: len(first) + len(seeds)], shown[len(first) + len(seeds) :]
    lead = lead or Lead(", ".join(run.name for run in runs) if len(runs) <= NAMED else f"{len(runs)} runs")
    return (
        page_environment()
        .get_template("page.html.jinja")
        .render(
            lead=lead,
            lead_figures=figures_of(lead.charts),
            policy=content_policy(style),
            style=Markup(style),  # ours; the policy's hash is of exactly this text
            several=several,
            facts=facts_table(runs),
            results=open_tables,
            more=folded,
            accuracy=figures_of(figures.accuracy(world, split) for split in splits for world in worlds),
            comparison=[(world.name, _comparison(world)) for world in worlds] if several else (),
            runs=[_run_view(run, f"run{index}", alone=not several) for index, run in enumerate(runs, start=1)],
            levels=KL_LEVELS,
            shares=ALIGNMENT_LEVELS,
            ratios=RATIO_LEVELS,
        )
    )


def content_policy(style: str) -> str:
    """The content security policy of a page whose one style sheet is `style`: everything else is forbidden."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"


def facts_table(runs: Sequence[RunRows]) -> Table:
    """What each run was, with which code and data, and how far it came."""
    columns = [_facts(run) for run in runs]
    rows = [(fact, *(column[fact] for column in columns)) for fact in columns[0]]
    return Table("Runs" if len(runs) > 1 else "Run", ("", *(run.name for run in runs)), tuple(rows))


def status(run: RunRows) -> str:
    """How far a run came and how it ended, as its manifest and its last row say."""
    words = {"running": "running, or killed", "finished": "finished", "stopped": "stopped early", "failed": "failed"}
    ended = words.get(str(run.manifest.get("status")), str(run.manifest.get("status", "unknown")))
    return f"{ended}: {run.updates_done} of {run.config.train.num_updates} updates"


def _facts(run: RunRows) -> dict[str, str]:
    config, manifest = run.config, run.manifest
    versions = manifest.get("versions") or {}
    leaps = config.data.leap_probability
    share = f"leap share {config.data.leap_share:g}" if leaps is None else f"leaps anywhere, probability {leaps:g}"
    world = f", {share}" if config.data.source == "world" else ""
    losses = {
        "distill": f"{config.loss.divergence.kind}, clip {config.loss.clip}, teacher {config.teacher.weights}",
        "sft": "likelihood of the references",
        "grpo": "likelihood of its own completions, by their advantage",
    }
    command, trainer = manifest.get("command") or [], manifest.get("trainer")
    return {
        "status": status(run),
        "method": method_name(config),
        "model": config.model.path + (f", LoRA rank {config.model.lora.rank}" if config.model.lora else ""),
        "data": f"{config.data.source_name}{world}, fingerprint {_short_hash(manifest.get('data_fingerprint'))}",
        "seed": f"{config.train.seed}, data {config.data.seed}",
        "updates": f"{config.train.num_updates} of {config.train.batch_size} rollouts, "
        f"learning rate {config.train.learning_rate:g}",
        "loss": losses[config.train.method] if trainer is None else f"that of {trainer}",
        "trainer": str(trainer or "atesd"),
        "sessions": _sessions(manifest.get("sessions") or []),
        "started": str(manifest.get("started", MISSING)),
        "time in updates": duration(sum(figures.phase_seconds(run).values())) if run.metrics else MISSING,
        "commit": _short_hash(manifest.get("commit")),
        "command": _typed(command),
        "machine": f"{manifest.get('cpu') or MISSING}, {manifest.get('threads') or 'default'} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version) or MISSING,
    }


def _typed(command: Any) -> str:
    """A command as one would type it: `atesd` for whatever started it, and paths from the folder that one is in."""
    words = [str(word) for word in command] if isinstance(command, list) else str(command).split()
    if words and ("/" in words[0] or words[0].endswith(".py")) and "atesd" in words[0]:
        words[0] = "atesd"
    here = f"{Path.cwd()}/"
    return shlex.join(word.removeprefix(here) for word in words)


def _short_hash(value: Any) -> str:
    """The first 12 characters of a hash, and what follows a plus sign; the manifest has the whole."""
    digest, plus, suffix = str(value or MISSING).partition("+")
    return digest[:12] + plus + suffix


def _sessions(sessions: Sequence[Manifest]) -> str:
    """How often the run was taken up again, and what had changed by then."""
    notes = [str(note) for session in sessions for note in session.get("notes") or []]
    return "; ".join([str(len(sessions)), *notes])


def _notes_once(tables: Sequence[Table]) -> list[Table]:
    """The tables, each without the notes that one before it has made already."""
    made: set[str] = set()
    kept = []
    for table in tables:
        kept.append(replace(table, notes=tuple(note for note in table.notes if note not in made)))
        made |= set(table.notes)
    return kept


def _result_tables(worlds: Sequence[World], splits: Sequence[str]) -> tuple[list[Table], list[Table]]:
    """The tables that stand open, the results of each world on the first split, and those that are folded away.

    With few runs all stand open.
    """
    results = [_titled(world, results_table(world.runs, split)) for split in splits for world in worlds]
    pairs = [(world, differences_table(world.runs, split)) for split in splits for world in worlds]
    differences = [_titled(world, table) for world, table in pairs if table is not None]
    tables = [*results, *differences]
    few = sum(len(world.runs) for world in worlds) <= NAMED
    count = len(tables) if few else min(len(worlds), len(results))
    return tables[:count], tables[count:]


def _titled(world: World, table: Table) -> Table:
    return replace(table, title=world.title(table.title))


def _comparison(world: World) -> tuple[Figure, ...]:
    panels = [*figures.LEARNING, figures.HEALTH[0], figures.HEALTH[1], figures.HEALTH[2]]
    return figures_of([figures.exposures(world), *(figures.metric(world, panel, "several") for panel in panels)])


def _run_view(run: RunRows, anchor: str, alone: bool) -> RunView:
    credit = [figures.credit(run, key, anchor) for key in ("progress", "grounding", "reward", "advantage")]
    difficulty = [figures.by_difficulty(run, split, anchor) for split in run.splits]
    learning = [figures.metric([run], panel, anchor) for panel in figures.LEARNING]
    looks = [lookahead.alignment(run, anchor), lookahead.alignment_map(run, anchor)]
    gate = [figures.metric([run], panel, anchor) for panel in lookahead.GATE]
    many = len(run.decisions) > LATEST
    latest = f"The last {LATEST} of {len(run.decisions)} decisions" if many else "Decisions"
    return RunView(
        anchor=anchor,
        name="The run" if alone else run.name,
        status=status(run),
        has_updates=bool(run.metrics),
        unrewarded=_unrewarded(run),
        learning=figures_of([*learning, *difficulty]),
        exposure=figures_of([figures.exposure(run, anchor), figures.reward_by_ratio(run, anchor)]),
        lookahead=figures_of([*looks, *gate]),
        decisions=figures_of([timeline(run, anchor), ridge(run, anchor)]),
        latest_decisions=decisions_table(run, run.decisions[-LATEST:], latest),
        all_decisions=decisions_table(run, run.decisions, f"All {len(run.decisions)} decisions") if many else None,
        credit=figures_of(credit),
        signals=figures_of(figures.metric([run], panel, anchor) for panel in figures.SIGNALS),
        health=figures_of(figures.metric([run], panel, anchor) for panel in figures.HEALTH),
        time=figures_of([figures.time_by_phase(run, anchor)]),
        alarms=tuple(find_alarms(run)),
        evaluations=evaluation_table(run),
        samples=tuple(sample_views(run)),
        samples_logged=len(run.samples),
        has_alignment=any(row.get("token_alignment") for row in run.samples),
        has_ratio=any(row.get("token_ratio") for row in run.samples),
        has_gate=cuts_by_alignment(run.config),
        settings=changed_settings(run.config),
        config_text=dump_config(run.config),
    )


def _unrewarded(run: RunRows) -> str:
    """Why there is no credit to show."""
    if run.config.exposure.kind == "aligned":
        return "No decision is rewarded: the ratios come from the look-ahead."
    return "No decision has been rewarded" + (
        "." if run.config.exposure.decides else ": the ratios were fixed before the run."
    )


def figures_of(charts: Iterable[Chart | None]) -> tuple[Figure, ...]:
    """Drawn charts; those without anything to show are left out."""
    drawn = (chart for chart in charts if chart is not None)
    return tuple(Figure(Markup(chart.svg()), chart.reading) for chart in drawn)  # matplotlib escapes its texts


def page_environment() -> Environment:
    """Templates in which every value is made visible and then escaped, and a misspelt name is an error."""
    return Environment(
        loader=PackageLoader("atesd_lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)
