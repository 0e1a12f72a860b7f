r"""Answers that are one number: exact value, per cent, unit. They are compared here, without sympy.

Read are digits with separators, fractions, mixed numbers, powers of ten, number words (`5 million`), per cents,
degrees, money, and a unit behind the number. docs/answers.md lists what is equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

from atesd.data.spelling import tidy, unwrapped

ROUNDED = Fraction(1, 10**6)
"""Largest relative difference between a decimal and a number that no decimal writes in full."""
WRITTEN = Fraction(1, 10**9)
"""Largest relative difference between two decimals: the rounding of a computer's floating-point numbers."""
_LEAST_DIGITS = 4  # of a gold that may be a rounded number
_LONGEST = 400  # characters of a number
_FARTHEST = 400  # exponent of ten

_GROUPED = re.compile(r"[1-9]\d{0,2}(?:(?:\{,\}\d{3})+|(?:,\d{3})+)(?:\.\d+)?", re.ASCII)
_SPACED = re.compile(r"[1-9]\d{0,2}(?:([ '_])\d{3})(?:\1\d{3})*(?:\.\d+)?", re.ASCII)
_POINTED = re.compile(r"[1-9]\d{0,2}(?:(?:\.\d{3}){2,}(?:,\d+)?|\.\d{3},\d+)", re.ASCII)
_PLAIN = re.compile(r"\d+\.?\d*|\.\d+", re.ASCII)
_COMMA = re.compile(r"\d+(?:,|\{,\})\d+", re.ASCII)
_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", re.ASCII)
_OVER = re.compile(r"\{?([^{}/\\]*)\\over([^{}/\\]*)\}?", re.ASCII)
_MIXED = re.compile(r"(\d+)(?:\s*(?=\\frac)|\s+(?=\d+\s*/)|\s*(?:\+|and)\s*(?=\\frac|\d+\s*/))", re.ASCII)
_REPEATING = re.compile(r"(\d*)\.(\d*)\s*\\(?:overline|bar)\s*\{\s*(\d+)\s*\}", re.ASCII)
_TEN = re.compile(
    r"(?:(?P<mantissa>.*\d\.?)\s*(?:\\times|\\cdot|\\ast|\*|x|X)\s*)?10\s*(?:\^|\*\*)\s*(?:\{\s*\(?|\()?\s*"
    r"(?P<power>[-+]?\s*\d+)\s*(?:\)?\s*\}|\))?",
    re.ASCII,
)
_EXPONENT = re.compile(r"(?P<mantissa>\d+\.?\d*|\.\d+)\s*[eE]\s*(?P<power>[-+]?\d+)", re.ASCII)
_NAME = re.compile(r"(?:\\text\s*\{[^{}]*\}|[A-Za-z])(?:_\s*(?:\w|\{\w+\}))?\s*(?:=|\\approx)\s*(?=[^=])")
_ORDINAL = re.compile(r"(?<=\d)\s*(?:st|nd|rd|th|\^\s*\{\s*\\text\{\s*(?:st|nd|rd|th)\s*\}\s*\})$")
_ABOUT = re.compile(r"(?:\\approx|\\sim|\\simeq|=)\s*")

