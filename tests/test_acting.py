"""A setting that nothing reads is refused, with what would make it act; kinds replace each other; old files open."""

from pathlib import Path

import pytest

from atesd.config import (
    Config,
    acting_settings,
    config_from_mapping,
    describe_settings,
    dump_config,
    load_config,
    method_name,
    parse_yaml,
    recipe_names,
    shared_overrides,
    with_groups,
    with_overrides,
)
from atesd.config.explain import every_setting
from atesd.config.yaml import dump_yaml
from atesd.control.kinds import exposure_kinds
from atesd.errors import ConfigError, IdleSettingError
from atesd.runs import RunFolder, new_manifest

FILE = ["data.source=x.jsonl", "model.path=y"]
RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.yaml"))
KIND_SETTINGS = {"replay": ["exposure.replay_run=runs/x"], "custom": ["exposure.factory=mine:make"]}


def refusal(*overrides: str, recipe: str = "micro") -> str:
    with pytest.raises(IdleSettingError) as caught:
        load_config(recipe, overrides)
    return str(caught.value)


# What nothing would read is refused


@pytest.mark.parametrize(
    ("overrides", "path", "acts_with"),
    [
        (["exposure.reveal_ratio=0.3"], "exposure.reveal_ratio", "exposure.kind: fixed"),
        (["exposure.arms=3"], "exposure.arms", "exposure.kind: bandit"),
        (["exposure.replay_run=runs/x"], "exposure.replay_run", "exposure.kind: replay"),
        (["exposure.factory_settings.a=1"], "exposure.factory_settings", "exposure.kind: custom"),
        (["exposure.schedule_end=0.5"], "exposure.schedule_end", "exposure.kind: schedule"),
        (["exposure.ratios=[0, 1]"], "exposure.ratios", "exposure.kind: aligned"),
        (["exposure.kind=fixed", "exposure.ratio_min=0.2"], "exposure.ratio_min", "exposure.kind: annealing, bandit,"),
        (["exposure.kind=bandit", "exposure.policy.hidden=3"], "exposure.policy", "exposure.kind: learned"),
        (["exposure.kind=bandit", "exposure.granularity=update"], "exposure.granularity", "exposure.kind: aligned, an"),
        (
            ["exposure.kind=aligned", "exposure.fallback.reveal_ratio=0.5"],
            "exposure.fallback.reveal_ratio",
            "exposure.fallback.kind: fixed",
        ),
        (["exposure.kind=bandit", "exposure.reward_buffer=8"], "exposure.reward_buffer", "credit.shuffle_rewards"),
        (
            ["exposure.kind=aligned", "exposure.granularity=per_token", "exposure.smoothing=0.1"],
            "exposure.smoothing",
            "exposure.granularity: update or per_difficulty",
        ),
        (["teacher.decay=0.5"], "teacher.decay", "teacher.weights: ema"),
        (["teacher.weights=ema", "teacher.every=5"], "teacher.every", "teacher.weights: refresh"),
        (["loss.divergence.k=5"], "loss.divergence.k", "loss.divergence.kind: top_k"),
        (["loss.divergence=top_k", "loss.divergence.teacher_weight=0.3"], "loss.divergence.teacher_weight", "jensen"),
        (["loss.gate.share=0.3"], "loss.gate.share", "loss.gate.kind: random, disagreement or entropy"),
        (["loss.gate=random", "loss.gate.side=low"], "loss.gate.side", "loss.gate.kind: disagreement or entropy"),
        (["loss.clip_threshold=1"], "loss.clip_threshold", "loss.clip: per_token or per_entry"),
        (["train.method=sft", "exposure.kind=bandit"], "exposure.kind", "train.method: distill"),
        (["train.method=sft", "sampling.top_p=0.5"], "sampling.top_p", "train.method: distill or grpo"),
        (["train.method=sft", "loss.temperature=0.5"], "loss.temperature", "train.method: distill or grpo"),
        (["train.method=grpo", "teacher.weights=live"], "teacher.weights", "train.method: distill"),
        (["train.method=grpo", "loss.gate=correct"], "loss.gate.kind", "train.method: distill"),
        (["train.method=grpo", "loss.divergence=reverse_kl"], "loss.divergence.kind", "train.method: distill"),
        (["train.method=grpo", "credit.hold_updates=2"], "credit.hold_updates", "holds its ratio"),
        (["train.method=grpo", "views.answer=only"], "views.answer", "train.method: distill"),
        (["train.group_size=4"], "train.group_size", "train.method: grpo, or train.grpo_weight above 0"),
        (["loss.gate=soft", "loss.gate.beta=2"], "loss.gate.beta", "loss.gate.kind: sdar"),
        (["exposure.kind=full", "credit.hold_updates=2"], "credit.hold_updates", "learned, bandit, random"),
        (["exposure.kind=full", "credit.preset=paper"], "credit.preset", "exposure.kind: learned or bandit"),
        (["exposure.kind=random", "credit.lookahead_updates=8"], "credit.lookahead_updates", "exposure that decides"),
        (["credit.grounding=withheld"], "credit.grounding", "credit.grounding_weight above 0"),
        (["credit.mixing=standardised"], "credit.mixing", "credit.grounding_weight above 0"),
        (["credit.probe_ratio=0.5"], "credit.probe_ratio", "credit.progress_signal: probe_kl"),
        (["credit.discount=0.5"], "credit.discount", "several measurements in a window"),
        (["credit.probe_every=4"], "credit.probe_every", "fewer updates than credit.lookahead_updates"),
        (["credit.preset=paper", "credit.probe_every=2"], "credit.probe_every", "progress_signal that is probed"),
        (
            ["exposure.kind=setpoint", "credit.shuffle_rewards=true"],
            "credit.shuffle_rewards",
            "control_share or custom",
        ),
        (["alignment.min_correct=3"], "alignment.min_correct", "exposure.kind: aligned, or loss.gate: aligned or soft"),
        ([*FILE, "data.leap_share=0.5"], "data.leap_share", "data.source: world"),
        ([*FILE, "data.unknown_facts=1"], "data.unknown_facts", "data.source: world"),
        ([*FILE, "data.max_difficulty=3"], "data.max_difficulty", "data.source: world or arithmetic"),
        ([*FILE, "data.seed=1"], "data.seed", "data.source: world, arithmetic or gsm_symbolic"),
        ([*FILE, "data.split_name=dev"], "data.split_name", "a `datasets` id"),
        ([*FILE, "data.subset=main"], "data.subset", "a `datasets` id"),
        (["data.leap_probability=0.2", "data.leap_share=1"], "data.leap_share", "data.leap_probability: null"),
        (["data.columns.id=number"], "data.columns.id", "a file or data set"),
        (["data.preset=deepmath"], "data.preset", "a data.source that is a file or data set"),
        (["data.segmenter=line"], "data.segmenter", "a data.source other than world"),
        (["views.instruction=Go."], "views.instruction", "a data.source other than world"),
        ([*FILE, "views.wording=constant", "views.partial_note=x"], "views.partial_note", "views.wording: adaptive"),
        (["model.revision=main"], "model.revision", "a model.path on the hub"),
        (["train.evaluate_every=0", "train.log_samples=4"], "train.log_samples", "train.evaluate_every above 0"),
        (
            ["exposure.kind=full", "train.micro_batch_tokens=99", "train.micro_batch_size=2"],
            "train.micro_batch_size",
            "train.micro_batch_tokens: null",
        ),
        (["evaluation.temperature=0", "evaluation.top_k=5"], "evaluation.top_k", "evaluation.temperature above 0"),
        (["data.checker=none", "evaluation.samples=4"], "evaluation.samples", "a data.checker other than none"),
    ],
)
def test_a_setting_without_effect_is_refused_with_what_would_make_it_act(
    overrides: list[str], path: str, acts_with: str
):
    message = refusal(*overrides)
    assert message.startswith(f"micro: {path}: ")
    assert acts_with in message
    assert "no effect" in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["exposure.kind=fixed", "exposure.reveal_ratio=0.3"],
        ["exposure.kind=random", "credit.hold_updates=2"],
        ["exposure.kind=full", "loss.gate=aligned", "credit.hold_updates=2", "alignment.min_correct=1"],
        ["credit.probe_every=2", "credit.discount=0.5"],
        ["credit.lookahead_updates=8", "credit.discount=0.5"],  # a probe at every hold of 4 lies inside the window
        ["credit.preset=paper", "credit.discount=0.5", "credit.mixing=standardised", "credit.grounding=withheld"],
        ["exposure.kind=bandit", "credit.mixing=standardised", "exposure.reward_buffer=8"],
        ["train.grpo_weight=1", "train.group_size=4"],
        ["train.micro_batch_tokens=99", "train.micro_batch_size=2"],  # probes are scored by rows
        ["data.leap_probability=0.2"],
        ["loss.divergence=top_k"],
        ["loss.gate=entropy"],
        ["loss.gate=influence", "loss.gate.scale=0.2", "loss.gate.permute=true"],
        ["train.method=grpo", "train.baseline=difficulty"],
        ["loss.gate.share=0.3", "loss.gate=random"],
        ["exposure.fallback=fixed", "exposure.kind=aligned", "exposure.fallback.reveal_ratio=0.5"],
    ],
)
def test_what_acts_is_accepted_in_any_order(overrides: list[str]):
    assert load_config("micro", overrides) == load_config("micro", overrides[::-1])


