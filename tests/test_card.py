"""The model card: what it must say, figures worked out by hand, and foreign text that stays text."""

import html
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from atesd.card import exposure_curve, fenced, hub_id, model_card, plain, sparkline, write_model_card
from atesd.config import Config, config_from_mapping
from atesd.runs import RunFolder, new_manifest


def config(**groups: dict[str, Any]) -> Config:
    train = {"num_updates": 20, "batch_size": 4, "seed": 3, **groups.pop("train", {})}
    return config_from_mapping({"train": train, **groups})


def evaluation(update: int, correct: dict[str, int], split: str = "test") -> dict[str, Any]:
    share = sum(correct.values()) / (2 * len(correct))
    estimate = {"value": share, "low": share - 0.1, "high": share + 0.1}
    return {
        "update": update,
        "split": split,
        "problems": len(correct),
        "samples": 2,
        "average": estimate,
        "pass_at_k": estimate,
        "verdicts": {"correct": 5, "wrong": 3, "unparseable": 1, "timeout": 1},
        "mean_tokens": 30.4,
        "truncated_share": 0.025,
        "loop_share": 0.0,
        "sampler": {"temperature": 0.7, "top_p": 1.0, "completion_tokens": 40, "seed": 3},
        "correct_counts": correct,
    }


def metric(update: int, ratio: float | None, skipped: str | None = None) -> dict[str, Any]:
    return {"update": update, "reveal_ratio": ratio, "effective_ratio": ratio, "skipped": skipped}


def finished(path: Path, chosen: Config) -> RunFolder:
    run = RunFolder.create(path, chosen, new_manifest(chosen, data_fingerprint="f00d", command=["atesd"]))
    for update in range(20):
        run.append("metrics", metric(update, update / 19, "non-finite loss" if update == 7 else None))
    for row in (
        evaluation(0, {"p": 0, "q": 1}),
        evaluation(20, {"p": 2, "q": 1}),
        evaluation(10, {"v": 1}, "validation"),
    ):
        run.append("evaluations", row)
    return run


@pytest.fixture
def card(tmp_path: Path) -> str:
    chosen = config()
    return model_card(chosen, finished(tmp_path / "first_run", chosen))


def header(text: str) -> Any:
    return yaml.safe_load(text.split("---\n")[1])


# What it says


def test_the_card_is_the_readme_of_the_model_folder(tmp_path: Path):
    run = finished(tmp_path / "run", config())
    path = write_model_card(run.final, config(), run)
    assert path == run.path / "model" / "README.md"
    assert path.read_text("utf-8") == model_card(config(), run)


