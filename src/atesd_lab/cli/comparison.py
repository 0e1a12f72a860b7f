"""What `atesd compare` prints: a table in colours on a terminal, plain elsewhere, JSON or Markdown on request."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from atesd.cli.options import say
from atesd.config import method_name
from atesd.errors import ConfigError
from atesd.table import Table, render_text
from atesd.text import visible
from atesd_lab.cli.rich_table import rich_table
from atesd_lab.report.groups import group_of
from atesd_lab.report.honest import Report, compare_groups, comparison_table, markdown
from atesd_lab.report.rows import read_run

COLOURS = {"better": "green", "worse": "red"}
SIDES = ("baseline", "candidate")


def print_comparison(
    baseline: Sequence[Path], candidate: Sequence[Path], *, as_json: bool = False, as_markdown: bool = False
) -> None:
    """Compare and print. Raises `ConfigError` without a second group, or for both formats at once."""
    if not candidate:
        raise ConfigError("compare: no candidate; write the baseline's runs, then --, then the candidate's")
    if as_json and as_markdown:
        raise ConfigError("compare: --json and --markdown exclude each other; choose one")
    names = group_names(baseline[0], candidate[0])
    report = compare_groups(group_of(names[0], baseline), group_of(names[1], candidate))
    if as_json:
        say(json.dumps(report.as_json(), indent=1, allow_nan=False))
    elif as_markdown:
        say(markdown(comparison_table(report)), nl=False)
    elif sys.stdout.isatty():
        print_rich(report, Console())
    else:
        answer, table = answer_first(report)
        say(f"{answer}\n" if answer else "", nl=bool(answer))
        say(render_text(table), nl=False)


def answer_first(report: Report) -> tuple[str, Table]:
    """The verdict at the last update, or the first that there is, and the table without it; empty where none is."""
    table = comparison_table(report)
    verdicts = sum(one.honest for one in report.comparisons)
    return (table.notes[0], replace(table, notes=table.notes[1:])) if verdicts else ("", table)


def group_names(baseline: Path, candidate: Path) -> tuple[str, str]:
    """What the sides are called: their methods, or baseline and candidate where these are the same."""
    first, second = (method_name(read_run(path).config) for path in (baseline, candidate))
    return (first, second) if first != second else (SIDES[0], SIDES[1])


def print_rich(report: Report, console: Console) -> None:
    """The answer, the table with its verdicts in colour, and the notes below."""
    answer, table = answer_first(report)
    console.print(Text(visible(answer)))
    verdicts = {row[-1]: COLOURS.get(row[-1].partition(",")[0], "yellow") for row in table.rows}
    console.print(rich_table(table, verdicts))
    for note in table.notes:
        console.print(Text(visible(note)))
