"""What `atesd audit` prints: tables in colours on a terminal, plain elsewhere, JSON on request."""

from __future__ import annotations

import json
import sys
import textwrap

from rich.console import Console
from rich.text import Text

from atesd.cli.options import say
from atesd.config import Config
from atesd.table import render_text
from atesd.text import visible
from atesd_lab.audit.audit import Audit, run_audit
from atesd_lab.audit.text import readings_table, rewards_table, sentences, verdict_lines
from atesd_lab.cli.rich_table import rich_table

WIDTH = 120
COLOURS = {"sound": "green", "drifts up": "red", "drifts down": "red"}


def print_audit(
    config: Config,
    *,
    rollouts: int,
    repeats: int,
    decisions: int,
    seeds: int,
    effect: float | None,
    as_json: bool = False,
) -> None:
    """Measure, simulate and print; progress goes to stderr."""
    audit = run_audit(
        config,
        rollouts=rollouts,
        repeats=repeats,
        decisions=decisions,
        seeds=seeds,
        effect=effect,
        say=lambda line: say(line, err=True),
    )
    if as_json:
        say(json.dumps(audit.as_json(), indent=1, allow_nan=False))
    elif sys.stdout.isatty():
        print_rich(audit, Console())
    else:
        for line in verdict_lines(audit):
            say(textwrap.fill(line, WIDTH, subsequent_indent="  "))
        say("")
        for table in (rewards_table(audit), readings_table(audit)):
            say(render_text(table))
        for line in sentences(audit):
            say(textwrap.fill(line, WIDTH, subsequent_indent="  "))


def print_rich(audit: Audit, console: Console) -> None:
    """The verdict, both tables with theirs in colour, and the sentences."""
    for line in verdict_lines(audit):
        console.print(Text(visible(line)))
    for table in (rewards_table(audit), readings_table(audit)):
        console.print(rich_table(table, COLOURS))
        for note in table.notes:
            console.print(Text(visible(note)))
    for line in sentences(audit):
        console.print(Text(visible(line)))