@pytest.mark.parametrize(
    ("text", "path", "acts_with"),
    [
        ("exposure: {kind: full, arms: 3}", "exposure.arms", "exposure.kind: bandit"),
        ("exposure: {kind: full}\ncredit: {preset: paper}", "credit.preset", "exposure that decides"),
        ("train: {method: sft}\nteacher: {weights: ema}", "teacher.weights", "train.method: distill"),
    ],
)
def test_a_file_is_checked_as_the_command_line_is(tmp_path: Path, text: str, path: str, acts_with: str):
    (tmp_path / "mine.yaml").write_text(text)
    for overrides in ([], ["train.seed=1"]):
        message = refusal(*overrides, recipe=str(tmp_path / "mine.yaml"))
        assert f"{path}: " in message
        assert acts_with in message


def test_what_does_not_act_is_neither_described_nor_dumped():
    full = load_config("micro", ["exposure.kind=full"])
    paths = {setting.path for setting in describe_settings(full)}
    assert {path for path in paths if path.startswith(("credit.", "exposure."))} == {
        "exposure.kind",
        "exposure.reference_ablation",
    }
    assert acting_settings(full)["exposure"] == {"kind": "full", "reference_ablation": "off"}
    assert "credit" not in parse_yaml(dump_config(full), "dumped")


