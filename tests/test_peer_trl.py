"""Full exposure beside a peer: the loss and the gradients of TRL 1.16's SDFT trainer, to 1e-5.

TRL trains a tiny model for three updates through its own `train()`: its prompts, its generation, its teacher and the
teacher's prompts, its loss, its gradient accumulation. A callback keeps of every update the weights before it, the
token ids, the loss that TRL logs, and the gradients that its optimiser receives. Of all this our side is given the
weights and the completion ids; prompts, views, teacher, loss and micro-batches are its own, made from a `Config`.

What TRL has to be told, so that both do the same work:
- `distillation_mode="full_logits"`, with `distillation_alpha` 0 for forward KL, 1 for reverse KL, and in between the
  teacher's share of the generalised Jensen-Shannon mixture, our `loss.divergence.teacher_weight`;
- `teacher_model_kind="base"`: the weights as they were loaded; with LoRA, the adapter off. Our `frozen`;
- `distillation_is_clip=None`: a clip of importance ratios, unrelated to `loss.clip`; it would not act here anyway;
- `bf16=False` and `max_grad_norm=0`: its defaults are bfloat16 autocast and a clipped gradient;
- `max_prompt_length=None`: it would cut a long prompt from the left, where we never cut a problem.

Where the two differ, and no setting makes them equal:
- TRL averages over each sequence, then over the rows: our `sequence`. Our `token` it only logs, as a metric.
- Its top-k takes the student's largest entries, ours the teacher's: two objectives.
- It pads prompts on the left and gives no position ids. Rotary models do not notice (up to rounding); a model with
  learned absolute positions would.
- Its teacher prompt is a template around the student's whole message. `views.instruction`, which closes both of our
  messages, has to be empty or to be part of `views.problem_text`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from torch import Tensor
from transformers import TrainerCallback

from atesd.build import objective
from atesd.config import (
    Config,
    FixedSettings,
    FullSettings,
    LiveTeacher,
    LoraConfig,
    LossConfig,
    ModelConfig,
    SamplingConfig,
    ViewsConfig,
)
from atesd.control.factory import make_exposure
from atesd.data.views import TextRenderer
from atesd.models.load import load_model, save_model
from atesd.models.prompts import PromptEncoder
from atesd.models.score import Scorer
from atesd.models.teacher import Teacher
from atesd.models.weights import ReplicatedWeights
from atesd.records import Problem
from atesd.train.update import Example, StepMeters
from atesd.train.views import TeacherPrompts
from tiny import tiny_model
from updates import distill

pytestmark = [
    pytest.mark.peer,
    # TRL says of the whole of trl.experimental that it may change; the version is pinned.
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
    # TRL 1.16 uses the name that transformers 5.23 has for activation checkpointing until version 6.
    pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning"),
]

PROBLEMS = (
    Problem("sum", "What is 2 + 3 + 4?", ("First 2 + 3 = 5.\n", "Then 5 + 4 = 9.\n"), r"So \boxed{9}.", "9"),
    Problem("short", "1 + 1 = ?", (), r"\boxed{2}", "2"),
    Problem("long", "Anna has 7 pens.\nShe loses 3. How many?", ("7 - 3\n\n", "is 4.\n\n"), r"\boxed{4}", "4"),
    Problem("product", "6 * 7?", ("6 * 7 = 42, ", "checked twice. "), r"It is \boxed{42}.", "42"),
)
SAMPLES, UPDATES = 2, 3

TRL_WORDING = ViewsConfig(problem_text="{problem}", instruction="", reference_begin="", reference_end="", transition="")
OUR_WORDING = ViewsConfig(problem_text="Problem: {problem}\n\nAnswer inside \\boxed{{}}.", instruction="")

FORWARD = {"kind": "forward_kl"}
CASES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "lora": {"lora": LoraConfig(rank=4, alpha=8)},
    "our_wording": {"views": OUR_WORDING},
    "reverse_kl": {"divergence": {"kind": "reverse_kl"}},
    "jensen_shannon": {"divergence": {"kind": "jensen_shannon", "teacher_weight": 0.3}},
    "one_micro_batch": {"micro_batches": 1},
}


@dataclass
class PeerUpdate:
    """One update of TRL's trainer."""

    weights: dict[str, Tensor]
    rows: list[Example] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    loss: float = 0.0
    token_mean: float = 0.0


@dataclass(frozen=True)
class Run:
    """What TRL did, and the config under which we claim to do the same."""

    config: Config
    updates: list[PeerUpdate]


