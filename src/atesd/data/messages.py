"""Problems and references out of chats, as TRL, verl, ms-swift and ShareGPT write them (docs/data.md).

A chat is a list of messages; a message is {role, content} or {from, value}, and its content is text or a list of parts
{type: text, text}. A column holds a whole chat, or the problem's and the solution's columns hold their side of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from atesd.config import ColumnsConfig, DataConfig
from atesd.data.rows import BadRow, Row, Unreadable, cell, shown

MESSAGE_COLUMNS: Mapping[str, Any] = {
    "problem": "messages (user)",
    "solution": "messages (assistant)",
    "messages": None,
}
"""The columns of a row that `Chats` made of a whole chat."""
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
"""Other words for the three roles."""
_UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "tool_call_id")
"""Keys of a message that say more than its content does."""
_DROPPED = "{} rows have {} in column '{}', which is not read"

Turn = tuple[str, str]


class _NoChatError(Exception):
    """Why a value is no chat with a problem; never leaves this module."""


class Chats:
    """Rows with what the user says last and the assistant's answer to it, of columns that hold chats.

    A system message and what comes before the last problem are refused, kept or left out as the settings say, and
    counted for `notes`.
    """

    def __init__(self, columns: ColumnsConfig, config: DataConfig) -> None:
        self._columns, self._config = columns, config
        self._counted: Counter[tuple[str, str]] = Counter()

    def unfolded(self, rows: Iterable[Row | BadRow]) -> Iterator[Row | BadRow]:
        """The rows, each with the text of its chats, or what is wrong with one.

        The text of `columns.messages` stands in `MESSAGE_COLUMNS`, that of one side of a chat in the side's own column.
        """
        read = self._sides if self._columns.messages is None else self._whole
        for row in rows:
            yield row if isinstance(row, BadRow) else read(row)

    def notes(self, name: str) -> tuple[str, ...]:
        """What was kept or not read of the chats of `name`."""
        said = {
            "earlier": _DROPPED.format("{}", "earlier turns", "{}") + " (data.earlier_turns: drop)",
            "drop": _DROPPED.format("{}", "a system message", "{}") + " (data.system_message: drop)",
            "keep": "{} rows have a system message in column '{}', which stands in front of the problem "
            "(data.system_message: keep)",
        }
        counted = sorted(self._counted.items(), key=lambda item: item[0][0] == "earlier")
        return tuple(f"{name}: {said[what].format(count, column)}" for (what, column), count in counted)

    def _whole(self, row: Row) -> Row | BadRow:
        column = self._columns.messages or ""
        try:
            problem, solution = self._exchange(_turns(cell(row.values, column)), column)
        except _NoChatError as error:
            return BadRow(row.number, f"column '{column}' {error}")
        return Row(
            row.number, {**row.values, MESSAGE_COLUMNS["problem"]: problem, MESSAGE_COLUMNS["solution"]: solution}
        )

    def _sides(self, row: Row) -> Row | BadRow:
        """The row with text in place of a chat in the problem's column, and in the solution's."""
        texts: dict[str, str] = {}
        for column, side in ((self._columns.problem, self._problem), (self._columns.solution, _solution)):
            value = None if column is None else cell(row.values, column)
            if column is not None and _is_chat(value):
                try:
                    texts[column] = side(_turns(value), column)
                except _NoChatError as error:
                    return BadRow(row.number, f"column '{column}' {error}")
        return Row(row.number, {**row.values, **texts}) if texts else row

    def _problem(self, turns: Sequence[Turn], column: str) -> str:
        problem, solution = self._exchange(turns, column)
        if solution is not None:
            raise _NoChatError(
                "ends with an answer of the assistant; name a column of whole chats in data.columns.messages instead"
            )
        return problem

    def _exchange(self, turns: Sequence[Turn], column: str) -> tuple[str, str | None]:
        """(what the user says last, the answer to it): `None` where nothing answers."""
        system = [content for role, content in turns if role == "system"]
        if any(role == "system" for role, _ in turns[len(system) :]):
            raise _NoChatError("holds a system message behind another message; it comes first")
        talk = turns[len(system) :]
        places = [place for place, (role, _) in enumerate(talk) if role == "user"]
        if not places:
            raise _NoChatError("holds no message of the user")
        last = places[-1]
        if len(talk) - last > 2:
            raise _NoChatError("holds more than one answer of the assistant behind the last message of the user")
        if last:
            self._allow_earlier(column)
        problem = self._with_system(system, talk[last][1], column)
        return problem, talk[last + 1][1] if last + 1 < len(talk) else None

    def _allow_earlier(self, column: str) -> None:
        if self._config.earlier_turns == "refuse":
            raise _NoChatError(
                "holds turns before the last problem, which neither student nor teacher would read "
                "(data.earlier_turns: drop uses the last exchange alone)"
            )
        self._counted["earlier", column] += 1

    def _with_system(self, system: Sequence[str], problem: str, column: str) -> str:
        if not system:
            return problem
        wanted = self._config.system_message
        if wanted == "refuse":
            raise _NoChatError(
                f"holds a system message, '{shown(system[0])}' (data.system_message: keep puts it in front of the "
                "problem, drop leaves it out; model.system_prompt is one for all rows)"
            )
        self._counted[wanted, column] += 1
        return "\n\n".join((*system, problem)) if wanted == "keep" else problem


def _solution(turns: Sequence[Turn], column: str) -> str:  # noqa: ARG001
    """The assistant's side of a chat: one message."""
    if [role for role, _ in turns] != ["assistant"]:
        said = ", ".join(role for role, _ in turns)
        raise _NoChatError(f"holds messages of {said}; a solution is one message of the assistant")
    return turns[0][1]


