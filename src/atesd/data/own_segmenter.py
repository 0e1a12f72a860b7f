"""The segmenter that `data.segmenter` names: one of ours, or one of the user's own (docs/factories.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import final

from atesd.config import DataConfig
from atesd.data.answers import last_boxed
from atesd.data.rows import shown
from atesd.data.segments import Segmenter
from atesd.errors import DataError
from atesd.importing import cause, function_made_by, is_named


@final
class OwnSegmenter:
    """The function of a text that a factory of the user's gives; its pieces must join to the text.

    Raises `DataError` where it raises, gives no pieces of text, loses something, or cuts through the final box.
    """

    def __init__(self, name: str, function: Callable[[str], Iterable[str]]) -> None:
        self._name, self._function = name, function

    def __call__(self, text: str) -> tuple[str, ...]:
        """The pieces of a reference; none of an empty one."""
        if not text:
            return ()
        try:
            given = self._function(text)
            pieces = tuple(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else None
        except Exception as error:  # of whatever kind: the function is the user's
            raise self._fault(f"raised {cause(error)}", text) from error
        if pieces is None or not all(isinstance(piece, str) for piece in pieces):
            raise self._fault(f"gave {type(given).__name__} '{shown(given)}', not a list of pieces of text", text)
        if not all(pieces):
            raise self._fault(f"gave an empty piece, number {pieces.index('') + 1}", text)
        if "".join(pieces) != text:
            raise self._fault("gave pieces that do not join to the text: nothing may be lost, added or stripped", text)
        box = last_boxed(text)
        if box is not None and box not in map(last_boxed, pieces):
            raise self._fault("cut through the box that holds the final answer", text)
        return pieces

    def _fault(self, what: str, text: str) -> DataError:
        return DataError(f"data.segmenter: {self._name} {what}; the reference is '{shown(text)}'")


def segmenter_of(config: DataConfig) -> Segmenter:
    """The word of one of ours, or the user's function. Raises `ConfigError` where the factory gives none."""
    if not is_named(config.segmenter):
        return config.segmenter
    return _own(config.segmenter, tuple(sorted(config.segmenter_settings.items())))


@lru_cache(maxsize=16)
def _own(name: str, settings: tuple[tuple[str, bool | int | float | str], ...]) -> OwnSegmenter:
    return OwnSegmenter(name, function_made_by(name, "data.segmenter", dict(settings), "text"))
