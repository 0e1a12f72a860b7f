"""What a dry run foretells: bytes as autograd and real runs have them, advice that holds, and nothing allocated."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from atesd.cli import app
from atesd.cli.forecast import Asked, described_lines, memory_limits, this_machine
from atesd.config import LoraConfig, load_config
from atesd.errors import ConfigError, ModelError
from atesd.forecast.advice import (
    bytes_needed,
    changed,
    changes,
    fits,
    rows_together,
    several_changes,
    single_changes,
    with_change,
)
from atesd.forecast.arithmetic import (
    FAST,
    SLOW,
    Lengths,
    ModelShape,
    Work,
    decoding,
    memory,
    peak,
    saved_bytes,
    seconds,
)
from atesd.forecast.devices import KINDS, DeviceKind, kind_named, kind_of_card, listed
from atesd.forecast.measured import COMPLETIONS, completions_line
from atesd.models.processor import adapters_as_their_inputs
from atesd.models.quiet import quiet
from atesd.models.shape import described_shape, shape_of
from benchmarks.memory import CASES, MOST, RANKS, foretold, title_of
from benchmarks.models import QWEN3, configured
from benchmarks.record import RESULTS, read

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
RANK, ROWS, TOKENS = 8, 3, 20
LENGTHS = Lengths(200, 200, 2248, 2248, 2048, 2048)
H100 = KINDS["h100-80gb"]


def tiny(family: str, layers: int, dtype: torch.dtype, lora: bool, attention: str = "sdpa") -> Any:
    kind, model = FAMILIES[family]
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attn_implementation": attention}
    made = model._from_config(kind(**sizes, **heads), dtype=dtype)
    if lora:
        import peft

        with quiet():
            made = peft.get_peft_model(
                made, peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            )
    return made.eval()


def kept_by_autograd(model: Any) -> int:
    """Bytes of all tensors that the pass of the backbone saves, parameters left out, each memory counted once."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        causal_lm.model(input_ids=torch.zeros(ROWS, TOKENS, dtype=torch.long), use_cache=False)
    return sum(size for memory, size in found.items() if memory not in own)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_autograd_saves_of_it(family: str, dtype: torch.dtype, lora: bool, attention: str) -> None:
    # The third layer alone: what a model of three keeps more than one of two.
    two, three = (kept_by_autograd(tiny(family, layers, dtype, lora, attention)) for layers in (2, 3))
    shape = shape_of(tiny(family, 2, dtype, lora=False))
    eager = TOKENS if attention == "eager" else 0
    told = saved_bytes(shape, dtype.itemsize, RANK if lora else None, eager)
    assert told == pytest.approx((three - two) / (ROWS * TOKENS), rel=0.001)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_whose_adapter_computes_in_bfloat16_keeps_no_copies_in_float32(family: str) -> None:
    models = [tiny(family, layers, torch.bfloat16, True, "eager") for layers in (2, 3)]
    for model in models:
        adapters_as_their_inputs(model)
    two, three = map(kept_by_autograd, models)
    shape = shape_of(tiny(family, 2, torch.bfloat16, lora=False))
    own = 2 * shape.adapter_entries(LoraConfig(rank=RANK)) / 2  # the rounded weights of one of two layers, 2 bytes each
    told = saved_bytes(shape, 2, RANK, TOKENS, rounded=True)
    assert told == pytest.approx((three - two - own) / (ROWS * TOKENS), rel=0.001)


def test_the_adapter_has_as_many_entries_as_peft_makes() -> None:
    shape, lora = shape_of(tiny("qwen3", 2, torch.float32, lora=False)), LoraConfig(rank=RANK)
    made = sum(p.numel() for p in tiny("qwen3", 2, torch.float32, lora=True).parameters() if p.requires_grad)
    assert shape.adapter_entries(lora) == made
    # By hand: queries alone, 32 in and 64 out, twice.
    assert shape.adapter_entries(LoraConfig(rank=RANK, target_modules=("q_proj",))) == 2 * RANK * (32 + 64)


