"""Damaged model folders, two thousand of them: each loads or is refused in one line, and none hangs.

A tiny model and its adapter are saved once. Each case copies one of them, damages one file (a value of another type, a
size, a nesting, an encoding, a cut or missing file, another template) and does what a run does first: load and encode.
ATESD_FUZZ_CASES and ATESD_FUZZ_FIRST choose other ones.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from atesd.config import LoraConfig, ModelConfig
from atesd.errors import AtesdError
from atesd.models.load import load_model, save_model
from atesd.models.prompts import PromptEncoder
from tiny import tiny_folder

CASES = int(os.environ.get("ATESD_FUZZ_CASES", "2000"))
SECONDS = 60  # of one case; a usual one takes a tenth of a second
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    10**6,
    10**9,
    10**30,
    -(2**63),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "é",
    "\x00",
    "\ud800",
    "10",
    "true",
    "default",
    "dynamic",
    "longrope",
    "silu",
    "nonsense",
    [],
    [[]],
    [1, 2],
    ["a"],
    [None],
    {},
    {"a": 1},
    {"content": 5},
    {"content": "<end>"},
    {"rope_type": "dynamic", "factor": 0},
    {"rope_type": "linear", "factor": "x"},
    {"rope_type": "yarn"},
    {"rope_type": 5},
    "qwen3",
    "llama",
    "bert",
    "t5",
)
TEMPLATES = (
    "",
    "{{",
    "{% if %}",
    "{% endif %}",
    "{{ 1 / 0 }}",
    "{{ 1 + 'a' }}",
    "{{ messages[9].content }}",
    "{{ x.y.z }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ 10 ** 10 ** 8 }}",
    "{{ raise_exception(5) }}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(99) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''|center(10 ** 9) }}",
    "{{ messages|random }}",
    "{{ ().__class__.__base__ }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{{ messages|tojson(indent='a') }}",
    "{{ messages[0].content }}",
    "{{ messages }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}!",
    "{{ " + "(" * 900,
    "{{ '%9999999999d' % 1 }}",
    "{{ messages|map(attribute='role')|join }}",
    "{{ strftime_now(5) }}",
    "{{ namespace() }}",
    "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tiny_folder(tmp_path_factory.mktemp("fuzz") / "base")
    adapter = base.with_name("adapter")
    save_model(load_model(ModelConfig(path=str(base), lora=LoraConfig(rank=2, alpha=4))), adapter)
    return base, adapter


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(below for key, inner in items for below in places(inner, (*path, key)))]


def damaged_json(text: str, draw: random.Random) -> bytes:
    """The document with some of its values replaced, removed, repeated, wrapped or renamed."""
    document = json.loads(text)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        path = draw.choice([p for p in places(document) if len(p) <= draw.choice([1, 1, 2, 5])] or [()])
        if not path:
            document = draw.choice([[], 5, "x", None, document])
            if not isinstance(document, dict):
                break
            continue
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        change = draw.choice(["value", "value", "value", "remove", "wrap", "deep", "extra", "scale"])
        if change == "value":
            parent[path[-1]] = copy.deepcopy(draw.choice(VALUES))
        elif change == "remove":
            del parent[path[-1]]
        elif change == "wrap":
            parent[path[-1]] = draw.choice([[parent[path[-1]]], {"content": parent[path[-1]]}])
        elif change == "deep":
            for _ in range(draw.choice([3, 100])):
                parent[path[-1]] = [parent[path[-1]]]
        elif change == "scale" and type(parent[path[-1]]) is int:
            parent[path[-1]] *= draw.choice([-1, 2, 3, 1000])
        elif isinstance(parent, dict):
            parent[
                draw.choice(["auto_map", "quantization_config", "rope_scaling", "dtype", "split_special_tokens"])
            ] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(document).encode("utf-8", "surrogatepass")


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """Cut, emptied, in another encoding, with bytes replaced, or nested deeply."""
    change = draw.choice(["cut", "empty", "flip", "utf-16", "bom", "nested", "twice", "latin", "digits"])
    place = draw.randrange(max(len(data), 1))
    match change:
        case "cut":
            return data[:place]
        case "empty":
            return b""
        case "flip":
            return data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
        case "utf-16":
            return data.decode("utf-8", "replace").encode("utf-16")
        case "bom":
            return b"\xef\xbb\xbf" + data
        case "nested":
            return b'{"a":' * 10**5 + b"1" + b"}" * 10**5
        case "twice":
            return data + data
        case "latin":
            return b"\xe9" + data
        case _:
            return b'{"vocab_size": ' + b"9" * 5000 + b"}"


def damaged_weights(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header, or cut off."""
    size = int.from_bytes(data[:8], "little")
    if draw.random() < 0.4:
        return damaged_bytes(data, draw)
    header = damaged_json(data[8 : 8 + size].decode(), draw)
    stated = draw.choice([len(header), len(header), len(header), 0, 2**63, len(data) * 2])
    return stated.to_bytes(8, "little") + header + data[8 + size :]


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one file of the folder; returns its name."""
    here = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jinja", ".safetensors")]
    path = folder / draw.choice(here)
    data = path.read_bytes()
    if draw.random() < 0.05:
        path.unlink()
    elif path.suffix == ".jinja":
        whole = draw.choice(TEMPLATES)
        text = draw.choice([whole, whole + data.decode(), data.decode() + whole])
        path.write_bytes(text.encode() if draw.random() < 0.85 else damaged_bytes(data, draw))
    elif path.suffix == ".safetensors":
        path.write_bytes(damaged_weights(data, draw))
    else:
        path.write_bytes(damaged_json(data.decode(), draw) if draw.random() < 0.8 else damaged_bytes(data, draw))
    return path.name


def used(path: Path) -> None:
    """What a run does with a model folder before its first update."""
    config = ModelConfig(path=str(path), device="cpu", max_context_tokens=256)
    loaded = load_model(config)
    encoder = PromptEncoder(loaded.tokenizer, config, loaded.end_ids)
    ids = [*encoder.student("1 + 2 = <end> 3"), *encoder.completion("3 a")]
    assert max(ids) < len(loaded.model.get_input_embeddings().weight)
    encoder.decode(ids)
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([ids]))
    save_model(loaded, path.with_name("saved"))


@pytest.mark.fuzz
def test_every_damaged_folder_loads_or_is_refused_in_one_line(folders, tmp_path, monkeypatch):
    base, adapter = folders
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def too_long(*_: object) -> None:
        raise TimeoutError("it hangs")

    signal.signal(signal.SIGALRM, too_long)
    outcome: Counter[str] = Counter()
    failures: list[str] = []
    first = int(os.environ.get("ATESD_FUZZ_FIRST", "0"))
    for case in range(first, first + CASES):
        draw = random.Random(case)
        source = adapter if draw.random() < 0.2 else base
        folder = tmp_path / "case"
        shutil.copytree(source, folder)
        name = damage(folder, draw)
        signal.alarm(SECONDS)
        try:
            used(folder)
            outcome["loads"] += 1
        except AtesdError as error:
            outcome["refused"] += 1
            if "\n" in str(error).strip():
                failures.append(f"case {case}, {name}: more than one line: {error}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"case {case}, {name}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            signal.alarm(0)
            shutil.rmtree(folder)
            shutil.rmtree(folder.with_name("saved"), ignore_errors=True)
    print(f"{CASES} folders: {dict(outcome)}, {len(failures)} tracebacks or hangs")
    assert not failures, "\n".join(failures[:40])
