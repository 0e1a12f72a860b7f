"""Answers that are plain numbers: their exact value, and another number of the same kind."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np

_WHOLE = r"\d{1,3}(?:,\d{3})+|\d+"
_DECIMAL = re.compile(rf"(?P<sign>-?)(?P<whole>{_WHOLE})(?:\.(?P<decimals>\d+))?", re.ASCII)
_RATIO = re.compile(r"(?P<sign>-?)(?:(\d+)/(\d+)|\\[dt]?frac\{(\d+)\}\{(\d+)\})", re.ASCII)
_MAX_DIGITS = 300
_NEAR, _FARTHEST = 9, 10**6


def plain_value(answer: str) -> Fraction | None:
    r"""The exact value of `12`, `-3.50`, `1,234`, `3/4` or `\frac{3}{4}`; None for anything else."""
    answer = answer.strip()
    if len(answer) > _MAX_DIGITS:
        return None
    if _DECIMAL.fullmatch(answer):
        return Fraction(answer.replace(",", ""))
    ratio = _RATIO.fullmatch(answer)
    if ratio is None:
        return None
    above, below = (int(part) for part in ratio.groups()[1:] if part is not None)
    return Fraction(-above if ratio["sign"] else above, below) if below else None


def another_number(answer: str, rng: np.random.Generator) -> str | None:
    """A different number close to `answer`, with its sign, decimals, commas and number of digits; None if it is none.

    Drawn uniformly among those at most 9 units of the last place, or a tenth of the value, away.
    """
    match = _DECIMAL.fullmatch(answer.strip())
    if match is None or len(answer) > _MAX_DIGITS:
        return None
    places = len(match["decimals"] or "")
    value = int(match["whole"].replace(",", "") + (match["decimals"] or ""))
    digits = len(str(value))
    lowest = 10 ** (digits - 1) if digits > 1 else int(match["sign"] == "-")
    reach = max(_NEAR, min(value // 10, _FARTHEST))
    low, high = max(lowest, value - reach), min(10**digits - 1, value + reach)
    other = low + int(rng.integers(high - low))  # one fewer than there are: `value` itself is skipped
    other += other >= value
    return _written_like(match, str(other).zfill(places + 1), places)


def _written_like(match: re.Match[str], digits: str, places: int) -> str:
    whole, decimals = digits[: len(digits) - places], digits[len(digits) - places :]
    grouped = f"{int(whole):,}" if "," in match["whole"] else whole
    return match["sign"] + grouped + (f".{decimals}" if places else "")
