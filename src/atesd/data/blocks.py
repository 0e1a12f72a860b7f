r"""Blocks of a text that are one thing: code fences, environments, tagged drawings and listings, tables.

- A code fence: a line that opens with three or more backticks or tildes, indented, quoted or in a list too, up to the
  next such line with nothing behind it.
- An environment, `\begin{x}` to its `\end{x}`, and a tag of `TAGS`, `[asy]` to `[/asy]`, `<table>` to `</table>`,
  nesting respected.
- A table: a line of dashes and bars (`|---|---|`, `--- | ---`) with the header before it and the rows behind it; two or
  more lines with bars around them (`| a | b |`) or of a drawn frame (`+---+---+`).

What never closes is ordinary text. Linear in the length of the text.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

TAGS = ("asy", "code", "figure", "latex", "math", "pre", "script", "style", "svg", "table", "tex", "tikz", "verbatim")

_FENCE = re.compile(
    r"^[ \t]*+(?:>[ \t]*+)*+(?:(?:[-*+]|\d{1,3}[.)])[ \t]++)?(?P<fence>`{3,}+|~{3,}+)(?=(?P<after>[^\r\n]*+))",
    re.MULTILINE,
)
_EDGE = re.compile(
    r"\\(?P<edge>begin|end)\s*+\{\s*+(?P<name>[^{}\s]++)\s*+\}|\\[\s\S]"
    rf"|(?P<bracket>[\[<])(?P<slash>/?)(?P<tag>(?i:{'|'.join(TAGS)}))(?:[ \t=][^\[\]<>\r\n]{{0,200}}+)?[\]>]"
)
_LINE = re.compile(r"[^\r\n]++")
_RULE = frozenset("|:- \t")
_FRAME = re.compile(r"\+[-=+:]{2,}\+")

Stretch = tuple[int, int]


class Stretches:
    """Stretches of a text; `place in stretches` is whether a place lies strictly inside one of them."""

    def __init__(self, stretches: Iterable[Stretch]) -> None:
        merged: list[Stretch] = []
        for start, end in sorted(stretches):
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self._starts = [start for start, _ in merged]
        self._ends = [end for _, end in merged]

    def __contains__(self, place: int) -> bool:
        index = bisect_left(self._starts, place) - 1
        return index >= 0 and place < self._ends[index]

    def holds(self, start: int) -> bool:
        """Whether the character at `start` belongs to a stretch."""
        return start + 1 in self or start in self


def blocks(text: str) -> list[Stretch]:
    """(start, end) of every block of `text`. What stands in a code fence opens and closes no other block."""
    fences = list(_fences(list(_FENCE.finditer(text))))
    fenced = Stretches(fences)
    edges = [edge for edge in _EDGE.finditer(text) if not fenced.holds(edge.start())]
    return [*fences, *_nested(edges), *_tables(text)]


def _fences(marks: Sequence[re.Match[str]]) -> Iterator[Stretch]:
    longest = _longest_behind(marks)
    place = 0
    while place < len(marks):
        opener = marks[place]
        kind, length = opener["fence"][0], len(opener["fence"])
        if longest[place] >= length and not (kind == "`" and "`" in opener["after"]):
            place = next(i for i in range(place + 1, len(marks)) if _closes(marks[i], kind) >= length)
            yield opener.start(), marks[place].end()
        place += 1


def _closes(mark: re.Match[str], kind: str) -> int:
    """The length of a fence that can close one of this kind; 0 if it cannot."""
    return len(mark["fence"]) if mark["fence"][0] == kind and not mark["after"].strip() else 0


def _longest_behind(marks: Sequence[re.Match[str]]) -> list[int]:
    """For each mark the length of the longest one behind it that can close its kind."""
    longest = [0] * len(marks)
    best = {"`": 0, "~": 0}
    for place in range(len(marks) - 1, -1, -1):
        kind = marks[place]["fence"][0]
        longest[place] = best[kind]
        best[kind] = max(best[kind], _closes(marks[place], kind))
    return longest


def _nested(edges: Iterable[re.Match[str]]) -> Iterator[Stretch]:
    """Environments and tags that close."""
    unclosed: dict[str, list[int]] = defaultdict(list)
    for edge in edges:
        if edge["edge"]:
            name, opens = "\\" + edge["name"], edge["edge"] == "begin"
        elif edge["tag"]:
            name, opens = edge["bracket"] + edge["tag"].lower(), not edge["slash"]
        else:
            continue
        if opens:
            unclosed[name].append(edge.start())
        elif unclosed[name]:
            yield unclosed[name].pop(), edge.end()


def _tables(text: str) -> Iterator[Stretch]:
    lines = [match.span() for match in _LINE.finditer(text)]
    if "|" not in text and "+" not in text:
        return
    runs = _runs(text, lines)
    rows = _rows([text[start:end].strip() for start, end in lines], runs)
    first = 0
    for place in range(1, len(lines) + 1):
        if place == len(lines) or not (rows[place] and rows[place - 1] and runs[place]):
            if place - first > 1:
                yield lines[first][0], lines[place - 1][1]
            first = place


def _runs(text: str, lines: Sequence[Stretch]) -> list[bool]:
    """For each line whether it follows right after the one before it, without an empty line between them."""
    ends = [None, *(end for _, end in lines)]
    gaps = [None if end is None else text[end:start] for end, (start, _) in zip(ends, lines, strict=False)]
    return [gap in ("\n", "\r\n", "\r") for gap in gaps]


def _rows(lines: Sequence[str], runs: Sequence[bool]) -> list[bool]:
    """For each line whether it is a row of a table."""
    rows = [_is_framed(line) for line in lines]
    behind_rule = False
    for place, line in enumerate(lines):
        behind_rule = behind_rule and runs[place] and "|" in line
        if _is_rule(line) and runs[place] and "|" in lines[place - 1]:
            behind_rule = rows[place - 1] = True
        rows[place] |= behind_rule
    return rows


def _is_rule(line: str) -> bool:
    return "|" in line and "-" in line and _RULE.issuperset(line)


def _is_framed(line: str) -> bool:
    return (len(line) > 3 and line.startswith("| ") and line.endswith(" |")) or bool(_FRAME.fullmatch(line))
