"""Problems and references out of a column of chats: lists of {role, content}."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atesd.data.rows import BadRow, Row, Unreadable, shown

MESSAGE_COLUMNS: Mapping[str, Any] = {
    "problem": "messages (user)",
    "solution": "messages (assistant)",
    "messages": None,
}
"""The columns of a row that `Chats` made."""


class _NoChatError(Exception):
    """Why a value is no chat with a problem; never leaves this module."""


class Chats:
    """Rows with what the user says last and the assistant's answer to it, of a column of chats.

    Not read: system messages and what comes before the last problem. Both are counted, for `notes`.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._unread = {"a system message": 0, "earlier turns": 0}

    def unfolded(self, rows: Iterable[Row | BadRow]) -> Iterator[Row | BadRow]:
        """The rows, each with the columns of `MESSAGE_COLUMNS` too, or what is wrong with its chat."""
        for row in rows:
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                problem, solution = self._read(row.values.get(self._column))
            except _NoChatError as error:
                yield BadRow(row.number, f"column '{self._column}' {error}")
                continue
            user, assistant = MESSAGE_COLUMNS["problem"], MESSAGE_COLUMNS["solution"]
            yield Row(row.number, {**row.values, user: problem, assistant: solution})

    def notes(self, name: str) -> tuple[str, ...]:
        """How many rows hold what is not read."""
        return tuple(
            f"{name}: {count} rows have {what} in column '{self._column}', which is not read"
            for what, count in self._unread.items()
            if count
        )

    def _read(self, chat: Any) -> tuple[str, str | None]:
        """(problem, solution) of a chat; the solution is None where nothing answers."""
        turns = _turns(chat)
        places = [place for place, (role, _) in enumerate(turns) if role == "user"]
        if not places:
            raise _NoChatError("holds no message of the user")
        last = places[-1]
        answers = [content for role, content in turns[last + 1 :] if role == "assistant"]
        if len(answers) > 1 or len(turns) - last - 1 > len(answers):
            raise _NoChatError("holds more than one answer of the assistant behind the last message of the user")
        before = {role for role, _ in turns[:last]}
        self._unread["a system message"] += "system" in before
        self._unread["earlier turns"] += bool(before - {"system"})
        return turns[last][1], answers[0] if answers else None


def _turns(chat: Any) -> list[tuple[str, str]]:
    if isinstance(chat, Unreadable):
        raise _NoChatError(chat.reason)
    if not isinstance(chat, (list, tuple)):
        raise _NoChatError(f"holds no list of messages but {type(chat).__name__} {shown(chat)}")
    return [_turn(place, message) for place, message in enumerate(chat, 1)]


def _turn(place: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise _NoChatError(f"holds as message {place} {shown(message)}, not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise _NoChatError(f"holds as message {place} {shown(message)}, whose role and content are not both text")
    return role, content
