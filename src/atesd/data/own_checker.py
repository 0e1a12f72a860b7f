"""The checker that `data.checker` names: one of ours, or one of the user's own (docs/factories.md)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast, final

from atesd.config import Config, DataConfig
from atesd.data.answers import Checker, ExactChecker, MathChecker, Pair, Workers
from atesd.data.own_worker import FAULT
from atesd.data.rows import shown
from atesd.errors import DataError
from atesd.importing import function_made_by
from atesd.records import Problem, Verdict

_WORKER = Path(__file__).with_name("own_worker.py")
_MOST_TRIED = 64  # references that the dry run has checked


@final
class OwnChecker:
    """The function (completion, answer) that a factory of the user's gives, in processes of its own.

    Raises `ConfigError` where the factory gives none, before any process starts; `check` raises `DataError` that names
    the problem where the function raises, or gives no verdict.
    """

    def __init__(self, config: DataConfig) -> None:
        self._name, settings = config.checker, config.checker_settings
        function_made_by(self._name, "data.checker", settings, "completion, answer")
        words = (str(config.checker_seconds), self._name, json.dumps(settings), json.dumps(sys.path))
        advice = "it is imported there by its name, from the same folder and path as here"
        self._pool = Workers(_WORKER, words, config.checker_workers, config.checker_seconds, self._name, advice)

    def check(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """The verdict on each pair, in order."""
        replies = self._pool.replies({i: [pair[0], pair[1]] for i, pair in enumerate(pairs)})
        for i, pair in enumerate(pairs):
            if replies[i].startswith(FAULT):
                row = f"problem {pair[2]}" if len(pair) > 2 else "a problem"
                raise DataError(
                    f"data.checker: {self._name}: {replies[i].removeprefix(FAULT)}; {row}, whose answer is "
                    f"'{shown(pair[1])}', completion '{shown(pair[0])}'"
                )
        return [cast(Verdict, replies[i]) for i in range(len(pairs))]

    def close(self) -> None:
        """End the processes. The next check starts new ones."""
        self._pool.close()


def configured_checker(config: Config) -> Checker | None:
    """The checker of a run; None for `none`, where nothing can be verified."""
    if config.checker == "none":
        return None
    if config.checker == "exact":
        return ExactChecker()
    return MathChecker(config.data.checker_workers) if config.checker == "math" else OwnChecker(config.data)


def pairs_of(problems: Sequence[Problem], completions: Sequence[str]) -> list[Pair]:
    """What a checker is asked: each completion with the answer and id of its problem."""
    return [(text, problem.answer, problem.id) for text, problem in zip(completions, problems, strict=True)]


def require_runs(checker: Checker | None, problems: Sequence[Problem]) -> None:
    """Raise `DataError` for a checker of the user's that fails on a reference, so that no model is loaded for it."""
    if isinstance(checker, OwnChecker):
        checker.check(pairs_of(problems[:1], [problem.reference for problem in problems[:1]]))


def checker_line(checker: Checker, problems: Sequence[Problem]) -> str:
    """How many of the first references a checker finds right."""
    some = problems[:_MOST_TRIED]
    verdicts = checker.check(pairs_of(some, [problem.reference for problem in some]))
    return f"checker: finds {verdicts.count('correct')} of the first {len(some)} references right"
