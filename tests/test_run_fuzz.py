"""A thousand damaged run folders: each is read or resumed rightly, or refused by an error of ours; no row is lost.

A small run is trained once. Each case copies it, damages one or two things in it (bytes, lines, JSON values, keys, a
link or folder in place of a file), and then does what people do: report, compare, resume. ATESD_FUZZ_CASES and
ATESD_FUZZ_FIRST choose other ones.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from atesd.errors import AtesdError
from atesd.rows import RowKind
from atesd.runs import RunFolder
from atesd.session import train
from atesd_lab.report.groups import group_of
from atesd_lab.report.honest import compare_groups, comparison_table
from atesd_lab.report.page import render_page
from atesd_lab.report.rows import read_runs
from quick import finished, quick

CASES = int(os.environ.get("ATESD_FUZZ_CASES", "1000"))
SECONDS = 60  # of one case; a usual one takes a fifth of a second
SHORT = ("train.num_updates=4", "train.checkpoint_every=2", "train.evaluate_every=2", "credit.lookahead_updates=1")
CONFIG = quick(*SHORT)
KINDS = ("nothing", "nothing", "link to nothing", "link to itself", "link to a folder", "folder", "file")
DRAWN = 0.15  # share of the cases whose page is drawn too, if it can be read: two seconds each
VALUES: tuple[Any, ...] = (None, True, 0, 1, -1, 3, 10**6, 10**30, 0.5, -1e300, 1e308, "", "x", "\u202e", "\ud800")
VALUES += ([], [[]], [None], [1, 2], {}, {"a": 1}, {"value": 0.5}, "finished", "running", "validation", float("nan"))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(below for key, inner in items for below in places(inner, (*path, key)))]


def damaged_json(text: bytes, draw: random.Random) -> bytes:
    """One value replaced, removed or nested deeply."""
    try:
        document = json.loads(text)
    except ValueError:  # a template, or damaged before
        return b"x"
    path = draw.choice(places(document)[1:] or [()])
    if not path:
        return b"[]"
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    match draw.choice(["value", "value", "remove", "extra", "deep"]):
        case "value":
            parent[path[-1]] = draw.choice(VALUES)
        case "remove":
            del parent[path[-1]]
        case "extra" if isinstance(parent, dict):
            parent["more"] = draw.choice(VALUES)
        case _:
            return b'{"update": 0, "a": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    return json.dumps(document).encode()


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(max(1, len(data)))
    match draw.choice(["cut", "empty", "flip", "flip", "twice", "zeros"]):
        case "cut":
            return data[:place]
        case "empty":
            return b""
        case "flip":
            return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :] if data else b"x"
        case "twice":
            return data + data
        case _:
            return data[:place] + bytes(draw.randrange(1, 50)) + data[place:]


def damaged_lines(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines()
    place = draw.randrange(len(lines)) if lines else 0
    match draw.choice(["remove", "twice", "swap", "json", "json", "json", "tail"]) if lines else "":
        case "remove":
            del lines[place]
        case "twice":
            lines.insert(place, lines[place])
        case "swap":
            lines.reverse()
        case "json" if lines[place].startswith(b"{"):
            lines[place] = damaged_json(lines[place], draw)
        case "tail":
            del lines[place:]
    return b"".join(line + b"\n" for line in lines)


def replaced(path: Path, draw: random.Random) -> str:
    """Something else in place of a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kind = draw.choice(KINDS)
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(draw.choice([b"", b"x", b"{}\n"]))
    elif kind != "nothing":
        path.symlink_to({"link to nothing": "nowhere", "link to itself": path.name}.get(kind, str(path.parent)))
    return kind


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one thing in a run folder; says what."""
    if draw.random() < 0.05:
        stray = folder / "checkpoints" / draw.choice([".trash-x", ".temporary-y", ".replaced-z", "update-000009"])
        if stray.parent.is_dir() and not os.path.lexists(stray):
            stray.symlink_to(draw.choice(["nowhere", "..", stray.name]))
        return f"link {stray.name}"
    deep = [path for path in sorted(folder.rglob("*")) if path.name not in (".lock", ".owner.json")]
    here = [path for path in deep if path.parent == folder]
    path = draw.choice(draw.choice([deep, here, [path for path in here if path.suffix in (".json", ".jsonl")] or here]))
    if path.is_dir() or path.is_symlink() or draw.random() < 0.15:
        return f"{path.relative_to(folder)}: {replaced(path, draw)}"
    data = path.read_bytes()
    ways = [damaged_json] if path.suffix == ".json" and draw.random() < 0.7 else [damaged_bytes, damaged_lines]
    path.write_bytes(draw.choice(ways)(data, draw))
    return str(path.relative_to(folder))


def without_record(folder: Path) -> None:
    """The manifest as earlier versions wrote it: readers then have only the rows themselves to go by."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["rows"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rows_of(folder: Path) -> dict[RowKind, list[dict[str, Any]]]:
    run = RunFolder.open(folder)
    rows: dict[RowKind, Any] = {kind: run.rows(kind) for kind in get_args(RowKind)}
    return {kind: [{k: v for k, v in row.items() if k != "seconds"} for row in some] for kind, some in rows.items()}