# A kind takes the place of the one before


def test_another_exposure_replaces_what_belongs_to_the_one_of_the_file():
    bandit = "exposure: {kind: bandit, arms: 3, ratio_max: 0.9, reference_ablation: filler}\ncredit: {probe_every: 2}"
    values = parse_yaml(bandit, "bandit")
    config = with_overrides(config_from_mapping(values), ["exposure.kind=setpoint"])
    assert acting_settings(config)["exposure"] == {
        "kind": "setpoint",
        "reference_ablation": "filler",
        "ratio_min": 0.0,
        "ratio_max": 0.9,
        "target_kl": None,
        "gain": 0.1,
        "start": 0.5,
    }
    assert config.credit.probe_every == 2
    full = with_overrides(config_from_mapping(values), ["exposure.kind=full"])
    assert "credit" not in acting_settings(full)


def test_the_same_kind_once_more_replaces_nothing():
    assert load_config("smollm2-sums", ["exposure.kind=aligned"]) == load_config("smollm2-sums")


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize(
    "overrides", [["exposure.kind=full"], ["train.method=grpo", "train.group_size=4"], ["train.method=sft"]]
)
def test_the_baselines_of_every_recipe_need_only_their_names(recipe: str, overrides: list[str]):
    config = load_config(recipe, overrides)
    assert config_from_mapping(parse_yaml(dump_config(config), "dumped")) == config


def test_what_several_runs_share_is_left_out_where_nothing_reads_it():
    shared = ["train.seed=1", "credit.hold_updates=2", "exposure.policy.hidden=3"]
    assert shared_overrides("micro", shared, ["exposure.kind=full"]) == ["train.seed=1"]
    assert shared_overrides("micro", shared, ["exposure.kind=random"]) == shared[:2]
    assert shared_overrides("micro", shared, []) == shared


def test_groups_in_place_of_others_take_along_what_acted_with_them():
    groups = {"model": {"path": "y"}, "data": {"source": "x"}}
    rest = {name: group for name, group in acting_settings(load_config("micro")).items() if name not in groups}
    assert with_groups(load_config("micro", ["data.seed=3"]), groups, "new") == config_from_mapping({**rest, **groups})


# To a file and back


@pytest.mark.parametrize("kind", exposure_kinds())
@pytest.mark.parametrize("more", [[], ["teacher.weights=ema", "loss.divergence=top_k", "loss.gate=entropy"]])
def test_every_kind_goes_to_a_file_and_back(kind: str, more: list[str], tmp_path: Path):
    config = load_config("micro", [f"exposure.kind={kind}", *KIND_SETTINGS.get(kind, []), *more])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("kind", exposure_kinds())
def test_every_kind_has_a_label_and_documents_its_settings(kind: str):
    config = load_config("micro", [f"exposure.kind={kind}", *KIND_SETTINGS.get(kind, [])])
    assert method_name(config)
    assert [setting.path for setting in describe_settings(config) if len(setting.description) < 5] == []


def test_every_path_that_is_described_is_one_that_a_message_may_name():
    assert {setting.path for setting in describe_settings(Config())} <= set(every_setting())


# Files of earlier versions


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_config_of_the_flat_layout_opens_and_goes_on_in_the_present_one(path: Path, tmp_path: Path):
    config = load_config(str(path))
    assert config_from_mapping(parse_yaml(dump_config(config), "dumped")) == config
    run = RunFolder.create(tmp_path / "run", config, new_manifest(config, data_fingerprint="a", command=["atesd"]))
    (run.path / "config.yaml").write_text(path.read_text())
    assert run.check_config(config) == []
    run.begin_session(config, command=["atesd"], updates_done=0)
    assert (run.path / "config.yaml").read_text() == dump_config(config)


