"""A logged rollout as the page shows it: both contexts, and its tokens coloured, and sorted, by what was measured."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from atesd.config import AlignedGateSettings, Config
from atesd.rows import SampleRow
from atesd.text import MISSING, finite, number, signed, spelt
from atesd_lab.report.rows import RunRows

KL_LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # nats per token, logarithmic: most tokens lie near 0, a few decide
ALIGNMENT_LEVELS = (0.01, 0.1, 0.5)  # shares of the largest magnitude in the rollout: its scale changes over training
RATIO_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIRST_SAMPLES = 2
LAST_SAMPLES = 6
SORTED_TOKENS = 100  # rows of a sorted list of tokens; a longer rollout says how many there are
BEFORE = 24  # characters before a token in a sorted list


@dataclass(frozen=True, slots=True)
class Measured:
    """A token with what was measured of it. `kept` is None where no gate decided by its alignment."""

    place: int
    text: str
    kl: float | None
    alignment: float | None
    ratio: float | None
    kept: bool | None


@dataclass(frozen=True, slots=True)
class Token:
    """A token's text, the classes of the style sheet that colour it, and its value as the page words it."""

    text: str
    style: str
    words: str


@dataclass(frozen=True, slots=True)
class Heat:
    """The completion coloured by one measurement."""

    title: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class SortedRow:
    """A token in a sorted list: where it stands, the text before it, and its values."""

    place: int
    before: str
    token: Token
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """The tokens of a rollout in one order."""

    name: str
    rows: tuple[SortedRow, ...]


@dataclass(frozen=True, slots=True)
class SampleView:
    """A rollout for the page. The teacher's context is cut where it begins and ends to differ from the student's.

    `columns` name the values of the sorted rows; `note` says how many tokens the orders leave out.
    """

    heading: str
    verdict: str
    facts: str
    student_context: str
    teacher_parts: tuple[str, str, str]
    completion: str
    heats: tuple[Heat, ...]
    columns: tuple[str, ...]
    orders: tuple[Order, ...]
    note: str


def sample_views(run: RunRows) -> list[SampleView]:
    """The first and the last logged rollouts, by update."""
    rows = sorted(run.samples, key=lambda row: int(row["update"]))
    if len(rows) > FIRST_SAMPLES + LAST_SAMPLES:
        rows = rows[:FIRST_SAMPLES] + rows[-LAST_SAMPLES:]
    return [_view(row, gated=cuts_by_alignment(run.config)) for row in rows]


def cuts_by_alignment(config: Config) -> bool:
    """Whether a token is kept where its alignment is positive, and left out elsewhere."""
    gate = config.loss.gate
    return isinstance(gate, AlignedGateSettings) and not gate.permute and gate.skip != "rollouts"


def token_level(kl: float) -> int:
    """How many of `KL_LEVELS` a token's KL (nats) has reached."""
    return bisect_right(KL_LEVELS, kl)


def alignment_level(alignment: float, largest: float) -> int:
    """How many of `ALIGNMENT_LEVELS` a token's alignment has reached, as a share of `largest`; negative if it harms."""
    level = bisect_right(ALIGNMENT_LEVELS, abs(alignment) / largest) if largest else 0
    return level if alignment > 0 else -level


def teacher_only(student_context: str, teacher_context: str) -> tuple[str, str, str]:
    """The teacher's context as (before, only the teacher reads this, after), cut between words; they join again."""
    student, teacher = _words(student_context), _words(teacher_context)
    start = _shared_length(student, teacher)
    end = len(teacher) - _shared_length(student[start:][::-1], teacher[start:][::-1])
    return "".join(teacher[:start]), "".join(teacher[start:end]), "".join(teacher[end:])


def _words(text: str) -> list[str]:
    """Words, each with the white space before it, so that they join to the text."""
    return re.findall(r"\s*\S+|\s+", text)


def _shared_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common beginning."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _view(row: SampleRow, gated: bool) -> SampleView:
    tokens = _measured(row, gated)
    kls = [token.kl for token in tokens if token.kl is not None]
    kept = [token.kept for token in tokens if token.kept is not None]
    facts = [
        f"difficulty {row.get('difficulty', 0)}",
        f"reveal ratio {number(row.get('reveal_ratio'), 2)}",
        f"effective {number(row.get('effective_ratio'), 2)}",
        f"{len(tokens)} tokens",
        f"mean KL {number(sum(kls) / len(kls) if kls else None, 2)} nats",
        *([f"{sum(kept)} tokens kept by the gate"] if kept else []),
    ]
    left = f"The first {SORTED_TOKENS} of {len(tokens)} tokens in each order." if len(tokens) > SORTED_TOKENS else ""
    return SampleView(
        heading=f"Update {row['update']}, problem {row['problem_id']}",
        verdict=f"{row.get('verdict') or 'not checked'}{', truncated' if row.get('truncated') else ''}",
        facts=", ".join(facts),
        student_context=row["student_context"],
        teacher_parts=teacher_only(row["student_context"], row["teacher_context"]),
        completion=row["completion"],
        heats=_heats(tokens),
        columns=tuple(name for name, _ in _columns(tokens)),
        orders=_orders(tokens),
        note=left,
    )


