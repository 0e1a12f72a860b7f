r"""Cuts reference solutions into segments: lossless, deterministic, never inside mathematics, a box or a code fence.

A cutter only chooses places to cut, so the segments concatenate to the text exactly. Separators (blank lines, line
ends, spaces) stay at the end of the segment before them.

Protected are `$..$`, `$$..$$`, `\(..\)`, `\[..\]`, `\begin{x}..\end{x}`, `\boxed{..}`, `\fbox{..}` and code fences. A
delimiter that never closes is ordinary text and protects nothing. A single `$` closes at the next one, in the same
paragraph, or not at all: where it hugs its content (`$x`), that one must hug it too (`x$`, no digit behind). So
`$5 and $6` are prices.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from atesd.data.answers import last_boxed

_END = r"(?>\r\n|\n|\r)"
_LINE = re.compile(_END)
_PARAGRAPH = re.compile(rf"{_END}(?:[ \t]*{_END})+")
_WORD = re.compile(r"\S\s+")

_STEP = re.compile(
    r"^[ \t]*+(?:"
    r"(?:\#{1,6}[ \t]*+)?(?:\*\*|__|\*|_)?[ \t]*+step[ \t]*+\(?\d+\b"  # Step 3: / ## Step 3 / **Step 3**
    r"|\#{1,6}[ \t]*+step\b"  # ## Step
    r"|(?:\#{1,6}[ \t]*+)?(?:\*\*|__)?\(?\d{1,3}[.)](?:\*\*|__)?(?=[ \t])"  # 3. / 3) / (3) / **3.**
    r")",
    re.IGNORECASE | re.MULTILINE,
)

_SENTENCE = re.compile(r"""(?<![.!?…])[.!?…]+(?:[)\]"'’”»*_$]|\\\)|\\\])*\s+|[。！？]+[」』”’）]*\s*""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[{~\"'“‘])(?:(?:[^\W\d_]\.)+[^\W\d_]|dr|mr|mrs|ms|prof|st|jr|sr|fig|figs|eq|eqs|thm|def|prop|lem|cor|sec|ch|"
    r"ex|ref|refs|nos?|vol|pp|vs|cf|ca|approx|resp|al|viz)$",
    re.IGNORECASE,
)
_LIST_MARKER = re.compile(r"\s*(?:\*\*|__)?\(?\d{1,3}$")

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(?P<brace>\{)|[-+]?\d+(?:\.\d+)?|[A-Za-z])")
_DELIMITER = re.compile(
    r"\\(?P<edge>begin|end)\s*\{(?P<name>[^{}\s]+)\}|\\(?P<bracket>[()\[\]])|\\[\s\S]|(?P<brace>[{}])|(?P<dollar>\$\$?)"
    r"|^[ ]{0,3}(?P<fence>`{3,}|~{3,})(?=(?P<after>[^\r\n]*))",
    re.MULTILINE,
)
_PARTNER = {"(": ")", "[": "]", "$$": "$$"}


def cut(text: str, segmenter: str) -> tuple[str, ...]:
    """The segments of `text`; their concatenation is `text`, none is empty, and none is blank unless all of it is.

    `segmenter`: paragraph (blank lines), line, sentence, token (a word with the space behind it), step (lines that open
    with a marker such as `Step 3:`, `3.`, `**Step 2**`, `## Step`; as auto where there is no marker), or auto: blank
    lines, else lines, else sentences, the first that cuts at all. Raises `ValueError` for another name.
    """
    protected = _Protected(text)
    cuts = [_units(text, cutter, protected) for cutter in _cutters(text, segmenter)]
    return next((units for units in cuts if len(units) > 1), cuts[-1])


