"""Text as it may appear in a report: nothing invisible, nothing that reorders its neighbours; numbers and units."""

from __future__ import annotations

import math
import reprlib
import unicodedata
from collections.abc import Mapping
from typing import Any

MISSING = "–"

# Cc controls, Cf format characters (bidi marks, zero widths, tags), Cs lone surrogates, Cn unassigned, line and
# paragraph separators: all of them change how text is shown without being seen.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"})
# Invisible, though Unicode calls them letters, marks or symbols: fillers, joiner, blank braille, variation selectors.
_HIDDEN_CHARACTERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | frozenset(
    chr(code)
    for start, end in ((0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))
    for code in range(start, end + 1)
)


def visible(text: str) -> str:
    """The text with every invisible character but newline and tab written out, as in ⟦U+202E⟧."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"⟦U+{ord(mark):04X}⟧" if _is_hidden(mark) else mark for mark in text)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 120, 120, 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 6


def shown(value: object) -> str:
    """A value as an error quotes it: on one line, and short whatever it holds (a list of itself, 10^9 entries)."""
    if isinstance(value, int) and value.bit_length() > 1000:  # more digits than Python agrees to write
        return f"an integer of {value.bit_length()} bits"
    return _SHORT.repr(value)


def _is_hidden(mark: str) -> bool:
    if mark in "\n\t":
        return False
    return mark in _HIDDEN_CHARACTERS or unicodedata.category(mark) in _HIDDEN_CATEGORIES


def finite(value: Any) -> float | None:
    """The number in a row, or None where it is missing or not finite."""
    if value is None or isinstance(value, str):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits; a dash where there is none."""
    found = finite(value)
    if found is None:
        return MISSING
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if found and not 1e-3 <= abs(found) < 1e5:
        return f"{found:.{digits - 1}e}"
    decimals = digits - 1 - (math.floor(math.log10(abs(found))) if found else 0)
    return f"{found:.{max(0, decimals)}f}"


def signed(value: Any, digits: int = 2) -> str:
    """A number with its sign, and `digits` significant digits; a dash where there is none."""
    found = finite(value)
    return MISSING if found is None else f"{'+' if found > 0 else ''}{number(found, digits)}"


def spelt(text: str) -> str:
    """The text on one line, its white space as signs: a token that is a space or a line break is seen."""
    return text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5")


def percent(share: Any) -> str:
    """A share in [0, 1] as percent with one decimal."""
    found = finite(share)
    return MISSING if found is None else f"{100 * found:.1f}"


def percent_interval(estimate: Mapping[str, Any] | None) -> str:
    """`{value, low, high}` (shares) as percent, the interval to whole points: 71.3 [66, 77]."""
    if not estimate:
        return MISSING
    if finite(estimate.get("low")) is None or finite(estimate.get("high")) is None:
        return percent(estimate.get("value"))
    return f"{percent(estimate['value'])} [{100 * estimate['low']:.0f}, {100 * estimate['high']:.0f}]"


def points_interval(value: float, low: float, high: float) -> str:
    """A difference of shares as signed percentage points: +12.0 [+3.1, +20.8]."""
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def span(low: float, high: float) -> str:
    """A range of two digits, such as 0.33 to 1.2; one number where both ends are written alike."""
    ends = list(dict.fromkeys(f"{end:,.0f}" if end >= 100 else f"{end:.2g}" for end in (low, high)))
    return " to ".join(ends)


def duration(seconds: Any) -> str:
    """Seconds as 8.2 s, 3 min 05 s or 2 h 07 min."""
    found = finite(seconds)
    if found is None:
        return MISSING
    if found < 59.95:
        return f"{found:.1f} s"
    minutes, rest = divmod(round(found), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