RunOf = Callable[[str], Run]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """Trains each case with TRL once, on a tiny Qwen3 whose tokens are single characters: no space is hidden."""
    folder = tmp_path_factory.mktemp("peer")
    loaded = tiny_model(list(string.printable))
    loaded.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    save_model(loaded, folder / "model")

    @cache
    def run(case: str) -> Run:
        arguments = dict(CASES[case])
        micro_batches = arguments.pop("micro_batches", 2)
        config = peer_config(folder / "model", **arguments)
        return Run(config, train_with_trl(config, micro_batches, folder / case))

    return run


def peer_config(
    model: Path, divergence: Any = FORWARD, lora: LoraConfig | None = None, views: ViewsConfig = TRL_WORDING
) -> Config:
    """Full exposure, forward KL over the whole vocabulary, no clip."""
    return Config(
        model=ModelConfig(path=str(model), lora=lora),
        views=views,
        exposure=FullSettings(),
        loss=LossConfig(divergence=divergence, clip="none", reduction="sequence"),
        sampling=SamplingConfig(temperature=1.3, completion_tokens=60),
    )


def train_with_trl(config: Config, micro_batches: int, out: Path) -> list[PeerUpdate]:
    """The same work as `config`, done by TRL."""
    sdft = pytest.importorskip("trl.experimental.sdft", reason="needs the extra `trl`")
    from datasets import Dataset
    from peft import LoraConfig as PeftLora

    arguments = sdft.SDFTConfig(
        distillation_mode="full_logits",
        distillation_alpha={"forward_kl": 0.0, "reverse_kl": 1.0}.get(
            config.loss.divergence.kind, config.loss.divergence.parameter
        ),
        distillation_is_clip=None,
        teacher_model_kind="base",
        teacher_prompt_template=teacher_template(config.views),
        temperature=config.sampling.temperature,
        max_prompt_length=None,
        max_completion_length=config.sampling.completion_tokens,
        num_generations=SAMPLES,
        shuffle_dataset=False,
        per_device_train_batch_size=SAMPLES * len(PROBLEMS) // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_steps=UPDATES,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        output_dir=str(out),
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    messages = TextRenderer(config.views)
    rows = [
        {"prompt": [{"role": "user", "content": messages.student(p)}], "privileged_context": p.reference}
        for p in PROBLEMS
    ]
    lora, witness = config.model.lora, Witness()
    sdft.SDFTTrainer(
        model=config.model.path,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        callbacks=[witness],
        peft_config=lora and PeftLora(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear"),
    ).train()
    return witness.updates


def teacher_template(views: ViewsConfig) -> str:
    """Our teacher's message as TRL's template; with `TRL_WORDING` it is TRL's default."""
    reference = views.reference_begin + "{privileged_context}" + views.reference_end
    return "\n\n".join(part for part in ("{prompt}", reference, views.transition) if part)


class Witness(TrainerCallback):
    """Writes down every update as TRL goes through it."""

    def __init__(self) -> None:
        self.updates: list[PeerUpdate] = []

    def on_step_begin(self, *_: Any, **parts: Any) -> None:
        self.updates.append(PeerUpdate({name: p.detach().clone() for name, p in trained_by(parts["model"])}))

    def on_self_distillation_batch_prepared(self, **parts: Any) -> None:
        self.updates[-1].rows = unpadded(parts, parts["processing_class"].pad_token_id)

    def on_pre_optimizer_step(self, *_: Any, **parts: Any) -> None:
        self.updates[-1].gradients = {name: p.grad.clone() for name, p in trained_by(parts["model"])}

    def on_log(self, *_: Any, **parts: Any) -> None:
        logs = parts["logs"]
        if "loss" in logs:
            self.updates[-1].loss, self.updates[-1].token_mean = logs["loss"], logs["sdft/distillation_loss"]


def trained_by(model: Any) -> list[tuple[str, Any]]:
    """The parameters that TRL's optimiser moves, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def unpadded(batch: Mapping[str, Tensor], pad_id: int) -> list[Example]:
    """TRL's batch row by row. No prompt holds the pad token itself."""
    tokens = batch["completion_ids"].shape[1]
    rows = []
    for student, teacher, mask in zip(
        batch["prompt_ids"], batch["teacher_input_ids"], batch["teacher_attention_mask"].bool(), strict=True
    ):
        prompt, completion = teacher[:-tokens][mask[:-tokens]], teacher[-tokens:][mask[-tokens:]]
        rows.append(
            Example(tuple(student[student != pad_id].tolist()), tuple(completion.tolist()), tuple(prompt.tolist()))
        )
    return rows


def our_rows(config: Config, completions: Sequence[tuple[int, ...]]) -> list[Example]:
    """The rows of an update by our own prompts and views, for these completions."""
    encoder = PromptEncoder(load_model(config.model).tokenizer, config.model)
    renderer, exposure = TextRenderer(config.views), make_exposure(config, UPDATES, 0)
    prompts = TeacherPrompts(config, encoder, renderer, PROBLEMS)
    problems = [problem for problem in PROBLEMS for _ in range(SAMPLES)]
    rows = []
    for problem, completion in zip(problems, completions, strict=True):
        context = prompts.view(problem, exposure.reveal_ratio(0, "")).context
        rows.append(Example(encoder.student(renderer.student(problem)), completion, context))
    return rows


def our_step(config: Config, update: PeerUpdate) -> tuple[StepMeters, dict[str, Tensor]]:
    """Loss and gradients of our step from the weights that TRL's student had, in micro-batches of three rows."""
    loaded = load_model(config.model)
    teacher, trained = Teacher(ReplicatedWeights(loaded.model), config.teacher), ReplicatedWeights(loaded.model).trained
    assert trained.keys() == update.weights.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(update.weights[name])
    rows, reduction = our_rows(config, [row.completion for row in update.rows]), config.loss.reduction
    meters = distill(
        Scorer(loaded), teacher, rows, objective(config), reduction=reduction, micro_batch_size=3, chunk_tokens=16
    )
    return meters, {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest distance of two gradients of one parameter, relative to that gradient; their norms are below 1.3."""
    assert ours.keys() == theirs.keys()
    tiny = torch.finfo(torch.float32).tiny  # LoRA's A has no gradient while B is zero
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=tiny)) for name in theirs)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_trl(run_of: RunOf, case: str) -> None:
    run = run_of(case)
    assert len(run.updates) == UPDATES
    for update in run.updates:
        meters, gradients = our_step(run.config, update)
        assert meters.loss == pytest.approx(update.loss, rel=1e-5, abs=0)
        assert difference(gradients, update.gradients) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_full_exposure_is_trls_teacher_prompt_id_by_id(run_of: RunOf, case: str) -> None:
    run = run_of(case)
    for update in run.updates:
        assert our_rows(run.config, [row.completion for row in update.rows]) == update.rows


def test_the_template_of_the_plain_wording_is_trls_default() -> None:
    sdft = pytest.importorskip("trl.experimental.sdft", reason="needs the extra `trl`")
    assert teacher_template(TRL_WORDING) == sdft.SDFTConfig.teacher_prompt_template


def test_our_token_reduction_is_the_mean_that_trl_logs(run_of: RunOf) -> None:
    # TRL logs the token mean of each micro-batch, averaged; with one micro-batch that is the mean over all tokens.
    run = run_of("one_micro_batch")
    config = changed(run.config, "loss", {"reduction": "token"})
    for update in run.updates:
        assert our_step(config, update)[0].loss == pytest.approx(update.token_mean, rel=1e-5, abs=0)


def test_the_rollouts_are_uneven_and_some_are_truncated(run_of: RunOf) -> None:
    rows = run_of("forward_kl").updates[-1].rows
    lengths = [len(row.completion) for row in rows]
    assert len(set(lengths)) > 3
    assert {row.completion[-1] == 1 for row in rows} == {True, False}  # 1: the end token, inside the loss


@pytest.mark.parametrize(
    ("component", "settings"),
    [
        ("loss", {"temperature": 1.25}),
        ("loss", {"reduction": "token"}),
        ("loss", LossConfig(divergence="reverse_kl", clip="none")),
        ("loss", {"clip": "per_entry"}),
        ("teacher", LiveTeacher()),
        ("views", {"reference_begin": " "}),
        ("exposure", FixedSettings(reveal_ratio=0.5)),
    ],
)
def test_any_other_setting_would_be_noticed(run_of: RunOf, component: str, settings: Any) -> None:
    run = run_of("forward_kl")
    update = run.updates[-1]  # by now student and teacher have different weights
    meters, gradients = our_step(changed(run.config, component, settings), update)
    assert abs(meters.loss / update.loss - 1) > 1e-3
    assert difference(gradients, update.gradients) > 1e-2


def changed(config: Config, component: str, settings: Any) -> Config:
    """The config with one component replaced, or some settings of it."""
    whole = getattr(config, component).model_copy(update=settings) if isinstance(settings, dict) else settings
    return config.model_copy(update={component: whole})
