"""Which split a problem belongs to: decided by a hash of its text, so that splits are disjoint by construction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from atesd.config import SharesConfig
from atesd.records import Problem, Split

Shares = tuple[tuple[Split, float], ...]
SHARES: Shares = (("train", 0.80), ("validation", 0.07), ("probe", 0.03), ("test", 0.10))
"""The default shares, in the order in which they divide the interval [0, 1)."""


@dataclass(frozen=True)
class ProblemSets:
    """The problems of a run, split. `skipped` lists refused rows, each with its reason; `notes` say what was chosen.

    `fingerprint` is the SHA-256 of every problem of every split, so that a resumed run can tell that its data changed,
    and `files` that of each file that was read, by its name.
    """

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    probe: tuple[Problem, ...]
    test: tuple[Problem, ...]
    skipped: tuple[str, ...] = ()
    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def split_of(text: str, shares: Shares = SHARES) -> Split:
    """The split of a problem by a hash of its text: that into whose share of [0, 1) the hash falls.

    Runs of white space count as one blank, so that two copies of a problem never fall into different splits.
    """
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64
    for split, share in shares:
        if place < share:
            return split
        place -= share
    return next(split for split, share in reversed(shares) if share)  # what rounding leaves of the interval


def shares_of(config: SharesConfig) -> Shares:
    """The shares as `split_of` reads them."""
    return ("train", config.train), ("validation", config.validation), ("probe", config.probe), ("test", config.test)


def fingerprint(*splits: Iterable[Problem]) -> str:
    """SHA-256 (hexadecimal) over every field of every problem, in order, with the borders between splits."""
    digest = hashlib.sha256()
    for problems in splits:
        for problem in problems:
            fields = (problem.id, problem.text, problem.segments, problem.closing, problem.answer, problem.difficulty)
            digest.update(repr(fields).encode())
        digest.update(b"|")
    return digest.hexdigest()