def _measured(row: SampleRow, gated: bool) -> list[Measured]:
    """The tokens of a row; those beyond the measured ones have no values."""
    texts = row.get("tokens") or []
    lists = (row.get("token_kl"), row.get("token_alignment"), row.get("token_ratio"))
    columns = [list(values or [])[: len(texts)] for values in lists]
    padded = [[*map(finite, column), *[None] * (len(texts) - len(column))] for column in columns]
    return [
        Measured(place, text, kl, alignment, ratio, alignment > 0 if gated and alignment is not None else None)
        for place, (text, kl, alignment, ratio) in enumerate(zip(texts, *padded, strict=True), start=1)
    ]


def _heats(tokens: Sequence[Measured]) -> tuple[Heat, ...]:
    """One text per measurement; the text of an old or foreign row without any stays uncoloured."""
    if not tokens:
        return ()
    heats = [Heat("By KL(teacher || student)", tuple(map(_by_kl, tokens)))]
    if any(token.alignment is not None for token in tokens):
        largest = _largest(tokens)
        title = f"By alignment, largest {number(largest, 2)}"
        heats.append(Heat(title, tuple(_by_alignment(token, largest) for token in tokens)))
    if any(token.ratio is not None for token in tokens):
        heats.append(Heat("By the token's own reveal ratio", tuple(map(_by_ratio, tokens))))
    return tuple(heats)


def _by_kl(token: Measured) -> Token:
    if token.kl is None:
        return Token(token.text, _style("k0", token), "not measured")
    return Token(token.text, _style(f"k{token_level(token.kl)}", token), f"{number(token.kl, 2)} nats")


def _by_alignment(token: Measured, largest: float) -> Token:
    if token.alignment is None:
        return Token(token.text, _style("k0", token), "not measured")
    level = alignment_level(token.alignment, largest)
    colour = f"{'p' if level > 0 else 'm'}{abs(level)}" if level else "k0"
    gate = " kept" if token.kept else ""
    decided = {None: "", True: ", kept", False: ", left out"}[token.kept]
    return Token(token.text, _style(colour + gate, token), signed(token.alignment) + decided)


def _by_ratio(token: Measured) -> Token:
    if token.ratio is None:
        return Token(token.text, _style("k0", token), "not measured")
    nearest = min(range(len(RATIO_LEVELS)), key=lambda level: abs(RATIO_LEVELS[level] - (token.ratio or 0.0)))
    return Token(token.text, _style(f"r{nearest}", token), f"ratio {number(token.ratio, 2)}")


def _style(colour: str, token: Measured) -> str:
    """The class of a colour; a line break has no surface to colour, so the style sheet draws a sign for it."""
    return f"{colour} n" if "\n" in token.text else colour


def _orders(tokens: Sequence[Measured]) -> tuple[Order, ...]:
    """The tokens by place and by each measurement; those without a value come last."""

    def by(value: Callable[[Measured], float | None], falling: bool) -> list[Measured]:
        known = [token for token in tokens if value(token) is not None]
        unknown = [token for token in tokens if value(token) is None]
        return [*sorted(known, key=lambda token: value(token) or 0.0, reverse=falling), *unknown]

    if not tokens:
        return ()
    orders = {"position": list(tokens), "largest KL": by(lambda token: token.kl, falling=True)}
    if any(token.alignment is not None for token in tokens):
        orders["most helpful"] = by(lambda token: token.alignment, falling=True)
        orders["most harmful"] = by(lambda token: token.alignment, falling=False)
    before, text = [], ""
    for token in tokens:
        before.append(text[-BEFORE:])
        text += token.text.replace("\n", spelt("\n"))
    columns = _columns(tokens)
    largest = _largest(tokens)

    def row(token: Measured) -> SortedRow:
        shown = _by_kl(token) if token.alignment is None else _by_alignment(token, largest)
        shown = Token(spelt(token.text), shown.style.removesuffix(" n"), shown.words)
        return SortedRow(token.place, before[token.place - 1], shown, tuple(value(token) for _, value in columns))

    return tuple(Order(name, tuple(map(row, some[:SORTED_TOKENS]))) for name, some in orders.items())


def _columns(tokens: Sequence[Measured]) -> list[tuple[str, Callable[[Measured], str]]]:
    """Which values a sorted list has, and how a token's is worded: those that any token has."""
    columns: list[tuple[str, Callable[[Measured], str]]] = [("KL, nats", lambda token: number(token.kl, 2))]
    if any(token.alignment is not None for token in tokens):
        columns.append(("alignment", lambda token: signed(token.alignment)))
    if any(token.kept is not None for token in tokens):
        columns.append(("gate", lambda token: {None: MISSING, True: "kept", False: "left out"}[token.kept]))
    if any(token.ratio is not None for token in tokens):
        columns.append(("ratio", lambda token: number(token.ratio, 2)))
    return columns


def _largest(tokens: Sequence[Measured]) -> float:
    return max((abs(token.alignment) for token in tokens if token.alignment is not None), default=0.0)
