r"""What two answers have in common, as far as that needs no algebra; and what sympy is to compare where it does.

The rules are decided once, in docs/answers.md: per cents, units, lists, choices, words, decimals.
"""

from __future__ import annotations

import re
from typing import Literal

from atesd.data.quantities import UNITS, read_quantity, same_quantity, split_unit, units_differ, without_factor
from atesd.data.spelling import normalise, tidy, unwrapped

LONGEST = 4000
"""Characters of an answer; a longer one is not read."""
DEEPEST = 15
"""Brackets in brackets; a parser's time is exponential in them."""

Pairs = tuple[tuple[str, str], ...]
Judgement = Literal["correct", "wrong", "unparseable"]

_CHOICE = re.compile(
    r"(?:\\text\{\s*)?(?:\(\s*(?:\\text\{\s*)?(?P<a>[A-J])(?:\s*\})?\s*\)|(?P<b>[A-J])(?:\s*\})?\s*(?:\)|[.:](?=\s|$))|"
    r"(?P<c>[A-J])$)(?:\s*\})?[.:]?\s*(?P<rest>.*)",
    re.DOTALL,
)
_STYLE = re.compile(r"\\(?:text|mathrm|mathbf|mbox)")
_WORDS = re.compile(r"[A-Za-z][A-Za-z ,.'-]*")
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?\s*(?:\\text\{)?\s*(?:([aApP])\.?\s*[mM]\.?)?\s*\}?", re.ASCII)
_EXPONENT = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?![\w.])", re.ASCII)
_BRACED_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d{3}(?!\d))", re.ASCII)
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,^_}])(?<!\d )[1-9]\d{0,2}(?: \d{3})+(?!\d| ?/)", re.ASCII)
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", re.ASCII)
_MIXED = re.compile(r"(?<![\d.^_}\\/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", re.ASCII)
_ROOT = re.compile(r"\\?sqrt\s*\(([^()]*)\)")
_SIGN = re.compile(r"\\pm(?![A-Za-z])")
_INNER_SIGN = re.compile(r"\{[^{}]*\\pm(?![A-Za-z])")
_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_CIRCLE = re.compile(r"\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\s*\\degree(?![A-Za-z])")
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_OF_Y = re.compile(r"y\s*=(?=[^=])")
_BLACKBOARD = re.compile(r"\\mathbb\s*([A-Z])(?![A-Za-z])")
_LISTED_UNIT = rf"\\text\{{\s*(?:{'|'.join(sorted(UNITS))})s?\s*\}}"
_UNIT_IN_LIST = re.compile(rf"(?<=[\d}}])\s*{_LISTED_UNIT}(?=\s*(?:[,;)\]]|\\text|\\\}}|$))")
_OF_X = re.compile(r"\s*[A-Za-z]\s*\(\s*[A-Za-z]\s*\)\s*=(?=[^=])")


def judge(gold: str, answer: str, choices: bool = True) -> Judgement | Pairs:
    """The verdict, or the pairs (gold, answer) for sympy, of which one equal pair makes the answer correct.

    `choices` False: a letter in front is not taken for that of a choice.
    """
    if normalise(gold) == normalise(answer):
        return "correct"
    if len(answer) > LONGEST or len(gold) > LONGEST:
        return "unparseable" if len(answer) > LONGEST else "wrong"
    if (verdict := _plain_verdict(gold, answer)) is not None:
        return verdict
    expected, found = tidy(gold), tidy(answer)
    if not found or depth(found) > DEEPEST:
        return "unparseable"
    if not expected or depth(expected) > DEEPEST:
        return "wrong"
    if choices and (parts := _without_choices(expected, found)) is not None:
        return parts if isinstance(parts, str) else judge(*parts, choices=False)
    return _pairs(expected, found)


