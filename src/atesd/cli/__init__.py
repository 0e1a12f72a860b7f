"""The command line: verbs that parse, call and print. Everything heavy is imported by the verb that needs it."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import entry_points

from atesd.cli.commands import app
from atesd.cli.options import code_of
from atesd.errors import AtesdError

VERBS = "atesd.commands"
"""The group of entry points whose functions add verbs: each is called with the `typer.Typer` of the command line."""


def main() -> None:
    """Entry point of `atesd`. An error that a user can act on is one plain message on stderr, never a traceback."""
    add_verbs()
    try:
        app()
    except AtesdError as error:
        from atesd.text import visible  # not before: it is needed by no other way out

        print(f"error: {visible(str(error))}", file=sys.stderr)
        raise SystemExit(code_of(error)) from None
    except OSError as error:  # a disk that refused what no verb foresaw
        from atesd.refusals import reason
        from atesd.text import visible

        print(f"error: {visible(str(error.filename or 'a file'))}: {reason(error)}", file=sys.stderr)
        raise SystemExit(code_of(error)) from None


def add_verbs() -> None:
    """Add the verbs of every installed package that registers some; a package whose files are gone adds none."""
    for entry in entry_points(group=VERBS):
        if importlib.util.find_spec(entry.module.partition(".")[0]) is not None:
            entry.load()(app)
