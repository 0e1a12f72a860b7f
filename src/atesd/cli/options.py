"""What the verbs of the command line share: their arguments, exit codes and names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from atesd.errors import ConfigError, DataError, ModelError
from atesd.text import visible

FAILED, BAD_INPUT, STOPPED, INTERRUPTED = 1, 2, 3, 130
CODES = {
    0: "done",
    FAILED: "failed, or a run folder is not in the state that the command needs",
    BAD_INPUT: "bad input (a setting, a row, a model, a wrong option)",
    STOPPED: "stopped on request by Ctrl-C or SIGTERM, with a checkpoint saved: the same command resumes",
    INTERRUPTED: "interrupted at once",
}
"""What each exit code means; no verb has another. A process that a signal ended has the system's code."""
EXIT_CODES = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in CODES.items()) + "."


def code_of(error: Exception) -> int:
    """The exit code of an error that ends a command."""
    return BAD_INPUT if isinstance(error, ConfigError | DataError | ModelError) else FAILED


Recipe = Annotated[str, typer.Argument(metavar="RECIPE_OR_YAML", help="A packaged recipe (atesd recipes) or a file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a setting; checked like the file. Repeatable."),
]


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text with nothing invisible in it: no name of a folder or recipe turns the terminal's text about."""
    typer.echo(visible(text), err=err, nl=nl)


def run_name(recipe: str) -> str:
    """The name of a run: the recipe's, or the stem of a file."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else Path(recipe).name


def show_names(texts: Mapping[str, str]) -> None:
    """Names of packaged files, each with the comment that it begins with."""
    for name, text in texts.items():
        say(f"{name:<{max(map(len, texts))}}  {text.splitlines()[0].removeprefix('# ')}")
