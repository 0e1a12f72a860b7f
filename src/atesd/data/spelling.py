r"""Spellings of an answer: `normalise` for equality as strings, `tidy` for reading it.

Both look at every token once, so that their work grows with the length of the text, whatever is in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?", re.ASCII)
_WORD = re.compile(r"\\[A-Za-z]+")

_STYLES = frozenset(
    rf"\{name}"
    for name in (
        *("text", "textbf", "textit", "textrm", "mathrm", "mathbf", "mbox"),
        *("textnormal", "textsf", "texttt", "textsc", "textup", "emph", "underline", "boldsymbol", "pmb", "bm"),
        *("mathit", "mathsf", "mathtt", "mathnormal", "boxed", "fbox", "framebox", "hbox", "operatorname"),
    )
)
_SWITCHES = frozenset(rf"\{name}" for name in ("bf", "rm", "it", "sf", "tt", "bfseries", "itshape", "large", "Large"))
_SIZES = frozenset((r"\left", r"\right", r"\displaystyle"))
_ALL_SIZES = _SIZES | frozenset(
    rf"\{size}{side}" for size in ("big", "Big", "bigg", "Bigg", "m") for side in ("", "l", "r", "m", "left", "right")
)
_MATHS_MARKS = frozenset((r"\(", r"\)", r"\[", r"\]"))
_FRACTIONS = frozenset((r"\dfrac", r"\tfrac"))
_SPACES = frozenset((r"\,", r"\;", r"\:", r"\>", r"\ ", "~", r"\quad", r"\qquad"))
_DROPPED = frozenset((r"\!", "$", r"\$"))
_UNREAD = _DROPPED | _ALL_SIZES | _SWITCHES | _MATHS_MARKS
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z])")
_ROWS = re.compile(r"\\begin\s*\{")

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_PARTS = {"½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
          "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8)}  # fmt: skip
_COMMAND_TABLE = r"""
× \times ⋅ \cdot · \cdot ∙ \cdot ÷ / ∕ / ⁄ / ≤ \le ≥ \ge ⩽ \le ⩾ \ge ≠ \ne ≈ \approx ± \pm ∞ \infty π \pi θ \theta
α \alpha β \beta λ \lambda ∪ \cup ∩ \cap ∈ \in ∅ \emptyset ° ^\circ º ^\circ ′ ' ’ ' ‘ ' ％ \% 、 , ， , 。 .
"""
_COMMANDS = _COMMAND_TABLE.split()
_SYMBOLS = {
    **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94)},  # fullwidth forms of the printable ASCII characters
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    **{sign: f"\\frac{{{above}}}{{{below}}}" for sign, (above, below) in _PARTS.items()},
    **{sign: text + " " * text[-1].isalpha() for sign, text in zip(_COMMANDS[::2], _COMMANDS[1::2], strict=True)},
}
_TRANSLATION = str.maketrans(_SYMBOLS)
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))")


def normalise(answer: str) -> str:
    r"""A canonical spelling, for equality as strings. Equal results mean the same answer; unequal ones mean nothing.

    Drops `$`, sizes (`\left`), spaces (except between digits, and where a command would run into a letter), a trailing
    period, commas between thousands; writes `\dfrac` as `\frac` and `\text{m}` as `m`. Normalising twice is normalising
    once.
    """
    pieces: list[str] = []
    openers: list[tuple[int, str] | None] = []  # for every open brace None, or the place and name of its style
    tokens = _TOKEN.findall(answer)
    blank = listed = False
    for opens, token in _read(tokens):
        if token in _SPACES or token.isspace() or (token[0] == "\\" and token[1:].isspace()):
            blank = True
            continue
        if token in _DROPPED or token in _SIZES:
            continue
        if token == "}" and openers and (opener := openers.pop()) is not None:
            continue
        if opens:
            openers.append((len(pieces), token))
            pieces.append("")
            continue
        if token == "{":
            openers.append(None)
        listed = listed or (blank and pieces[-1:] == [","])
        _append(pieces, r"\frac" if token in _FRACTIONS else token, blank)
        blank = False
    for opener in openers:
        if opener is not None:
            pieces[opener[0]] = opener[1] + "{"
    spelling = _without_trailing_periods(pieces)
    if not _THOUSANDS.fullmatch(spelling):
        return spelling
    return spelling.replace(",", ", ") if listed else re.sub(r"[{},]", "", spelling)


def _read(tokens: list[str]) -> Iterator[tuple[bool, str]]:
    """(whether it opens a group, token): a style and the brace behind it are one token."""
    index = 0
    while index < len(tokens):
        token = tokens[index]
        index += 1
        behind = index + (index < len(tokens) and tokens[index].isspace())
        opens = token in _STYLES and behind < len(tokens) and tokens[behind] == "{"
        if opens:
            index = behind + 1
        elif token == r"\!":  # takes back the blank behind it
            index = behind
        yield opens, token


def _append(pieces: list[str], token: str, blank: bool) -> None:
    """Add a token, with a blank in front where it must not touch the last one."""
    last = next((piece for piece in reversed(pieces) if piece), "")
    digits = blank and last[-1:].isdigit() and token[0].isdigit()
    if digits or (_WORD.fullmatch(last) and token[0].isascii() and token[0].isalpha()):
        pieces.append(" ")
    pieces.append(token)


def _without_trailing_periods(pieces: list[str]) -> str:
    end = len(pieces)
    while end and pieces[end - 1] in (".", ""):
        end -= 1
    return "".join(pieces[:end])


def tidy(answer: str) -> str:
    r"""The answer in plain LaTeX, for reading: symbols as commands, sizes and dollars gone, every style a `\text`.

    What wraps all of it is taken off: dollars, `**`, `\boxed`, a style, braces, a trailing period.
    """
    text = answer if _ROWS.search(answer) else _DOUBLED.sub(r"\\", answer)
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2] or root[3]}}}", text)
    text = _RAISED.sub(lambda raised: f"^{{{raised[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _LOWERED.sub(lambda lowered: f"_{{{lowered[0].translate(_SUBSCRIPTS)}}}", text)
    pieces: list[str] = []
    for opens, token in _read(_TOKEN.findall(text.translate(_TRANSLATION))):
        if opens:
            pieces.append(r"\text{")
        elif token in _SPACES or token.isspace() or (token[0] == "\\" and token[1:].isspace()):
            pieces.append(" ")
        elif token not in _UNREAD:
            _append(pieces, r"\frac" if token in _FRACTIONS or token == r"\cfrac" else token, blank=False)
    return unwrapped("".join(pieces))


def unwrapped(text: str) -> str:
    r"""`text` without outer spaces, `**`, backticks, braces or `\text{...}` around all of it, and a trailing mark."""
    closing = _closings(text)
    start, end = 0, len(text)
    while True:
        begin, stop = start, end
        while start < end and text[start].isspace():
            start += 1
        while end > start and (text[end - 1].isspace() or text[end - 1] in ",;\\"):
            end -= 1
        if end - start > 1 and text[end - 1] == "." and text[end - 2] not in "\\.":
            end -= 1
        if end - start > 4 and text.startswith("**", start) and text.endswith("**", start, end):
            start, end = start + 2, end - 2
        if end - start > 2 and text[start] == text[end - 1] == "`":
            start, end = start + 1, end - 1
        for opening in (r"\text{", "{"):
            brace = start + len(opening) - 1
            if text.startswith(opening, start) and closing.get(brace) == end - 1:
                start, end = brace + 1, end - 1
        if (start, end) == (begin, stop):
            return text[start:end]


def _closings(text: str) -> dict[int, int]:
    """The place of the closing brace of every opening one."""
    pairs: dict[int, int] = {}
    open_braces: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "}" and open_braces:
            pairs[open_braces.pop()] = match.start()
    return pairs
