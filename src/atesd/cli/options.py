"""What the verbs of the command line share: their arguments, exit codes and names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from atesd.text import visible

STOPPED = 3
"""The exit code of a run that was stopped on request."""
EXIT_CODES = (
    "Exit codes: 0 done; 1 failed; 2 bad input (a setting, a row, a model, a wrong option); 3 stopped on request by "
    "Ctrl-C or SIGTERM, with a checkpoint saved: the same command resumes; 130 interrupted at once."
)

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