def test_the_header_names_the_base_model_and_the_data_set_only_if_the_hub_has_them(tmp_path: Path, card: str):
    hub = config(
        model={"path": "Qwen/Qwen3-1.7B", "lora": {}, "max_context_tokens": 4096},
        data={"source": "siyanzhao/Openthoughts_math_30k_opsd"},
    )
    found = header(model_card(hub, finished(tmp_path / "hub", hub)))
    assert found["base_model"] == "Qwen/Qwen3-1.7B"
    assert found["datasets"] == ["siyanzhao/Openthoughts_math_30k_opsd"]
    assert found["library_name"] == "peft"
    assert header(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "license" not in found


def test_a_local_folder_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/mine") is None
    assert hub_id("models/theirs") == "models/theirs"
    assert hub_id("/models/mine") is None
    assert hub_id("world:a") is None
    assert hub_id("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_base_and_final_scores_come_with_intervals_and_their_paired_gain(card: str):
    # Base: (0 + 1) of 4, final: (2 + 1) of 4. Gains of 1 and 0 points by problem: mean .5, any resample in [0, 1].
    # Two verdicts of ten could not be read.
    assert "| test | base | 25.0 [15.0, 35.0] | 25.0 [15.0, 35.0] | 2 | 2 | 30 | 2.5 | 0.0 | 20.0 |" in card
    assert "| test | after 20 updates (final) | 75.0 [65.0, 85.0] |" in card
    assert "Gain of the last over the first on test, paired by problem: +50.0 [+0.0, +100.0] points." in card
    assert "| validation | after 10 updates |" in card
    assert "Sampled with temperature 0.7, top\\_p 1.0, completion\\_tokens 40, seed 3." in card


def test_a_newer_evaluation_of_the_same_update_replaces_the_older(tmp_path: Path):
    run = finished(tmp_path / "run", config())
    run.append("evaluations", evaluation(20, {"p": 2, "q": 2}))
    assert "after 20 updates (final) | 100.0" in model_card(config(), run)
    assert "| 75.0" not in model_card(config(), run)


def test_no_gain_is_claimed_between_different_problems(tmp_path: Path):
    run = finished(tmp_path / "run", config())
    run.append("evaluations", evaluation(20, {"p": 2, "other": 2}))
    assert "Gain" not in model_card(config(), run)


def test_the_exposure_curve_is_the_mean_of_each_tenth():
    rows = [metric(update, ratio) for update, ratio in enumerate([0.0, 0.5] * 5 + [1.0] * 10)]
    curve = exposure_curve(rows)
    assert [(first, last) for first, last, _, _ in curve] == [(2 * i, 2 * i + 1) for i in range(10)]
    assert [asked for _, _, asked, _ in curve] == [0.25] * 5 + [1.0] * 5
    assert exposure_curve(rows[:3]) == [(0, 0, 0.0, 0.0), (1, 1, 0.5, 0.5), (2, 2, 0.0, 0.0)]
    assert exposure_curve([metric(0, None)]) == []


def test_every_update_counts_in_exactly_one_tenth():
    for count in range(1, 40):
        spans = [(first, last) for first, last, _, _ in exposure_curve([metric(i, 0.5) for i in range(count)])]
        assert [i for first, last in spans for i in range(first, last + 1)] == list(range(count))


def test_the_sparkline_runs_from_the_lowest_to_the_highest_bar():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"


def test_the_card_says_data_seed_and_every_setting(card: str):
    assert "| fingerprint of the problems | f00d |" in card
    assert "| seed | 3 |" in card
    assert "| exposure of the teacher | ATESD (sound credit) |" in card
    settings = re.search(r"```yaml\n(.*?)\n```", card, re.DOTALL)
    assert settings is not None
    assert config_from_mapping(yaml.safe_load(settings[1])) == config()


# What it admits


def test_one_seed_skipped_updates_and_the_toy_world_are_admitted(card: str):
    assert "One run with one seed (3)." in card
    assert "1 of 20 updates were skipped" in card
    assert "Validation problems were scored once on the way" in card
    assert "say nothing of language models" in card
    assert "resumed" not in card


def test_a_resume_is_admitted_with_what_it_changed(tmp_path: Path):
    run = finished(tmp_path / "run", config())
    run.begin_session(config(train={"keep_checkpoints": 9}), command=[], updates_done=5)
    assert "resumed once: train.keep\\_checkpoints: 3 -\\> 9" in model_card(config(), run)


def test_controls_the_literal_reward_and_the_designed_world_are_named(tmp_path: Path):
    chosen = config(exposure={"reference_ablation": "shuffled"}, credit={"preset": "paper"}, data={"leap_share": 0.5})
    text = model_card(chosen, finished(tmp_path / "run", chosen))
    assert "control: shuffled); this is a control run" in text
    assert "That reward rises when the ratio falls" in text
    assert "designed to make full exposure harmful" in text


def test_a_run_without_rows_has_a_card(tmp_path: Path):
    chosen = config(train={"method": "sft"})
    run = RunFolder.create(tmp_path / "run", chosen, new_manifest(chosen, data_fingerprint="0", command=[]))
    text = model_card(chosen, run)
    assert "The model was not evaluated." in text
    assert "## Exposure" not in text
    assert "0 updates of supervised training" in text


@pytest.mark.parametrize(("lora", "loader"), [(None, "AutoModelForCausalLM"), ({}, "AutoPeftModelForCausalLM")])
def test_the_code_to_load_it_is_python(tmp_path: Path, lora: dict[str, Any] | None, loader: str):
    chosen = config(model={"lora": lora})
    code = re.search(r"```python\n(.*?)\n```", model_card(chosen, finished(tmp_path / "run", chosen)), re.DOTALL)
    assert code is not None
    compile(code[1], "card", "exec")
    assert f"{loader}.from_pretrained(folder)" in code[1]


# Foreign text


def test_a_hostile_name_stays_text(tmp_path: Path):
    hostile = "[x](javascript:y)<img src=x onerror=y>|`\u202e"
    chosen = config(
        model={"path": hostile},
        data={"source": f"{hostile}\n---\n# owned", "segmenter": "line"},
        views={"instruction": "```\n<script>alert(1)</script>"},
    )
    text = model_card(chosen, finished(tmp_path / "run", chosen))
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", text)
    assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", outside)
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert "\n# owned" not in outside
    assert "\u202e" not in text


@given(st.text())
def test_plain_text_leaves_no_active_character_and_no_line_break(text: str):
    escaped = plain(text)
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_{}\[\]<>#|~&$]", escaped)
    assert len(escaped.splitlines()) <= 1
    assert html.unescape(re.sub(r"\\(.)", r"\1", escaped)).count("⟦") >= text.count("⟦")


@given(st.text(alphabet="`~ab\n"))
def test_a_code_block_ends_only_at_its_last_line(text: str):
    first, *inside, last = fenced(text).split("\n")
    assert first == last
    assert all(not re.fullmatch(rf" {{0,3}}`{{{len(first)},}}\s*", line) for line in inside)
    assert "\n".join(inside) == text.strip("\n")


@pytest.mark.parametrize("write", [plain, fenced])
def test_a_card_hides_nothing_that_a_report_shows(write):
    assert "\u27e6U+3164\u27e7" in write("a\u3164b")
