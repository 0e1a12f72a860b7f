"""Two groups of arguments with `--` between them."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

FLAGS = ("--json", "--markdown", "--help", "-h")


class Sides(TyperCommand):
    """A command that reads `A B -- C D` as `A B --candidate C --candidate D`: click alone forgets where `--` stood.

    What looks like one of the command's flags keeps its meaning after `--`; every other word there is a run folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Translate, then parse as ever. `ctx` is click's context, which typer brings under names that change."""
        if "--" in args:
            place = args.index("--")
            before, after = args[:place], args[place + 1 :]
            runs = [word for word in after if word not in FLAGS]
            flags = [word for word in after if word in FLAGS]
            args = [*before, *flags, *(word for run in runs for word in ("--candidate", run))]
        return super().parse_args(ctx, args)
