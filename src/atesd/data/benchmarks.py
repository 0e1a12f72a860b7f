"""The benchmarks of `atesd evaluate --benchmark`: where their problems are, and whether they are the right ones.

benchmarks.yaml beside this file lists them. No text of a problem is packaged: it comes from the hub or its cache
through `datasets`, or from a file of yours, and a hash of its content says whether it is what others were scored on.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Strict

from atesd.config import Component, DataConfig, parse_yaml
from atesd.config.explain import nearest
from atesd.data.sources import load_benchmark
from atesd.data.splits import ProblemSets
from atesd.data.tables import open_table
from atesd.errors import ConfigError, DataError
from atesd.records import Problem

Pinned = Literal["pinned", "expected", "no"]
"""By what the content was checked: the registry's hash, one that the user gave, or nothing."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"-?\d{1,3}(,?\d{3})*")
_COLUMNS = {"problem": "problem", "answer": "answer"}
Words = Annotated[tuple[str, ...], Strict(False)]
Day = Annotated[datetime.date, Strict(False)]


class Benchmark(Component):
    """One entry of benchmarks.yaml, whose head says what the fields are."""

    title: str
    hub: str
    subset: str | None = None
    split: str
    columns: dict[str, str]
    problems: int = Field(ge=1)
    held: str = Field(pattern=r"\d{4}-\d{2}")
    licence: str
    sha256: str | None = Field(pattern=_SHA256.pattern)
    copies: Words

    def is_clean(self, released: datetime.date | None) -> bool | None:
        """Whether no problem was public when a model was released; None where that day is not known.

        To the month, in favour of the doubt: what was held in the month of the release is not clean.
        """
        return None if released is None else self.held > f"{released:%Y-%m}"


class Family(Component):
    """Models that were released together."""

    name: str
    pattern: str
    released: Day
    thinking: str | None = None


class Registry(Component):
    """benchmarks.yaml."""

    benchmarks: dict[str, Benchmark]
    families: list[Family]


@dataclass(frozen=True, slots=True)
class Asked:
    """A benchmark as the command line names it, `aime24` or `aime24=FILE`, and the hash that was asked for."""

    name: str
    file: str | None = None
    expected: str | None = None

    @property
    def entry(self) -> Benchmark:
        """What the registry says of it."""
        return registry().benchmarks[self.name]

    @property
    def source(self) -> str:
        """The file, or the id on the hub."""
        return self.file or self.entry.hub


@dataclass(frozen=True, slots=True)
class Content:
    """The problems of a benchmark, as the test split of `problems`; `sha256` is the hash that was found."""

    asked: Asked
    data: DataConfig
    problems: ProblemSets
    sha256: str
    pinned: Pinned


@cache
def registry() -> Registry:
    """What benchmarks.yaml says."""
    text = (importlib.resources.files("atesd.data") / "benchmarks.yaml").read_text("utf-8")
    return Registry.model_validate(parse_yaml(text, "benchmarks.yaml"))


def asked_for(names: str, expected: Sequence[str] = ()) -> list[Asked]:
    """`aime24,math500=FILE` with hashes `aime24=SHA256`. Raises `ConfigError` for an unknown name, a name twice."""
    hashes = dict(_pair(word, "--expect-hash") for word in expected)
    found = [_one(word.strip(), hashes) for word in names.split(",")]
    each = [one.name for one in found]
    twice = next((name for name in each if each.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--benchmark: {twice} is named twice; each is one row")
    stray = next((name for name in hashes if name not in each), None)
    if stray is not None:
        raise ConfigError(f"--expect-hash {stray}=...: {stray} is not evaluated; --benchmark names {', '.join(each)}")
    return found


def _one(word: str, hashes: Mapping[str, str]) -> Asked:
    name, given, file = word.partition("=")
    known = registry().benchmarks
    if name not in known:
        raise ConfigError(f"--benchmark {word!r}: no such benchmark{nearest(name, known)}; known: {', '.join(known)}")
    if given and not file:
        raise ConfigError(f"--benchmark {word}: no file after the =; write {name} for the hub, or {name}=FILE.jsonl")
    return Asked(name, file or None, hashes.get(name))


def _pair(word: str, option: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    if not _SHA256.fullmatch(value):
        raise ConfigError(f"{option} {word}: expected NAME=SHA256, 64 hexadecimal digits, as an evaluation prints them")
    return name, value


def load_content(asked: Asked, data: DataConfig) -> Content:
    """Read a benchmark, every row of it, and check how many problems it has and what they hash to.

    Of `data` the checker alone is kept, with its settings. Raises `DataError` for a source that cannot be read, and for
    other problems than those that were pinned.
    """
    entry = asked.entry
    columns = entry.columns
    if asked.file is not None and not set(columns.values()) <= set(open_table(asked.file, entry.split).columns):
        columns = _COLUMNS  # the hub's names are not in the file: what our own files call them
    kept = {name: value for name, value in data if name.startswith("checker")}
    settings = {"source": asked.source, "test_source": asked.source, "columns": columns, "split_name": entry.split}
    subset = None if asked.file else entry.subset
    config = DataConfig.model_validate({**settings, "subset": subset, **kept})
    try:
        problems = load_benchmark(config)
    except DataError as error:
        hint = "" if asked.file else f"\nOr name a file of yours: --benchmark {asked.name}=FILE.jsonl"
        raise DataError(f"{asked.name}: {error}{hint}") from None
    found = content_hash(problems.test)
    if asked.expected is None and len(problems.test) != entry.problems:
        raise DataError(
            f"{asked.source}: {len(problems.test)} problems, but {asked.name} ({entry.title}) has {entry.problems}; "
            f"give its whole file, or say that a part is what you want: --expect-hash {asked.name}={found}"
        )
    wanted = asked.expected or entry.sha256
    if wanted not in (None, found):
        raise DataError(_other_content(asked, found))
    pinned: Pinned = "expected" if asked.expected else "pinned" if entry.sha256 else "no"
    return Content(asked, config, problems, found, pinned)


def _other_content(asked: Asked, found: str) -> str:
    entry = asked.entry
    head = f"{asked.source}: its problems hash to {found}"
    if asked.expected is not None:
        return f"{head}, not to {asked.expected} (--expect-hash); another version, or another set of columns"
    copies = " and ".join(entry.copies)
    return (
        f"{head}, not to {entry.sha256}, that of {asked.name} in {copies}. Texts, answers or columns differ: look at "
        f"it, and if it is what you want to be scored on, --expect-hash {asked.name}={found}"
    )


def content_hash(problems: Iterable[Problem]) -> str:
    """SHA-256 of what a benchmark asks and expects, hexadecimal: of the sorted lines `problem TAB answer`.

    Neither the order of the rows counts, nor runs of white space in a problem, nor white space, leading zeros and
    separators of thousands in an answer, nor any other column.
    """
    lines = sorted(f"{' '.join(one.text.split())}\t{_plain(one.answer)}" for one in problems)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain(answer: str) -> str:
    answer = "".join(answer.split())
    number = answer.replace(",", "")
    return str(int(number)) if _NUMBER.fullmatch(answer) and len(number) < 100 else answer


def family_of(path: str) -> Family | None:
    """The family of a model by the last part of its path or hub id; None: not known."""
    name = Path(path).name
    return next((one for one in registry().families if re.fullmatch(one.pattern, name)), None)
