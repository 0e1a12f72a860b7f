"""Checkpoints: what goes in comes out, damage is found, and a kill at any moment costs no older checkpoint."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from atesd.errors import CheckpointError
from atesd.models.ranks import Ranks
from atesd.models.weights import Part
from atesd.train import checkpoint
from atesd.train.checkpoint import digest, load_newest, save_checkpoint

RUN = "run-1"
STATE = {"weights": torch.arange(6.0).view(2, 3), "seen": ("a", 3), "rate": 0.1}


def save(folder: Path, updates_done: int, state: dict[str, Any] = STATE, keep: int = 3) -> Path:
    return save_checkpoint(folder, updates_done, state, keep, run_id=RUN)


def load(folder: Path) -> dict[str, Any]:
    loaded = load_newest(folder, RUN)
    assert loaded is not None
    return loaded.state


def same(left: Any, right: Any) -> bool:
    """Equal in type, structure and bits, written without regard to how the codec works."""
    if isinstance(left, Tensor):
        alike = isinstance(right, Tensor) and (left.dtype, left.shape) == (right.dtype, right.shape)
        return alike and bool(torch.equal(left.detach(), right))
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(
            type(a) is type(b) and same(left[a], right[b]) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right)  # tells -0.0 from 0.0


# Round trip

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
TENSORS = st.builds(
    lambda shape, dtype, seed: torch.from_numpy(np.random.default_rng(seed).integers(-3, 3, shape)).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | st.integers() | FINITE | st.text() | TENSORS
KEYS = st.text(max_size=3) | st.integers(-3, 3) | st.sampled_from(["#tensor", "0", "#0", "a/b", "~1", "__metadata__"])
STATES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(state=st.dictionaries(KEYS, STATES, max_size=4))
@pytest.mark.usefixtures("quick_disk")
def test_any_state_comes_back_exactly(tmp_path: Path, state: dict[str, Any]):
    save(tmp_path, 1, state, keep=1)
    assert same(load(tmp_path), state)
    assert digest(load(tmp_path)) == digest(state)


def test_an_optimiser_goes_on_exactly_where_it_was(tmp_path: Path):
    def step(model: nn.Linear, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimiser.step()

    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimiser, resumed = (torch.optim.AdamW(m.parameters(), lr=0.1, betas=(0.8, 0.9)) for m in (model, other))
    step(model, optimiser)
    save(tmp_path, 1, {"model": model.state_dict(), "optimiser": optimiser.state_dict()})
    state = load(tmp_path)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimiser"])
    step(model, optimiser)
    step(other, resumed)
    assert digest([model.state_dict(), optimiser.state_dict()]) == digest([other.state_dict(), resumed.state_dict()])


def test_views_transposes_and_tied_tensors_are_stored_by_value(tmp_path: Path):
    base = torch.arange(12.0).view(3, 4)
    state = {"t": base.T, "row": base[1], "all": base, "flat": base.view(-1), "wide": base[:1].expand(3, 4)}
    save(tmp_path, 1, {**state, "tied": state["row"]})
    loaded = load(tmp_path)
    assert same(loaded, {**state, "tied": base[1]})
    loaded["row"] += 1
    assert torch.equal(loaded["tied"], base[1])
    assert torch.equal(loaded["all"], base)


def test_tied_tensors_take_room_once(tmp_path: Path):
    weight = torch.ones(1000)
    path = save(tmp_path, 1, {"embedding": weight, "head": weight})
    assert (path / "tensors.safetensors").stat().st_size < 4500  # 1000 floats of 4 bytes and a header


def test_the_tensors_bear_the_names_of_their_places_in_the_state(tmp_path: Path):
    path = save(
        tmp_path, 1, {"student": {"layers.0.weight": torch.ones(1)}, "adam": {0: torch.ones(2), "0": torch.ones(3)}}
    )
    with safe_open(path / "tensors.safetensors", "pt") as file:
        assert set(file.keys()) == {"/student/layers.0.weight", "/adam/#0", "/adam/0"}


def test_parameters_and_numpy_numbers_come_back_as_plain_tensors_and_numbers(tmp_path: Path):
    save(tmp_path, 1, {"parameter": nn.Parameter(torch.ones(2)), "ema": np.float64(0.1)})
    loaded = load(tmp_path)
    assert same(loaded, {"parameter": torch.ones(2), "ema": 0.1})
    assert not loaded["parameter"].requires_grad


# The digest


def test_the_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": {0: 2, 1: 3}}) == digest({"b": {1: 3, 0: 2}, "a": 1})


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"a": 0.0}, {"a": -0.0}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": [1]}, {"a": (1,)}),
        ({0: 1}, {"0": 1}),
        ({"a": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}),
        ({"a": torch.zeros(1)}, {"a": -torch.zeros(1)}),
        ({"a": torch.zeros(1, dtype=torch.int32)}, {"a": torch.zeros(1)}),
        ({"a": torch.ones(1), "b": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.ones(1)}),
        ({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0 + 2**-23)}),
    ],
)
def test_the_digest_tells_apart_what_differs_in_any_bit_or_type(left: Any, right: Any):
    assert digest(left) != digest(right)


def test_the_digest_ignores_how_a_tensor_lies_in_memory():
    base = torch.arange(6.0).view(2, 3)
    assert digest({"a": base.T, "b": base, "c": base}) == digest({"a": base.T.clone(), "b": base, "c": base.clone()})


# What is refused


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"student": {"w": torch.tensor([1.0, float("nan")])}}, "state/student/w: 1 of 2 entries are not finite"),
        ({"w": torch.tensor(float("inf"), dtype=torch.bfloat16)}, "state/w: 1 of 1 entries are not finite"),
        ({"ema": [0.1, (float("nan"),)]}, "state/ema/1/0 is nan"),
        ({"adam": {0: {"step": float("-inf")}}}, "state/adam/#0/step is -inf"),
        ({"set": {1}}, "state/set: a set is neither a tensor nor a JSON value"),
        ({"by": {(1, 2): 0}}, "state/by: the key (1, 2) of type tuple"),
        ({"by": {True: 0}}, "state/by: the key True of type bool"),
        ({"w": torch.ones(1, dtype=torch.complex64)}, "state/w: tensors of torch.complex64"),
        ({"w": torch.ones(2, device="meta")}, "state/w: a Tensor (torch.strided, meta) cannot be stored"),
        ({"w": torch.eye(2).to_sparse()}, "state/w: a Tensor (torch.sparse_coo, cpu) cannot be stored"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(tmp_path: Path, state: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        save(tmp_path, 1, state)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match=r"update-000002: cannot be written: .*No space left"):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["update-000001"]


# Which checkpoints stay


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_are_kept(tmp_path: Path):
    for updates_done in (8, 9, 10, 1_000_000):
        save(tmp_path, updates_done, keep=2)
    assert names(tmp_path) == ["update-000010", "update-1000000"]
    loaded = load_newest(tmp_path, RUN)
    assert loaded is not None
    assert (loaded.updates_done, loaded.path.name, loaded.skipped) == (1_000_000, "update-1000000", ())


def test_a_checkpoint_may_be_written_again(tmp_path: Path):
    save(tmp_path, 5, {"x": 1})
    save(tmp_path, 5, {"x": 2})
    assert load(tmp_path) == {"x": 2}
    assert names(tmp_path) == ["update-000005"]


def test_after_a_walk_back_the_abandoned_future_is_set_aside(tmp_path: Path):
    for updates_done in (25, 50):
        save(tmp_path, updates_done)
    (tmp_path / "update-000050" / "state.json").unlink()
    save(tmp_path, 30, {"x": 30}, keep=1)
    assert names(tmp_path) == ["beyond-update-000050", "update-000030"]
    assert load(tmp_path) == {"x": 30}


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path):
    (tmp_path / "update-notes.txt").write_text("mine")
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["update-000002", "update-notes.txt"]


# Damage


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path: Path):
    assert load_newest(tmp_path / "absent", RUN) is None
    assert load_newest(tmp_path, RUN) is None


FILES = ("manifest.json", "state.json", "tensors.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, name: str):
    file = save(tmp_path, 1) / name
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in {0, len(content) - 1, *rng.integers(len(content), size=60).tolist()}:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="update-000001: "):
            load_newest(tmp_path, RUN)
    file.write_bytes(content)
    assert same(load(tmp_path), STATE)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_grown_or_missing_is_found(tmp_path: Path, name: str):
    file = save(tmp_path, 1) / name
    content = file.read_bytes()
    for damaged in (*(content[:size] for size in range(0, len(content), 7)), content + b"\n", None):
        file.write_bytes(damaged) if damaged is not None else file.unlink()
        with pytest.raises(CheckpointError, match="update-000001: "):
            load_newest(tmp_path, RUN)


def test_the_newest_valid_one_is_taken_and_each_skipped_one_is_explained(tmp_path: Path):
    for updates_done in (10, 20, 30, 40, 50):
        save(tmp_path, updates_done, {"w": torch.zeros(1000), "n": updates_done}, keep=9)
    (tmp_path / "update-000050" / "tensors.safetensors").write_bytes(bytes(812))
    (tmp_path / "update-000040" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "update-000030")
    shutil.copytree(tmp_path / "update-000010", tmp_path / "update-000030")
    loaded = load_newest(tmp_path, RUN)
    assert loaded is not None
    assert (loaded.updates_done, loaded.state["n"]) == (20, 20)
    assert loaded.skipped == (
        "update-000050: tensors.safetensors has 812 bytes, expected 4,072",
        "update-000040: manifest.json is missing",
        "update-000030: holds update-000010; the folder was renamed",
    )


def test_when_all_are_damaged_each_is_listed(tmp_path: Path):
    for updates_done in (1, 2):
        (save(tmp_path, updates_done) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"(?s)update-000002: state.json has 2 bytes.*update-000001: state.json"):
        load_newest(tmp_path, RUN)


def test_a_checkpoint_of_another_run_or_format_is_named(tmp_path: Path):
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="belongs to run run-1, not to this run, run-2"):
        load_newest(tmp_path, "run-2")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": "atesd-checkpoint-9"}))
    with pytest.raises(CheckpointError, match="format 'atesd-checkpoint-9', expected 'atesd-checkpoint-1'"):
        load_newest(tmp_path, RUN)


# Tensors that ranks divide


class Threads(Ranks):
    """Ranks that are threads of one process."""

    def _exchange(self, message: bytes) -> list[bytes]:
        MESSAGES[self.rank] = message
        BARRIER.wait()
        found = [MESSAGES[rank] for rank in range(self.size)]
        BARRIER.wait()
        return found


MESSAGES: dict[int, bytes] = {}
BARRIER = threading.Barrier(2)
SHAPE = (5, 2)


def divided_state(rank: int, value: float = 0.0) -> dict[str, Any]:
    """A tensor of five rows, three on rank 0 and two on rank 1, one of a single row, and one that is whole."""
    rows = torch.arange(10.0).view(SHAPE) + value
    first = 3 * rank
    parts = {"w": Part(rows[first : first + 3], first, SHAPE), "one": Part(torch.ones(1 - rank, 2), rank, (1, 2))}
    return {**parts, "whole": torch.full((3,), value), "n": value}


def save_divided(folder: Path, value: float = 0.0, states: Any = divided_state) -> list[BaseException | None]:
    """Save as two ranks do; what each raised."""
    raised: list[BaseException | None] = [None, None]

    def save_as(rank: int) -> None:
        try:
            save_checkpoint(folder, 1, states(rank, value), 3, run_id=RUN, ranks=Threads(rank, 2))
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=save_as, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def wanted(rows: slice, path: str, count: int) -> slice:
    return rows if path == "/w" else slice(0, count)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_rows_of_two_ranks_are_read_by_any_number(tmp_path: Path, size: int):
    assert save_divided(tmp_path) == [None, None]
    found = []
    for rank in range(size):
        piece = -(-5 // size)
        rows = slice(rank * piece, min(5, (rank + 1) * piece))
        loaded = load_newest(tmp_path, RUN, partial(wanted, rows))
        assert loaded is not None
        assert torch.equal(loaded.state["one"], torch.ones(1, 2))
        found.append(loaded.state["w"])
    assert torch.equal(torch.cat(found), torch.arange(10.0).view(SHAPE))


def test_ranks_that_hold_the_same_rows_write_them_once(tmp_path: Path):
    assert (
        save_divided(tmp_path, states=lambda _, value: {"w": Part(torch.ones(2, 2) + value, 0, (2, 3))}) == [None] * 2
    )
    assert [path.name for path in (tmp_path / "update-000001").glob("rows-*")] == ["rows-00000.safetensors"]


@pytest.mark.parametrize("name", ["rows-00000.safetensors", "rows-00001.safetensors"])
def test_rows_that_are_damaged_cut_short_or_missing_are_found(tmp_path: Path, name: str):
    save_divided(tmp_path)
    path = tmp_path / "update-000001" / name
    whole = path.read_bytes()
    for content in (whole[:-1] + b"?", whole[:-1], whole[:4], None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_newest(tmp_path, RUN)
    path.write_bytes(whole)
    assert load_newest(tmp_path, RUN) is not None


def test_a_row_that_no_file_has_is_told(tmp_path: Path):
    save_divided(tmp_path, states=lambda rank, _: {"w": Part(torch.ones(1, 2), 2 * rank, (4, 2))})
    with pytest.raises(CheckpointError, match="/w: its rows from 1 on are in no file, of 4"):
        load_newest(tmp_path, RUN)


def test_a_row_that_is_not_finite_on_one_rank_is_told_on_all_and_nothing_is_written(tmp_path: Path):
    broken = lambda rank, _: {"w": Part(torch.full((1, 2), math.nan if rank else 0.0), rank, (2, 2))}  # noqa: E731
    told = save_divided(tmp_path, states=broken)
    assert str(told[1]) == "state/w: 2 of 2 entries are not finite; a checkpoint holds only finite numbers"
    assert str(told[0]) == f"rank 1 of 2 failed: {told[1]}"
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_one_rank_is_told_on_all_and_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_divided(tmp_path)
    write = checkpoint.save_file

    def refuse(tensors: dict[str, Tensor], path: Path) -> None:
        if path.name == "rows-00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    told = save_divided(tmp_path, 1.0)
    assert "update-000001: cannot be written: " in str(told[1])
    assert str(told[0]) == f"rank 1 of 2 failed: {told[1]}"
    assert [path.name for path in tmp_path.iterdir()] == ["update-000001"]
    assert load(tmp_path)["n"] == 0.0


# Kills

NURSERY = """
    import itertools, json, os, signal, sys, threading, time
    from pathlib import Path
    import numpy as np
    import torch
    from atesd.models.ranks import Ranks
    from atesd.models.weights import Part
    from atesd.train.checkpoint import load_newest, save_checkpoint

    folder, mode, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    rng = np.random.default_rng(5)
    os.fsync = lambda descriptor: None  # of no account to a killed process, and slow

    messages, barrier = {}, threading.Barrier(2)

    class Threads(Ranks):
        def _exchange(self, message):
            messages[self.rank] = message
            barrier.wait()
            found = [messages[rank] for rank in range(2)]
            barrier.wait()
            return found

    def save_rows(n, rank):
        rows = Part(torch.full((1500,), float(n)), 1500 * rank, (3000,))
        save_checkpoint(folder, n, {"w": rows, "n": n}, 2, run_id="run", ranks=Threads(rank, 2))

    def save(n):
        if mode == "divided":
            other = threading.Thread(target=save_rows, args=(n, 1))
            other.start()
            save_rows(n, 0)
            other.join()
        else:
            save_checkpoint(folder, n, {"w": torch.full((3000,), float(n)), "n": n}, 2, run_id="run")

    def newest():
        loaded = load_newest(folder, "run")
        assert loaded.state["n"] == loaded.updates_done and (loaded.state["w"] == loaded.updates_done).all()
        files = 5 if mode == "divided" else 3
        assert all(len(list(path.iterdir())) == files for path in folder.glob("update-*"))
        return loaded.updates_done, loaded.skipped

    def die_before_operation(number):
        operations = itertools.count(1)
        names = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir"}
        sys.addaudithook(
            lambda name, _: name in names and next(operations) == number and os.kill(os.getpid(), signal.SIGKILL)
        )

    def child(done, number, writer):
        if mode in ("operations", "divided"):
            die_before_operation(number)
        twice, onward = (done + 1, done + 2), itertools.count(done + 1)
        for n in {"operations": twice, "divided": twice, "onward": onward, "again": itertools.repeat(done)}[mode]:
            save(n)
            os.write(writer, b"x")
        os._exit(0)

    save(1)
    done = 1
    for number in range(1, rounds + 1):
        reader, writer = os.pipe()
        process = os.fork()
        if not process:
            child(done, number, writer)
        os.close(writer)
        if mode not in ("operations", "divided"):
            time.sleep(float(rng.uniform(0, 0.05)))
            os.kill(process, signal.SIGKILL)
        killed = os.waitpid(process, 0)[1] == signal.SIGKILL
        with os.fdopen(reader, "rb") as pipe:
            saved = len(pipe.read())
        expected = done if mode == "again" else done + saved
        done, skipped = newest()
        print(json.dumps({"killed": killed, "saved": saved, "kept": done >= expected, "skipped": skipped}))
