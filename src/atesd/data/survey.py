"""Looks at the rows of a source, to say how they are to be read: which columns hold what, or which preset fits."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from atesd.config import DataConfig
from atesd.data.answers import marked_answer
from atesd.data.entries import Reading
from atesd.data.messages import turns_of
from atesd.data.presets import PRESETS
from atesd.data.rows import OTHER_ANSWER, BadRow, Row, Table, cell, read_columns, shown
from atesd.data.segments import split_reference
from atesd.data.sources import read_table, table_of
from atesd.data.tables import open_table
from atesd.errors import DataError

_LOOKED_AT = 1000  # rows of each source
_CHATS_LOOKED_AT = 50  # to tell who speaks in a column
_MOST_COLUMNS = 40  # that are named in a message
_NAMES: Mapping[str, str] = {
    "problem": "problem question prompt query instruction input text",
    "solution": "solution reference rationale reasoning explanation response completion output answer "
    "generated_solution chain_of_thought cot extra_info.answer",
    "answer": "answer final_answer expected_answer gold target ground_truth label solution final "
    "reward_model.ground_truth",
    "difficulty": "difficulty level",
    "id": "id uid unique_id uuid key problem_id",
}
"""Names of columns that hold what, the likeliest first; capitals do not count."""
_FITS = ("openthoughts-114k", "deepmath", "openr1")
"""Presets that are told by their columns alone."""
_TRIED_SEGMENTERS = ("auto", "step", "sentence")
_ENOUGH_SEGMENTS = 3


@dataclass(frozen=True)
class Survey:
    """How a source is to be read: settings of `data`, what they give, and a line for each thing that was found.

    `system` is the system message that all chats share; empty where there is none.
    """

    settings: Mapping[str, Any]
    reading: Reading
    found: tuple[str, ...]
    system: str = ""


def survey(sources: Sequence[str]) -> Survey:
    """Look at the sources. Raises `DataError` that says what was looked for and what was found if nothing fits."""
    tables = [open_table(source, "train") for source in sources]
    samples = [_sample(table) for table in tables]
    rows = [row for sample in samples for row in islice(sample.read(()), _LOOKED_AT) if isinstance(row, Row)]
    if not rows:
        raise DataError(f"{', '.join(sources)}: {_why_no_rows(samples)}")
    columns = _columns(rows)
    base = {"source": list(sources) if len(sources) > 1 else sources[0]}
    tried = [{**base, **settings, **_chat_settings(columns, settings)} for settings in _candidates(columns)]
    best, chosen = (0, False, 0), tried[:1]
    for settings in tried:
        fit = _fit(_read(rows, settings), settings)
        if fit > best:
            best, chosen = fit, [settings]
        if best == (len(rows), True, 0):
            break
    if not best[0]:
        raise DataError(f"{', '.join(sources)}: {_hopeless(columns, rows, chosen)}")
    return _whole(chosen[0], columns)


def _fit(reading: Reading, settings: Mapping[str, Any]) -> tuple[int, bool, int]:
    """How well a reading fits, to compare: rows understood; whether answers or a filter are read; contradictions, < 0.

    Understood is also what a preset filters, and a row whose solution comes to another answer than the column states:
    that a reading finds faults is no reason to read less. Where most rows are contradicted, the column holds no
    answers.
    """
    usable = sum(bool(entry.solution) for entry in reading.entries)
    contradicted = sum(row.reason.startswith(OTHER_ANSWER) for row in reading.bad)
    understood = usable + reading.filtered + (contradicted if contradicted < usable else 0)
    knows = "preset" in settings or "answer" in settings.get("columns", {})
    return (understood, knows, -contradicted) if usable else (0, False, 0)


def best_segmenter(reading: Reading) -> tuple[str, list[int]]:
    """The first way to cut that gives the median reference some segments, else the one that gives most; its counts."""
    some = [entry for entry in reading.entries[:_LOOKED_AT] if entry.solution]
    counts = {
        name: [len(split_reference(entry.solution, entry.answer, name)[0]) for entry in some]
        for name in _TRIED_SEGMENTERS
    }
    middles = {name: statistics.median(count or [0]) for name, count in counts.items()}
    enough = [name for name in _TRIED_SEGMENTERS if middles[name] >= _ENOUGH_SEGMENTS]
    best = enough[0] if enough else max(_TRIED_SEGMENTERS, key=lambda name: middles[name])
    return best, counts[best]


Columns = Mapping[str, Sequence[Any]]
"""The values of each column, and of each path one step into a column of groups, that are not null."""


def _sample(table: Table) -> Table:
    """The first rows of a table with all their columns."""
    rows = list(islice(table.read(list(dict.fromkeys(table.columns))), _LOOKED_AT))
    return replace(table, read=lambda _: rows)


def _why_no_rows(samples: Sequence[Table]) -> str:
    bad = [(sample, row) for sample in samples for row in sample.read(()) if isinstance(row, BadRow)]
    faults = [f"{sample.name}: {sample.place(row.number)}: {row.reason}" for sample, row in bad]
    return f"no row can be read; the first: {faults[0]}" if faults else "there are no rows"


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    names = dict.fromkeys(
        path
        for row in rows
        for name, value in row.values.items()
        for path in (name, *(f"{name}.{key}" for key in (value if isinstance(value, Mapping) else ())))
    )
    values = {name: [value for row in rows if (value := cell(row.values, name)) is not None] for name in names}
    return {name: some for name, some in values.items() if some}


def _chats(columns: Columns, settings: Mapping[str, Any]) -> Sequence[Any]:
    """The values that may be chats and hold the problem."""
    named = settings.get("columns", {})
    return () if "preset" in settings else columns.get(named.get("messages") or named.get("problem", "problem"), ())


def _roles(value: Any) -> list[str]:
    return [role for role, _ in turns_of(value)]


def _speakers(values: Sequence[Any]) -> set[str]:
    """Who speaks in the first chats of a column."""
    return {role for value in values[:_CHATS_LOOKED_AT] for role in _roles(value)}


def _chat_settings(columns: Columns, settings: Mapping[str, Any]) -> dict[str, str]:
    """What becomes of system messages and earlier turns, where some chats have them; a shared one is the model's."""
    chats = [roles for value in _chats(columns, settings) if (roles := _roles(value))]
    more = {}
    if any("system" in roles for roles in chats):
        more["system_message"] = "drop" if _shared_system(columns, settings) else "keep"
    if any(roles.count("user") > 1 for roles in chats):
        more["earlier_turns"] = "drop"
    return more