@pytest.mark.parametrize("layout", ["flat", "present"])
def test_a_recorded_sampled_token_keeps_the_clip_that_its_run_had(layout: str, tmp_path: Path):
    clip = {"divergence": "sampled_token", "clip": "per_token", "clip_threshold": 2.0}
    recorded = parse_yaml(RECORDED[0].read_text(), "recorded") if layout == "flat" else acting_settings(Config())
    (tmp_path / "config.yaml").write_text(dump_yaml({**recorded, "loss": {**recorded["loss"], **clip}}))
    loss = load_config(str(tmp_path / "config.yaml")).loss
    assert (loss.divergence.kind, loss.clip, loss.threshold) == ("sampled_token", "per_token", 2.0)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("full", ["exposure.kind=full", "exposure.reference_ablation=shuffled", "teacher.weights=refresh",
                  "teacher.every=7", "loss.gate=aligned", "alignment.success=centred"]),
        ("fixed", ["exposure.kind=fixed", "exposure.reveal_ratio=0.3", "teacher.weights=ema", "teacher.decay=0.98",
                   "loss.gate=random", "loss.gate.share=0.55"]),
        ("random", ["exposure.kind=random", "exposure.granularity=per_problem", "loss.divergence=top_k",
                    "loss.divergence.k=5", "credit.hold_updates=3"]),
        ("schedule", ["exposure.kind=schedule", "exposure.schedule=cosine", "loss.divergence=jensen_shannon",
                      "loss.divergence.teacher_weight=0.25", "teacher.weights=live"]),
        ("replay", ["exposure.kind=replay", "exposure.replay_run=runs/x", "exposure.replay_order=shuffled"]),
        ("learned", ["credit.preset=paper", "exposure.policy.learning_rate=0", "exposure.ratio_max=0.9",
                     "model.lora={rank: 2, alpha: 4}"]),
        ("aligned", ["exposure.kind=aligned", "exposure.ratios=[0, 0.5, 1]", "exposure.fallback=fixed",
                     "exposure.fallback.reveal_ratio=0.4", "alignment.min_correct=3",
                     "exposure.granularity=per_token"]),
        ("bandit", ["exposure.kind=bandit", "exposure.arms=3", "exposure.discount=0.9", "credit.shuffle_rewards=true",
                    "exposure.reward_buffer=6"]),
        ("setpoint", ["exposure.kind=setpoint", "exposure.start=0.25", "exposure.target_kl=0.1"]),
        ("per_problem", ["exposure.kind=staircase", "exposure.start=0.75", "exposure.step_solved=0.2"]),
        ("custom", ["exposure.kind=custom", "exposure.factory=halving:make", "exposure.factory_settings.step=0.2"]),
        ("grpo", ["train.method=grpo", "train.group_size=4"]),
        ("sft", ["train.method=sft"]),
    ],
)  # fmt: skip
def test_a_recorded_config_is_what_the_same_settings_are_now(name: str, overrides: list[str]):
    recorded = Path(__file__).parent / "recorded" / f"{name}.yaml"
    assert load_config(str(recorded)) == load_config("micro", overrides)


def test_a_recorded_config_takes_overrides_of_the_present_layout():
    recorded = str(Path(__file__).parent / "recorded" / "bandit.yaml")
    assert load_config(recorded, ["exposure.kind=full"]) == load_config("micro", ["exposure.kind=full"])
    assert load_config(recorded, ["exposure.arms=7"]).exposure.arms == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bandit: {arms: 3}", "bandit.arms: unknown setting; it is now exposure.arms, which exposure.kind: bandit"),
        ("policy: {hidden: 3}", "it is now exposure.policy.hidden, which exposure.kind: learned reads"),
        ("aligned: {min_correct: 3}", "aligned.min_correct: unknown setting; it is now alignment.min_correct"),
        ("aligned: {ratios: [0, 1]}", "it is now exposure.ratios, which exposure.kind: aligned reads"),
        ("search: {start: 0.3}", "it is now exposure.start"),
        ("exposure: {control: none}", "exposure.control: unknown setting; it is now exposure.reference_ablation"),
        ("loss: {token_gate: random}", "loss.token_gate: unknown setting; it is now loss.gate"),
        ("loss: {top_k: 5}", "it is now loss.divergence.k, which loss.divergence.kind: top_k reads"),
        ("teacher: {weights: ema, ema_decay: 0.5}", "it is now teacher.decay, which teacher.weights: ema reads"),
        ("model: {lora: {dropout: 0.1}}", "model.lora.dropout: unknown setting; it never acted"),
    ],
)
def test_a_file_of_ones_own_in_the_former_layout_is_told_the_new_path(tmp_path: Path, text: str, said: str):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "mine.yaml"))
    assert said in str(caught.value)
