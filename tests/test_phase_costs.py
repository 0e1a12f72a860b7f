"""Prices of an update by phase, each by a second route, and what they make of a comparison at equal time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from atesd.config import load_config
from atesd.models.shape import shape_of
from atesd_lab.paper.aligned_measure import GRPO
from atesd_lab.paper.phase_costs import PriceList, answer_table, by_arithmetic, composed, main, measured, qwen3_8b
from atesd_lab.stats.differences import paired_difference
from atesd_lab.sweep.pivot import read_cells
from test_aligned_results import ONE_WORLD, metric, raw, table_of, write_sweep

BY_FEATURES = ("loss.gate=aligned", "alignment.parameters=features")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"), [{"world": "steps"}, {"arm": ["aligned", "sound"]}])


def price(*words: str) -> dict[str, float]:
    found = by_arithmetic(load_config("micro", words))
    assert found is not None
    return dict(found)


# By arithmetic


def test_the_shape_is_that_of_the_model_that_transformers_builds() -> None:
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        built = shape_of(AutoModelForCausalLM.from_config(config))
    ours = qwen3_8b()
    assert sorted(size for _, *size in ours.linears) == sorted(size for _, *size in built.linears)
    for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocabulary", "tied", "qk_norm", "parameters"):
        assert getattr(ours, name) == getattr(built, name), name


def test_an_update_of_grpo_is_decoding_and_three_passes() -> None:
    # Weights 7.57e9 behind the embedding. A step reads them in bfloat16, and the cache of 64 rows of 200 + 1024 tokens
    # on average, 147,456 bytes each, at half of 3.35 TB/s. Passes: 2 operations per weight and token, and attention.
    layers, body, head = 36, 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288), 151936 * 4096
    speed, bandwidth = 0.45 * 989e12, 0.5 * 3.35e12
    decoding = 2048 * (2 * (body + head) + 64 * (200 + 1024) * 2 * layers * 8 * 128 * 2) / bandwidth
    prompts = 64 * (2 * body * 200 + 2 * layers * 4096 * 200**2) / speed
    pass_ = 64 * (2 * body * 2248 + 2 * layers * 4096 * 2248**2) / speed
    found = price("train.method=grpo")
    assert found["sampling"] == pytest.approx(decoding + prompts, rel=1e-6)
    assert found["teacher"] == found["look-ahead"] == 0
    # forward, forward again (checkpointing), backward to the adapter's inputs; the head forward and back. The step of
    # an adapter takes milliseconds.
    student = 3 * pass_ + 2 * 2 * head * 64 * 2048 / speed
    assert found["student and step"] == pytest.approx(student, rel=1e-3)


def test_a_teacher_reads_what_is_revealed_and_a_gate_adds_products_with_the_head() -> None:
    full = price("exposure.kind=full")
    half = price("exposure.kind=fixed", "exposure.reveal_ratio=0.5")
    sdar = price("exposure.kind=full", "loss.gate=sdar")
    gate = price("exposure.kind=full", *BY_FEATURES)
    speed, body = 0.45 * 989e12, 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    less = 64 * (2 * body * 1024 + 2 * 36 * 4096 * (4296**2 - 3272**2)) / speed
    assert full["teacher"] - half["teacher"] == pytest.approx(less, rel=1e-6)
    product = 2 * 151936 * 4096 * 64 * 2048 / speed
    assert sdar["look-ahead"] == pytest.approx(2 * product)
    # the gate: three of them, and a pass more over the rollouts with two
    pass_ = 64 * (2 * body * 2248 + 2 * 36 * 4096 * 2248**2) / speed
    assert gate["look-ahead"] == pytest.approx(5 * product + pass_, rel=1e-6)
    assert full["look-ahead"] == 0
    assert {name: gate[name] for name in ("sampling", "teacher", "student and step")} == {
        name: full[name] for name in ("sampling", "teacher", "student and step")
    }


@pytest.mark.parametrize(
    "words",
    [
        ("exposure.kind=aligned",),
        ("exposure.kind=learned",),
        ("train.method=sft",),
        ("exposure.kind=full", "loss.gate=aligned"),
        ("exposure.kind=full", "loss.gate=soft"),
    ],
    ids=" ".join,
)
def test_an_arm_that_the_arithmetic_does_not_know_has_no_price(words: tuple[str, ...]) -> None:
    assert by_arithmetic(load_config("micro", words)) is None


# Measured


def test_the_phases_of_the_gate_make_up_the_other_arms() -> None:
    gate = {"sampling": 5.0, "teacher": 3.0, "student and step": 4.0, "look-ahead": 2.0}

    def whole(*words: str) -> float | None:
        found = composed(load_config("micro", words), gate)
        return None if found is None else sum(found.values())

    assert whole("train.method=grpo") == 9
    assert whole("exposure.kind=fixed", "exposure.reveal_ratio=0.5") == whole("exposure.kind=full") == 12
    assert whole("exposure.kind=full", "loss.gate=sdar") == 12
    assert whole("exposure.kind=full", *BY_FEATURES) == 14
    assert whole("exposure.kind=full", "loss.gate=aligned") is None  # two displaced passes: other phases


def test_a_price_is_the_median_over_runs_of_the_mean_over_updates(swept: Path, tmp_path: Path) -> None:
    times = Path(shutil.copytree(swept, tmp_path / "times"))
    for seed, sampling in enumerate((1.0, 3.0, 4.0, 100.0)):
        path = times / f"leaps-half-{'aabb'[seed]}-gate-seed-{seed}" / "metrics.jsonl"
        late = {"sample": sampling, "teacher": 2.0, "student": 3.0, "loss_backward": 4.0, "control": 5.0}
        rows = [metric(update, seconds={"sample": 50.0, "evaluate": 9.0}) for update in range(4)]
        rows += [metric(update, seconds={**late, "evaluate": 9.0}) for update in range(4, 8)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gates = [cell for cell in read_cells(times) if cell.points["arm"] == "gate"]
    settled = measured(gates, 4)["gate"]  # medians over runs: (3 + 4) / 2
    assert settled == {"sampling": 3.5, "teacher": 2.0, "student and step": 7.0, "look-ahead": 5.0}
    whole = measured(gates)["gate"]  # (50 + 3.5) / 2, and half of the rest
    assert whole == {"sampling": 26.75, "teacher": 1.0, "student and step": 3.5, "look-ahead": 2.5}


def test_a_run_without_an_update_after_the_first_hold_is_refused(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(swept), "--model", str(swept)]) == 2  # two updates each
    assert "no update from 2 on has `seconds`" in capsys.readouterr().err


def test_a_world_with_nothing_to_compare_with_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path / "s", ONE_WORLD[:1])
    for cell in (tmp_path / "s").glob("*-seed-*"):
        if not any(f"-{arm}-seed" in cell.name for arm in ("gate", "grpo")):
            shutil.rmtree(cell)
    assert main([str(tmp_path / "s")]) == 2
    assert "no finished run of full or fixed exposure without a gate" in capsys.readouterr().err


# At equal time


def priced(**whole: float) -> PriceList:
    return PriceList("made up", "", {arm: {"sampling": seconds} for arm, seconds in whole.items()})


def test_at_equal_prices_all_updates_count_and_at_a_double_price_half_of_them(swept: Path) -> None:
    table = table_of(swept, "leaps-half")
    for cost, update in ((1.0, 20), (2.0, 10)):
        [row] = answer_table([table], [priced(gate=cost, grpo=1.0)], GRPO).rows
        found = paired_difference(raw(swept, "grpo", "validation", 20), raw(swept, "gate", "validation", update))
        assert f"{100 * float(found.value):+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]" in row[1]
        assert row[1].endswith(f"({update} / 20)")


def test_an_interval_that_leaves_out_zero_is_bold_and_counted(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", ONE_WORLD[:1], scored=lambda arm, *_: 0.9 if arm == "gate" else 0.3)
    found = answer_table([table_of(sweep, "leaps-half")], [priced(gate=1.0, grpo=1.0)], GRPO)
    assert found.rows[0][1].startswith("**+")
    assert found.notes[0] == "Made up: ahead in 1, of 1 worlds."
    without = answer_table([table_of(sweep, "leaps-half")], [priced(gate=1.0)], GRPO)
    assert without.rows[0][1] == "–"
    assert without.notes[0] == "Made up: nothing to compare, of 1 worlds."


def test_the_command_prints_prices_and_answers(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(swept)]) == 0
    text = capsys.readouterr().out
    assert "| gate | 0.03 | 0 | 0.17 | 0 | 0.2 | 1.33 |" in text  # 0.2 s an update, GRPO 0.15
    assert "**Prices: 8B, by arithmetic**" in text
    assert text.count("The gate less") == 2  # no run of SDAR's gate
    assert "(15 / 20)" in text  # 20 updates of GRPO are 15 of the gate