_PERCENT = re.compile(
    r"\s*(?:\\?%|\\text\{\s*(?:\\?%|per\s?cent|percentage|pct\.?)\s*\}|per\s?cent|percentage|pct\.?)$", re.IGNORECASE
)
_DEGREE = re.compile(
    r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|\\text\{\s*degrees?\s*\}|degrees?)\s*"
    r"(?:\\text\{\s*([CFK])\s*\}|([CFK])|\\text\{\s*(?:degrees?\s+)?(Celsius|Fahrenheit)\s*\})?$"
)
_MONEY = r"(\\text\{\s*(?:USD|US|EUR|GBP|Rs\.?|€|£|¥|₹)\s*\}|\\pounds|\\euro|€|£|¥|₹|USD|US|EUR|GBP|Rs\.?)\s*"
_PRICE = re.compile(rf"([-+]?)\s*{_MONEY}(?=[-+.\d\\])")
_POWER = r"(?:\s*\^\s*(?:\d|\{\s*-?\d+\s*\}))?"
_TEXT_UNIT = re.compile(rf"\s*(?:/|\\cdot|\\times)?\s*\\text\{{\s*((?:[^{{}}]|\{{[^{{}}]*\}})*?)\s*\}}{_POWER}\s*$")
_BARE_UNIT = re.compile(rf"(?<![A-Za-z\\])\s*[A-Za-zµ]+(?:[ /.-]+[A-Za-z]+)*\.?{_POWER}\s*$")
_SPEED = re.compile(r"[A-Za-z]+/[A-Za-z]+")
_LETTER_UNITS = frozenset("mgshlLAVWJNKCFT")
_MATHS_WORDS = """
and mod log exp sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan sqrt inf infinity nan
alpha beta gamma delta theta lambda sigma omega times cdot over choose plus minus
"""
_BASES = r"(?:in )?base(?: (?:\d+|two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen))?\W*$"
_CHANGED = re.compile(
    rf"\W*(?:(?:squared|cubed|factorial|remainder)\b|{_BASES}|(?:and|or|plus|minus|times|over|to) (?:-?\d"
    r"|(?:\w+ )?(?:half|halves|thirds?|fourths?|quarters?)\b))",
    re.IGNORECASE,
)
"""Remarks that change the number in front of them."""
_NO_UNITS = frozenset(_MATHS_WORDS.split())
_OPEN_END = re.compile(r"[-+*/^_=<>,;:({\[\\]$")

UNITS: dict[str, str] = {}
for _names in (
    "mm millimeter millimetre",
    "cm centimeter centimetre",
    "dm decimeter decimetre",
    "m meter metre",
    "km kilometer kilometre",
    "in inch inche",
    "ft foot feet",
    "yd yard",
    "mi mile",
    "mg milligram",
    "g gram gm",
    "kg kilogram kilo",
    "lb",
    "pound",
    "oz ounce",
    "ms millisecond",
    "s sec second",
    "min minute",
    "h hr hour",
    "day",
    "week wk",
    "month",
    "year yr",
    "ml milliliter millilitre",
    "l liter litre",
    "cent",
    "dollar usd",
    "euro eur",
    "rupee rs",
    "yen",
    "degree deg",
    "radian rad",
    "mph",
):
    UNITS |= dict.fromkeys(_names.split(), _names.split()[0])

