"""Every setting: name, default, unit, range, origin. Load YAML, apply overrides, dump what was resolved.

Origins: "paper" is ATESD (arXiv 2605.11458), "OPSD" is arXiv 2601.18734 (third version), "ours" means that the paper
does not say and we chose. Each default is stated once, here. Nothing writes to a config after loading. This module
imports neither torch nor transformers, so that a mistake in a config is reported at once.
"""

from __future__ import annotations

import difflib
import importlib.resources
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator

from atesd.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
ProgressSignal = Literal["train_kl", "probe_nll", "probe_success", "probe_gain", "probe_kl", "train_success"]
Granularity = Literal["update", "per_difficulty", "per_problem", "per_token"]
ExposureKind = Literal[
    "full",
    "fixed",
    "random",
    "schedule",
    "replay",
    "learned",
    "aligned",
    "bandit",
    "setpoint",
    "per_problem",
    "custom",
]


class Component(BaseModel):
    """A group of settings that one part of the program reads. Frozen; an unknown key is an error.

    Strict: true is not 1, "4" is not 4; an integer is a number. No setting is infinite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, strict=True, allow_inf_nan=False)


class LoraConfig(Component):
    """Low-rank adapters (PEFT). The frozen teacher is then the same model with the adapter off."""

    rank: int = Field(64, ge=1, description="OPSD: 64")
    alpha: int = Field(128, ge=1, description="OPSD: 128")
    dropout: float = Field(0.0, ge=0, lt=1, description="PEFT's; never acts here: no pass is in training mode")
    target_modules: str | Annotated[tuple[str, ...], Strict(False)] = Field(
        "all-linear", description="module names, or PEFT's all-linear"
    )


class ModelConfig(Component):
    """Which model is student and teacher, and how its prompts are written."""

    path: str = Field("world:a", description="folder, hub id, `smollm2`, or an embedded world model: world:a|b|c|bad")
    revision: str | None = Field(None, description="hub revision; None: the newest")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="weights; logits are always float32. bfloat16 is for lora: it rounds small updates away"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is one")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="transformers' attention")
    gradient_checkpointing: bool = Field(False, description="trade a second forward for memory")
    lora: LoraConfig | None = Field(None, description="None: train every weight")
    chat_template: bool = Field(True, description="false: prompts are plain text")
    system_prompt: str | None = Field(None, description="system message of both contexts")
    student_template: dict[str, bool | int | str] = Field(
        default_factory=dict, description="chat-template options of the student; OPSD: enable_thinking: false"
    )
    teacher_template: dict[str, bool | int | str] = Field(
        default_factory=dict, description="chat-template options of the teacher; OPSD: enable_thinking: true"
    )
    max_context_tokens: int = Field(4096, ge=16, description="longest teacher context plus completion, tokens; ours")


class ColumnsConfig(Component):
    """Which column of a file holds what."""

    problem: str = Field("problem", description="the problem text")
    solution: str | None = Field("solution", description="the reference solution; None: there is none (m = 0)")
    answer: str | None = Field(None, description="the final answer; None: the last \\boxed{} of the solution")
    id: str | None = Field(None, description="None: a hash of the problem text")
    difficulty: str | None = Field(None, description="an integer level; None: all 0")


class DataConfig(Component):
    """Where problems come from and how their references are cut."""

    source: str = Field(
        "world", description="world, arithmetic, gsm_symbolic, FILE.jsonl, FILE.parquet, or a `datasets` id"
    )
    preset: Literal["openthoughts-opsd", "openthoughts-114k", "deepmath", "gsm8k", "math", "openr1"] | None = Field(
        None, description="column map and row filter of a known data set"
    )
    columns: ColumnsConfig = ColumnsConfig()
    split_name: str = Field("train", description="split of a `datasets` id")
    test_source: str | None = Field(None, description="a separate held-out file; None: a hash of the text decides")
    on_bad_row: Literal["refuse", "skip"] = Field("refuse", description="skip: counted and listed, never silent")
    segmenter: Literal["auto", "paragraph", "line", "sentence", "step", "token"] = Field(
        "auto", description="auto (ours): blank lines, else lines, else sentences"
    )
    checker: Literal["auto", "exact", "math", "none"] = Field(
        "auto", description="auto: exact for the world, math-verify elsewhere; none: nothing can be verified"
    )
    checker_workers: int = Field(2, ge=1, le=64, description="processes of the checker math")
    leap_share: Fraction = Field(0.0, description="world only: share q of problems whose reference leaps")
    leap_probability: Fraction | None = Field(
        None, description="world only: leaps anywhere with this probability instead of late leaps"
    )
    min_difficulty: int = Field(2, ge=2, le=6, description="world only: fewest clauses in a problem")
    max_difficulty: int = Field(
        6, ge=2, le=6, description="most clauses in a problem of the world, operations in one of arithmetic"
    )
    unknown_facts: int | None = Field(
        None,
        ge=0,
        le=6,
        description="world only: how many facts of a problem the student was never taught; None: as they come",
    )
    train_size: int | None = Field(4096, ge=1, description="problems; None: all there are")
    validation_size: int = Field(200, ge=0, description="problems for choosing checkpoints")
    probe_size: int = Field(64, ge=1, description="fixed probe problems of the controller; ours")
    test_size: int = Field(300, ge=0, description="held-out problems")
    seed: int = Field(0, ge=0, description="seed of procedural problems")

    @model_validator(mode="after")
    def _problems_exist(self) -> DataConfig:
        if self.min_difficulty > self.max_difficulty:
            raise ValueError(f"min_difficulty {self.min_difficulty} is above max_difficulty {self.max_difficulty}")
        if self.unknown_facts is not None and self.unknown_facts > self.min_difficulty:
            raise ValueError(
                f"unknown_facts {self.unknown_facts} is more than the {self.min_difficulty} clauses of the shortest "
                "problem; raise min_difficulty"
            )
        return self


class ViewsConfig(Component):
    """What the teacher's message says around the visible reference. Texts are ours; the order of parts is OPSD's."""

    answer: Literal["keep", "withhold", "only"] = Field("keep", description="paper: keep, at every ratio")
    wording: Literal["adaptive", "constant"] = Field(
        "adaptive",
        description="adaptive (ours): only a cut reference is called partial; constant: one text for all",
    )
    problem_text: str = Field("Problem: {problem}", description="how a problem is introduced")
    instruction: str = Field(
        "Reason step by step and put the final answer inside \\boxed{}.", description="closes both contexts"
    )
    reference_begin: str = Field("Reference solution:\n<<<\n", description="opens the reference")
    reference_end: str = Field("\n>>>", description="closes the reference")
    partial_note: str = Field(
        "[The reference may be incomplete from here on.]", description="said when the reference is cut"
    )
    answer_text: str = Field(
        "Final answer: \\boxed{{{answer}}}", description="the answer when the closing is not shown"
    )
    transition: str = Field(
        "Study the reference until you see why it is right. Then solve the problem yourself, in your own words.",
        description="between the reference and the instruction",
    )


class ExposureConfig(Component):
    """How much of the reference the teacher sees."""

    kind: ExposureKind = Field("learned", description="paper")
    reveal_ratio: Fraction = Field(1.0, description="paper alpha; read by kind: fixed")
    granularity: Granularity = Field(
        "update",
        description="paper: one per update; kind per_problem: per_problem, unless written out; per_token: aligned only",
    )
    control: Literal["off", "none", "shuffled", "wrong_answer", "filler"] = Field(
        "off", description="a control in place of the true reference; none: the teacher sees no reference"
    )
    schedule: Literal["linear", "cosine"] = Field("linear", description="read by kind: schedule")
    schedule_start: Fraction = Field(0.0, description="ratio at the first update; swap with the end to ramp down")
    schedule_end: Fraction = Field(1.0, description="ratio at the last update")
    replay_run: str | None = Field(None, description="run folder whose ratios are replayed")
    replay_order: Literal["recorded", "shuffled"] = Field("recorded", description="shuffled: the same ratios, permuted")
    ratio_min: Fraction = Field(0.0, description="lowest ratio that is drawn; paper has bounds, value ours")
    ratio_max: Fraction = Field(1.0, description="highest ratio that is drawn; paper has bounds, value ours")
    factory: str | None = Field(None, description="module:function that makes your exposure; read by kind: custom")
    factory_settings: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="whatever your factory reads; kept with the run"
    )

    @property
    def decides(self) -> bool:
        """Whether ratios are decided during the run from what it shows, and decisions are rewarded and logged."""
        return self.kind in ("learned", "bandit", "setpoint", "per_problem", "custom")

    @model_validator(mode="before")
    @classmethod
    def _own_granularity(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("kind") == "per_problem":
            return {"granularity": "per_problem", **values}
        return values

    @model_validator(mode="after")
    def _fits_the_kind(self) -> ExposureConfig:
        if self.ratio_min > self.ratio_max:
            raise ValueError(f"ratio_min {self.ratio_min} is above ratio_max {self.ratio_max}; swap them")
        if self.kind == "replay" and self.replay_run is None:
            raise ValueError("kind: replay needs replay_run, the run folder whose ratios are replayed")
        if self.kind == "custom" and self.factory is None:
            raise ValueError("kind: custom needs factory, for example my_controller:make")
        if self.kind == "per_problem" and self.granularity == "update":
            raise ValueError("kind: per_problem has no one ratio per update; set granularity: per_problem")
        if self.kind in ("bandit", "setpoint") and self.granularity != "update":
            raise ValueError(f"kind: {self.kind} has one ratio per update; set granularity: update")
        if self.granularity == "per_token" and self.kind != "aligned":
            raise ValueError(
                f"kind: {self.kind} has no ratio per token; set kind: aligned, or granularity: update, per_difficulty "
                "or per_problem"
            )
        return self


CREDIT_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"progress_signal": "train_kl", "drop": "positive", "grounding_weight": 0.1},
    "sound": {"progress_signal": "probe_success", "drop": "signed", "grounding_weight": 0.0},
}


class CreditConfig(Component):
    """When and how an exposure decision is rewarded. `preset` fills the settings that are not written out."""

    preset: Literal["sound", "paper"] = Field("sound", description="ours: sound; the literal reading is not (docs)")
    hold_updates: int = Field(4, ge=1, description="paper H, student updates; value ours")
    lookahead_updates: int = Field(4, ge=1, description="paper L, student updates; value ours")
    probe_every: int | None = Field(
        None, ge=1, description="updates between the probes of a window; None: where one starts or closes; ours"
    )
    discount: float = Field(0.9, gt=0, le=1, description="paper gamma, per student update; value ours")
    window_start: Literal["decision", "hold_end"] = Field("decision", description="the formula; hold_end: the prose")
    progress_signal: ProgressSignal = Field("probe_success", description="what should fall; set by preset")
    drop: Literal["signed", "positive"] = Field("signed", description="positive: max(0, drop), paper; set by preset")
    probe_ratio: Fraction = Field(1.0, description="the teacher's fixed ratio in probe_kl; ours")
    grounding: Literal["answer", "withheld"] = Field("answer", description="paper: answer; withheld: hidden segments")
    grounding_weight: float = Field(0.0, ge=0, description="paper lambda_gt; set by preset")
    mixing: Literal["raw", "standardised"] = Field("raw", description="raw: the formula; standardised: z-scores")
    shuffle_rewards: bool = Field(False, description="null control: permute the rewards of each buffer")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        preset = values.get("preset", "sound")
        return {**CREDIT_PRESETS.get(preset if isinstance(preset, str) else "", {}), **values}


class PolicyConfig(Component):
    """The Beta policy of the learned exposure and its REINFORCE update."""

    hidden: int = Field(32, ge=1, description="tanh units of the one hidden layer; ours")
    learning_rate: float = Field(2e-2, ge=0, description="Adam; ours. 0 is the untrained-policy control")
    beta1: float = Field(0.0, ge=0, lt=1, description="Adam; ours: with 0.9 it keeps climbing past a moved optimum")
    decisions_per_policy_update: int = Field(4, ge=2, description="paper B; value ours")
    entropy_ceiling: float = Field(-0.27, description="nats; that of Beta(3, 3); form paper, value ours")
    entropy_cost: float = Field(1.0, ge=0, description="reached linearly from 0 over the run; form paper, value ours")
    ema_decay: float = Field(0.9, ge=0, lt=1, description="of the training-state averages; ours")


class BanditConfig(Component):
    """Thompson sampling over a few ratios: `exposure.kind: bandit`. All ours."""

    arms: int = Field(5, ge=2, description="ratios, evenly spaced from ratio_min to ratio_max; ours")
    prior_deviation: float = Field(
        1.0, gt=0, description="of an arm's mean reward before any, in deviations of the reward; ours"
    )
    smoothness: float = Field(0.35, gt=0, description="ratio over which mean rewards are alike; small: unrelated; ours")
    discount: float = Field(
        0.98, gt=0, le=1, description="of earlier rewards, per decision; 1: none is forgotten; ours"
    )


class SetpointConfig(Component):
    """Feedback toward a target KL: `exposure.kind: setpoint`. All ours."""

    target_kl: float | None = Field(None, gt=0, description="nats per token; None: that of the first decision; ours")
    gain: float = Field(0.1, gt=0, description="ratio per nat of log KL and decision; ours")
    start: Fraction = Field(0.5, description="the first ratio; ours")


class SearchConfig(Component):
    """A staircase per problem or difficulty: `exposure.kind: per_problem`. All ours."""

    step_solved: float = Field(0.1, ge=-1, le=1, description="change of the ratio after a verified rollout; ours")
    step_unsolved: float = Field(-0.1, ge=-1, le=1, description="change of the ratio after any other rollout; ours")
    start: Fraction = Field(0.5, description="the ratio of the first problems; ours")


class AlignedConfig(Component):
    """The first-order look-ahead: which ratio, and which tokens, would raise the student's verified success. Ours."""

    ratios: Annotated[tuple[Fraction, ...], Strict(False), Field(min_length=2)] = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0), description="the ratios among which `aligned` chooses"
    )
    success: Literal["correct", "centred", "references", "shuffled"] = Field(
        "correct",
        description="whose likelihood is success: own correct rollouts; rewards centred per difficulty; the references "
        "(a misleading control); correct ones of permuted verdicts (a null control)",
    )
    direction_rollouts: int | None = Field(
        None,
        ge=1,
        description="most rollouts of a hold that give the direction, drawn if there are more; None: all",
    )
    smoothing: float = Field(0.5, ge=0, lt=1, description="weight of past holds in the alignment per ratio; ours")
    min_correct: int = Field(8, ge=1, description="correct rollouts that a hold must have to give a direction; ours")
    fallback: Literal["full", "fixed", "random", "schedule"] = Field(
        "full", description="the exposure that decides while there is no direction; its settings are exposure's"
    )
    logit_change: float = Field(
        0.05, gt=0, description="nats, root mean square: how far the two points displace the logits; ours"
    )
    metric: Literal["plain", "optimiser"] = Field(
        "plain", description="in which the step is measured; optimiser: the root of AdamW's second moments divides it"
    )