def split_reference(solution: str, answer: str, segmenter: str) -> tuple[tuple[str, ...], str]:
    r"""(segments, closing) of a solution; the closing is the unit with the last box, with everything after it.

    Without a box in the solution, all of it is segments and the closing is `\n\nFinal answer: \boxed{answer}`. `auto`
    takes the first of blank lines, lines, sentences that leaves two segments, else the one that leaves most: a solution
    in lines with its answer in a paragraph of its own is cut into lines. Raises `ValueError` as `cut` does.
    """
    boxed = last_boxed(solution) is not None
    protected = _Protected(solution)
    splits = []
    for cutter in _cutters(solution, segmenter):
        units = _units(solution, cutter, protected)
        place = _last_box(units) if boxed else len(units)
        splits.append((units[:place], "".join(units[place:])))
        if place > 1:
            break
    segments, closing = max(splits, key=lambda split: len(split[0]))
    if boxed:
        return segments, closing
    return segments, ("\n\n" if solution else "") + f"Final answer: \\boxed{{{answer}}}"


def _last_box(units: tuple[str, ...]) -> int:
    return max(index for index, unit in enumerate(units) if last_boxed(unit) is not None)


def _cutters(text: str, segmenter: str) -> tuple[str, ...]:
    """The names of the cutters to try, coarse to fine."""
    if segmenter == "auto" or (segmenter == "step" and not _STEP.search(text)):
        return ("paragraph", "line", "sentence")
    if segmenter not in _PLACES:
        raise ValueError(f"unknown segmenter {segmenter!r}; allowed: auto, {', '.join(_PLACES)}")
    return (segmenter,)


def _units(text: str, cutter: str, protected: _Protected) -> tuple[str, ...]:
    """`text` cut where the cutter says and nothing is protected; a blank unit joins the one before it, or behind."""
    units: list[str] = []
    start = 0
    for place in [*_PLACES[cutter](text), len(text)]:
        if place in protected or place == start:
            continue
        unit = text[start:place]
        if units and (unit.isspace() or units[-1].isspace()):
            units[-1] += unit
        else:
            units.append(unit)
        start = place
    return tuple(units)


def _ends(pattern: re.Pattern[str]) -> Callable[[str], Iterator[int]]:
    return lambda text: (match.end() for match in pattern.finditer(text))


def _step_places(text: str) -> Iterator[int]:
    return (match.start() for match in _STEP.finditer(text))


def _sentence_places(text: str) -> Iterator[int]:
    """Ends of sentences: a full stop, question or exclamation mark before white space, or a blank line.

    No end: before a small letter; after an abbreviation (`e.g.`, `Dr.`, `Fig.`); after a list marker (`2.`).
    """
    blank_lines = set(_PLACES["paragraph"](text))
    stops = {match.end(): match.start() for match in _SENTENCE.finditer(text)}
    start = 0
    for place in sorted(blank_lines | stops.keys()):
        if place in blank_lines or not _goes_on(text, start, stops[place], place):
            yield place
            start = place


def _goes_on(text: str, start: int, stop: int, place: int) -> bool:
    """Whether the sentence from `start` goes on at `place`, behind the mark at `stop`."""
    if text[place : place + 1].islower():
        return True
    if text[stop] != "." or not text[stop + 1 : stop + 2].isspace():
        return False
    line = max(start, text.rfind("\n", start, stop) + 1)
    before = text[max(start, stop - 24) : stop]
    return bool(_ABBREVIATION.search(before)) or bool(_LIST_MARKER.fullmatch(text, line, stop))


_PLACES: dict[str, Callable[[str], Iterator[int]]] = {
    "paragraph": _ends(_PARAGRAPH),
    "line": _ends(_LINE),
    "sentence": _sentence_places,
    "step": _step_places,
    "token": _ends(_WORD),
}


class _Protected:
    """The stretches of a text inside which it must not be cut: `place in protected`."""

    def __init__(self, text: str) -> None:
        merged: list[tuple[int, int]] = []
        for start, end in sorted(_stretches(text)):
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self._starts = [start for start, _ in merged]
        self._ends = [end for _, end in merged]

    def __contains__(self, place: int) -> bool:
        index = bisect_left(self._starts, place) - 1
        return index >= 0 and place < self._ends[index]


