"""Sizes and shares of the splits: what a file needs, what a small one gives, and that old splits stay."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.config import DataConfig, SharesConfig, config_from_mapping, dump_config, load_config
from atesd.data.sources import load_problems
from atesd.data.splits import SHARES, shares_of, split_of
from atesd.errors import ConfigError, DataError


def source(tmp_path: Path, rows: int) -> str:
    path = tmp_path / f"{rows}.jsonl"
    path.write_text("\n".join(json.dumps({"problem": f"p{i}", "solution": "\\boxed{1}"}) for i in range(rows)), "utf-8")
    return str(path)


def sizes(name: str, **settings: Any) -> tuple[int, ...]:
    sets = load_problems(DataConfig(source=name, **settings))
    return tuple(len(split) for split in (sets.train, sets.validation, sets.probe, sets.test))


def refusal(name: str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_problems(DataConfig(source=name, **settings))
    return str(caught.value)


def test_the_default_shares_split_as_they_always_did():
    # Recorded with the first version, as are the fingerprints of runs, which depend on it.
    splits = " ".join(split_of(f"p{i}") for i in range(10_000))
    assert (
        hashlib.sha256(splits.encode()).hexdigest()
        == "f5b5ef48415795ba273e090a2be7c66c7696297baa08301166677615ba9f6e6f"
    )
    assert shares_of(SharesConfig()) == SHARES


def test_the_fingerprint_of_a_file_is_what_it_always_was(tmp_path):
    rows = [{"problem": f"What is {i} + {i}?", "solution": f"Add.\n\nSo \\boxed{{{2 * i}}}."} for i in range(300)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    config = DataConfig(source=str(tmp_path / "p.jsonl"), train_size=None, validation_size=5, probe_size=5, test_size=5)
    assert load_problems(config).fingerprint == "c61c6519eca0dbdaabe3d4456a16f96cb30fb32a96262ee53a77b79885a5b524"


@given(text=st.text(max_size=8), probe=st.floats(0, 1))
def test_every_problem_falls_into_a_split_with_a_share(text, probe):
    shares = shares_of(SharesConfig(train=1 - probe, validation=0, probe=probe, test=0))
    assert dict(shares)[split_of(text, shares)] > 0


def test_shares_of_the_problems_are_about_those_asked_for():
    shares = shares_of(SharesConfig(train=0.5, validation=0.2, probe=0.2, test=0.1))
    found = [split_of(f"p{i}", shares) for i in range(10_000)]
    for split, share in shares:
        assert abs(found.count(split) / 10_000 - share) < 5 * math.sqrt(share * (1 - share) / 10_000)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (
            {"probe": 0.1},
            "data.shares: train 0.8, validation 0.07, probe 0.1, test 0.1 sum to 1.07; they must sum to 1",
        ),
        ({"train": 1.1}, "data.shares.train: 1.1 is not allowed; expected at least 0 and at most 1"),
        ({"valid": 0.1}, "data.shares.valid: unknown setting; did you mean validation?"),
    ],
)
def test_shares_that_do_not_divide_a_source_are_refused(shares, message):
    with pytest.raises(ConfigError) as caught:
        config_from_mapping({"data": {"shares": shares}})
    assert message in str(caught.value)


def test_a_small_file_gives_what_it_has_and_says_so_where_no_size_is_given(tmp_path):
    # Of 300 rows 240, 21, 9 and 30 are expected.
    name = source(tmp_path, 300)
    found = [split_of(f"p{i}") for i in range(300)]
    expected = tuple(found.count(split) for split, _ in SHARES)
    assert sizes(name) == expected
    train, validation, probe, test = expected
    assert load_problems(DataConfig(source=name)).notes == (
        f"{name}: few rows, so splits are smaller than their sizes: train {train} of 4096, validation {validation} of "
        f"200, probe {probe} of 64, test {test} of 300 (data.on_few_rows: shrink)",
    )


def test_shares_give_a_small_file_enough_probes(tmp_path):
    shares = {"train": 0.4, "validation": 0.1, "probe": 0.4, "test": 0.1}
    assert sizes(source(tmp_path, 300), shares=shares)[2] == 64


def test_a_size_that_is_given_is_no_upper_bound(tmp_path):
    # 64 of 3 % are 2,134 rows, and 300 give 9 of these 64: in this file 64 need 300 * 64 / found.
    name = source(tmp_path, 300)
    found = sum(split_of(f"p{i}") == "probe" for i in range(300))
    message = refusal(name, train_size=None, validation_size=0, test_size=0)
    needed = max(64 / 0.03, 300 * 64 / found)
    assert f"too few problems: probe {found} of 64 (data.probe_size). It needs about " in message
    stated = int(message.split("about ")[1].split(" ")[0].replace(",", ""))
    assert needed <= stated <= 1.1 * needed
    assert "this file has 300 usable problems: lower these sizes, or change data.shares" in message
    assert "data.on_few_rows: shrink" in message


def test_the_stated_number_of_rows_is_above_that_of_the_file(tmp_path):
    for rows in (50, 500, 1500, 2100):
        message = refusal(source(tmp_path, rows), train_size=None, validation_size=0, test_size=0, probe_size=66)
        assert int(message.split("about ")[1].split(" ")[0].replace(",", "")) > rows


def test_training_and_probes_need_a_problem_each_in_any_case(tmp_path):
    assert "probe 0 of 64 (data.probe_size). It needs about 34 rows; this file has 3 usable" in refusal(
        source(tmp_path, 3)
    )
    assert "this file has 0 usable problems" in refusal(source(tmp_path, 0))


def test_a_share_of_nothing_is_named(tmp_path):
    shares = {"train": 0.9, "validation": 0, "probe": 0.1, "test": 0}
    message = refusal(
        source(tmp_path, 300), train_size=None, validation_size=7, probe_size=1, test_size=0, shares=shares
    )
    assert "validation 0 of 7 (data.validation_size). data.shares.validation: 0 gives it none" in message


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, "refuse"),
        ({"source": "arithmetic"}, "refuse"),
        ({"source": "p.jsonl"}, "shrink"),
        ({"source": "p.jsonl", "test_size": 5}, "refuse"),
        ({"source": "p.jsonl", "test_size": 5, "on_few_rows": "shrink"}, "shrink"),
        ({"source": "p.jsonl", "on_few_rows": "refuse"}, "refuse"),
    ],
)
def test_default_sizes_are_upper_bounds_for_files_alone(settings, chosen):
    assert DataConfig.model_validate(settings).on_few_rows == chosen


def test_a_recorded_config_keeps_the_choice(tmp_path):
    config = config_from_mapping({"data": {"source": "p.jsonl"}, "model": {"path": "m"}})
    (tmp_path / "c.yaml").write_text(dump_config(config), "utf-8")
    assert load_config(str(tmp_path / "c.yaml")) == config
    assert config.data.on_few_rows == "shrink"


def test_the_shares_of_the_world_and_of_generated_problems():
    with pytest.raises(ConfigError, match=r"data\.shares: the world's models were taught its train share"):
        load_problems(DataConfig(shares={"train": 0.7, "validation": 0.1, "probe": 0.1, "test": 0.1}))
    shares = {"train": 0.5, "validation": 0.0, "probe": 0.5, "test": 0.0}
    some = {"source": "arithmetic", "train_size": 50, "validation_size": 0, "probe_size": 50, "test_size": 0}
    assert len(load_problems(DataConfig(**some, shares=shares)).probe) == 50
    with pytest.raises(ConfigError, match=r"data\.shares.test: 0 leaves none of the 9 problems asked for"):
        load_problems(DataConfig(**{**some, "test_size": 9}, shares=shares))