class LossConfig(Component):
    """The student's loss on its own tokens."""

    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "top_k", "sampled_token"] = Field(
        "forward_kl", description="KL(teacher || student) over the full vocabulary: OPSD and paper"
    )
    jsd_weight: float = Field(0.5, gt=0, lt=1, description="teacher's share of the mixture; read by jensen_shannon")
    top_k: int = Field(100, ge=1, description="teacher's largest entries, the rest one tail bucket; read by top_k")
    clip: Literal["none", "per_token", "per_entry"] = Field("per_token", description="ours; OPSD: per_entry")
    clip_threshold: float | None = Field(
        None, gt=0, description="nats; None: 0.05 for per_entry (OPSD), 2.0 for per_token (ours)"
    )
    temperature: float | None = Field(None, gt=0, description="divides both logits; None: sampling.temperature (OPSD)")
    reduction: Literal["sequence", "token"] = Field("sequence", description="paper: sequence; OPSD's code: token")
    token_gate: Literal["none", "aligned", "correct", "random", "disagreement", "entropy"] = Field(
        "none",
        description="which tokens are distilled (ours): aligned: those whose step would raise verified success; "
        "correct: those of verified rollouts; "
        "random; the share gate_share by KL from the teacher, or by the student's entropy",
    )
    gate_share: Fraction = Field(0.5, description="share of tokens kept; read by random, disagreement and entropy")
    gate_side: Literal["low", "high"] = Field("high", description="which of them; read by disagreement and entropy")
    chunk_tokens: int | None = Field(
        None, ge=1, description="tokens whose logits exist at one time; None: as many as fit a byte budget"
    )

    @property
    def threshold(self) -> float:
        """The clip threshold in force, nats."""
        default = {"none": float("inf"), "per_token": 2.0, "per_entry": 0.05}[self.clip]
        return default if self.clip_threshold is None or self.clip == "none" else self.clip_threshold

    @model_validator(mode="after")
    def _clip_fits(self) -> LossConfig:
        if self.clip == "per_entry" and self.divergence not in ("forward_kl", "reverse_kl", "jensen_shannon"):
            raise ValueError(f"clip: per_entry has no entries to clip under divergence: {self.divergence}; use none")
        return self