_TENS = {"hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
_ORDINAL_WORDS = "third fourth fifth sixth seventh eighth ninth tenth hundredth thousandth millionth"
_MULTIPLES = {"dozen": Fraction(12)} | {word: Fraction(10**power) for word, power in _TENS.items()}
_PARTS = {"half": Fraction(1, 2)} | {
    word: Fraction(1, parts)
    for word, parts in zip(_ORDINAL_WORDS.split(), (*range(3, 11), 10**2, 10**3, 10**6), strict=True)
}
FACTORS = _MULTIPLES | _PARTS | {"halves" if word == "half" else f"{word}s": part for word, part in _PARTS.items()}
"""Number words. In the plural a multiple is what is counted (`7 dozens`), as a quarter is; `5 third graders` too."""
_FACTOR_WORD = rf"(?:{'|'.join(word for word in FACTORS if word not in _PARTS)})"
_FACTOR_WORDS = rf"({_FACTOR_WORD}(?: +{_FACTOR_WORD})*(?![A-Za-z-])|(?:{'|'.join(_PARTS)})(?=\s*\}}?$))"
_FACTOR = re.compile(
    rf"(?:(?<=[\d)}}])|(?<=\\pi))\s*(?:\\text\{{\s*)?{_FACTOR_WORDS}|(?<=[A-Za-z])\s*\\text\{{\s*{_FACTOR_WORDS}",
    re.IGNORECASE,
)
_NUMBER_WORD = re.compile(rf"\s*{_FACTOR_WORDS}", re.IGNORECASE)
_SUM_OR_LIST = re.compile(r"[+;<>=]|,(?!\}?\d{3})|(?<=[^\s{(^])\s*-")
_WITH_FACTOR = re.compile(
    r"(?:[A-Za-z\s.'/(){}]|(?<=[A-Za-z])-(?=[A-Za-z])|\\text\{|\^\s*\{?-?\d+|\\?%|\^\s*\{?\\circ|\\degree)*+"
)
"""What may stand behind the number words that are of the whole answer: a unit, a remark."""

CURRENCIES: dict[str, str] = {
    **dict.fromkeys(("US", "USD"), "dollar^1"),
    **dict.fromkeys(("EUR", r"\euro", "€"), "euro^1"),
    **dict.fromkeys(("GBP", r"\pounds", "£"), "sterling^1"),
    **dict.fromkeys(("Rs", "₹"), "rupee^1"),
    "¥": "yen^1",
}
_POUNDS = {frozenset(("pound^1", other)) for other in ("lb^1", "sterling^1")}  # a pound may be either


@dataclass(frozen=True, slots=True)
class Number:
    """A value; significant digits and decimal places of a decimal, else 0; whether its comma may also part a list."""

    value: Fraction
    digits: int = 0
    places: int = 0
    doubtful: bool = False


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with what stands around it: `unit` is empty if there is none or an unknown one, `name` as in x = 5."""

    number: Number
    percent: bool = False
    unit: str = ""
    name: str = ""


def read_quantity(answer: str) -> Quantity | None:
    r"""The one number that the answer is, such as `-1\frac12`, `50.0\%`, `\$1{,}234`, `1.4 \times 10^9`, `5 cm`."""
    if len(answer) > _LONGEST:
        return None
    dollar = "\\$" in answer or answer.count("$") == 1  # a pair of them is mathematics
    return _quantity(tidy(answer), "dollar^1" if dollar else "")


def _quantity(text: str, money: str) -> Quantity | None:
    """`money`: the unit that a sign says which is not in the text."""
    name = _NAME.match(text)
    rest = text[name.end() :] if name else text
    if about := _ABOUT.match(rest):
        rest = rest[about.end() :]
    if price := _PRICE.match(rest):
        rest = price[1] + rest[price.end() :]
        money = CURRENCIES[re.sub(r"\\text|[{}\s.]", "", price[2])]
    rest, factor = without_factor(_ORDINAL.sub("", rest))
    bare, unit = split_unit(rest)
    number = _number(unwrapped(bare))
    if number is None:
        return None
    number, unit = _times(number, factor), unit or money
    written = re.sub(r"[\s{}=]|\\approx", "", name[0]) if name and "\\text" not in name[0] else ""
    return Quantity(number, unit == "%", "" if unit == "%" else unit, written)


def without_factor(text: str) -> tuple[str, Fraction]:
    r"""(`text` without the number words behind its number, their product): `5 \text{ million dollars}` has 10^6.

    Number words in a sum or a list stay where they are.
    """
    words = _FACTOR.search(text)
    if words is None:
        return text, Fraction(1)
    start, end = words.span(1 if words[1] else 2)
    if _SUM_OR_LIST.search(text[:start]) or not _WITH_FACTOR.fullmatch(text, end):
        return text, Fraction(1)
    return text[:start] + text[end:], prod(
        (FACTORS[word] for word in text[start:end].lower().split()), start=Fraction(1)
    )


def _times(number: Number, factor: Fraction) -> Number:
    """A number by a number word; a decimal stays one, with as many digits."""
    if factor == 1:
        return number
    power = len(str(max(factor.numerator, factor.denominator))) - 1
    power = power if factor >= 1 else -power
    if factor == Fraction(10) ** power:
        return replace(number, value=number.value * factor, places=number.places - power)
    return replace(number, value=number.value * factor, digits=min(number.digits, 1), places=0)


def split_unit(text: str) -> tuple[str, str]:
    r"""(`text` without the unit behind it, the unit): `%`, a name of one of two spellings alike, or empty if unknown.

    A unit is `\text{...}`, with a power or several of them, or a word of two letters or more behind a blank (of three
    behind a digit). One letter is a variable, and so are two that touch the number: `4t`, `3 m`, `10cm`.
    """
    if percent := _PERCENT.search(text[-40:]):
        return text[: len(text) - (percent.end() - percent.start())], "%"
    if degree := _DEGREE.search(text[-60:]):
        scale = next((letter[0] for letter in degree.groups() if letter), "")
        return text[: len(text) - (degree.end() - degree.start())], f"degree{scale}" if scale else "degree"
    names: list[str] = []
    while (match := _TEXT_UNIT.search(text[-80:])) and _is_unit(text[: len(text) - len(match[0])], match[1]):
        names.append(match[0].strip())
        text = text[: len(text) - len(match[0])]
    if names:
        return text, _known("".join(reversed(names)))
    return _without_bare_unit(text)


def _is_unit(before: str, name: str) -> bool:
    r"""Whether a `\text` behind `before` is a unit or a remark, and not a part of the mathematics."""
    before = before.rstrip()
    outside = re.sub(r"\\text\{[^{}]*\}", "", before[-200:])
    letter = len(name) == 1 and name not in _LETTER_UNITS
    if (_CHANGED.match(name) and not _known(name)) or _NUMBER_WORD.match(name):
        return False
    return bool(re.search(r"[\dA-Za-z]", outside)) and not letter and not _OPEN_END.search(before)


def _without_bare_unit(text: str) -> tuple[str, str]:
    r"""A unit without `\text`: words behind a number."""
    match = _BARE_UNIT.search(text[-80:])
    if match is None or len(match[0]) == len(text):
        return text, ""
    before, word = text[: len(text) - len(match[0])], match[0].strip()
    first = re.split(r"[ /.^-]", word, maxsplit=1)[0]
    touches = not (before[-1:].isspace() or match[0][0].isspace())
    if not touches and _SPEED.fullmatch(word) and all(name in UNITS for name in word.split("/")):
        return before, ""
    if len(first) < (3 if touches else 2) or not re.search(r"(?:[\d}]|\\pi)\s*$", before):
        return text, ""
    if _known(first) or _known(word) or first.lower() in ("sq", "cu"):
        return before, _known(word)
    if _CHANGED.match(word) or _NUMBER_WORD.match(word):
        return text, ""
    counted = len(first) > (3 if touches else 2) and first.lower() not in _NO_UNITS
    return (before, "") if counted and _number(unwrapped(before)) is not None else (text, "")


def _known(unit: str) -> str:
    r"""The unit's own name, with its power; empty if it is not in the table."""
    plain = re.sub(r"\\text|[{}\s.]", "", unit).lower()
    square = 2 if re.match(r"sq(uared?)?", plain) else 3 if re.match(r"cu(bic)?(?!p)", plain) else 1
    plain = re.sub(r"^(sq(uared?)?|cu(bic)?(?!p))", "", plain)
    word, _, power = plain.partition("^")
    name = UNITS.get(word) or UNITS.get(word.removesuffix("s")) or ""
    return f"{name}^{power or square}" if name else ""


def _number(text: str) -> Number | None:
    sign = -1 if text[:1] == "-" else 1
    rest = text[1:].lstrip() if text[:1] in ("-", "+") else text
    number = _unsigned(_without_parentheses(rest))
    return None if number is None else replace(number, value=sign * number.value)


def _without_parentheses(text: str) -> str:
    """`text` without the pairs of parentheses around all of it, as far as no comma makes them a tuple."""
    inner = text.lstrip("( ")
    pairs = text[: len(text) - len(inner)].count("(")
    closed = len(text) - len(inner.rstrip(") ")) if pairs else 0
    if not pairs or "," in text or "(" in inner or text[len(text) - closed :].count(")") != pairs:
        return text
    return inner.rstrip(") ")


def _unsigned(text: str) -> Number | None:
    if (number := _digits(text)) is not None:
        return number
    for read in (_ratio, _mixed, _scientific, _repeating):
        if (number := read(text)) is not None:
            return number
    if text[:1] == "-" and len(text) > 1 and text[1] != "-":  # inside parentheses
        inner = _unsigned(text[1:].lstrip())
        return None if inner is None else replace(inner, value=-inner.value)
    return None


def _digits(text: str) -> Number | None:
    """A number in digits, with or without separators between thousands."""
    if _GROUPED.fullmatch(text):
        return _decimal(text.replace("{,}", "").replace(",", ""))
    if _SPACED.fullmatch(text):
        return _decimal(re.sub(r"[ '_]", "", text))
    if _POINTED.fullmatch(text):
        return _decimal(text.replace(".", "").replace(",", "."))
    if _PLAIN.fullmatch(text):
        return _decimal(text)
    if _COMMA.fullmatch(text):
        return replace(_decimal(text.replace("{,}", ".").replace(",", ".")), doubtful=True)
    return None


def _decimal(text: str) -> Number:
    places = text.partition(".")[2]
    digits = len(text.replace(".", "").lstrip("0")) or 1
    return Number(Fraction(text.rstrip(".") or "0"), digits if places else 0, len(places))


def _ratio(text: str) -> Number | None:
    r"""`\frac{a}{b}`, `a/b`, `a \over b` of two numbers in digits."""
    if fraction := _FRACTION.fullmatch(text):
        above, below = (part for part in fraction.groups() if part is not None)
    elif over := _OVER.fullmatch(text):
        above, below = over.groups()
    elif text.count("/") == 1:
        above, below = text.split("/")
    else:
        return None
    parts = [_signed_digits(_without_parentheses(part.strip())) for part in (above, below)]
    if parts[0] is None or parts[1] is None or not parts[1].value:
        return None
    digits = max(parts[0].digits, parts[1].digits)
    return Number(parts[0].value / parts[1].value, digits, doubtful=parts[0].doubtful or parts[1].doubtful)


def _signed_digits(text: str) -> Number | None:
    sign = -1 if text[:1] == "-" else 1
    number = _digits(text[1:].lstrip() if text[:1] in ("-", "+") else text)
    return None if number is None else replace(number, value=sign * number.value)


def _mixed(text: str) -> Number | None:
    r"""A whole number and a proper fraction: `1\frac12`, `1 1/2`."""
    whole = _MIXED.match(text)
    part = _ratio(text[whole.end() :].strip()) if whole else None
    if whole is None or part is None or part.digits or not 0 < part.value < 1:
        return None
    return Number(int(whole[1]) + part.value)


def _repeating(text: str) -> Number | None:
    r"""A decimal whose last digits repeat for ever: `0.1\overline{6}`."""
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    whole, fixed, repeated = match.groups()
    period = Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
    return Number(Fraction(int(whole + fixed or "0"), 10 ** len(fixed)) + period)


def _scientific(text: str) -> Number | None:
    match = _EXPONENT.fullmatch(text) or _TEN.fullmatch(text)
    if match is None:
        return None
    mantissa = Number(Fraction(1)) if match["mantissa"] is None else _signed_digits(match["mantissa"].strip())
    power = int("".join(match["power"].split())) if len(match["power"]) < 9 else _FARTHEST + 1
    if mantissa is None or abs(power) > _FARTHEST:
        return None
    return Number(mantissa.value * Fraction(10) ** power, mantissa.digits, mantissa.places - power)


def same_quantity(gold: Quantity, answer: Quantity) -> bool | None:
    """Whether two quantities are the same; None where that is not decided by them as numbers."""
    if gold.name and answer.name and gold.name != answer.name:
        return False
    if units_differ(gold.unit, answer.unit):
        return False
    if (gold.number.doubtful and answer.number.doubtful) or _is_list(gold.number):
        return None
    if gold.percent == answer.percent:
        return same_number(gold.number, answer.number)
    scaled = [_hundredth(part.number) if part.percent else part.number for part in (gold, answer)]
    return same_number(gold.number, answer.number) or same_number(scaled[0], scaled[1])


def units_differ(one: str, other: str) -> bool:
    """Whether both are known and not the same; per cents aside, which are no unit."""
    return "" not in (one, other) and one != other and frozenset((one, other)) not in _POUNDS


def _hundredth(number: Number) -> Number:
    return replace(number, value=number.value / 100, places=number.places + 2)


def _is_list(gold: Number) -> bool:
    """A gold such as `2,1` is a list; `1,22` and `0,5` are numbers."""
    whole = abs(gold.value) < 1
    return gold.doubtful and not whole and gold.value * 10 == int(gold.value * 10)


def same_number(gold: Number, answer: Number) -> bool:
    """Equal exactly, or where a decimal is among them as far as decimals can tell (see `ROUNDED` and `WRITTEN`).

    A gold that is a decimal of four digits or more is also right for an exact answer that it rounds, or cuts off.
    """
    if gold.value == answer.value:
        return True
    if not gold.digits and not answer.digits:
        return False
    written = _terminates(gold.value) and _terminates(answer.value)
    largest = max(abs(gold.value), abs(answer.value))
    if abs(gold.value - answer.value) <= (WRITTEN if written else ROUNDED) * largest:
        return True
    rounded = gold.digits >= _LEAST_DIGITS and not answer.digits and _terminates(gold.value)
    return rounded and abs(answer.value - gold.value) < Fraction(1, 10) ** gold.places


def _terminates(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