def _stretches(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of everything protected. Linear up to a logarithm, whatever stays unclosed."""
    delimiters = list(_DELIMITER.finditer(text))
    pairs = _nested_pairs(delimiters)
    for box in _BOX.finditer(text):
        end = pairs.get(box.start("brace")) if box["brace"] else box.end()
        if end is not None:
            yield box.start(), end  # a box is whole even where it crosses other delimiters
    closers = _closers(text, delimiters)
    free_from = 0
    for opener in delimiters:
        if opener.start() >= free_from:
            end = pairs.get(opener.start()) if opener["edge"] else _closed_at(text, opener, closers)
            if end is not None:
                yield opener.start(), end
                free_from = end


def _nested_pairs(delimiters: Iterable[re.Match[str]]) -> dict[int, int]:
    r"""Start of each `{` and `\begin{x}` that closes -> end of its `}` or `\end{x}`, nesting respected."""
    pairs: dict[int, int] = {}
    unclosed: dict[str, list[int]] = defaultdict(list)
    for mark in delimiters:
        name, opens = (mark["name"], mark["edge"] == "begin") if mark["edge"] else ("{", mark["brace"] == "{")
        if opens:
            unclosed[name].append(mark.start())
        elif (mark["edge"] or mark["brace"]) and unclosed[name]:
            pairs[unclosed[name].pop()] = mark.end()
    return pairs


class _Marks:
    """Marks in the order of the text; finds the next one from a place on."""

    def __init__(self) -> None:
        self._marks: list[re.Match[str]] = []
        self._starts: list[int] = []

    def add(self, mark: re.Match[str]) -> None:
        self._marks.append(mark)
        self._starts.append(mark.start())

    def after(self, start: int, least_length: int = 0) -> re.Match[str] | None:
        """The first mark from `start` on with at least this many characters."""
        for index in range(bisect_left(self._starts, start), len(self._marks)):
            if not least_length or len(self._marks[index][0].strip()) >= least_length:
                return self._marks[index]
        return None


_Closers = dict[str, _Marks]


def _closers(text: str, delimiters: Iterable[re.Match[str]]) -> _Closers:
    """Everything that can close a stretch, by kind and in order."""
    closers: _Closers = defaultdict(_Marks)
    for mark in delimiters:
        if mark["dollar"]:
            closers["any $"].add(mark)
        if mark["bracket"] or mark["dollar"] == "$$":
            closers[mark["bracket"] or "$$"].add(mark)
        if mark["fence"] and not mark["after"].strip():
            closers[mark["fence"][0]].add(mark)
    for blank in _PARAGRAPH.finditer(text):
        closers["blank"].add(blank)
    return closers


def _closed_at(text: str, opener: re.Match[str], closers: _Closers) -> int | None:
    """Where the stretch that `opener` opens ends; None if it opens none or nothing closes it."""
    closer: re.Match[str] | None = None
    kind = opener["dollar"] or opener["bracket"]
    if kind == "$":
        closer = closers["any $"].after(opener.end())
        if closer is None or closer[0] != "$" or not _fits(text, opener, closer):
            return None
        blank = closers["blank"].after(opener.end())
        return closer.end() if blank is None or closer.start() < blank.start() else None
    if kind in _PARTNER:
        closer = closers[_PARTNER[kind]].after(opener.end())
    elif opener["fence"] and not (opener["fence"][0] == "`" and "`" in opener["after"]):
        closer = closers[opener["fence"][0]].after(opener.end(), len(opener["fence"]))
    return None if closer is None else closer.end()


def _fits(text: str, opener: re.Match[str], closer: re.Match[str]) -> bool:
    """Whether two dollars hug their content on both sides (and no digit follows), or on neither."""
    apart = text[opener.end()].isspace()
    followed_by_digit = text[closer.end() : closer.end() + 1].isdigit()
    return text[closer.start() - 1].isspace() == apart and (apart or not followed_by_digit)