class TeacherConfig(Component):
    """The teacher's weights: a clock of their own, independent of the exposure."""

    weights: Literal["frozen", "live", "ema", "refresh"] = Field("frozen", description="the initial policy: OPSD")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="per student update; read by ema")
    refresh_every: int = Field(50, ge=1, description="student updates between copies; read by refresh")


class SamplingConfig(Component):
    """How the student writes its rollouts."""

    temperature: float = Field(1.0, gt=0, description="OPSD: 1.1")
    top_p: float = Field(1.0, gt=0, le=1, description="OPSD: 0.95")
    top_k: int = Field(0, ge=0, description="0: off; OPSD: 20")
    min_p: float = Field(0.0, ge=0, lt=1, description="0: off")
    completion_tokens: int = Field(1024, ge=1, description="longest completion; OPSD: 1024")
    batch_size: int = Field(64, ge=1, description="rows decoded together; does not change the draws")
    engine: Literal["auto", "builtin", "transformers"] = Field(
        "auto", description="what runs the network; auto: builtin for Llama, Qwen2 and Qwen3, else transformers"
    )


class TrainConfig(Component):
    """The optimiser, the clock and the checkpoints."""

    method: Literal["distill", "sft", "grpo"] = Field("distill", description="sft and grpo are the baselines")
    num_updates: int = Field(100, ge=1, description="OPSD: 100")
    batch_size: int = Field(32, ge=1, description="rollouts per update; OPSD: 32")
    micro_batch_size: int = Field(8, ge=1, description="rows scored together; does not change the gradient")
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="in place of micro_batch_size: as many rows as fit, padding included, at least one"
    )
    learning_rate: float = Field(5e-6, ge=0, description="AdamW; OPSD: 5e-6")
    warmup_updates: int = Field(0, ge=0, description="linear from 0")
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW")
    max_grad_norm: float = Field(0.1, gt=0, description="OPSD: 0.1")
    group_size: int = Field(8, ge=2, description="samples per problem; read by grpo and grpo_weight")
    grpo_weight: float = Field(
        0.0, ge=0, description="adds GRPO's loss on the same rollouts to distillation; ours: a baseline. 0: none"
    )
    evaluate_every: int = Field(25, ge=0, description="updates between validations; 0: never")
    checkpoint_every: int = Field(25, ge=1, description="updates between checkpoints; OPSD: 25")
    keep_checkpoints: int = Field(3, ge=1, description="newest ones kept; older ones are deleted")
    log_samples: int = Field(2, ge=0, description="rollouts with both contexts kept at each validation")
    threads: int | None = Field(None, ge=1, description="CPU threads; None: torch's choice. Part of bit-exactness")
    seed: int = Field(0, ge=0, description="every draw of the run is a function of it")

    @model_validator(mode="after")
    def _groups(self) -> TrainConfig:
        if self.grpo_weight and self.method != "distill":
            raise ValueError(f"grpo_weight {self.grpo_weight} is added to distillation; set method: distill, or 0")
        if self.samples_per_problem > 1 and self.batch_size % self.group_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of group_size {self.group_size}")
        return self

    @property
    def samples_per_problem(self) -> int:
        """Rollouts of one problem in an update: a group where advantages are centred in groups, else one."""
        return self.group_size if self.method == "grpo" or self.grpo_weight else 1