def turns_of(value: Any) -> list[Turn]:
    """(role, text) of each message of a chat; empty for what is none."""
    try:
        return _turns(value) if _is_chat(value) else []
    except _NoChatError:
        return []


def _is_chat(value: Any) -> bool:
    """Whether a value is meant as a chat, or as a message."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, Mapping) and any(set(keys) <= first.keys() for keys in _KEYS)


def _turns(chat: Any) -> list[Turn]:
    """(role, text) of each message."""
    if isinstance(chat, Unreadable):
        raise _NoChatError(chat.reason)
    if isinstance(chat, Mapping) and _is_chat(chat):
        chat = [chat]
    if not isinstance(chat, (list, tuple)):
        raise _NoChatError(f"holds no list of messages but {type(chat).__name__} {shown(chat)}")
    return [_turn(place, message) for place, message in enumerate(chat, 1)]


def _turn(place: int, message: Any) -> Turn:
    known = [keys for keys in _KEYS if isinstance(message, Mapping) and set(keys) <= message.keys()]
    known = [keys for keys in known if message[keys[0]] is not None] or known[:1]  # Parquet gives all rows all keys
    if not known:
        raise _NoChatError(f"holds as message {place} {shown(message)}, not an object with role and content")
    role, content = (message[key] for key in known[0])
    text = _joined(content)
    if not isinstance(role, str) or text is None:
        raise _NoChatError(f"holds as message {place} {shown(message)}, whose role and content are not both text")
    if unread := [key for key in _UNREAD if message.get(key)]:
        raise _NoChatError(f"holds as message {place} one with {unread[0]}, which is not read; write it as content")
    role = _ROLES.get(role, role)
    if role not in ("system", "user", "assistant"):
        raise _NoChatError(f"holds as message {place} one of '{shown(role)}'; a role is system, user or assistant")
    return role, text


def _joined(content: Any) -> str | None:
    """The text of a content: itself, or its parts one behind the other; None where there is anything but text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)) or not content:
        return None
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    words = [text for text in texts if isinstance(text, str)]
    return "".join(words) if len(words) == len(content) else None