def _candidates(columns: Columns) -> Iterator[dict[str, Any]]:
    """Ways to read the rows, the likeliest first: a preset, a column of chats, the columns by their names."""
    names = set(columns)
    marked = [isinstance(text, str) and marked_answer(text) is not None for text in columns.get("answer", ())]
    if "question" in names and marked and sum(marked) > len(marked) / 2:
        yield {"preset": "gsm8k"}
    yield from ({"preset": name} for name in _FITS if set(PRESETS[name].reads) <= names)
    if {"problem", "solution", "level", "type"} <= names:
        yield {"preset": "math"}
    likely = ((what, name) for what in ("difficulty", "id") for name in _named(columns, what)[:1])
    more = {what: name for what, name in likely if _holds(what, columns, name)}
    answers = [name for name in _named(columns, "answer") if _holds("answer", columns, name)]
    for chats in (name for name, values in columns.items() if {"user", "assistant"} <= _speakers(values)):
        yield from (_mapped(messages=chats, answer=answer, **more) for answer in [*answers[:2], None])
    for problem in _named(columns, "problem")[:2]:
        others = [name for name in _named(columns, "solution") if name != problem and _holds("solution", columns, name)]
        for solution in [*others[:2], None]:
            for answer in [*(name for name in answers[:3] if name not in (problem, solution)), None]:
                yield _mapped(problem=problem, solution=solution, answer=answer, **more)


def _mapped(**columns: str | None) -> dict[str, Any]:
    usual = {"problem": "problem", "solution": "solution"}
    kept = {
        what: name
        for what, name in columns.items()
        if (name is not None or what == "solution") and usual.get(what) != name
    }
    return {"columns": kept} if kept else {}


def _named(columns: Columns, what: str) -> list[str]:
    """The columns whose names are among those of `what`, the likeliest first."""
    by_name = {name.lower(): name for name in reversed(list(columns))}
    return [by_name[name] for name in _NAMES[what].split() if name in by_name]


