r"""Cuts reference solutions into segments: lossless, deterministic, never inside mathematics, a box or a block.

A cutter only chooses places to cut, so the segments concatenate to the text exactly. Separators (blank lines, line
ends, spaces) stay at the end of the segment before them.

Protected are `$..$`, `$$..$$`, `\(..\)`, `\[..\]`, `\boxed{..}`, `\fbox{..}` and the blocks of `data/blocks.py`: code
fences, environments, drawings, tables. A delimiter that never closes is ordinary text and protects nothing. What opens
outside a block does not close inside it. A single `$` closes at the next one, in the same paragraph, or not at all:
where it hugs its content (`$x`), that one must hug it too (`x$`, no digit behind). So `$5 and $6` are prices.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from atesd.data.answers import boxes, last_boxed
from atesd.data.blocks import Stretch, Stretches, blocks

Segmenter = str | Callable[[str], tuple[str, ...]]
"""A name of ours, or a function whose pieces join to the text (`own_segmenter`)."""

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
_DELIMITER = re.compile(r"\\(?P<bracket>[()\[\]])|\\[\s\S]|(?P<brace>[{}])|(?P<dollar>\$\$?)")
_PARTNER = {"(": ")", "[": "]", "$$": "$$"}


def cut(text: str, segmenter: Segmenter) -> tuple[str, ...]:
    """The segments of `text`; their concatenation is `text`, none is empty, and none is blank unless all of it is.

    `segmenter`: paragraph (blank lines), line, sentence, token (a word with the space behind it), step (lines that open
    with a marker such as `Step 3:`, `3.`, `**Step 2**`, `## Step`; as auto where there is no marker), or auto: blank
    lines, else lines, else sentences, the first that cuts at all; or a function. Raises `ValueError` for another name.
    """
    if not isinstance(segmenter, str):
        return segmenter(text)
    protected = Stretches(_stretches(text))
    cuts = [_units(text, cutter, protected) for cutter in _cutters(text, segmenter, protected)]
    return next((units for units in cuts if len(units) > 1), cuts[-1])


def split_reference(solution: str, answer: str, segmenter: Segmenter) -> tuple[tuple[str, ...], str]:
    r"""(segments, closing) of a solution; the closing begins at the first unit that boxes the final answer.

    The final answer is the content of the last box. So no segment shows it in a box of its own: the teacher reads it
    once under `views.answer: keep`, and nowhere in a box under `withhold`.

    Without a box in the solution, all of it is segments and the closing is `\n\nFinal answer: \boxed{answer}`. `auto`
    takes the first of blank lines, lines, sentences that leaves two segments, else the one that leaves most: a solution
    in lines with its answer in a paragraph of its own is cut into lines. Raises `ValueError` as `cut` does.
    """
    boxed = last_boxed(solution) is not None
    splits = []
    for units in _tried(solution, segmenter):
        place = _first_answer(units) if boxed else len(units)
        splits.append((units[:place], "".join(units[place:])))
        if place > 1:
            break
    segments, closing = max(splits, key=lambda split: len(split[0]))
    if boxed:
        return segments, closing
    return segments, ("\n\n" if solution else "") + f"Final answer: \\boxed{{{answer}}}"


def _tried(text: str, segmenter: Segmenter) -> Iterator[tuple[str, ...]]:
    """The units of each way to cut, coarse to fine."""
    if not isinstance(segmenter, str):
        yield segmenter(text)
        return
    protected = Stretches(_stretches(text))
    yield from (_units(text, cutter, protected) for cutter in _cutters(text, segmenter, protected))


def _first_answer(units: Sequence[str]) -> int:
    """The place of the first unit of which a box holds what the last box of all does."""
    answer = next(box for unit in reversed(units) if (box := last_boxed(unit)) is not None)
    return next(place for place, unit in enumerate(units) if boxes(unit, answer))


def _cutters(text: str, segmenter: str, protected: Stretches) -> tuple[str, ...]:
    """The names of the cutters to try, coarse to fine. A marker of a step inside a block marks none."""
    steps = segmenter == "step" and any(place not in protected for place in _step_places(text))
    if segmenter == "auto" or (segmenter == "step" and not steps):
        return ("paragraph", "line", "sentence")
    if segmenter not in _PLACES:
        raise ValueError(f"unknown segmenter {segmenter!r}; allowed: auto, {', '.join(_PLACES)}")
    return (segmenter,)


def _units(text: str, cutter: str, protected: Stretches) -> tuple[str, ...]:
    """`text` cut where the cutter says and nothing is protected; a blank unit joins the one before it, or behind."""
    starts: list[int] = []
    start, last_is_blank = 0, False
    for place in [*_PLACES[cutter](text), len(text)]:
        if place in protected or place == start:
            continue
        blank = text[start:place].isspace()
        if starts and (blank or last_is_blank):
            last_is_blank = last_is_blank and blank
        else:
            starts.append(start)
            last_is_blank = blank
        start = place
    return tuple(text[one:other] for one, other in pairwise([*starts, len(text)]))


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


def _stretches(text: str) -> Iterator[Stretch]:
    """(start, end) of everything protected. Linear up to a logarithm, whatever stays unclosed."""
    whole = blocks(text)
    yield from whole
    delimiters = list(_DELIMITER.finditer(text))
    pairs = _braces(delimiters)
    for box in _BOX.finditer(text):
        end = pairs.get(box.start("brace")) if box["brace"] else box.end()
        if end is not None:
            yield box.start(), end  # a box is whole even where it crosses other delimiters
    inside = Stretches(whole)
    outside = [mark for mark in delimiters if not inside.holds(mark.start())]
    closers = _closers(text, outside)
    free_from = 0
    for opener in outside:
        if opener.start() >= free_from:
            end = _closed_at(text, opener, closers)
            if end is not None:
                yield opener.start(), end
                free_from = end


def _braces(delimiters: Iterable[re.Match[str]]) -> dict[int, int]:
    """Start of each `{` that closes -> end of its `}`, nesting respected."""
    pairs: dict[int, int] = {}
    unclosed: list[int] = []
    for mark in delimiters:
        if mark["brace"] == "{":
            unclosed.append(mark.start())
        elif mark["brace"] and unclosed:
            pairs[unclosed.pop()] = mark.end()
    return pairs


class _Marks:
    """Marks in the order of the text; finds the next one from a place on."""

    def __init__(self) -> None:
        self._marks: list[re.Match[str]] = []
        self._starts: list[int] = []

    def add(self, mark: re.Match[str]) -> None:
        self._marks.append(mark)
        self._starts.append(mark.start())

    def after(self, start: int) -> re.Match[str] | None:
        """The first mark from `start` on."""
        index = bisect_left(self._starts, start)
        return self._marks[index] if index < len(self._marks) else None


_Closers = dict[str, _Marks]


def _closers(text: str, delimiters: Iterable[re.Match[str]]) -> _Closers:
    """Everything that can close a stretch, by kind and in order."""
    closers: _Closers = defaultdict(_Marks)
    for mark in delimiters:
        if mark["dollar"]:
            closers["any $"].add(mark)
        if mark["bracket"] or mark["dollar"] == "$$":
            closers[mark["bracket"] or "$$"].add(mark)
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
    return None if closer is None else closer.end()


def _fits(text: str, opener: re.Match[str], closer: re.Match[str]) -> bool:
    """Whether two dollars hug their content on both sides (and no digit follows), or on neither."""
    apart = text[opener.end()].isspace()
    followed_by_digit = text[closer.end() : closer.end() + 1].isdigit()
    return text[closer.start() - 1].isspace() == apart and (apart or not followed_by_digit)