def records() -> list[Path]:
    return sorted(RESULTS.glob("*/memory.json"))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_foretold_memory_is_that_of_measured_runs(name: str, ranks: int) -> None:
    told = peak(memory(foretold(name, ranks))).total
    assert records()
    for path in records():
        cases = {case.name: dict(case.memory or {}) for case in read(path)[0].cases}
        measured = cases[title_of(name, ranks)]["measured"]
        assert abs(told / measured - 1) <= MOST, f"{path.parent.name}: {told / 1e6:.0f} of {measured / 1e6:.0f} MB"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of a model of 1.7 billion parameters, and nothing else."""
    folder = tmp_path_factory.mktemp("1.7B")
    configured(QWEN3["1.7B"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shape(large: Path) -> ModelShape:
    return described_shape(load_config("qwen3-1.7b", [f"model.path={large}"]).model)


def work(shape: ModelShape, *settings: str, kind: str = "h100-80gb", devices: int = 8) -> Work:
    return Work(load_config("qwen3-1.7b", list(settings)), shape, LENGTHS, KINDS[kind], devices)


FULL = ("model.lora=null", "model.dtype=float32", "model.gradient_checkpointing=false")


def test_the_state_of_full_training_is_five_copies_of_the_weights(shape: ModelShape) -> None:
    # By hand: 1,720,574,976 float32 weights, a frozen copy, two moments and, in the step, a gradient; AdamW's
    # temporaries are two of the embedding, 151,936 x 2,048.
    assert shape.parameters == 1_720_574_976
    step = next(phase for phase in memory(work(shape, *FULL)) if phase.name == "step")
    assert step.total == 5 * 4 * 1_720_574_976 + 2 * 4 * 151_936 * 2048


def test_an_average_of_bfloat16_weights_is_in_float32_and_rounded_for_the_teachers_pass(shape: ModelShape) -> None:
    phases = memory(work(shape, *FULL, "model.dtype=bfloat16", "teacher.weights=ema"))
    copies = {phase.name: phase.parts["teacher copy"] for phase in phases if "teacher copy" in phase.parts}
    assert copies.pop("teacher") == 6 * shape.parameters
    assert set(copies.values()) == {4 * shape.parameters}


def test_an_adapter_in_bfloat16_has_no_teachers_copy_and_float32_moments(shape: ModelShape) -> None:
    # By hand: rank 64 on 28 layers of 2,048 to 2,048, 1,024, 1,024; 2,048 to 2,048; 2,048 to 6,144 twice and back.
    adapter = 28 * 64 * ((2048 + 2048) * 2 + (2048 + 1024) * 2 + (2048 + 6144) * 3)
    parts = memory(work(shape))[0].parts
    assert parts["weights"] == 2 * shape.parameters + 4 * adapter
    assert (parts["teacher copy"], parts["optimiser"]) == (0, 8 * adapter)


def test_sharding_divides_the_state_between_the_devices(shape: ModelShape) -> None:
    whole = work(shape, *FULL)
    for sharding, shards in (("full", 64), ("hybrid", 8)):
        config = changed(whole.config, {"model.sharding": sharding})
        own = memory(replace(whole, config=config, devices=64))[0].parts
        assert own["optimiser"] == memory(whole)[0].parts["optimiser"] / shards


def test_what_grows_with_a_setting_grows_in_proportion(shape: ModelShape) -> None:
    def part(name: str, which: str, *settings: str) -> float:
        return next(p.parts[which] for p in memory(work(shape, *settings, devices=1)) if p.name == name)

    # Rows of 200 + 1,024 tokens: 1,280 columns end the last block, the limit is 1,224 of them.
    rows = part("sample", "KV cache", "sampling.batch_size=8", "exposure.kind=full")
    assert rows == 2 * 29 * 8 * 1224 * 8 * 128 * 2
    assert part("sample", "KV cache", "sampling.batch_size=16", "exposure.kind=full") == 2 * rows
    logits = part("loss", "logits", "loss.chunk_tokens=64")
    assert logits == 2 * 64 * 151_936 * 4
    assert part("loss", "logits", "loss.chunk_tokens=128") == 2 * logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_long_evaluation_are_as_many_as_fit(shape: ModelShape, kind: str) -> None:
    # Completions of 38,912 tokens: about 4.6 GB of cache a row.
    long = work(shape, kind=kind, devices=1)
    rows = rows_together(long)
    assert rows in (1, 2, 4, 8, 16, 32)
    assert rows == 1 or decoding(long, rows, 38_912).total <= long.kind.usable
    assert decoding(long, 2 * rows, 38_912).total > long.kind.usable
    assert rows_together(work(shape, "evaluation.completion_tokens=512", kind="h100-80gb")) == 64


def test_every_setting_that_is_said_to_make_it_fit_does(shape: ModelShape) -> None:
    small = work(shape, "model.gradient_checkpointing=false", "train.micro_batch_size=32", kind="l4-24gb", devices=1)
    assert not fits(small)
    told = single_changes(small)
    assert "model.gradient_checkpointing=true" in [str(change) for change, _ in told]
    for change, size in told:
        assert bytes_needed(with_change(small, change)) == size <= small.kind.usable
    others = {str(change) for change in changes(small)} - {str(change) for change, _ in told}
    assert all(not fits(with_change(small, change)) for change in changes(small) if str(change) in others)


def test_several_settings_fit_together_and_none_of_them_is_idle(shape: ModelShape) -> None:
    small = work(shape, *FULL, kind="l4-24gb", devices=2)
    assert single_changes(small) == []
    several, size = several_changes(small)
    assert len(several) > 1
    assert size <= small.kind.usable
    for left_out in several:
        fewer = small
        for change in several:
            fewer = fewer if change is left_out else with_change(fewer, change)
        assert not fits(fewer)


def test_ten_times_the_speed_takes_a_tenth_of_the_products_time(shape: ModelShape) -> None:
    usual = work(shape)
    fast = replace(usual, kind=replace(H100, flops=10 * H100.flops))
    for phase in ("teacher", "student", "loss_backward"):
        assert seconds(fast, FAST)[phase] == pytest.approx(seconds(usual, FAST)[phase] / 10)
    assert seconds(fast, FAST)["sample"] > seconds(usual, FAST)["sample"] / 2  # it waits for memory
    assert seconds(replace(usual, kind=replace(H100, flops=0.0)), FAST) == {}


def test_decoding_reads_weights_and_cache_once_a_step(shape: ModelShape) -> None:
    # By hand, one device: 1,024 steps; weights without the embedding's second use, and 32 rows of 200 + 512 tokens.
    read = 2 * shape.parameters + 32 * 2 * 28 * 1024 * 2 * (200 + 512)
    step = read / (3.35e12 * FAST.bandwidth)
    told = seconds(work(shape, devices=1), FAST)["sample"]
    assert told == pytest.approx(1024 * step, rel=0.02)  # the prompts' pass is the rest


def test_every_phase_is_slower_at_the_slow_end_of_the_range(shape: ModelShape) -> None:
    fast, slow = (seconds(work(shape), end) for end in (FAST, SLOW))
    assert all(slow[name] > 1.5 * value for name, value in fast.items())
    assert fast.keys() == slow.keys() == {"sample", "teacher", "student", "loss_backward", "step"}


@pytest.mark.parametrize(("devices", "rows"), [(8, 4), (64, 1)])
def test_a_folder_with_a_description_alone_is_planned_without_memory_for_it(
    large: Path, devices: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tensor of the model on any device but meta would have to be made by one of these.
    monkeypatch.setattr(torch.nn.Module, "to", None)
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)
    config = load_config("qwen3-1.7b", [f"model.path={large}"])
    said = "\n".join(described_lines(config, Asked(devices, "h100-80gb")))
    assert "1,720,574,976 parameters by its config.json, 69,730,304 trained; no weights were read" in said
    assert f"devices: {devices} x h100-80gb, 80.0 GB each" in said
    assert f"rows on a device: {rows} in an update" in said
    assert f"as assumed (not measured: {large} holds no tokenizer); --problem-tokens" in said
    assert "it fits: " in said
    assert re.search(r"seconds per update, an estimate: [\d.]+ to [\d.]+; sample [\d.]+ to ", said)
    assert "the range is assumed, as no run on a GPU has checked it: 25% to 60% of the operations" in said
    assert ("train.batch_size 32 leaves 32 of 64 devices without a row; --set train.batch_size=64" in said) == (
        devices == 64
    )


def test_a_run_that_does_not_fit_says_what_would(large: Path) -> None:
    config = load_config("qwen3-1.7b", [f"model.path={large}", *FULL])
    said = list(described_lines(config, Asked(2, "l4-24gb", 100, 500)))
    assert any(line.startswith("it does not fit: ") and "of 22.1 GB that may be filled" in line for line in said)
    at = next(i for i, line in enumerate(said) if "together these do, at" in line)
    assert "--set model.lora='{rank: 64, alpha: 128}' --set model.dtype=bfloat16" in "\n".join(said[at:])
    assert any(line.startswith("contexts as asked: student up to 100, teacher up to 600 tokens") for line in said)


def test_contexts_are_measured_where_data_and_tokenizer_are_at_hand() -> None:
    said = "\n".join(described_lines(load_config("micro"), Asked(8, "a100-40gb")))
    assert "contexts of the first 512 training problems: student up to " in said


def test_a_length_that_nobody_measured_is_called_a_guess_and_what_measures_it_is_named() -> None:
    guess = "completions: 1,024 tokens is a guess for this model and data; `atesd profile` of this recipe measures how"
    assert completions_line(load_config("qwen3-1.7b")).startswith(guess)
    assert completions_line(load_config("micro", ["train.method=sft"])) == ""
    world = "completions: measured before training, mean 14 tokens, 0% cut off at 40 (600 completions of the embedded"
    for recipe in ("micro", "micro-steps", "micro-bandit"):
        assert completions_line(load_config(recipe)).startswith(world)
        assert any(line.startswith(world) for line in described_lines(load_config(recipe), Asked(1, "a10-24gb")))


def test_what_is_measured_is_of_packaged_recipes_and_their_limits() -> None:
    for recipe in ("micro", "smollm2-gsm", "smollm2-sums"):
        config = load_config(recipe)
        found = COMPLETIONS[config.model.path.partition(":")[0], config.data.source_name]
        assert found.mean < found.most == config.sampling.completion_tokens


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("H100", "; did you mean h100-80gb?"),
        ("h100_80gb", "; did you mean h100-80gb?"),
        ("a100", "; did you mean a100-40gb or a100-80gb?"),
        ("h1000-80gb", "; did you mean h100-80gb?"),
        ("tpu", ""),
    ],
)
def test_a_kind_that_is_not_known_names_the_near_one(name: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind_named(name)
    assert str(caught.value) == f"--device-kind {name}: expected one of {', '.join(KINDS)}{meant}"


def test_a_card_is_known_by_the_name_that_its_driver_gives() -> None:
    assert kind_of_card("NVIDIA H100 80GB HBM3", 85_017_493_504) == replace(H100, memory=85_017_493_504)
    assert kind_of_card("NVIDIA A100-SXM4-40GB", 42_000_000_000).bandwidth == 1.555e12
    assert kind_of_card("Another Card", 10).flops == 0
    assert kind_of_card("NVIDIA GeForce RTX 4090", 25_000_000_000).bandwidth == 1.008e12
    assert kind_of_card("NVIDIA L4", 24_000_000_000).flops == 121e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA L40",
        "NVIDIA A10G",
        "NVIDIA RTX A1000",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_a_card_has_no_speeds_of_another_that_is_called_alike(name: str) -> None:
    assert kind_of_card(name, 20_000_000_000) == DeviceKind(name, 20_000_000_000)


def test_a_processor_has_no_more_memory_than_its_groups_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = tmp_path / "v2", tmp_path / "v1"
    files = {new / "memory.max": "max", new / "job/memory.max": "3000", new / "job/step/memory.max": "4000"}
    files |= {old / "memory/docker/memory.limit_in_bytes": "2000", old / "cpu/docker/memory.limit_in_bytes": "1"}
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    assert min(memory_limits(new, own)) == 3000
    own.write_text("9:cpu:/docker\n4:hugetlb,memory:/docker\n0::/\n")
    assert min(memory_limits(old, own)) == 2000
    assert min(memory_limits(tmp_path / "none", tmp_path / "nothing")) == math.inf
    monkeypatch.setattr("atesd.cli.forecast.memory_limits", lambda: iter([1000.0]))
    assert this_machine(load_config("micro", ["model.device=cpu"]), 2) == DeviceKind("cpu", 500)


def test_every_kind_has_all_its_numbers_a_source_and_a_row_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs/scale.md").read_text("utf-8")
    for kind, row in zip(KINDS.values(), listed(), strict=True):
        assert kind.source
        assert min(kind.memory, kind.flops, kind.flops32, kind.bandwidth, kind.link) > 0
        assert "| " + " | ".join(row) + " |" in page


def test_what_the_plan_alone_reads_is_refused_without_it() -> None:
    done = CliRunner().invoke(app, ["train", "micro", "--devices", "8", "--device-kind", "h100-80gb"])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith("--devices 8, --device-kind h100-80gb: read by --dry-run alone")


def test_a_problem_that_leaves_no_room_is_refused(large: Path) -> None:
    config = load_config("qwen3-1.7b", [f"model.path={large}"])
    with pytest.raises(ConfigError, match=r"--problem-tokens 50000: model\.max_context_tokens 40960 less"):
        list(described_lines(config, Asked(8, "h100-80gb", 50_000)))


def test_a_folder_without_a_description_is_refused(tmp_path: Path) -> None:
    config = load_config("qwen3-1.7b", [f"model.path={tmp_path}"])
    with pytest.raises(ModelError, match=r"holds neither config\.json nor"):
        list(described_lines(config, Asked(8, "h100-80gb")))


def test_every_recipe_can_be_planned_on_every_kind(shape: ModelShape) -> None:
    for recipe in ("micro", "micro-paper", "smollm2-gsm", "qwen3-8b"):
        for kind in KINDS.values():
            asked = Work(load_config(recipe), shape, LENGTHS, kind, 3)
            assert all(math.isfinite(phase.total) for phase in memory(asked))
            assert all(math.isfinite(value) and value > 0 for value in seconds(asked, FAST).values())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_foretold_memory_is_that_of_a_run_made_now(name: str, ranks: int, tmp_path: Path) -> None:
    from benchmarks.memory import measured_now

    told = peak(memory(foretold(name, ranks))).total
    assert told == pytest.approx(measured_now(name, ranks, tmp_path), rel=MOST)