def _holds(what: str, columns: Columns, name: str) -> bool:
    """Whether the values of a column can be what its name says."""
    values = columns[name]
    if what == "id":
        plain = all(isinstance(value, (str, int)) and not isinstance(value, bool) for value in values)
        return plain and len(set(values)) == len(values) == max(map(len, columns.values()))
    if what == "answer":
        alone = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
        return all(isinstance(value, (str, int, float)) and not isinstance(value, bool) for value in alone)
    if what == "solution":
        return any(isinstance(value, str) or _roles(value) for value in values)
    words = [str(value).lower().removeprefix("level").strip() for value in values]
    numbers = all(word.removeprefix("-").replace(".", "", 1).isdigit() for word in words)
    return numbers and len(words) == max(map(len, columns.values()))


def _read(rows: Sequence[Row], settings: Mapping[str, Any]) -> Reading:
    """The rows, numbered anew, by these settings."""
    numbered = [Row(number, row.values) for number, row in enumerate(rows, 1)]
    names = tuple(dict.fromkeys(name for row in rows for name in row.values))
    return read_table(Table("rows", names, lambda _: numbered), _config(settings))


def _config(settings: Mapping[str, Any]) -> DataConfig:
    return DataConfig.model_validate({**settings, "on_bad_row": "skip"})


def _shared_system(columns: Columns, settings: Mapping[str, Any]) -> str:
    """The one system message of every chat that is read; empty where they differ, or there is none."""
    values = _chats(columns, settings)
    said = {tuple(text for role, text in turns if role == "system") for chat in values if (turns := turns_of(chat))}
    return "\n\n".join(said.pop()) if len(said) == 1 else ""


def _system_of_all(settings: Mapping[str, Any]) -> str:
    """The one system message of every chat of the sources; empty where they differ."""
    named = settings.get("columns", {})
    column = named.get("messages") or named.get("problem", "problem")
    rows = read_columns(table_of(_config(settings)), {"data.columns.messages": column})
    return _shared_system({column: [cell(row.values, column) for row in rows if isinstance(row, Row)]}, settings)


def _whole(settings: Mapping[str, Any], columns: Columns) -> Survey:
    """All rows by the settings that were chosen, with what all chats of all rows have in common."""
    shared = _system_of_all(settings) if settings.get("system_message") == "drop" else ""
    if "system_message" in settings and not shared:
        settings = {**settings, "system_message": "keep"}
    reading = read_table(table_of(_config(settings)), _config(settings))
    named = settings.get("columns", {})
    used = {*named.values(), *(() if "messages" in named else ("problem", "solution"))}
    if "preset" in settings:
        preset = PRESETS[settings["preset"]]
        used = {*preset.reads}
        found = [f"the columns of data.preset: {settings['preset']}"]
        found += [f"{reading.filtered} rows left out, as it keeps {preset.kept}"] if reading.filtered else []
    elif "messages" in named:
        found = [f"chats in '{named['messages']}'"]
    else:
        found = [f"problems in '{named.get('problem', 'problem')}'"]
        solution = named.get("solution", "solution")
        found.append("no solutions" if solution is None else f"solutions in '{solution}'")
    found += [f"{what} in '{named[what]}'" for what in ("answer", "difficulty", "id") if what in named]
    heads = {str(name).partition(".")[0] for name in used}
    others = [name for name in columns if name.partition(".")[0] not in heads and name.partition(".")[0] == name]
    found += [f"not used: {_listed(others)}"] if others else []
    return Survey(settings, reading, tuple(found), shared)


def _hopeless(columns: Columns, rows: Sequence[Row], tried: Sequence[Mapping[str, Any]]) -> str:
    """What was looked for, what is there, and why the likeliest way to read it fails."""
    parts = ("problem", "solution", "answer")
    looked = "; ".join(f"{what}: {', '.join(names.split())}" for what, names in _NAMES.items() if what in parts)
    kinds = [
        f"'{shown(name)}' ({type(some[0]).__name__}, such as '{shown(some[0])}')" for name, some in columns.items()
    ]
    likeliest = [_read(rows, settings) for settings in tried[:1]]
    faults = [reading.faults[0] if reading.faults else "no row has a solution" for reading in likeliest]
    why = f" The likeliest reading fails: {faults[0]}." if faults else ""
    return (
        f"found no problems with solutions and answers in {len(rows)} rows. Looked for a column of chats, for the "
        f"columns of {', '.join(PRESETS)}, and for columns of these names: {looked}. Found: {_listed(kinds)}.{why} "
        "Say what they hold in a recipe of your own: data.columns (docs/data.md)"
    )


def _listed(words: Sequence[str]) -> str:
    more = len(words) - _MOST_COLUMNS
    return ", ".join(words[:_MOST_COLUMNS]) + (f" and {more} more" if more > 0 else "")
