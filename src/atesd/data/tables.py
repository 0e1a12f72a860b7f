"""Opens a source: a file, a folder, or what `datasets` loads by its id."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atesd.data.arrow_rows import chained, dataset_table, parquet_table
from atesd.data.json_rows import json_table, jsonl_table
from atesd.data.rows import Table, cause_of, require
from atesd.errors import DataError

_READERS: Mapping[str, Callable[[Path], Table]] = {
    ".jsonl": jsonl_table,
    ".json": json_table,
    ".parquet": parquet_table,
}
_FORMATS = (
    "a .jsonl, .json or .parquet file, a folder or hub id that `datasets` loads, world, arithmetic, or gsm_symbolic"
)
_OTHER_FORMATS = {".csv", ".tsv", ".txt", ".yaml", ".yml", ".arrow", ".gz", ".zst", ".zip"}
_CONFIGURATIONS = re.compile(r"(?:available configs: |Available: )\[(.*?)\]", re.DOTALL)
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder


def open_table(source: str, *split_names: str, subset: str | None = None) -> Table:
    """Open a .jsonl, .json or .parquet file, a folder, or an id of `datasets`; the first of `split_names` there is.

    `subset` is the configuration of an id that has several, as `main` of GSM8K. Raises `DataError` for what does not
    exist, cannot be read, is of another format, or needs a package that is not installed.
    """
    path = Path(source)
    try:
        return _open(path, source, split_names, subset)
    except OSError as error:
        raise DataError(f"data.source: {source}: cannot be read: {error.strerror or error}") from None


def _open(path: Path, source: str, split_names: Sequence[str], subset: str | None) -> Table:
    suffix = path.suffix.lower()
    if suffix in _READERS and not path.is_dir():
        if not path.is_file():
            raise DataError(f"{source}: no such file{_similar_file(path)}")
        return replace(_READERS[suffix](path), files=(source,))
    if suffix in (".csv", ".tsv") and path.is_file():
        raise DataError(
            f"{source}: cannot read a '{path.suffix}' file, whose cells have no types; write it as JSON Lines: "
            f"pandas.read_csv(FILE, dtype=str{', sep=TAB' if suffix == '.tsv' else ''}).to_json('{path.stem}.jsonl', "
            "orient='records', lines=True)"
        )
    if path.is_file() or (suffix in _OTHER_FORMATS and not path.is_dir()):
        raise DataError(f"{source}: cannot read a '{path.suffix}' file; a source is {_FORMATS}")
    datasets = require("datasets", "datasets", f"data.source: {source}")
    saved = any((path / name).is_file() for name in _SAVED)
    if saved and subset is not None:
        raise DataError(f"data.subset: {source} is a folder that save_to_disk wrote, which has none; leave it out")
    words = (source,) if subset is None else (source, subset)
    files = None if saved or not path.is_dir() else _files_of_folder(datasets, words)
    if files is not None:
        split = _split(files, source, split_names)
        tables = [replace(_reader_in_folder(Path(file))(Path(file)), files=(file,)) for file in files[split]]
        return replace(tables[0] if len(tables) == 1 else chained(source, tables), split=split)
    load = datasets.load_from_disk if saved else datasets.load_dataset
    loaded = _loaded(source, lambda: load(*words))
    if not isinstance(loaded, dict):
        return dataset_table(source, loaded)
    split = _split(loaded, source, split_names)
    return replace(dataset_table(source, loaded[split]), split=split)


def _files_of_folder(datasets: Any, words: Sequence[str]) -> dict[str, list[str]] | None:
    """The files of each split as `datasets` finds them, if all are of kinds that are read here, else None.

    `datasets` keeps the last of a key given twice, and gives up on a whole folder for one row that it cannot read.
    """
    builder = _loaded(words[0], lambda: datasets.load_dataset_builder(*words))
    files = {str(split): [str(file) for file in some] for split, some in (builder.config.data_files or {}).items()}
    shaped = getattr(builder.config, "field", None) or getattr(builder.config, "features", None)
    paths = [Path(file) for some in files.values() for file in some]
    read_here = bool(paths) and all(path.suffix.lower() in _READERS and path.is_file() for path in paths)
    return files if read_here and not shaped else None


def _reader_in_folder(path: Path) -> Callable[[Path], Table]:
    """`datasets` reads an array from a .jsonl file as well."""
    return parquet_table if path.suffix.lower() == ".parquet" else json_table


def _split(splits: Mapping[str, Any], source: str, names: Sequence[str]) -> str:
    present = [name for name in names if name in splits]
    if not present:
        raise DataError(f"data.split_name: '{source}' has no split '{names[-1]}'; it has {', '.join(splits)}")
    return present[0]


def _loaded(source: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # of many kinds: missing, gated, offline, malformed
        if isinstance(error, ConnectionError):
            raise DataError(
                f"data.source: {source}: neither a local folder nor in the hub cache, and the hub cannot be reached; "
                "check the name and the network, or set data.source to a .jsonl or .parquet file (HF_HUB_OFFLINE=1 in "
                "the environment skips the retries)"
            ) from None
        if several := _CONFIGURATIONS.search(str(error)):
            raise DataError(f"data.subset: the configurations of {source} are {several[1]}; set it to one") from None
        raise DataError(
            f"data.source: {source}: cannot be loaded ({cause_of(error)}); a source is {_FORMATS}"
        ) from None


def _similar_file(path: Path) -> str:
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