class EvaluationConfig(Component):
    """Average@k on held-out problems."""

    samples: int = Field(2, ge=1, description="k; the paper's tables: 12")
    temperature: float = Field(1.0, ge=0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="1: off")
    top_k: int = Field(0, ge=0, description="0: off")
    min_p: float = Field(0.0, ge=0, lt=1, description="0: off")
    completion_tokens: int | None = Field(None, ge=1, description="None: sampling.completion_tokens")


class Config(Component):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    exposure: ExposureConfig = ExposureConfig()
    credit: CreditConfig = CreditConfig()
    policy: PolicyConfig = PolicyConfig()
    bandit: BanditConfig = BanditConfig()
    setpoint: SetpointConfig = SetpointConfig()
    search: SearchConfig = SearchConfig()
    aligned: AlignedConfig = AlignedConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    sampling: SamplingConfig = SamplingConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _signal_that_can_be_measured(cls, values: Any) -> Any:
        """Where nothing can be verified, the `sound` preset falls back to the probe NLL (method section 5)."""
        if not isinstance(values, Mapping):
            return values
        data, credit = values.get("data") or {}, values.get("credit") or {}
        unverified = isinstance(data, Mapping) and data.get("checker") == "none"
        if unverified and isinstance(credit, Mapping) and credit.get("preset", "sound") == "sound":
            return {**values, "credit": {"progress_signal": "probe_nll", **credit}}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.data.checker == "none":
            verified = self.credit.progress_signal in ("probe_success", "probe_gain", "train_success")
            if verified and self.exposure.decides:
                raise ValueError(
                    f"credit.progress_signal: {self.credit.progress_signal} needs a checker; use probe_nll"
                )
            if self.exposure.kind == "per_problem":
                raise ValueError("exposure.kind: per_problem searches by verified rollouts; set data.checker: math")
            if self.exposure.kind == "aligned" or self.loss.token_gate == "aligned":
                raise ValueError(
                    "exposure.kind: aligned and loss.token_gate: aligned need verified rollouts; set data.checker"
                )
            if self.loss.token_gate == "correct":
                raise ValueError("loss.token_gate: correct needs verified rollouts; set data.checker")
            if self.train.samples_per_problem > 1:
                raise ValueError("train.method: grpo needs verified rewards, and so does grpo_weight; set data.checker")
        if self.exposure.granularity == "per_token" and self.loss.token_gate not in ("none", "aligned"):
            raise ValueError(
                f"loss.token_gate: {self.loss.token_gate} with exposure.granularity: per_token: a token that chooses "
                "its ratio is gated by its own alignment or not at all; set token_gate: none or aligned"
            )
        looks_ahead = self.exposure.kind == "aligned" or self.loss.token_gate == "aligned"
        if looks_ahead and self.model.dtype == "bfloat16" and self.model.lora is None:
            raise ValueError(
                "model.dtype: bfloat16 without model.lora rounds away the displacement that aligned needs; set "
                "model.lora, or model.dtype: float32"
            )
        if self.data.source != "world" and self.model.path.startswith("world:"):
            raise ValueError(f"model.path: {self.model.path} speaks only the world's language; set data.source: world")
        if self.sampling.completion_tokens >= self.model.max_context_tokens:
            raise ValueError(
                f"sampling.completion_tokens {self.sampling.completion_tokens} leaves no room for a prompt in "
                f"model.max_context_tokens {self.model.max_context_tokens}"
            )
        return self

    @property
    def loss_temperature(self) -> float:
        """What both logits are divided by in the loss."""
        return self.loss.temperature if self.loss.temperature is not None else self.sampling.temperature

    @property
    def evaluation_tokens(self) -> int:
        """Longest completion in evaluation, tokens."""
        return self.evaluation.completion_tokens or self.sampling.completion_tokens

    @property
    def checker(self) -> Literal["exact", "math", "none"]:
        """The answer checker in force."""
        if self.data.checker == "auto":
            return "exact" if self.data.source == "world" else "math"
        return self.data.checker


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{key_node.start_mark.name}: line {line}: a key is a word, not a {key_node.id}")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"{key_node.start_mark.name}: line {line}: the key '{key}' is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our loader would take for something else, such as '1e3'."""

    yaml_implicit_resolvers = _UniqueKeyLoader.yaml_implicit_resolvers


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text on one line: line breaks of every kind, and what cannot be seen, are written as escapes."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text_node)


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    folder = importlib.resources.files("atesd") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML strictly: duplicate keys and syntax errors are `ConfigError`s that name the line."""
    try:
        loader = _UniqueKeyLoader(text)
        loader.name = name
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{name}: {where}not valid YAML: {getattr(error, 'problem', None) or error}") from None