def depth(text: str) -> int:
    """How many brackets stand inside each other at most."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def plainly_equal(gold: str, answer: str) -> bool:
    """Whether two answers are the same string, quantity, choice, word or time: cheap, and never wrongly true."""
    return judge(gold, answer) == "correct"


def _plain_verdict(gold: str, answer: str) -> Judgement | None:
    """The verdict of numbers, times of day and words."""
    expected, found = read_quantity(gold), read_quantity(answer)
    same = same_quantity(expected, found) if expected and found else None
    if same is None:
        same = _same_time(gold, answer)
    if same is None:
        same = _same_words(gold, answer)
    return None if same is None else "correct" if same else "wrong"


def _same_time(gold: str, answer: str) -> bool | None:
    """Times of day; `7:32` by itself is a ratio."""
    read = [_CLOCK.fullmatch(tidy(text)) for text in (gold, answer)]
    if read[0] is None or read[1] is None or not any(match and (match[3] or match[4]) for match in read):
        return None
    return _seconds(read[0]) == _seconds(read[1])


def _seconds(clock: re.Match[str]) -> int:
    hours = int(clock[1])
    if clock[4]:
        hours = hours % 12 + (12 if clock[4] in "pP" else 0)
    return (hours * 60 + int(clock[2])) * 60 + int(clock[3] or 0)


def _same_words(gold: str, answer: str) -> bool | None:
    r"""Words, in any case; letters alone are words if one side says so by `\text`, or if four or more."""
    expected, found = _words(gold), _words(answer)
    if expected is None or found is None or max(len(expected), len(found)) < 2:
        return None
    if expected == found and len(expected) > 2:
        return True
    styled = _STYLE.search(gold) or _STYLE.search(answer)
    longest = max(map(len, re.split(r"\W+", f"{expected} {found}")))
    return expected == found if styled or longest > 3 else None


def _words(answer: str) -> str | None:
    text = tidy(answer)
    if r"\text{" in text and re.search(r"[A-Za-z]", re.sub(r"\\text\{[^{}]*\}", "", text)):
        return None  # mathematics with a remark
    text = re.sub(r"\\text\{|\}", " ", text)
    text = " ".join(text.split()).strip(" .")
    return text.casefold() if _WORDS.fullmatch(text) else None


def _without_choices(gold: str, answer: str) -> Judgement | tuple[str, str] | None:
    """Answers to a question with lettered choices: the verdict, the texts behind the letters, or None for others."""
    expected, found = _CHOICE.fullmatch(gold), _CHOICE.fullmatch(answer)
    behind = [unwrapped(match["rest"]) if match else "" for match in (expected, found)]
    if expected and found:
        same = _letter(expected) == _letter(found)
        return "wrong" if not same else (behind[0], behind[1]) if all(behind) else "correct"
    if found and behind[1]:
        return gold, behind[1]
    return (behind[0], answer) if expected and behind[0] else None


def _letter(choice: re.Match[str]) -> str:
    return str(choice["a"] or choice["b"] or choice["c"])


def _pairs(gold: str, answer: str) -> Pairs:
    """What sympy compares: without units; a per cent also as its hundredth."""
    (expected, unit), (found, other) = _without_unit(gold), _without_unit(answer)
    expected, found = expected.strip() or gold, found.strip() or answer
    if units_differ(unit, other) and "%" not in (unit, other):
        return ()
    if _OF_Y.match(expected if _OF_X.match(found) else found):
        expected, found = _OF_X.sub("y=", expected, count=1), _OF_X.sub("y=", found, count=1)
    pairs = [(_expression(expected, ""), _expression(found, expected))]
    if (unit == "degree") != (other == "degree") and r"\pi" in (answer if unit == "degree" else gold):
        pairs.append((_in_radians(gold), _in_radians(answer)))
    if (unit == "%") != (other == "%"):
        hundredth = [rf"\frac{{{text}}}{{100}}" for text in pairs[0]]
        pairs.append((hundredth[0], pairs[0][1]) if unit == "%" else (pairs[0][0], hundredth[1]))
    return tuple(pairs)


def _without_unit(text: str) -> tuple[str, str]:
    if _ANGLE_FUNCTION.search(text) and _CIRCLE.search(text):
        return text, ""
    text, factor = without_factor(text)
    bare, unit = split_unit(text)
    times = rf"({bare.strip()}) \cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}"
    return bare if factor == 1 else times, unit


def _in_radians(text: str) -> str:
    return _CIRCLE.sub(r" \\cdot \\frac{\\pi}{180}", text)


def _expression(text: str, other: str) -> str:
    """A text as sympy's reader takes it: one way to write numbers, roots, angles. `other` is the gold of an answer."""
    text = _in_radians(text) if _ANGLE_FUNCTION.search(text) else _CIRCLE.sub("", text)
    text = _EXPONENT.sub(r"\1 \\cdot 10^{\2}", text)
    text = _BRACED_COMMA.sub("", text)
    text = _SPACED_THOUSANDS.sub(lambda number: number[0].replace(" ", ""), text)
    text = _MIXED.sub(r"(\1+\\frac{\2}{\3})", text)
    text = _PI.sub(r"\\pi ", _ROOT.sub(r"\\sqrt{\1}", text)).replace("**", "^")
    text = _UNIT_IN_LIST.sub("", _BLACKBOARD.sub(r"\\mathbb{\1}", text)).replace(r"\varnothing", r"\emptyset")
    return _both_signs(_commas(text, other))


def _both_signs(text: str) -> str:
    r"""An expression with `\pm` inside a group as the list of its two values, which sympy's reader does not know."""
    if not _INNER_SIGN.search(text) or "," in text or r"\{" in text:
        return text
    return ", ".join(_SIGN.sub(f" {plus} ", text).replace(r"\mp", minus) for plus, minus in ("+-", "-+"))


def _commas(text: str, other: str) -> str:
    """Commas between thousands go, in an answer only if its gold is no list; the others get a blank behind them."""
    if not re.search(r"[(\[{]", text) and "," not in other:
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return re.sub(r",(?=\S)", ", ", text)
