"""The packaged recipes: all of them load, and each is what its name says."""

from pathlib import Path

import pytest

from atesd.config import (
    Config,
    CreditConfig,
    PolicyConfig,
    config_from_mapping,
    load_config,
    parse_yaml,
    recipe_names,
    recipe_text,
)
from atesd.control.learned import LearnedSettings
from atesd.data.benchmarks import family_of
from atesd.data.views import shown_segments
from atesd.engine.builtin import BuiltinEngine
from atesd.engine.factory import engine_for, engine_note
from atesd.models.load import load_model
from atesd_lab.audit.audit import budget_of
from atesd_lab.paper.numbers import paper_numbers
from tiny import tiny_folder

MICRO = ("micro", "micro-opsd", "micro-steps", "micro-paper", "micro-bandit")
# arXiv 2601.18734 (third version) and its repository's README
OPSD = {
    "exposure of the baseline": "full",
    "divergence": "forward_kl",
    "clip": "per_entry",
    "learning_rate": 5.0e-6,
    "max_grad_norm": 0.1,
    "lora": (64, 128),
    "batch": 32,
    "completion_tokens": 1024,
    "rollouts": (1.1, 0.95, 20),
    "updates": 100,
    "checkpoint_every": 25,
    "teacher": "frozen",
    "thinking": (False, True),  # our recipes align both ends; one --set gives OPSD's
    "evaluation": (1.0, 38912, 12),
}


def opsd_settings(config: Config) -> dict[str, object]:
    assert config.model.lora is not None
    return {
        "exposure of the baseline": config.exposure.kind,
        "divergence": config.loss.divergence.kind,
        "clip": config.loss.clip,
        "learning_rate": config.train.learning_rate,
        "max_grad_norm": config.train.max_grad_norm,
        "lora": (config.model.lora.rank, config.model.lora.alpha),
        "batch": config.train.batch_size,
        "completion_tokens": config.sampling.completion_tokens,
        "rollouts": (config.sampling.temperature, config.sampling.top_p, config.sampling.top_k),
        "updates": config.train.num_updates,
        "checkpoint_every": config.train.checkpoint_every,
        "teacher": config.teacher.weights,
        "thinking": (
            config.model.student_template["enable_thinking"],
            config.model.teacher_template["enable_thinking"],
        ),
        "evaluation": (
            config.evaluation.temperature,
            config.evaluation.completion_tokens,
            config.evaluation.samples,
        ),
    }


def test_the_recipes_are_those_of_the_readme():
    qwen3 = {"qwen3-1.7b", "qwen3-1.7b-paper", "qwen3-4b", "qwen3-8b"}
    assert set(recipe_names()) == {*MICRO, "micro-words", "smollm2-gsm", "smollm2-sums", *qwen3}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_loads_and_begins_with_a_comment_that_says_what_it_is(name: str):
    load_config(name)
    assert recipe_text(name).startswith("# ")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_few_lines_over_the_defaults(name: str):
    lines = [line for line in recipe_text(name).splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 20


def test_the_paper_s_recipe_holds_what_the_papers_print_and_the_paper_s_reward():
    config = load_config("qwen3-1.7b-paper")
    assert opsd_settings(config) == {**OPSD, "exposure of the baseline": "learned"}
    assert config.loss.reduction == "sequence"  # the equation
    paper = CreditConfig(preset="paper")
    assert config.credit == paper
    assert (paper.progress_signal, paper.drop, paper.grounding) == ("train_kl", "positive", "answer")
    assert config.exposure == LearnedSettings(policy=PolicyConfig(importance_cap=None))


def test_every_setting_that_the_record_of_the_papers_has_is_in_the_paper_s_recipe():
    config, record = load_config("qwen3-1.7b-paper"), paper_numbers()["opsd"]
    lora, sampling, train = config.model.lora, config.sampling, config.train
    assert lora is not None
    assert record["recipe"] == {
        "divergence": config.loss.divergence.kind,
        "clip": f"{config.loss.clip} {config.loss.threshold:g} (8B 0.06)",
        "learning_rate": train.learning_rate,
        "max_grad_norm": train.max_grad_norm,
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "batch": train.batch_size,
        "completion_tokens": sampling.completion_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "updates": train.num_updates,
        "checkpoint_every": train.checkpoint_every,
        "teacher": f"{config.teacher.weights} initial policy",
        "student_thinking": config.model.student_template["enable_thinking"],
        "teacher_thinking": config.model.teacher_template["enable_thinking"],
    }
    evaluation = {
        "temperature": config.evaluation.temperature,
        "new_tokens": config.evaluation.completion_tokens,
        "samples": config.evaluation.samples,
    }
    assert evaluation.items() <= record["evaluation"].items()
    # Thinking belongs to an evaluation of its own: the recipe scores nothing on the way, and says how.
    assert (config.data.validation_size, config.data.test_size) == (0, 0)
    assert "--benchmark aime24,aime25,hmmt-feb25" in recipe_text("qwen3-1.7b-paper")
    family = family_of(config.model.path)
    assert family is not None
    assert family.thinking == "enable_thinking"


@pytest.mark.parametrize(("size", "threshold"), [("1.7b", 0.05), ("4b", 0.05), ("8b", 0.06)])
def test_the_qwen_recipes_hold_the_published_settings_of_opsd(size: str, threshold: float):
    config = load_config(f"qwen3-{size}", ["exposure.kind=full", "model.teacher_template.enable_thinking=true"])
    assert opsd_settings(config) == OPSD
    assert config.loss.threshold == threshold
    assert config.model.path == f"Qwen/Qwen3-{size.upper()}"
    assert (config.data.source, config.data.preset) == ("siyanzhao/Openthoughts_math_30k_opsd", "openthoughts-opsd")
    assert config.loss_temperature == config.sampling.temperature  # both logits are divided by it
    assert config.exposure.reference_ablation == "off"


@pytest.mark.parametrize("size", ["1.7b", "4b", "8b"])
def test_the_contexts_of_the_qwen_recipes_end_alike(size: str):
    # Where they do not, the first tokens disagree by template; OPSD's own setting is the override above.
    model = load_config(f"qwen3-{size}").model
    assert model.student_template == model.teacher_template == {"enable_thinking": False}


@pytest.mark.parametrize("size", ["1.7b", "4b", "8b"])
def test_the_budget_of_a_qwen_recipe_suffices_by_the_audit(size: str):
    config = load_config(f"qwen3-{size}")
    assert config.exposure.kind == "learned"
    assert budget_of(config).verdict == "sound"


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("qwen3")])
def test_the_evaluation_of_a_qwen_recipe_fits_into_its_window(name: str):
    config = load_config(name)
    assert config.evaluation_tokens + 1024 <= config.model.max_context_tokens <= 40960  # Qwen3's window


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_qwen_recipes_differ_in_model_and_threshold_alone(size: str):
    smallest, other = (parse_yaml(recipe_text(f"qwen3-{name}"), name) for name in ("1.7b", size))
    for values in (smallest, other):
        values["model"].pop("path")
        values["loss"].pop("clip_threshold")
    assert smallest == other