def recipe_text(recipe: str) -> str:
    """The YAML text of a packaged recipe or of a file."""
    if recipe in recipe_names():
        return (importlib.resources.files("atesd") / "recipes" / f"{recipe}.yaml").read_text("utf-8")
    path = Path(recipe)
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{recipe}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
        except OSError as error:
            raise ConfigError(f"{recipe}: cannot be read: {error.strerror}") from None
    hint = _nearest(recipe, recipe_names())
    raise ConfigError(f"'{recipe}' is neither a file nor a recipe{hint}; recipes: {', '.join(recipe_names())}")


def load_config(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """Load a packaged recipe or a YAML file, apply `a.b=value` overrides, and check everything.

    An override of `credit.preset` takes the place of all that presets fill in, also of what the file writes out.
    Raises `ConfigError` that names each setting by its dotted path, its value, what is allowed, and the nearest name.
    """
    values = parse_yaml(recipe_text(recipe), recipe) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{recipe}: expected settings grouped by component, found {type(values).__name__}")
    _apply_overrides(values, overrides)
    return config_from_mapping(values, name=recipe)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """`config` with `a.b=value` overrides, applied and checked as `load_config` does."""
    values = config.model_dump(mode="json")
    _apply_overrides(values, overrides)
    return config_from_mapping(values, name="--set")


def config_from_mapping(values: Mapping[str, Any], name: str = "config") -> Config:
    """Check a nested mapping of settings. Raises `ConfigError` as `load_config` does."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(item) for item in error.errors(include_url=False))
        raise ConfigError(f"{name}: " + "\n  ".join(lines)) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def yaml_value(value: Any) -> str:
    """One value as YAML on one line."""
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    text: str = yaml.dump([plain], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.strip()[1:-1]


def describe_settings(config: Config) -> Iterator[tuple[str, Any, str]]:
    """Each setting as (dotted path, value in force, unit and origin)."""
    yield from _describe(config, "")


def _describe(component: BaseModel, prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in type(component).model_fields.items():
        value = getattr(component, name)
        if isinstance(value, BaseModel):
            yield from _describe(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.description or ""


def _apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> None:
    """A credit preset comes first, so that it never takes back another override."""
    for override in sorted(overrides, key=lambda text: text.partition("=")[0].strip() != "credit.preset"):
        _apply_override(values, override)


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *groups, leaf = path.strip().split(".")
    if not equals or not leaf or not all(groups):
        raise ConfigError(f"--set {override}: expected a.b=value, for example --set train.num_updates=4")
    node = values
    for group in groups:
        child = node.get(group)
        if child is None:
            child = node[group] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: '{group}' is a setting, not a group of settings")
        node = child
    if [*groups, leaf] == ["credit", "preset"]:
        for filled in CREDIT_PRESETS["sound"]:
            node.pop(filled, None)
    node[leaf] = parse_yaml(text, f"--set {override}")


def _explain(item: Any) -> str:
    """One pydantic error as: dotted path, value, what is allowed, nearest valid name."""
    location = [str(part) for part in item["loc"]]
    if item["type"] in ("extra_forbidden", "invalid_key"):
        return _explain_unknown(location)
    component, name = _setting_at(location)
    path = ".".join(location[: location.index(name) + 1]) if name else ""
    if item["type"] in ("value_error", "assertion_error"):
        message = str(item["ctx"]["error"])
        return f"{path}: {message}" if path else message
    if item["type"] == "model_type":
        names = ", ".join(_group_at(location).model_fields)
        return f"{path}: {item['input']!r} is not a group of settings; allowed in it: {names}"
    schema = component.model_json_schema()["properties"].get(name, {})
    words = [str(word) for rule in _alternatives(schema) for word in rule.get("enum", [])]
    value = item["input"]
    return f"{path}: {value!r} is not allowed; expected {_expected(item, schema)}{_nearest(str(value), words)}"


_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _expected(item: Any, schema: Mapping[str, Any]) -> str:
    """What a setting allows, in words, from its JSON schema; the whole range whichever bound was crossed."""
    rules = _alternatives(schema)
    bounds = [f"{word} {rule[key]:g}" for key, word in _BOUNDS.items() for rule in rules if key in rule]
    if item["type"] == "finite_number":
        return " and ".join(["a finite number", *bounds])
    if item["type"].startswith(("greater_than", "less_than")):
        return " and ".join(bounds)
    if item["loc"][-1:] in [("bool",), ("int",), ("str",), ("tuple[str, ...]",)]:  # an alternative of a union
        return " or ".join(rule["type"] for rule in rules if rule.get("type") not in (None, "object"))
    return str(item["msg"]).removeprefix("Input should be ").replace("a valid ", "a ").replace("a int", "an int")


def _alternatives(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = schema.get("additionalProperties")
    return [schema, *schema.get("anyOf", []), *(inner.get("anyOf", []) if isinstance(inner, Mapping) else [])]


def _explain_unknown(location: list[str]) -> str:
    *groups, name = location
    names = list(_group_at(groups).model_fields)
    elsewhere = [path for path, _, _ in describe_settings(Config()) if path.rsplit(".", 1)[-1] == name]
    hint = _nearest(name, names) or (f"; did you mean {elsewhere[0]}?" if elsewhere else "")
    where = f"in '{'.'.join(groups)}'" if groups else "at the top"
    return f"{'.'.join(location)}: unknown setting{hint}; allowed {where}: {', '.join(names)}"


def _setting_at(location: list[str]) -> tuple[type[BaseModel], str]:
    """The last group on the way to a location and the setting in it; what pydantic appends of a union is dropped."""
    component: type[BaseModel] = Config
    name = ""
    for part in location:
        if part not in component.model_fields:
            break
        name, group = part, _group_in(component, part)
        if group is None or part == location[-1]:
            break
        component = group
    return component, name


def _group_at(location: list[str]) -> type[BaseModel]:
    component: type[BaseModel] = Config
    for part in location:
        component = _group_in(component, part) or component
    return component


def _group_in(component: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The group of settings that a field holds; None if it holds a value."""
    field = component.model_fields.get(name)
    candidates = [field.annotation, *get_args(field.annotation)] if field else []
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _nearest(word: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