"""


def nursery(folder: Path, mode: str, rounds: int) -> list[dict[str, Any]]:
    """Children that save in a loop and are killed: one line for each. They are forked, to import torch once."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(NURSERY), str(folder), mode, str(rounds)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("mode", ["onward", "again"])
def test_after_a_kill_at_a_random_moment_the_newest_checkpoint_is_whole(tmp_path: Path, mode: str):
    kills = nursery(tmp_path, mode, 20)
    assert len(kills) == 20
    assert all(kill["killed"] and kill["kept"] and not kill["skipped"] for kill in kills)
    assert sum(kill["saved"] for kill in kills) > 0


def test_a_kill_before_any_single_file_operation_costs_no_finished_checkpoint(tmp_path: Path):
    # Two saves take fewer audited operations than there are children: the last ones live, so every place was hit.
    kills = nursery(tmp_path, "operations", 90)
    assert all(kill["kept"] and not kill["skipped"] for kill in kills)
    assert kills[30]["killed"]
    assert not kills[-1]["killed"]


def test_a_kill_while_two_ranks_write_their_rows_costs_no_finished_checkpoint(tmp_path: Path):
    kills = nursery(tmp_path, "divided", 120)
    assert all(kill["kept"] and not kill["skipped"] for kill in kills)
    assert kills[40]["killed"]
    assert not kills[-1]["killed"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_file_is_forced_to_the_disk_before_its_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    replace = os.replace
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: events.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(f"-> {Path(new).name}"), replace(old, new)))
    save(tmp_path, 1)
    named = events.index("-> update-000001")
    forced = {name.removeprefix(".").removesuffix(".tmp") for name in events[:named]}
    assert {*FILES, "temporary-update-000001"} <= forced
    assert events[named + 1 :] == [tmp_path.name]