def test_the_micro_recipes_differ_from_micro_in_one_thing_each():
    values = parse_yaml(recipe_text("micro"), "micro")
    changes = {
        "micro-opsd": {"exposure": {"kind": "full"}},
        "micro-steps": {"data": {"source": "world", "leap_share": 0.0}},
        "micro-paper": {"credit": {"preset": "paper"}},
    }
    for name, change in changes.items():
        assert load_config(name) == config_from_mapping({**values, **change})


def test_micro_is_the_leap_world_with_the_learned_exposure_and_the_sound_reward():
    config = load_config("micro")
    assert (config.data.source, config.data.leap_share) == ("world", 0.5)
    assert (config.exposure.kind, config.credit.preset) == ("learned", "sound")
    assert config.train.threads == 1  # part of bit-exactness


def test_smollm2_is_trained_with_an_adapter_a_chat_template_and_verified_answers():
    config = load_config("smollm2-gsm")
    assert (config.model.path, config.data.source, config.checker) == ("smollm2", "gsm_symbolic", "math")
    assert config.model.lora is not None
    assert config.model.chat_template


def test_the_sums_show_every_ratio_of_their_look_ahead_another_view():
    config = load_config("smollm2-sums")
    assert (config.data.source, config.checker, config.data.max_difficulty) == ("arithmetic", "exact", 3)
    assert [shown_segments(ratio, 3) for ratio in config.exposure.ratios] == [0, 1, 2, 3]


def test_the_word_problems_are_those_that_their_model_was_taught_in_the_contexts_that_it_was_taught():
    config = load_config("micro-words")
    assert (config.data.source, config.data.templates, config.data.segmenter) == ("gsm_symbolic", "short", "line")
    assert config.model.path == "words:a"


STAND_INS = {"Qwen/": "qwen3", "smollm2": "llama", "runs/smollm2-sums-start/": "llama"}
"""The architecture behind a path that the hub, a fetch or a run of yours fills; the others come with the code."""


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_gets_the_builtin_engine(name: str, tmp_path: Path):
    config = load_config(name)
    found = [architecture for start, architecture in STAND_INS.items() if config.model.path.startswith(start)]
    assert bool(found) is not config.model.path.startswith(("world:", "words:"))
    path = str(tiny_folder(tmp_path / "model", architecture=found[0])) if found else config.model.path
    loaded = load_model(config.model.model_copy(update={"path": path, "device": "cpu"}))
    assert type(engine_for(loaded, config.sampling.engine, config.sampling.batch_size)) is BuiltinEngine
    assert engine_note(loaded, config.sampling.engine) is None
