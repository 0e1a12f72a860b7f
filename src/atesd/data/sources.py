"""Problems of a run: read from a source, every row checked, split by a hash of their text, references cut.

All bad rows of a source are collected; then they are refused together, or left out and listed (`data.on_bad_row`).
Nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import get_args

from atesd.config import GENERATED, ColumnsConfig, DataConfig, SharesConfig
from atesd.data.arithmetic import COLUMNS as ARITHMETIC_COLUMNS
from atesd.data.arithmetic import LEAST_OPERATIONS, arithmetic_rows
from atesd.data.arrow_rows import chained
from atesd.data.entries import Entry, Reading, checked, text_hash
from atesd.data.gsm import COLUMNS as GSM_COLUMNS
from atesd.data.gsm import gsm_rows
from atesd.data.messages import MESSAGE_COLUMNS, Chats
from atesd.data.own_segmenter import segmenter_of
from atesd.data.presets import PRESETS
from atesd.data.rows import BadRow, Row, Table, read_columns, require_columns
from atesd.data.segments import Segmenter, split_reference
from atesd.data.sizes import require_enough, said, shortages, sizes_of
from atesd.data.splits import ProblemSets, Shares, fingerprint, shares_of, split_of
from atesd.data.tables import open_table
from atesd.data.word_problems import TEMPLATES, short_rows
from atesd.errors import ConfigError, DataError
from atesd.records import Problem, Split

_SPLITS: tuple[Split, ...] = get_args(Split)
_LISTED = 20  # bad rows that an error message shows


def load_problems(config: DataConfig) -> ProblemSets:
    """The problems of a file, a data set or a generator: checked, split, and cut into segments.

    The split of a problem depends on its text alone, and so does which problems are taken where a split has more than
    its size. With `data.test_source` that file is the test split (all of it, up to `data.test_size`), and what would
    have been the test share is trained on. A generated row that is bad is left out whatever `data.on_bad_row` says.

    Raises `DataError` for bad rows, a missing column or package, or a split smaller than its size; `ConfigError` for
    settings that contradict each other.
    """
    require_consistent(config)
    beside = config.test_source in config.sources  # then data.split_name is the one that is trained on
    test = None if config.test_source is None else _read_test(config.test_source, config, test_first=beside)
    generated = config.source in GENERATED
    main = _generate(config) if generated else _with_references(read_table(table_of(config), config), config)
    main = _without_overlap(main, test)
    if not generated:
        _refuse_bad_rows(main, config)
    candidates = main.entries if generated else sorted(main.entries, key=_rank)
    chosen = _chosen(candidates, sizes_of(config), shares_of(config.shares), test)
    short = shortages({split: len(some) for split, some in chosen.items()}, config)
    require_enough(short, config, main.name, len(main.entries))
    cut, of_test = segmenter_of(config), {id(entry) for entry in test.entries} if test else set()
    train, validation, probe, held_out = (
        tuple(_problem(entry, cut, test if test and id(entry) in of_test else main) for entry in chosen[split])
        for split in _SPLITS
    )
    skipped = main.skipped + (test.skipped if test else ())
    seal = fingerprint(train, validation, probe, held_out)
    of_test_file = _test_notes(test, len(held_out))
    notes = (*_mixture(main, chosen, config), *main.notes, *of_test_file, *said(short, config, main.name))
    return ProblemSets(train, validation, probe, held_out, skipped, seal, notes, _hashes(main, test))


def load_benchmark(config: DataConfig) -> ProblemSets:
    """Every usable problem of `data.test_source` as the test split, and no other: to evaluate on, not to train with.

    Raises `DataError` as `load_problems` does, and where nothing is left.
    """
    if config.test_source is None:
        raise ConfigError("data.test_source: none given; name a file or data set to evaluate on")
    reading = _read_test(config.test_source, config)
    if not reading.entries:
        faults = (
            f"; of {len(reading.faults)} rows none can be used, the first is {reading.faults[0]}" if reading.bad else ""
        )
        raise DataError(f"{reading.name}: no usable problem in it{faults}")
    problems = tuple(_problem(entry, segmenter_of(config), reading) for entry in reading.entries)
    seal = fingerprint((), (), (), problems)
    return ProblemSets((), (), (), problems, reading.skipped, seal, reading.notes, _hashes(reading))


def require_consistent(config: DataConfig) -> None:
    """Raise `ConfigError` for settings of `data` that contradict each other."""
    if config.source in ("world", *GENERATED) and config.preset is not None:
        raise ConfigError(f"data.preset: {config.preset} describes a data set; leave it out for {config.source}")
    if config.source == "world" and config.test_source is not None:
        raise ConfigError("data.test_source: the world makes its own test problems; leave it out")
    if config.preset is not None and config.test_source is None and config.columns != ColumnsConfig():
        raise ConfigError(f"data.columns: the preset {config.preset} sets the columns; leave one of the two out")
    if config.source == "world" and config.shares != SharesConfig():
        raise ConfigError("data.shares: the world's models were taught its train share; leave the shares out")
    if config.source in GENERATED and config.train_size is None:
        raise ConfigError(
            f"data.train_size: none given, but {config.source} has no end; set a number, for example 4096"
        )
    if config.source == "arithmetic" and config.max_difficulty < LEAST_OPERATIONS:
        raise ConfigError(
            f"data.max_difficulty: {config.max_difficulty}: sums have {LEAST_OPERATIONS} operations or more; raise it"
        )


def read_table(table: Table, config: DataConfig) -> Reading:
    """The rows of a table by `data.preset` or the column map."""
    if config.preset is None:
        return _read_mapped(table, config.columns, config)
    preset = PRESETS[config.preset]
    kept: list[Row | BadRow] = []
    filtered = 0
    for row in read_columns(table, _preset_columns(config)):
        values = preset.adapt(row.values) if isinstance(row, Row) else None
        if isinstance(row, BadRow):
            kept.append(row)
        elif values is None:
            filtered += 1
        else:
            kept.append(Row(row.number, values))
    line = f"{table.name}: {filtered} rows left out: data.preset: {config.preset} keeps {preset.kept}"
    complete = config.on_missing_reference != "keep"
    reading = checked(table.name, kept, preset.columns, config.checker, table.place, complete=complete)
    return replace(reading, left_out=(line,) if filtered else (), part=table.part, filtered=filtered, files=table.files)


def table_of(config: DataConfig) -> Table:
    """The table of `data.source`; several sources as one, each of which must have the columns that are read."""
    tables = [open_table(source, config.split_name, subset=config.subset) for source in config.sources]
    if len(tables) == 1:
        return tables[0]
    wanted = _settings(config.columns) if config.preset is None else _preset_columns(config)
    for table in tables:
        require_columns(table, wanted)
    return chained(f"{len(tables)} sources", tables)


def _preset_columns(config: DataConfig) -> dict[str, str]:
    """Column by the words for what names it, of the preset."""
    return {f"data.preset: {config.preset} ({name})": name for name in PRESETS[config.preset or ""].reads}


def _read_mapped(table: Table, columns: ColumnsConfig, config: DataConfig, *, solutions: bool = True) -> Reading:
    """Read a table by its column map; `solutions`: whether they must come to the stated answers."""
    chats = Chats(columns, config)
    rows = chats.unfolded(read_columns(table, _settings(columns)))
    if columns.messages is not None:
        columns = columns.model_copy(update=MESSAGE_COLUMNS)
    complete = config.on_missing_reference != "keep"
    reading = checked(table.name, rows, columns, config.checker, table.place, solutions=solutions, complete=complete)
    return replace(reading, notes=(*chats.notes(table.name), *reading.notes), part=table.part, files=table.files)


def _with_references(reading: Reading, config: DataConfig) -> Reading:
    """Rows without a reference solution: bad, left out or kept, as `data.on_missing_reference` says; always counted.

    Where `data.columns.solution` is null nobody expects one.
    """
    without = [entry for entry in reading.entries if not entry.solution]
    if not without or (config.preset is None and config.columns.solution is None):
        return reading
    count = f"{reading.name}: {len(without)} of {len(reading.entries)} usable rows have no reference solution"
    if config.on_missing_reference == "keep":
        note = f"{count}; their teacher reads the answer alone (data.on_missing_reference: keep; or: skip, refuse)"
        return replace(reading, notes=(*reading.notes, note))
    missing = [
        BadRow(entry.row, "no reference solution (data.on_missing_reference: keep uses the row)") for entry in without
    ]
    kept = tuple(entry for entry in reading.entries if entry.solution)
    if config.on_missing_reference == "refuse":
        return replace(reading, entries=kept, bad=(*reading.bad, *missing))
    lines = tuple(f"{reading.name}: {reading.place(row.number)}: {row.reason}" for row in missing)
    note = f"{count}; they are left out (data.on_missing_reference: skip)"
    return replace(reading, entries=kept, left_out=(*reading.left_out, *lines), notes=(*reading.notes, note))


def _read_test(source: str, config: DataConfig, *, test_first: bool = False) -> Reading:
    """Read `data.test_source` by `data.columns`. It may lack the solution column, and a column `answer` is found.

    A test problem is scored by its answer, so that its solution need not come to the same.
    Ids of a column get the prefix `test:`, as two files often count their rows alike. Of named splits the one called
    test is read; `data.split_name` where it is another than the default, unless `test_first`.
    """
    names = ("test", config.split_name)
    usual = test_first or config.split_name == DataConfig.model_fields["split_name"].default
    table = open_table(source, *(names if usual else names[::-1]), subset=config.subset)
    columns = config.columns
    if columns.answer is None and "answer" in table.columns:
        columns = columns.model_copy(update={"answer": "answer"})
    if columns.solution not in table.columns and columns.answer is not None:
        columns = columns.model_copy(update={"solution": None})
    reading = _read_mapped(table, columns, config, solutions=False)
    _refuse_bad_rows(reading, config)
    prefix = "" if columns.id is None else "test:"
    split = (f"{source}: its split '{table.split}' is the test file",) if table.split else ()
    entries = tuple(replace(entry, id=prefix + entry.id) for entry in reading.entries)
    return replace(reading, entries=entries, notes=(*split, *reading.notes))


def _generate(config: DataConfig) -> Reading:
    """Generated rows: half as many again as the largest split needs, since some are bad or come twice."""
    sizes = sizes_of(config)
    empty = [split for split, share in shares_of(config.shares) if sizes[split] and not share]
    if empty:
        raise ConfigError(
            f"data.shares.{empty[0]}: 0 leaves none of the {sizes[empty[0]]} problems asked for; raise it"
        )
    count = 2000 + int(1.5 * max((sizes[split] or 0) / share for split, share in shares_of(config.shares) if share))
    if config.source == "arithmetic":
        rows: Iterable[Row | BadRow] = arithmetic_rows(config.seed, count, config.max_difficulty)
        return checked(config.source_name, rows, ARITHMETIC_COLUMNS, config.checker)
    if config.templates == "all":
        return checked(config.source_name, gsm_rows(config.seed, count), GSM_COLUMNS, config.checker)
    rows = short_rows(config.seed, count, TEMPLATES[config.templates])
    return checked(config.source_name, rows, GSM_COLUMNS, config.checker)


def _settings(columns: ColumnsConfig) -> dict[str, str]:
    """Column by the setting that names it."""
    unread = () if columns.messages is None else ("problem", "solution")
    return {f"data.columns.{name}": column for name, column in columns if column is not None and name not in unread}


def _without_overlap(main: Reading, test: Reading | None) -> Reading:
    """What shares its text with a test problem is a bad row of the main source."""
    tested = {text_hash(entry.text): entry.row for entry in test.entries} if test else {}
    overlap = {entry.row: tested[key] for entry in main.entries if (key := text_hash(entry.text)) in tested}
    where = {row: f"{test.place(other)} of {test.name}" for row, other in overlap.items()} if test else {}
    bad = tuple(BadRow(row, f"the same problem as {other}") for row, other in where.items())
    return replace(main, entries=tuple(e for e in main.entries if e.row not in overlap), bad=main.bad + bad)


def _mixture(main: Reading, chosen: Mapping[Split, Sequence[Entry]], config: DataConfig) -> Iterator[str]:
    """How many problems each of several sources gives, and to which split."""
    if len(config.sources) == 1:
        return
    of_main = {id(entry) for entry in main.entries}
    usable = Counter(main.part(entry.row) for entry in main.entries)
    for place, source in enumerate(config.sources):
        mine = (
            f"{split} {sum(id(entry) in of_main and main.part(entry.row) == place for entry in some)}"
            for split, some in chosen.items()
        )
        yield f"{source}: {usable[place]:,} usable rows: {', '.join(mine)}"


def _test_notes(test: Reading | None, taken: int) -> Iterator[str]:
    """What was said of the test file, and whether `data.test_size` takes a part of it."""
    if test is None:
        return
    yield from test.notes
    if taken < len(test.entries):
        yield f"{test.name}: test {taken} of {len(test.entries)} problems (data.test_size)"


def _hashes(*readings: Reading | None) -> dict[str, str]:
    """SHA-256 (hexadecimal) of each file that was read, those of a folder by their paths."""
    hashes = {}
    for name in (name for reading in readings if reading for name in reading.files):
        with Path(name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _refuse_bad_rows(reading: Reading, config: DataConfig) -> None:
    if config.on_bad_row == "skip" or not reading.bad:
        return
    faults = reading.faults
    lines = [f"  {fault}" for fault in faults[:_LISTED]]
    if len(faults) > _LISTED:
        lines.append(f"  and {len(faults) - _LISTED} more")
    total = len(reading.entries) + len(faults)
    head = f"{reading.name}: {len(faults)} of {total} rows cannot be used:"
    raise DataError("\n".join([head, *lines, "Correct them, or leave them out with data.on_bad_row: skip"]))


def _chosen(
    candidates: Sequence[Entry], sizes: dict[Split, int | None], shares: Shares, test: Reading | None
) -> dict[Split, list[Entry]]:
    """The first entries of each split, up to its size."""
    members: dict[Split, list[Entry]] = {split: [] for split in _SPLITS}
    for entry in candidates:
        split = split_of(entry.text, shares)
        members["train" if test and split == "test" else split].append(entry)
    if test:
        members["test"] = sorted(test.entries, key=_rank)
    return {split: list(islice(members[split], sizes[split])) for split in _SPLITS}


def _problem(entry: Entry, segmenter: Segmenter, reading: Reading) -> Problem:
    try:
        segments, closing = split_reference(entry.solution, entry.answer, segmenter)
    except DataError as error:  # of a segmenter of the user's
        raise DataError(f"{reading.name}: {reading.place(entry.row)}: {error}") from error
    return Problem(entry.id, entry.text, segments, closing, entry.answer, entry.difficulty)


def _rank(entry: Entry) -> tuple[bytes, str]:
    """An order that depends on the problems alone, so that a sorted file gives no one-sided sample."""
    return hashlib.blake2b(entry.text.encode(), digest_size=8, person=b"rank").digest(), entry.id
