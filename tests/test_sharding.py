"""Weights divided over two real processes (gloo, 127.0.0.1) train as weights that are whole do."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from atesd.config import ModelConfig
from shard_program import CASES, Case, bases, model_of, three_updates
from test_ranks import outputs, start_ranks

PROGRAM = Path(__file__).with_name("shard_program.py")
ROUNDING = 1e-12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have left all that `shard_program` does."""
    folder = tmp_path_factory.mktemp("sharded")
    bases(folder)
    outputs(start_ranks([str(PROGRAM), str(folder)], [folder / "cwd-0", folder / "cwd-1"]))
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_with_divided_weights_train_as_one_process_does(case: Case, folder: Path):
    expected = three_updates(case, model_of(case, folder), ModelConfig())
    found = load_file(folder / f"{case.name}.safetensors")
    assert found.keys() == expected.keys()
    worst = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    assert max(worst.values()) < ROUNDING, sorted(worst.items(), key=lambda pair: -pair[1])[:5]
