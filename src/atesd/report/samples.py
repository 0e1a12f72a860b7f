"""A logged rollout as the page shows it: both contexts, and each completion token shaded by its KL."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from atesd.report.rows import Row, RunRows
from atesd.report.text import finite, number

KL_LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # nats per token, logarithmic: most tokens lie near 0, a few decide
FIRST_SAMPLES = 2
LAST_SAMPLES = 6


@dataclass(frozen=True, slots=True)
class Token:
    """A token's text, its place among `KL_LEVELS` (0: below all), and its KL as the page words it."""

    text: str
    level: int
    words: str


@dataclass(frozen=True, slots=True)
class SampleView:
    """A rollout for the page. The teacher's context is cut where it begins and ends to differ from the student's."""

    heading: str
    verdict: str
    facts: str
    student_context: str
    teacher_parts: tuple[str, str, str]
    tokens: tuple[Token, ...]
    completion: str


def sample_views(run: RunRows) -> list[SampleView]:
    """The first and the last logged rollouts, by update."""
    rows = sorted(run.samples, key=lambda row: int(row["update"]))
    if len(rows) > FIRST_SAMPLES + LAST_SAMPLES:
        rows = rows[:FIRST_SAMPLES] + rows[-LAST_SAMPLES:]
    return [_view(row) for row in rows]


def token_level(kl: float) -> int:
    """How many of `KL_LEVELS` a token's KL (nats) has reached."""
    return bisect_right(KL_LEVELS, kl)


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


def _view(row: Row) -> SampleView:
    tokens = _tokens(row.get("tokens") or [], row.get("token_kl") or [])
    measured = [kl for kl in map(finite, row.get("token_kl") or []) if kl is not None]
    facts = [
        f"difficulty {row.get('difficulty', 0)}",
        f"reveal ratio {number(row.get('reveal_ratio'), 2)}",
        f"effective {number(row.get('effective_ratio'), 2)}",
        f"{len(tokens)} tokens",
        f"mean KL {number(sum(measured) / len(measured) if measured else None, 2)} nats",
    ]
    return SampleView(
        heading=f"Update {row['update']}, problem {row['problem_id']}",
        verdict=f"{row.get('verdict') or 'not checked'}{', truncated' if row.get('truncated') else ''}",
        facts=", ".join(facts),
        student_context=row["student_context"],
        teacher_parts=teacher_only(row["student_context"], row["teacher_context"]),
        tokens=tokens,
        completion=row["completion"],
    )


def _tokens(texts: Sequence[str], kls: Sequence[float | None]) -> tuple[Token, ...]:
    """Tokens with their KL; those beyond the measured ones say so."""
    padded = [*kls[: len(texts)], *[None] * (len(texts) - len(kls))]
    return tuple(_token(text, finite(kl)) for text, kl in zip(texts, padded, strict=True))


def _token(text: str, kl: float | None) -> Token:
    if kl is None:
        return Token(text, 0, "not measured")
    return Token(text, token_level(kl), f"{number(kl, 2)} nats")
