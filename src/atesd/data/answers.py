"""Whether a completion's final answer is right."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[-+]?\d+(?:\.\d+)?|[A-Za-z]")


def last_boxed(text: str) -> str | None:
    r"""The content of the box that opens last in `text`: `\boxed{...}` or `\fbox{...}`, stripped of outer spaces.

    Braces are matched; escaped ones (`\{`, `\}`) do not count. Without braces a number or one letter is taken
    (`\boxed 7`). None if there is no box, if the last one is empty, or if it never closes: a truncated answer is not
    replaced by an earlier one.
    """
    span = last_box(text)
    return None if span is None else text[span[0] : span[1]].strip() or None


def last_box(text: str) -> tuple[int, int] | None:
    """Where the content of the last box starts and ends in `text` (see `last_boxed`), without its braces."""
    start = max((match.end() for match in _BOX.finditer(text)), default=-1)
    if start < 0:
        return None
    if text[start : start + 1] == "{":
        end = _closing_brace(text, start)
        return None if end is None else (start + 1, end)
    bare = _BARE.match(text, start)
    return None if bare is None else bare.span()


def _closing_brace(text: str, opening: int) -> int | None:
    depth, position = 0, opening
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
        position += 1
    return None
