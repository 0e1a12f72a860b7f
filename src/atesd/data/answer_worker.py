"""A process that compares two answers at a time: JSON lines in, one verdict per line out.

`answers.MathChecker` runs this file by its path, so it imports nothing of the package (a torch in every worker would
cost seconds and memory). It ends itself when a comparison outlives its processor time: the kernel delivers the alarm,
whatever the computation is busy with, and a process that is held up loses none of it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

READY = "ready"
SUSPECT_SHARE = 0.25  # of the memory that a comparison may take; an unequal one that took more gives no verdict
WORN_SHARE = 0.25  # of that memory, which a process may keep before it makes room for a new one
ROUNDED = 1e-6  # relative difference of a decimal and an irrational or periodic number
WRITTEN = 1e-9  # of two decimals
PROVEN = 1e-40  # of two exact numbers whose difference is not evaluated to more digits
LEAST_DIGITS = 4  # of a decimal gold that may be rounded or cut off
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])|\\(?:imath|text\s*\{i\}|mathrm\s*\{i\})")

_INDEX = re.compile(r"_\s*\{?\s*i(?![A-Za-z])|\\(?:sum|prod)(?![A-Za-z])")


def main(seconds: float, memory_mb: int) -> None:
    """Serve until standard input closes. Says `ready` once everything is imported, or else why it is not.

    A reply is [verdict, whether the process leaves]: sympy keeps what it has computed, and a process grows old.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group: the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies = take_stdout()
    try:
        compare = _load()
        _limit_memory(memory_mb)
        if compare("x^2-1", "(x-1)(x+1)") != "correct":
            raise MemoryError(f"math-verify does not run in {memory_mb} MB")
    except Exception as error:
        reply_with(replies, f"{type(error).__name__}: {error}", leaves=True)
        return
    usual = before = _memory_mb("VmHWM:")
    start = _memory_mb("VmSize:")
    reply_with(replies, READY)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = _best(compare, json.loads(line))
        except MemoryError:
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        after = _memory_mb("VmHWM:")
        # sympy swallows failed allocations and goes on to "not equal": the parent sees a death instead.
        if verdict != "correct" and after - before > SUSPECT_SHARE * (memory_mb - usual):
            return
        before = after
        reply_with(replies, verdict, leaves=_memory_mb("VmSize:") - start > WORN_SHARE * (memory_mb - start))


def _best(compare: Callable[[str, str], str], pairs: list[list[str]]) -> str:
    """Correct if one pair is, else the verdict on the first."""
    verdict = "wrong"
    for place, (gold, answer) in enumerate(pairs):
        reply = compare(gold, answer)
        if reply == "correct":
            return reply
        verdict = reply if place == 0 else verdict
    return verdict


def _load() -> Callable[[str, str], str]:
    """Import math-verify and run it once, so that no import is left for the first pair."""
    from latex2sympy2_extended.latex2sympy2 import (
        ConversionConfig,
        NormalizationConfig,
        latex2sympy,
        normalize_latex,
    )
    from math_verify import grader

    logging.disable(logging.CRITICAL)  # math-verify warns that its own time-outs are off
    # Its numeric comparison has absolute tolerances, under which all tiny numbers are equal.
    grader.sympy_numeric_eq = _numerically_equal
    # Units are taken off before: its own list of units holds single letters.
    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    letters = ConversionConfig(lowercase_symbols=False)

    def read(answer: str, real: bool) -> Any:
        try:
            text = normalize_latex(answer, spelling)
            parsed = _parsed(
                text,
                lambda part: latex2sympy(part, is_real=real, normalization_config=None, conversion_config=letters),
            )
            return parsed if real else _with_imaginary_unit(parsed)
        except MemoryError:
            raise
        except Exception:
            return None

    def compare(gold: str, answer: str) -> str:
        real = _INDEX.search(gold + answer) is not None or _IMAGINARY.search(f"{gold} {answer}") is None
        expected = read(gold, real)
        if expected is None:
            return "wrong"  # the strings differ, and there is nothing else to go by
        found = read(answer, real)
        if found is None:
            return "unparseable"
        try:
            # Its time-outs raise inside whatever sympy is doing and are swallowed there: off.
            equal = grader.verify(
                [expected], [found], allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
            )
        except MemoryError:
            raise
        except Exception:
            equal = False  # incomparable kinds: not shown to be equal
        return "correct" if equal else "wrong"

    for gold, answer in (("x^2+2x+1", "(x+1)^2"), ("(1,2)", "[1,2]"), (r"\sqrt{2}", "1.5"), ("x=5", "5")):
        compare(gold, answer)
    return compare