def read_by_people(folder: Path) -> tuple[bytes, ...]:
    """What a page is made from."""
    names = ("manifest.json", "config.yaml", *(f"{kind}.jsonl" for kind in get_args(RowKind)))
    return tuple((folder / name).read_bytes() if (folder / name).is_file() else b"-" for name in names)


def ending(work: Callable[[], object]) -> str:
    """How it ended: `done`, `refused`, or what has no business here."""
    try:
        work()
    except AtesdError as error:
        str(error).encode("utf-8", "surrogatepass")
        return "refused" if len(str(error)) < 5_000 else f"an error of {len(str(error))} characters"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return "done"


@pytest.mark.fuzz
def test_every_damaged_run_is_right_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = finished(CONFIG, tmp_path / "base").path
    other = finished(quick(*SHORT, "train.seed=1"), tmp_path / "other").path
    expected, untouched = rows_of(base), read_by_people(base)
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def too_long(*_: object) -> None:
        raise TimeoutError("it hangs")

    signal.signal(signal.SIGALRM, too_long)
    outcome: Counter[str] = Counter()
    failures: list[str] = []
    first = int(os.environ.get("ATESD_FUZZ_FIRST", "0"))
    for case in range(first, first + CASES):
        draw = random.Random(case)
        folder = tmp_path / "case"
        shutil.copytree(base, folder)
        if draw.random() < 0.4:
            without_record(folder)
        done = " and ".join(damage(folder, draw) for _ in range(draw.choice([1, 1, 2])))
        drawn = read_by_people(folder) != untouched and draw.random() < DRAWN
        verbs = {"report": partial(report, folder, drawn), "compare": partial(compare, other, folder)}
        for verb, work in {**verbs, "resume": partial(train, CONFIG, folder)}.items():
            signal.alarm(SECONDS)
            end = ending(work)
            signal.alarm(0)
            if end == "done" and verb == "resume" and not all_there(rows_of(folder), expected):
                end = "rows lost without a word"
            outcome[f"{verb} {end}" if end in ("done", "refused") else "failures"] += 1
            if end not in ("done", "refused"):
                failures.append(f"case {case}, {verb}, {done}: {end}")
        shutil.rmtree(folder)
    print(f"\n{CASES} folders: {dict(sorted(outcome.items()))}")
    assert not failures, "\n".join(failures[:40])


def report(folder: Path, drawn: bool) -> None:
    runs = read_runs([folder])
    if drawn:
        render_page(runs)


def compare(baseline: Path, candidate: Path) -> None:
    comparison_table(compare_groups(group_of("a", [baseline]), group_of("b", [candidate])))


def all_there(found: dict[RowKind, Any], expected: dict[RowKind, Any]) -> bool:
    """Every row of the whole run, and none that is not; an evaluation may have been added."""
    added = len(found["evaluations"]) - len(expected["evaluations"])
    more = added > 0 and found["evaluations"][: -added or None] == expected["evaluations"]
    return found == expected or (more and all(found[kind] == expected[kind] for kind in expected if kind[0] != "e"))
