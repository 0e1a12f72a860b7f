"""Settings: what is refused and in which words, overrides, presets, and the way to a file and back."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atesd.config import (
    CREDIT_PRESETS,
    Config,
    config_from_mapping,
    describe_settings,
    dump_config,
    load_config,
    parse_yaml,
    recipe_names,
    with_overrides,
)
from atesd.errors import ConfigError


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("micro", overrides)
    return str(caught.value)


def refused_file(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    return str(caught.value)


# What is refused


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.nun_updates=3", ["train.nun_updates", "unknown", "did you mean num_updates?", "allowed in 'train'"]),
        ("trian.num_updates=3", ["trian", "unknown", "did you mean train?", "allowed at the top: model, data"]),
        ("num_updates=3", ["num_updates", "did you mean train.num_updates?"]),
        ("model.lora.rnak=3", ["model.lora.rnak", "did you mean rank?", "allowed in 'model.lora'"]),
        ("train.2=3", ["train.2", "unknown setting"]),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest_one(override: str, words: list[str]):
    message = refusal(override)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.num_updates=true", "train.num_updates: True is not allowed; expected an integer"),
        ("train.num_updates='4'", "train.num_updates: '4' is not allowed; expected an integer"),
        ("train.num_updates=1.5", "train.num_updates: 1.5 is not allowed; expected an integer"),
        ("train.learning_rate=yes", "train.learning_rate: True is not allowed; expected a number"),
        ("train.num_updates=null", "train.num_updates: None is not allowed; expected an integer"),
        ("train.num_updates.x=1", "train.num_updates: {'x': 1} is not allowed; expected an integer"),
        ("model.chat_template=1", "model.chat_template: 1 is not allowed; expected a boolean"),
        ("model.path=3", "model.path: 3 is not allowed; expected a string"),
        ("model.student_template.a=[1]", "model.student_template: [1] is not allowed; expected boolean or integer"),
        ("model.lora.target_modules=5", "model.lora.target_modules: 5 is not allowed; expected string or array"),
        ("model.lora=5", "model.lora: 5 is not a group of settings; allowed in it: rank, alpha"),
        ("train=3", "train: 3 is not a group of settings; allowed in it: method, num_updates"),
    ],
)
def test_an_ill_typed_setting_is_refused_with_path_value_and_type(override: str, expected: str):
    assert expected in refusal(override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("exposure.ratio_min=1.5", "exposure.ratio_min: 1.5 is not allowed; expected at least 0 and at most 1"),
        ("data.leap_probability=-0.1", "data.leap_probability: -0.1 is not allowed; expected at least 0 and at most 1"),
        ("credit.discount=0", "credit.discount: 0 is not allowed; expected above 0 and at most 1"),
        ("exposure.policy.beta1=1", "exposure.policy.beta1: 1 is not allowed; expected at least 0 and below 1"),
        ("train.num_updates=0", "train.num_updates: 0 is not allowed; expected at least 1"),
        ("train.learning_rate=.inf", "train.learning_rate: inf is not allowed; expected a finite number"),
        ("train.learning_rate=.nan", "train.learning_rate: nan is not allowed; expected a finite number"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_the_whole_range(override: str, expected: str):
    assert expected in refusal(override)


def test_a_word_that_is_none_of_the_allowed_is_refused_with_all_of_them_and_the_nearest():
    message = refusal("credit.progress_signal=probe_nil")
    assert "credit.progress_signal: 'probe_nil'" in message
    assert "'train_kl', 'probe_nll', 'probe_success', 'probe_gain', 'probe_kl' or 'train_success'" in message
    assert message.endswith("did you mean probe_nll?")


def test_every_mistake_is_listed_at_once():
    message = refusal("train.num_updates=0", "exposure.kind=learnt", "loss.clipp=none")
    assert [path for path in ("train.num_updates", "exposure.kind", "loss.clipp") if path not in message] == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["exposure.kind=replay"], "needs replay_run"),
        (["exposure.ratio_min=0.8", "exposure.ratio_max=0.2"], "ratio_min 0.8 is above ratio_max 0.2"),
        (["loss.clip=per_entry", "loss.divergence=sampled_token"], "no entries to clip"),
        (["loss.divergence=top_k", "loss.divergence.k=0"], "loss.divergence.k: 0 is not allowed; expected at least 1"),
        (["loss.divergence=jensen_shannon", "loss.divergence.teacher_weight=1"], "expected above 0 and below 1"),
        (["train.method=grpo", "train.batch_size=12"], "batch_size 12 is not a multiple of group_size 8"),
        (["train.method=grpo", "data.checker=none"], "train.method: grpo needs verified rewards"),
        (["data.checker=none", "credit.progress_signal=train_success"], "train_success needs a checker"),
        (
            ["credit.progress_signal=probe_gain", "sampling.top_p=0.9"],
            "set sampling.top_p: 1, or credit.progress",
        ),
        (
            ["exposure.kind=bandit", "credit.progress_signal=probe_gain", "sampling.top_k=20", "sampling.min_p=0.1"],
            "does not go with sampling.top_k: its importance weights",
        ),
        (["data.source=x.jsonl"], "world:a speaks only the world's language"),
        (["sampling.completion_tokens=4096"], "leaves no room for a prompt"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], expected: str):
    assert expected in refusal(*overrides)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("train: {seed: 1}\nloss: {clip: none}\ntrain: {seed: 2}\n", "line 3: the key 'train' is given twice"),
        ("train:\n  seed: 1\n  seed: 1\n", "line 3: the key 'seed' is given twice"),
        ("train: {seed: [}", "line 1: not valid YAML"),
        ("train: !!python/object/apply:os.getcwd []", "line 1: not valid YAML"),
        ("a: 2024-13-45", "not valid YAML: month must be in 1..12"),
        ("? [1]\n: 2", "line 1: a key is a word, not a sequence"),
        ("- train", "expected settings grouped by component, found list"),
        (b"train: {seed: 1} # \xff", "not UTF-8 at byte 19"),
        ("train:\n", "train: None is not a group of settings"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_line(tmp_path: Path, content: str | bytes, expected: str):
    path = tmp_path / "mine.yaml"
    message = refused_file(path, content)
    assert message.startswith(str(path))
    assert expected in message


def test_a_recipe_that_does_not_exist_is_refused_with_the_nearest_and_all_names():
    with pytest.raises(ConfigError, match=r"'mirco' is neither a file nor a recipe; did you mean micro\?; recipes: "):
        load_config("mirco")


# Overrides


@pytest.mark.parametrize("override", ["train.num_updates", "=3", "..=3", "train.=3", ""])
def test_an_override_without_path_or_value_is_refused_with_an_example(override: str):
    assert "expected a.b=value, for example --set train.num_updates=4" in refusal(override)


def test_an_override_is_read_as_yaml_and_wins_over_the_file():
    config = load_config("micro", ["train.learning_rate=1e-3", "model.student_template.enable_thinking=true"])
    assert config.train.learning_rate == 0.001
    assert config.model.student_template == {"enable_thinking": True}


def test_the_last_of_two_overrides_wins():
    assert load_config("micro", ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_an_override_opens_a_group_that_the_file_leaves_closed():
    lora = load_config("micro", ["model.lora.rank=4"]).model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha) == (4, 128)


def test_an_override_cannot_go_through_a_setting():
    assert "'seed' is a setting" in refusal("train.seed=1", "train.seed.deep=1")


def test_overrides_of_a_config_are_checked_and_leave_it_as_it_was():
    config = load_config("micro")
    assert with_overrides(config, ["train.seed=7"]).train.seed == 7
    assert config.train.seed == 0
    with pytest.raises(ConfigError, match=r"--set: train\.sed: unknown setting; did you mean seed\?"):
        with_overrides(config, ["train.sed=7"])


# Presets


@pytest.mark.parametrize("preset", ["sound", "paper"])
def test_a_preset_fills_what_is_not_written_out(preset: str):
    credit = config_from_mapping({"credit": {"preset": preset}}).credit
    assert {name: getattr(credit, name) for name in CREDIT_PRESETS[preset]} == CREDIT_PRESETS[preset]


def test_what_is_written_out_wins_over_the_preset():
    credit = config_from_mapping({"credit": {"preset": "paper", "grounding_weight": 0.5}}).credit
    assert (credit.progress_signal, credit.grounding_weight) == ("train_kl", 0.5)


def test_the_defaults_are_those_of_the_default_preset():
    assert Config().credit == config_from_mapping({"credit": {"preset": Config().credit.preset}}).credit


def test_a_preset_given_as_override_replaces_the_settings_of_the_old_one_in_a_resolved_file(tmp_path: Path):
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(load_config("micro")))
    credit = load_config(str(path), ["credit.drop=signed", "credit.preset=paper"]).credit
    assert (credit.progress_signal, credit.grounding_weight) == ("train_kl", 0.1)
    assert credit.drop == "signed"  # said on the same command line, so it stays


def test_without_a_checker_the_sound_preset_falls_back_to_the_probe_nll():
    assert load_config("micro", ["data.checker=none"]).credit.progress_signal == "probe_nll"


# To a file and back


def test_a_config_cannot_be_changed_after_loading():
    with pytest.raises(ValueError, match="frozen"):
        load_config("micro").train.seed = 3


@settings(deadline=None, max_examples=50)
@given(text=st.text(), number=st.floats(0, 1e300), words=st.lists(st.text(), max_size=2))
def test_a_dumped_config_reads_back_to_an_equal_one(text: str, number: float, words: list[str]):
    config = config_from_mapping(
        {
            "model": {"path": text, "lora": {"target_modules": words}, "student_template": {text: text}},
            "data": {"source": "x", "split_name": text},
            "train": {"learning_rate": number},
        }
    )
    assert config_from_mapping(parse_yaml(dump_config(config), "dumped")) == config


@pytest.mark.parametrize(
    "text", ["1e3", "yes", "null", "12", "2024-01-01", "0x1f", "1:30", "~", "<<", "=", " a ", "#", "\x85+", "\u2028"]
)
def test_text_that_looks_like_something_else_stays_text(text: str):
    config = config_from_mapping({"data": {"source": "x", "split_name": text}, "model": {"path": "y"}})
    assert parse_yaml(dump_config(config), "dumped")["data"]["split_name"] == text


def test_every_setting_is_described_with_its_value():
    described = {setting.path: setting for setting in describe_settings(load_config("micro"))}
    assert described["data.leap_share"].value == 0.5
    assert [path for path, setting in described.items() if len(setting.description) < 5] == []


def leaves(node: dict[str, object]) -> Iterator[object]:
    """Everything in nested mappings that is no mapping."""
    for child in node.values():
        yield from leaves(child) if isinstance(child, dict) else [child]


def test_the_settings_described_are_exactly_those_that_are_dumped():
    config = load_config("qwen3-1.7b")
    dumped = parse_yaml(dump_config(config), "dumped")
    for setting in describe_settings(config):
        *groups, leaf = setting.path.split(".")
        node = dumped
        for group in groups:
            node = node[group]
        node.pop(leaf)
    assert list(leaves(dumped)) == []


def test_reading_a_config_imports_neither_torch_nor_transformers():
    code = "import sys; from atesd.config import load_config; load_config('micro'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers", "scipy", "matplotlib"} & set(modules) == set()


@pytest.mark.parametrize("name", recipe_names())
def test_a_config_goes_to_another_process_and_back(name: str):
    config = load_config(name)
    assert pickle.loads(pickle.dumps(config)) == config