def _with_imaginary_unit(parsed: Any) -> Any:
    from sympy import I

    return parsed.xreplace({symbol: I for symbol in parsed.free_symbols if symbol.name == "i"})


def _parsed(text: str, parse: Callable[[str], Any]) -> Any:
    """What a text is as mathematics; of a chain of equations that cannot be read as a whole, its last side."""
    try:
        return parse(text)
    except Exception:
        sides = re.split(r"(?<![\\<!>])=", text)
        if len(sides) < 3 or "," in text or ";" in text:
            raise
        return parse(sides[-1])


def _numerically_equal(one: Any, two: Any, *_: object) -> bool:
    """Whether two expressions or matrices are equal by value, relative to their size."""
    from sympy import MatrixBase, MatrixExpr

    one, two = _done(one), _done(two)
    if isinstance(one, (MatrixBase, MatrixExpr)) or isinstance(two, (MatrixBase, MatrixExpr)):
        shapes = getattr(one, "shape", None), getattr(two, "shape", None)
        return (
            shapes[0] is not None
            and shapes[0] == shapes[1]
            and all(
                _numerically_equal(a, b) or (a - b).simplify() == 0 for a, b in zip(one.flat(), two.flat(), strict=True)
            )
        )
    try:
        return _close(one, two)
    except MemoryError:
        raise
    except Exception:
        return False


def _done(expression: Any) -> Any:
    try:
        return expression.doit()
    except Exception:
        return expression


def _close(one: Any, two: Any) -> bool:
    """Equal exactly, or up to the tolerance of decimals: a number by its value, an expression by its coefficients."""
    from sympy import Float

    decimal = one.has(Float) or two.has(Float)
    unit = _last_place(one) if one.is_Float and not two.has(Float) else 0
    one, two = _exact(one), _exact(two)
    if one == two:
        return True
    if unit and two.is_number and bool(abs((one - two).evalf(15)) < unit):
        return True
    if one.is_Rational and two.is_Rational:
        tolerance = WRITTEN if _terminates(one.q) and _terminates(two.q) else ROUNDED
        return decimal and bool(abs(one - two) <= tolerance * max(abs(one), abs(two)))
    if one.is_number and two.is_number:
        return _near(one, two, ROUNDED if decimal else PROVEN)
    if not decimal:
        return bool((one - two).expand() == 0)
    first, second = (side.expand().evalf(30).as_coefficients_dict() for side in (one, two))
    return set(first) == set(second) and all(_near(first[term], second[term], ROUNDED) for term in first)


def _exact(expression: Any) -> Any:
    """Every decimal as the fraction that it writes."""
    from sympy import Float, Rational

    decimals = expression.atoms(Float)
    return expression.xreplace({decimal: Rational(str(decimal)) for decimal in decimals}) if decimals else expression


def _last_place(decimal: Any) -> Any:
    """One unit of the last digit of a decimal; 0 if it has too few digits to be the rounded value of another number."""
    from sympy import Rational

    digits, _, power = str(decimal).lower().partition("e")
    places = len(digits.partition(".")[2].rstrip("0")) - int(power or 0)
    return Rational(10) ** -places if len(re.sub(r"\D", "", digits).strip("0")) >= LEAST_DIGITS else 0


def _terminates(denominator: int) -> bool:
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _near(one: Any, two: Any, tolerance: float) -> bool:
    """Whether two numbers, real or complex, differ by at most `tolerance` of the larger."""
    difference, *sizes = (abs(number.evalf(15)) for number in (one - two, one, two))
    return all(size.is_finite for size in sizes) and bool(difference <= tolerance * max(sizes))


def _limit_memory(memory_mb: int) -> None:
    """Cap the address space; on Linux only, other systems do not enforce it."""
    if sys.platform.startswith("linux"):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = memory_mb * 2**20
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _memory_mb(field: str) -> float:
    """`VmHWM:`, the most memory this program ever held, or `VmSize:`, its address space, MB; 0 where none is limited.

    From the kernel's account of the address space: that of getrusage begins with the peak of whoever started the
    process, so that under a parent larger than the limit every comparison would look too large.
    """
    if not sys.platform.startswith("linux"):
        return 0.0
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 2**10


def take_stdout() -> BinaryIO:
    """A private copy of standard output; what a library prints goes to standard error instead."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def reply_with(replies: BinaryIO, word: str, leaves: bool = False) -> None:
    replies.write(json.dumps([word, leaves]).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
