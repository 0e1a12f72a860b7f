"""From the rows of another trainer's data set to problems whose references can be shown in part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast, final

from atesd.config import Config
from atesd.data.answers import Checker, last_boxed
from atesd.data.entries import text_hash
from atesd.data.equivalence import judge
from atesd.data.own_checker import configured_checker, pairs_of
from atesd.data.own_segmenter import segmenter_of
from atesd.data.segments import Segmenter, cut, split_reference
from atesd.data.splits import fingerprint
from atesd.errors import DataError
from atesd.records import Problem

_KEYS = ("reference", "answer", "difficulty")


@lru_cache(maxsize=4096)
def problem_of(
    text: str, reference: str, answer: str | None = None, difficulty: int = 0, segmenter: Segmenter = "auto"
) -> Problem:
    """A problem with its reference cut into segments; its id is a hash of the text.

    The answer is the reference's last box, or the one given. A reference without either has no closing: no answer is
    shown at any ratio. Raises `DataError` if the answer given is not the one that the reference boxes, as far as this
    is seen without algebra.
    """
    boxed = last_boxed(reference)
    if boxed is not None and answer is not None and judge(answer, boxed) in ("wrong", "unparseable"):
        raise DataError(
            f"'{text:.60}': the reference boxes '{boxed}' but its answer is '{answer}'; mend one of the two"
        )
    final = answer if boxed is None else boxed
    segments, closing = (
        (cut(reference, segmenter), "") if final is None else split_reference(reference, final, segmenter)
    )
    return Problem(text_hash(text), text, segments, closing, final or "", difficulty)


def message_text(prompt: Any) -> str:
    """The problem in a prompt, which is text or a chat: what the user says last, of a message in parts the texts."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part.get("text"))


def problem_in(prompt: Any, context: Any, segmenter: Segmenter, where: str = "a row") -> Problem:
    """The problem of a prompt whose reference is text, or a mapping of reference, answer and difficulty.

    Raises `DataError` that names the row by `where` for anything else.
    """
    values = {"reference": context} if isinstance(context, str) else context
    if not isinstance(values, Mapping) or not isinstance(values.get("reference"), str) or set(values) - {*_KEYS}:
        raise DataError(
            f"{where}: the reference is {context!s:.60}; expected text, or a mapping with {', '.join(_KEYS)}"
        )
    if not values["reference"].strip():
        raise DataError(
            f"{where}: the reference is empty, so that no ratio shows anything; give one, or leave the row out"
        )
    answer, difficulty = values.get("answer"), values.get("difficulty") or 0
    if not isinstance(answer, str | None) or type(difficulty) is not int:
        raise DataError(
            f"{where}: answer {answer!r:.40}, difficulty {difficulty!r:.40}; expected text, '9', and a whole number"
        )
    return problem_of(_text_of(prompt, where), values["reference"], answer, difficulty, segmenter)


def columns(rows: Iterable[Any], *needed: str, optional: str = "") -> Iterator[tuple[Any, ...]]:
    """Columns of the trainer's data set, row by row; last the optional one or None.

    Raises `DataError` for a row without one that is needed.
    """
    for number, row in enumerate(rows):
        if missing := [name for name in needed if name not in row]:
            found = ", ".join(map(str, row))
            raise DataError(f"row {number}: no column {missing[0]}; it has {found}. Rename one of them")
        yield (*(row[name] for name in needed), *([row.get(optional)] if optional else []))


def require_problems(rows: Iterable[tuple[Any, Any]], config: Config, where: str = "row") -> str:
    """The fingerprint of the problems of all (prompt, reference); messages call a row `where` and its number.

    Raises `DataError` for a row that cannot be used, or whose answer is not known but is to be shown.
    """
    problems = []
    for number, (prompt, context) in enumerate(rows):
        problems.append(problem_in(prompt, context, segmenter_of(config.data), f"{where} {number}"))
        if not problems[-1].answer and config.views.answer != "withhold":
            raise DataError(
                f"{where} {number}: the reference has no \\boxed{{}} and no answer is stated, but the teacher sees it "
                "at every ratio; give {'reference': .., 'answer': ..}, or set views.answer: withhold"
            )
    return fingerprint(problems)


def fingerprint_of(rows: Iterable[Any]) -> str:
    """SHA-256 (hexadecimal) over rows whose references are made during the run."""
    return hashlib.sha256(repr(list(rows)).encode()).hexdigest()


def _text_of(prompt: Any, where: str) -> str:
    try:
        return message_text(prompt)
    except (LookupError, TypeError, AttributeError):
        raise DataError(f"{where}: the prompt is {prompt!s:.60}; expected text, or a chat of messages") from None


@final
class Judge:
    """Says which completions solve their problem, by `data.checker`."""

    def __init__(self, config: Config) -> None:
        self._config, self._checker = config, cast("Checker | None", None)

    def verdicts(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[tuple[str, int, float]]:
        """(problem id, difficulty, 1.0 or 0.0) of each completion; empty where `data.checker` is none."""
        self._checker = self._checker or configured_checker(self._config)
        if self._checker is None:
            return []
        found = zip(problems, self._checker.check(pairs_of(problems, texts)), strict=True)
        return [(problem.id, problem.difficulty, float(verdict == "correct")) for problem, verdict in found]

    def close(self) -> None:
        """End the checker's processes; asked again, it starts new ones."""
        if self._checker is not None:
            self._checker.close()
            self._checker = None
