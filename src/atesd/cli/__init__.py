"""The command line: verbs that parse, call and print. Everything heavy is imported by the verb that needs it."""

from __future__ import annotations

import sys

from atesd.cli.commands import app
from atesd.errors import AtesdError, ConfigError, DataError, ModelError


def main() -> None:
    """Entry point of `atesd`. An error that a user can act on is one plain message on stderr, never a traceback."""
    try:
        app()
    except AtesdError as error:
        from atesd.report.text import visible  # not before: it is needed by no other way out

        print(f"error: {visible(str(error))}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError | DataError | ModelError) else 1) from None
