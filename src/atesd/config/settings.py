"""Every setting: name, default, unit, range, origin, and when it acts.

Origins: "paper" is ATESD (arXiv 2605.11458), "OPSD" is arXiv 2601.18734 (third version), "ours" means that the paper
does not say and we chose. Each default is stated once: here, or beside the controller that reads it
(`atesd.control`). Nothing writes to a config after loading. This module imports neither torch nor transformers, so that
a mistake in a config is reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, Strict, create_model, model_validator

from atesd.component import ActsWhen, Component, Fraction, OwnSettings, chosen, tagged, word_or_named
from atesd.control.aligned import AlignedSettings
from atesd.control.credit import CreditConfig
from atesd.control.kinds import exposure_kinds
from atesd.control.learned import LearnedSettings, PolicyConfig
from atesd.control.settings import BoundedSettings, ExposureSettings, Granularity, GranularSettings, Run
from atesd.importing import is_named
from atesd.maths.divergences import DIVERGENCES, Divergence

GENERATED = ("gsm_symbolic", "arithmetic")
"""Sources that write their own problems in words."""
PROCEDURAL = ("world", *GENERATED)
"""Values of `data.source` that make their problems."""
EAGER_TOKENS = 1024  # ours; measured at 96: memory of eager attention grows with the square of a row
_FILES = (".jsonl", ".json", ".parquet")
_PRESETS_WITH_DIFFICULTY = ("deepmath",)

_DISTILS = ActsWhen(lambda c: c.distils, "train.method: distill")
_SHOWS = ActsWhen(
    lambda c: c.distils or c.hinted.rollouts > 0, "train.method: distill, or with hinted.rollouts above 0"
)
_SAMPLES = ActsWhen(lambda c: c.train.method != "sft", "train.method: distill or grpo")
_WORLD = ActsWhen(lambda c: c.data.source == "world", "data.source: world")
_TEXT = ActsWhen(
    lambda c: c.data.source != "world", "a data.source other than world, whose language has words of its own"
)
_READS = ActsWhen(lambda c: c.data.source not in ("world", *GENERATED), "a data.source that is a file or data set")
_LOOKS_AT_ROWS = ActsWhen(
    lambda c: c.data.test_source is not None or _READS.holds(c),
    "a data.source that is a file or data set, or with data.test_source",
)
_OWN_CHECKER = ActsWhen(lambda c: is_named(c.data.checker), "data.checker: module:function")
_GRADED = ActsWhen(lambda c: c.data.checker != "none", "a data.checker other than none")
_HINTED = ActsWhen(lambda c: c.hinted.rollouts > 0, "hinted.rollouts above 0")
_DISPLACED = ActsWhen(lambda c: c.alignment.displaces, "alignment.parameters: all or last_layer")
_BY_PARAMETERS = ActsWhen(
    lambda c: c.alignment.parameters != "features", "alignment.parameters: all, last_layer, last_half or last_mlp"
)
_DRAWN = ActsWhen(lambda c: c.evaluation.temperature > 0, "evaluation.temperature above 0")


class LoraConfig(Component):
    """Low-rank adapters (PEFT). The frozen teacher is then the same model with the adapter off."""

    rank: int = Field(64, ge=1, description="OPSD: 64")
    alpha: int = Field(128, ge=1, description="OPSD: 128")
    target_modules: str | Annotated[tuple[str, ...], Strict(False)] = Field(
        "all-linear", description="module names, or PEFT's all-linear"
    )


class ModelConfig(Component):
    """Which model is student and teacher, and how its prompts are written."""

    path: str = Field(
        "world:a",
        description="folder, hub id, `smollm2`, an embedded world model: world:a|b|c|bad, or one of word problems that "
        "a clone of the repository holds: words:a|b",
    )
    revision: Annotated[
        str | None,
        ActsWhen(
            lambda c: not c.model.path.startswith(("world:", "words:")) and c.model.path != "smollm2",
            "a model.path on the hub",
        ),
    ] = Field(None, description="hub revision; None: the newest")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="weights; logits are always float32. bfloat16 is for lora: it rounds small updates away"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is one")
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None,
        description="transformers' attention; None: sdpa, but for rows of at most 1024 tokens in bfloat16 on a CPU "
        "that computes in it eager, and adapters in bfloat16 too",
    )
    gradient_checkpointing: bool = Field(False, description="trade a second forward for memory")
    lora: LoraConfig | None = Field(None, description="None: train every weight")
    sharding: Literal["none", "full", "hybrid"] = Field(
        "none",
        description="none: every rank has all weights; full: each its rows of every tensor; hybrid: so within a node",
    )
    compute_dtype: Annotated[
        Literal["bfloat16"] | None,
        ActsWhen(
            lambda c: c.model.sharding != "none" and c.model.dtype == "float32" and c.model.lora is None,
            "model.sharding: full or hybrid, model.dtype: float32 and no model.lora",
        ),
    ] = Field(None, description="type of the passes, while the weights stay in float32; None: model.dtype")
    chat_template: bool = Field(True, description="false: prompts are plain text")
    system_prompt: str | None = Field(None, description="system message of both contexts")
    student_template: dict[str, bool | int | str] = Field(
        default_factory=dict, description="chat-template options of the student; OPSD: enable_thinking: false"
    )
    teacher_template: Annotated[dict[str, bool | int | str], _DISTILS] = Field(
        default_factory=dict, description="chat-template options of the teacher; OPSD: enable_thinking: true"
    )
    template_date: Annotated[date, Strict(False)] = Field(
        date(2024, 7, 26), description="today, for a chat template that prints it: contexts never change at midnight"
    )
    max_context_tokens: int = Field(4096, ge=16, description="longest teacher context plus completion, tokens; ours")

    @model_validator(mode="before")
    @classmethod
    def _attention_once(cls, values: Any) -> Any:
        """In float32 `sdpa`, which earlier versions recorded as the default, is what None means."""
        if not isinstance(values, Mapping) or values.get("dtype", "float32") != "float32":
            return values
        return {name: value for name, value in values.items() if (name, value) != ("attention", "sdpa")}

    @property
    def prefers_eager_on_cpu(self) -> bool:
        """Whether a CPU that computes in bfloat16 is to use eager attention: rows are short, and nothing was set."""
        return self.attention is None and self.dtype == "bfloat16" and self.max_context_tokens <= EAGER_TOKENS


class ColumnsConfig(Component):
    """Which column of a file holds what."""

    problem: str = Field("problem", description="the problem text")
    solution: str | None = Field("solution", description="the reference solution; None: there is none (m = 0)")
    answer: str | None = Field(None, description="the final answer; None: the last \\boxed{} of the solution")
    id: str | None = Field(None, description="None: a hash of the problem text")
    difficulty: str | None = Field(None, description="an integer level; None: all 0")
    messages: str | None = Field(
        None,
        description="a chat, [{role, content}, ..], in place of problem and solution: what the user says last and the "
        "answer to it",
    )

    @model_validator(mode="after")
    def _one_place_for_the_problem(self) -> ColumnsConfig:
        if self.messages is not None and (self.problem, self.solution) != ("problem", "solution"):
            raise ValueError(
                f"messages {self.messages} holds the problem and the solution; leave these two columns out"
            )
        return self


class SharesConfig(Component):
    """Into which parts the hash of a problem's text divides a source. They sum to 1."""

    train: Fraction = Field(0.80, description="share of the problems to train on; ours")
    validation: Fraction = Field(0.07, description="share for choosing checkpoints; ours")
    probe: Fraction = Field(0.03, description="share of the controller's probes, 64 of about 2,200 rows; ours")
    test: Fraction = Field(0.10, description="share held out; trained on where there is a test_source; ours")

    @model_validator(mode="after")
    def _whole(self) -> SharesConfig:
        total = self.train + self.validation + self.probe + self.test
        if abs(total - 1) > 1e-9:
            shares = ", ".join(f"{split} {share:g}" for split, share in self)
            raise ValueError(f"{shares} sum to {total:g}; they must sum to 1")
        return self


def _one_or_several(value: Any) -> Any:
    """A source, or several as a tuple; a list of one is that one."""
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    if not several or not all(isinstance(source, str) and source.strip() for source in several):
        raise ValueError(f"{value!r} is not allowed; expected a file or data set, or a list of them")
    if len(several) == 1:
        return several[0]
    if made := [source for source in several if source in PROCEDURAL]:
        raise ValueError(f"{made[0]} makes its own problems and stands alone; leave the others out")
    if twice := [source for source in several if several.count(source) > 1]:
        raise ValueError(f"{twice[0]} stands twice in the list; keep one")
    return tuple(several)


class DataConfig(Component):
    """Where problems come from and how their references are cut."""

    source: Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several)] = Field(
        "world",
        description="world, arithmetic, gsm_symbolic, FILE.jsonl, FILE.json, FILE.parquet, or what `datasets` loads; "
        "or a list of such files and data sets, read as one",
    )
    preset: Annotated[
        Literal["openthoughts-opsd", "openthoughts-114k", "deepmath", "gsm8k", "math", "openr1"] | None, _READS
    ] = Field(None, description="column map and row filter of a known data set")
    columns: Annotated[
        ColumnsConfig,
        ActsWhen(
            lambda c: c.data.test_source is not None or (_READS.holds(c) and c.data.preset is None),
            "a data.source that is a file or data set without data.preset, or with data.test_source",
        ),
    ] = ColumnsConfig()
    split_name: Annotated[
        str, ActsWhen(lambda c: c.data.has_splits, "a data.source or data.test_source that is a `datasets` id")
    ] = Field("train", description="split of a `datasets` id")
    subset: Annotated[
        str | None, ActsWhen(lambda c: c.data.has_splits, "a data.source or data.test_source that is a `datasets` id")
    ] = Field(
        None, min_length=1, description="configuration of a `datasets` id that has several, such as main of gsm8k"
    )
    test_source: Annotated[str | None, _TEXT] = Field(
        None, description="a separate held-out file; None: a hash of the text decides"
    )
    on_bad_row: Literal["refuse", "skip"] = Field("refuse", description="skip: counted and listed, never silent")
    on_missing_reference: Annotated[Literal["refuse", "skip", "keep"], _READS] = Field(
        "keep", description="rows without a solution; keep: their teacher reads the answer alone. Counted in any case"
    )
    on_few_rows: Annotated[Literal["refuse", "shrink"], _READS] = Field(
        "refuse",
        description="shrink: a split with fewer problems than its size takes all it has, which is said; the default "
        "of a file or data set where no size is given",
    )
    system_message: Annotated[Literal["refuse", "keep", "drop"], _LOOKS_AT_ROWS] = Field(
        "refuse", description="of a row's chat; keep: in front of the problem, in the user's message; drop: said"
    )
    earlier_turns: Annotated[Literal["refuse", "drop"], _LOOKS_AT_ROWS] = Field(
        "refuse", description="of a row's chat, before its last problem; drop: not read, which is said"
    )
    templates: Annotated[
        Literal["all", "short", "short-held-out"],
        ActsWhen(lambda c: c.data.source == "gsm_symbolic", "data.source: gsm_symbolic"),
    ] = Field(
        "all",
        description="of gsm_symbolic; short: those of few, short lines, which the model of `world pretrain words` was "
        "taught; short-held-out: of that kind too, but never shown to it",
    )
    segmenter: Annotated[str, word_or_named("auto", "paragraph", "line", "sentence", "step", "token"), _TEXT] = Field(
        "auto", description="auto (ours): blank lines, else lines, else sentences; or yours, module:function (docs)"
    )
    segmenter_settings: Annotated[
        OwnSettings, _TEXT, ActsWhen(lambda c: is_named(c.data.segmenter), "data.segmenter: module:function")
    ] = Field(default_factory=dict, description="whatever the maker of your segmenter reads; kept with the run")
    checker: Annotated[str, word_or_named("auto", "exact", "math", "none")] = Field(
        "auto",
        description="auto: exact for the world, math-verify elsewhere; none: nothing can be verified; or yours, "
        "module:function (docs)",
    )
    checker_settings: Annotated[OwnSettings, _OWN_CHECKER] = Field(
        default_factory=dict, description="whatever the maker of your checker reads; kept with the run"
    )
    checker_seconds: Annotated[float, _OWN_CHECKER] = Field(
        10.0, gt=0, description="processor time of one answer in your checker; beyond it the verdict is timeout; ours"
    )
    checker_workers: Annotated[
        int, ActsWhen(lambda c: c.checker not in ("exact", "none"), "data.checker: math or module:function")
    ] = Field(2, ge=1, le=64, description="processes of the checker")
    leap_share: Annotated[
        Fraction, _WORLD, ActsWhen(lambda c: c.data.leap_probability is None, "data.leap_probability: null")
    ] = Field(0.0, description="share q of problems whose reference leaps")
    leap_probability: Annotated[Fraction | None, _WORLD] = Field(
        None, description="leaps anywhere with this probability instead of late leaps"
    )
    min_difficulty: Annotated[int, _WORLD] = Field(2, ge=2, le=6, description="fewest clauses in a problem")
    max_difficulty: Annotated[
        int, ActsWhen(lambda c: c.data.source in ("world", "arithmetic"), "data.source: world or arithmetic")
    ] = Field(6, ge=2, le=6, description="most clauses in a problem of the world, operations in one of arithmetic")
    unknown_facts: Annotated[int | None, _WORLD] = Field(
        None,
        ge=0,
        le=6,
        description="how many facts of a problem the student was never taught; None: as they come",
    )
    train_size: int | None = Field(4096, ge=1, description="problems; None: all there are")
    validation_size: int = Field(200, ge=0, description="problems for choosing checkpoints")
    probe_size: int = Field(64, ge=1, description="fixed probe problems of the controller; ours")
    test_size: int = Field(300, ge=0, description="held-out problems")
    shares: Annotated[SharesConfig, ActsWhen(lambda c: c.data.source != "world", "a data.source other than world")] = (
        SharesConfig()
    )
    seed: Annotated[
        int,
        ActsWhen(lambda c: c.data.source in ("world", *GENERATED), "data.source: world, arithmetic or gsm_symbolic"),
    ] = Field(0, ge=0, description="seed of procedural problems")

    @property
    def leaps(self) -> bool:
        """Whether references of the embedded world leap, on purpose, beyond the student."""
        return self.leap_share > 0 or bool(self.leap_probability)

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source, in order."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def source_name(self) -> str:
        """All sources in one line."""
        return ", ".join(self.sources)

    @property
    def has_difficulties(self) -> bool:
        """Whether problems have a difficulty; in a file without that column all have 0."""
        read = self.columns.difficulty if self.preset is None else self.preset in _PRESETS_WITH_DIFFICULTY
        return self.source in PROCEDURAL or bool(read)

    @property
    def has_splits(self) -> bool:
        """Whether something is read that has named splits: a `datasets` id or folder."""
        read = [self.test_source, *([] if self.source in PROCEDURAL else self.sources)]
        return any(name is not None and not name.endswith(_FILES) for name in read)

    @model_validator(mode="before")
    @classmethod
    def _sizes_that_nobody_asked_for(cls, values: Any) -> Any:
        """The default sizes are no reason to refuse a small file: they are upper bounds where none is given."""
        if not isinstance(values, Mapping) or values.get("source", "world") in PROCEDURAL:
            return values
        named = {f"{split}_size" for split in SharesConfig.model_fields} & values.keys()
        return values if named or "on_few_rows" in values else {**values, "on_few_rows": "shrink"}

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

    answer: Annotated[Literal["keep", "withhold", "only"], _SHOWS] = Field(
        "keep", description="paper: keep, at every ratio"
    )
    wording: Annotated[Literal["adaptive", "constant"], _SHOWS, _TEXT] = Field(
        "adaptive",
        description="adaptive (ours): only a cut reference is called partial; constant: one text for all",
    )
    problem_text: Annotated[str, _TEXT] = Field("Problem: {problem}", description="how a problem is introduced")
    instruction: Annotated[str, _TEXT] = Field(
        "Reason step by step and put the final answer inside \\boxed{}.", description="closes both contexts"
    )
    reference_begin: Annotated[str, _SHOWS, _TEXT] = Field(
        "Reference solution:\n<<<\n", description="opens the reference"
    )
    reference_end: Annotated[str, _SHOWS, _TEXT] = Field("\n>>>", description="closes the reference")
    partial_note: Annotated[
        str, _SHOWS, _TEXT, ActsWhen(lambda c: c.views.wording == "adaptive", "views.wording: adaptive")
    ] = Field("[The reference may be incomplete from here on.]", description="said when the reference is cut")
    answer_text: Annotated[
        str, _SHOWS, _TEXT, ActsWhen(lambda c: c.views.answer != "withhold", "views.answer: keep or only")
    ] = Field("Final answer: \\boxed{{{answer}}}", description="the answer when the closing is not shown")
    transition: Annotated[str, _SHOWS, _TEXT] = Field(
        "Study the reference until you see why it is right. Then solve the problem yourself, in your own words.",
        description="between the reference and the instruction",
    )


class AlignmentConfig(Component):
    """The direction of success, along which ratios and tokens are measured (exposure and gate `aligned`). Ours."""

    success: Literal["correct", "centred", "references", "shuffled"] = Field(
        "correct",
        description="whose likelihood is success: own correct rollouts; rewards centred per difficulty; the references "
        "(a misleading control); correct ones of permuted verdicts (a null control)",
    )
    parameters: Literal["all", "last_layer", "last_half", "last_mlp", "features"] = Field(
        "all",
        description="whose gradient is read: all that are trained, by two displaced passes; those of the last layer, "
        "which alone is displaced; those of its second half, from the output projection on, or of its feed-forward "
        "block, by an exact derivative; or the scale of each entry of the last hidden state, without a pass; ours",
    )
    direction_rollouts: int | None = Field(
        None,
        ge=1,
        description="most rollouts of a hold that give the direction, drawn if there are more; None: all",
    )
    memory: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="weight of the direction so far beside that of a new hold: against its noise; 0: the last hold "
        "alone; ours",
    )
    min_correct: int = Field(8, ge=1, description="correct rollouts that a hold must have to give a direction; ours")
    logit_change: Annotated[float, _DISPLACED] = Field(
        0.05, gt=0, description="nats, root mean square: how far the two points displace the logits; ours"
    )
    metric: Annotated[Literal["plain", "optimiser"], _BY_PARAMETERS] = Field(
        "plain", description="in which the step is measured; optimiser: the root of AdamW's second moments divides it"
    )

    @property
    def displaces(self) -> bool:
        """Whether weights are displaced to find the derivative along the direction; of the other parts it is exact."""
        return self.parameters in ("all", "last_layer")


class HintedConfig(Component):
    """Rollouts that the student writes with part of the reference in its prompt, where it is seldom right alone."""

    rollouts: int = Field(
        0,
        ge=0,
        description="how many of train.batch_size; they give the success direction alone and are not distilled, or "
        "join GRPO's groups, equally many each; 0: none",
    )
    target_success: Annotated[float, _HINTED] = Field(
        0.5, gt=0, lt=1, description="share of them that shall be right: the ratio of what they see follows; SEELE: 0.5"
    )
    importance_cap: Annotated[
        float | None,
        ActsWhen(lambda c: c.hinted.rollouts > 0 and c.looks_ahead, "hinted.rollouts above 0 and a look-ahead"),
    ] = Field(
        None,
        gt=0,
        description="largest weight of one in the direction: its probability without the hint over that with it; "
        "None: all weigh 1; ours",
    )
    prompt: Annotated[
        Literal["hinted", "student"],
        ActsWhen(lambda c: c.hinted.rollouts > 0 and c.train.method == "grpo", "hinted.rollouts above 0 and GRPO"),
    ] = Field(
        "hinted",
        description="under which prompt GRPO reads them: the one they were written under (SEELE, SAGE, POPE), or the "
        "problem alone",
    )


class DivergenceSettings(Component):
    """One of `maths.divergences.DIVERGENCES` by its name, with its parameter if it has one."""

    kind: str

    @property
    def parameter(self) -> float | None:
        """The number that the divergence is asked for; None where it has none."""
        asked = DIVERGENCES[self.kind].parameter
        return None if asked is None else float(getattr(self, asked.name))


def _settings_of(divergence: Divergence) -> type[DivergenceSettings]:
    """The settings of a divergence as its entry in the registry describes them."""
    name, asked = divergence.name, divergence.parameter
    fields: dict[str, Any] = {"kind": (Literal[name], Field(name, description=divergence.summary))}
    if asked is not None:
        number, most = (int if asked.whole else float), (None if asked.below == math.inf else asked.below)
        least = {"ge": math.floor(asked.above) + 1} if asked.whole else {"gt": asked.above}
        fields[asked.name] = (number, Field(number(asked.default), lt=most, description=asked.description, **least))
    return create_model(name, __base__=DivergenceSettings, __module__=__name__, __doc__=divergence.summary, **fields)


_DIVERGENCE_KINDS = {name: _settings_of(divergence) for name, divergence in DIVERGENCES.items()}
globals().update(_DIVERGENCE_KINDS)  # where pickle looks for them


class NoGate(Component):
    """Every token is distilled."""

    kind: Literal["none"] = Field("none", description="every token is distilled: OPSD and paper")


class PermutableGate(Component):
    """A gate whose weights can be dealt to other tokens: the null control of the same weights."""

    permute: bool = Field(False, description="control: each rollout's weights dealt to its tokens at random; ours")


class LookAheadGate(PermutableGate):
    """A gate that reads every token's alignment with success."""

    skip: Literal["none", "rollouts", "update"] = Field(
        "none", description="what is left out where its mean alignment is negative: no step is taken on it; ours"
    )


class AlignedGateSettings(LookAheadGate):
    """The tokens whose step would raise verified success."""

    kind: Literal["aligned"] = Field("aligned", description="tokens whose step would raise verified success; ours")


class SoftGateSettings(LookAheadGate):
    """All tokens, each by how far its step would raise verified success."""

    kind: Literal["soft"] = Field(
        "soft", description="a sigmoid of the alignment, rescaled so that each rollout keeps its weight; ours"
    )
    sharpness: float = Field(
        4.0, gt=0, description="factor of alignment over its root mean square in the rollout; ours, by a pilot"
    )


class SdarGateSettings(PermutableGate):
    """All tokens, each by how much likelier the teacher finds it."""

    kind: Literal["sdar"] = Field(
        "sdar", description="a sigmoid of the sampled token's log-probability, teacher's less student's: SDAR"
    )
    beta: float = Field(5.0, gt=0, description="factor of the gap, per nat; SDAR: 5")


class InfluenceGateSettings(PermutableGate):
    """All tokens, each by its first-order influence on the policy-gradient surrogate of its rollout."""

    kind: Literal["influence"] = Field(
        "influence",
        description="bounded weights by the influence on the policy gradient's surrogate, read off the logits, that "
        "keep each rollout's weight: after ICSD",
    )
    scale: float = Field(0.1, gt=0, description="influence at which a weight has gone most of its way; ours")
    bound: float = Field(0.9, gt=0, lt=1, description="how far a weight may go from 1, before rescaling; ours")


class CorrectGateSettings(Component):
    """The tokens of verified rollouts."""

    kind: Literal["correct"] = Field("correct", description="tokens of verified rollouts; ours")


class RandomGateSettings(Component):
    """A random share of the tokens."""

    kind: Literal["random"] = Field("random", description="a share of the tokens, at random; ours")
    share: Fraction = Field(0.5, description="share of tokens kept")


class RankedGateSettings(Component):
    """The share of the tokens at one end of an order."""

    kind: Literal["disagreement", "entropy"]
    share: Fraction = Field(0.5, description="share of tokens kept")
    side: Literal["low", "high"] = Field("high", description="which of them")


class DisagreementGateSettings(RankedGateSettings):
    """By the KL from the teacher."""

    kind: Literal["disagreement"] = Field("disagreement", description="a share by KL from the teacher; ours")


class EntropyGateSettings(RankedGateSettings):
    """By the student's entropy."""

    kind: Literal["entropy"] = Field("entropy", description="a share by the student's entropy; ours")


Gate = (
    NoGate
    | AlignedGateSettings
    | SoftGateSettings
    | SdarGateSettings
    | InfluenceGateSettings
    | CorrectGateSettings
    | RandomGateSettings
    | DisagreementGateSettings
    | EntropyGateSettings
)


class LossConfig(Component):
    """The student's loss on its own tokens."""

    if TYPE_CHECKING:
        divergence: DivergenceSettings = DivergenceSettings(kind="forward_kl")
    else:
        divergence: Annotated[tagged(_DIVERGENCE_KINDS.values(), "kind", "forward_kl"), _DISTILS] = _DIVERGENCE_KINDS[
            "forward_kl"
        ]()
    clip: Annotated[Literal["none", "per_token", "per_entry"], _DISTILS] = Field(
        "per_token", description="ours; OPSD: per_entry; for sampled_token, which a clip biases, none unless written"
    )
    clip_threshold: Annotated[
        float | None, _DISTILS, ActsWhen(lambda c: c.loss.clip != "none", "loss.clip: per_token or per_entry")
    ] = Field(None, gt=0, description="nats; None: 0.05 for per_entry (OPSD), 2.0 for per_token (ours)")
    temperature: Annotated[float | None, _SAMPLES] = Field(
        None, gt=0, description="divides both logits; None: sampling.temperature (OPSD)"
    )
    reduction: Literal["sequence", "token"] = Field("sequence", description="paper: sequence; OPSD's code: token")
    gate: Annotated[Gate, *chosen("kind", "none"), _DISTILS] = NoGate()
    chunk_tokens: int | None = Field(
        None, ge=1, description="tokens whose logits exist at one time; None: as many as fit a byte budget"
    )

    @property
    def threshold(self) -> float:
        """The clip threshold in force, nats."""
        default = {"none": float("inf"), "per_token": 2.0, "per_entry": 0.05}[self.clip]
        return default if self.clip_threshold is None or self.clip == "none" else self.clip_threshold

    @model_validator(mode="before")
    @classmethod
    def _an_estimate_is_not_clipped_unasked(cls, values: object) -> object:
        """`clip: none` where none is written beside a divergence whose expectation a clip would change."""
        if not isinstance(values, Mapping) or "clip" in values:
            return values
        written = values.get("divergence")
        kind = written.get("kind") if isinstance(written, Mapping) else getattr(written, "kind", written)
        estimate = isinstance(kind, str) and kind in DIVERGENCES and DIVERGENCES[kind].estimates
        return {**values, "clip": "none"} if estimate else values

    @model_validator(mode="after")
    def _clip_fits(self) -> LossConfig:
        if self.clip == "per_entry" and not DIVERGENCES[self.divergence.kind].clips_entries:
            raise ValueError(
                f"clip: per_entry has no entries to clip under divergence: {self.divergence.kind}; use none"
            )
        return self


class FrozenTeacher(Component):
    """The initial policy."""

    weights: Literal["frozen"] = Field("frozen", description="the initial policy: OPSD")


class LiveTeacher(Component):
    """The student itself."""

    weights: Literal["live"] = Field("live", description="the student itself")


class EmaTeacher(Component):
    """A running average of the student."""

    weights: Literal["ema"] = Field("ema", description="a running average of the student")
    decay: float = Field(0.99, ge=0, lt=1, description="per student update")


class RefreshedTeacher(Component):
    """A copy of the student, made anew every so often."""

    weights: Literal["refresh"] = Field("refresh", description="a copy of the student, every so often")
    every: int = Field(50, ge=1, description="student updates between copies")


TeacherConfig = FrozenTeacher | LiveTeacher | EmaTeacher | RefreshedTeacher
"""The teacher's weights: a clock of their own, independent of the exposure."""


_FILTERS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
"""The settings that forbid tokens in `sampling`, and the values that forbid none."""


def _is_base(url: str) -> bool:
    """Whether it is scheme, host and port, and nothing else."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, half an IPv6 address
        return False
    return known and parts.username is None and not (parts.path.strip("/") or parts.query or parts.fragment)


class ServerSettings(Component):
    """Servers that write the rollouts (docs/scale.md): vLLM, or whatever speaks its completions on token ids."""

    urls: Annotated[tuple[str, ...], Strict(False), BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)] = (
        Field(("http://127.0.0.1:8000",), min_length=1, description="http://HOST:PORT of each; they share the requests")
    )
    folder: str | None = Field(
        None, description="for the weights, seen by trainer and servers; None: a temporary one of this machine"
    )
    publish: Literal["auto", "adapter", "weights"] = Field(
        "auto",
        description="what the servers load after each update; auto: the adapter if there is one, else all weights",
    )
    draws: Literal["seed", "keyed"] = Field(
        "seed", description="seed: the server's own, from a seed per request; keyed: ours, by atesd.engine.keyed_draws"
    )
    drift_limit: float = Field(
        0.5, gt=0, description="nats per token between its log-probabilities and ours, above which a run stops; ours"
    )
    drift_alarm: float = Field(0.05, gt=0, description="nats per token above which the report warns; ours")
    timeout: float | None = Field(
        None, gt=0, description="seconds for one answer, waiting included; None: 600, more for long completions (docs)"
    )
    retries: int = Field(3, ge=0, le=20, description="repetitions of a request that failed")
    retry_wait: float = Field(1.0, ge=0, description="seconds before the first repetition, doubled for each other")
    sleep: bool = Field(
        False, description="the servers give up their GPU memory between rollouts: for GPUs that the trainer shares"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ServerSettings:
        for url in self.urls:
            if not _is_base(url):
                raise ValueError(f"urls: {url!r} is no address of a server; write it as http://HOST:PORT")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError(f"urls: one of {', '.join(self.urls)} stands twice")
        if self.drift_alarm > self.drift_limit:
            raise ValueError(
                f"drift_alarm {self.drift_alarm:g} is above drift_limit {self.drift_limit:g}, where a run stops: it "
                "would never be seen"
            )
        return self

    def answer_seconds(self, completion_tokens: int = 0, at_once: float = 1) -> float:
        """Seconds for one of `at_once` completions that a server is asked for together: `timeout`, or by their length.

        600, or what 4 tokens a second for each, and 500 for all together, take where that is longer. Both assumed, on
        the slow side: a server that dies breaks the connection, and one that hangs is rare.
        """
        by_length = completion_tokens * max(1 / 4, at_once / 500)
        return max(600.0, by_length) if self.timeout is None else self.timeout


class SamplingConfig(Component):
    """How the student writes its rollouts."""

    temperature: Annotated[float, _SAMPLES] = Field(1.0, gt=0, description="OPSD: 1.1")
    top_p: Annotated[float, _SAMPLES] = Field(1.0, gt=0, le=1, description="OPSD: 0.95")
    top_k: Annotated[int, _SAMPLES] = Field(0, ge=0, description="0: off; OPSD: 20")
    min_p: Annotated[float, _SAMPLES] = Field(0.0, ge=0, lt=1, description="0: off")
    completion_tokens: int = Field(1024, ge=1, description="longest completion; OPSD: 1024")
    batch_size: Annotated[
        int,
        ActsWhen(lambda c: c.sampling.engine != "server", "a sampling.engine other than server, which batches itself"),
    ] = Field(64, ge=1, description="rows decoded together; does not change the draws")
    engine: Literal["auto", "builtin", "transformers", "server"] = Field(
        "auto", description="what runs the network; auto: builtin for Llama, Qwen2 and Qwen3, else transformers"
    )
    server: Annotated[ServerSettings, ActsWhen(lambda c: c.sampling.engine == "server", "sampling.engine: server")] = (
        ServerSettings()
    )

    @property
    def filters_off(self) -> list[str]:
        """What to write so that no token is forbidden, such as `sampling.top_p: 1`; empty where none is."""
        return [f"sampling.{name}: {off:g}" for name, off in _FILTERS.items() if getattr(self, name) != off]


class TrainConfig(Component):
    """The optimiser, the clock and the checkpoints."""

    method: Literal["distill", "sft", "grpo"] = Field("distill", description="sft and grpo are the baselines")
    num_updates: int = Field(100, ge=1, description="OPSD: 100")
    batch_size: int = Field(32, ge=1, description="rollouts per update; OPSD: 32")
    micro_batch_size: Annotated[
        int,
        ActsWhen(
            lambda c: c.train.micro_batch_tokens is None or c.decides or c.looks_ahead, "train.micro_batch_tokens: null"
        ),
    ] = Field(8, ge=1, description="rows scored together; does not change the gradient")
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="in place of micro_batch_size: as many rows as fit, padding included, at least one"
    )
    learning_rate: float = Field(5e-6, ge=0, description="AdamW; OPSD: 5e-6")
    warmup_updates: int = Field(0, ge=0, description="linear from 0")
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW")
    max_grad_norm: float = Field(0.1, gt=0, description="OPSD: 0.1")
    group_size: Annotated[
        int,
        ActsWhen(
            lambda c: c.train.samples_per_problem > 1,
            "train.method: grpo, or train.grpo_weight above 0, with train.baseline: group",
        ),
    ] = Field(8, ge=2, description="samples per problem")
    grpo_weight: float = Field(
        0.0, ge=0, description="adds GRPO's loss on the same rollouts to distillation; ours: a baseline. 0: none"
    )
    baseline: Annotated[
        Literal["group", "difficulty"],
        ActsWhen(
            lambda c: c.train.has_policy_gradient, "train.method: grpo, or train.method: distill with train.grpo_weight"
        ),
    ] = Field(
        "group",
        description="what a reward is compared with in the policy gradient: the samples of its problem, in units of "
        "their deviation (GRPO), or the mean of the update's problems of its difficulty, each sampled once; ours",
    )
    evaluate_every: int = Field(25, ge=0, description="updates between validations; 0: never")
    checkpoint_every: int = Field(25, ge=1, description="updates between checkpoints; OPSD: 25")
    keep_checkpoints: int = Field(3, ge=1, description="newest ones kept; older ones are deleted")
    log_samples: Annotated[int, ActsWhen(lambda c: c.train.evaluate_every > 0, "train.evaluate_every above 0")] = Field(
        2, ge=0, description="rollouts with both contexts kept at each validation"
    )
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
        return self.group_size if self.has_policy_gradient and self.baseline == "group" else 1

    @property
    def has_policy_gradient(self) -> bool:
        """Whether the likelihood of rollouts is weighted by the advantage of their rewards."""
        return self.method == "grpo" or (self.method == "distill" and self.grpo_weight > 0)


class EvaluationConfig(Component):
    """Average@k on held-out problems."""

    samples: int = Field(2, ge=1, description="k; the paper's tables: 12")
    temperature: float = Field(1.0, ge=0, description="0: greedy")
    top_p: Annotated[float, _DRAWN] = Field(1.0, gt=0, le=1, description="1: off")
    top_k: Annotated[int, _DRAWN] = Field(0, ge=0, description="0: off")
    min_p: Annotated[float, _DRAWN] = Field(0.0, ge=0, lt=1, description="0: off")
    completion_tokens: int | None = Field(None, ge=1, description="None: sampling.completion_tokens")


class Config(Component):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    if TYPE_CHECKING:
        exposure: ExposureSettings = LearnedSettings()
    else:
        exposure: Annotated[
            tagged(exposure_kinds().values(), "kind", "learned", {"per_problem": "staircase"}), _DISTILS
        ] = LearnedSettings()
    credit: CreditConfig = CreditConfig()
    alignment: Annotated[
        AlignmentConfig, ActsWhen(lambda c: c.looks_ahead, "exposure.kind: aligned, or loss.gate: aligned or soft")
    ] = AlignmentConfig()
    hinted: Annotated[
        HintedConfig,
        ActsWhen(
            lambda c: c.looks_ahead or c.train.method == "grpo",
            "exposure.kind: aligned, loss.gate: aligned or soft, or train.method: grpo",
        ),
    ] = HintedConfig()
    loss: LossConfig = LossConfig()
    teacher: Annotated[TeacherConfig, *chosen("weights", "frozen"), _DISTILS] = FrozenTeacher()
    sampling: SamplingConfig = SamplingConfig()
    train: TrainConfig = TrainConfig()
    evaluation: Annotated[EvaluationConfig, _GRADED] = EvaluationConfig()

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
            if verified and self.decides:
                raise ValueError(
                    f"credit.progress_signal: {self.credit.progress_signal} needs a checker; use probe_nll"
                )
            if self.distils and self.exposure.follows_verdicts:
                raise ValueError(f"exposure.kind: {self.exposure.kind} follows verdicts; set data.checker: math")
            if self.looks_ahead:
                raise ValueError(
                    "exposure.kind: aligned and loss.gate: aligned or soft need verified rollouts; set data.checker"
                )
            if self.distils and self.loss.gate.kind in ("correct", "influence"):
                raise ValueError(f"loss.gate: {self.loss.gate.kind} needs verified rollouts; set data.checker")
            if self.train.has_policy_gradient:
                raise ValueError("train.method: grpo needs verified rewards, and so does grpo_weight; set data.checker")
        off = self.sampling.filters_off
        if self.decides and self.credit.progress_signal == "probe_gain" and off:
            raise ValueError(
                f"credit.progress_signal: probe_gain does not go with {off[0].partition(':')[0]}: its importance "
                "weights cannot see a completion that the filter forbade before and admits now, so that they find a "
                f"loss or a gain where there is none; set {', '.join(off)}, or credit.progress_signal: probe_success"
            )
        if self.granularity == "per_token" and self.loss.gate.kind not in ("none", "aligned"):
            raise ValueError(
                f"loss.gate: {self.loss.gate.kind} with exposure.granularity: per_token: a token that chooses "
                "its ratio is gated by its own alignment or not at all; set loss.gate: none or aligned"
            )
        if self.granularity == "per_token":
            self._require_whole_rollouts()
        if self.centres_by_difficulty and not self.data.has_difficulties:
            asks = "train.baseline: difficulty" if self.train.has_policy_gradient else "loss.gate: influence"
            raise ValueError(
                f"{asks} compares a verdict with those of other problems of its difficulty, and data.source: "
                f"{self.data.source_name} names none; set data.columns.difficulty, or train.baseline: group with "
                "train.grpo_weight above 0"
            )
        gate = self.loss.gate
        if isinstance(gate, LookAheadGate) and gate.skip == "update" and self.train.has_policy_gradient:
            raise ValueError(
                f"loss.gate.skip: update would skip the policy gradient of train.grpo_weight {self.train.grpo_weight:g}"
                " too; set loss.gate.skip: rollouts or none"
            )
        displaced = self.looks_ahead and self.alignment.displaces
        if displaced and self.model.dtype == "bfloat16" and self.model.lora is None:
            raise ValueError(
                "model.dtype: bfloat16 without model.lora rounds away the displacement that alignment.parameters: "
                f"{self.alignment.parameters} needs; set alignment.parameters: last_half, last_mlp or features, "
                "model.lora, or model.dtype: float32"
            )
        if self.looks_ahead and self.model.sharding != "none":
            raise ValueError(
                f"model.sharding: {self.model.sharding} does not go with exposure.kind: aligned or loss.gate: aligned "
                "or soft, whose ranks displace the weights at different times; set model.sharding: none"
            )
        if self.model.sharding != "none" and self.model.lora is not None and self.publishes_weights:
            raise ValueError(
                f"sampling.server.publish: weights merges the adapter in a copy of the model, and model.sharding: "
                f"{self.model.sharding} leaves no rank all of it; set sampling.server.publish: adapter"
            )
        if self.hinted.rollouts:
            self._require_hints()
        if self.data.source != "world" and self.model.path.startswith("world:"):
            raise ValueError(f"model.path: {self.model.path} speaks only the world's language; set data.source: world")
        if self.sampling.completion_tokens >= self.model.max_context_tokens:
            raise ValueError(
                f"sampling.completion_tokens {self.sampling.completion_tokens} leaves no room for a prompt in "
                f"model.max_context_tokens {self.model.max_context_tokens}"
            )
        return self

    def _require_whole_rollouts(self) -> None:
        """Raise `ValueError` where a gate of whole rollouts would meet tokens that choose their own ratio."""
        gate = self.loss.gate
        set_aside = {
            "permute: true": isinstance(gate, PermutableGate) and gate.permute,
            "skip: rollouts": isinstance(gate, LookAheadGate) and gate.skip == "rollouts",
        }
        for words in (words for words, given in set_aside.items() if given):
            raise ValueError(
                f"loss.gate.{words} does not go with exposure.granularity: per_token, where each token chooses its "
                "ratio and its gate together; leave it out, or set exposure.granularity: update"
            )

    def _require_hints(self) -> None:
        """Raise `ValueError` where hinted rollouts would leave nothing to train on, or mean nothing."""
        train, hinted = self.train, f"hinted.rollouts {self.hinted.rollouts}"
        most = train.batch_size if train.method == "grpo" else train.batch_size - 1
        if self.hinted.rollouts > most:
            raise ValueError(f"{hinted} is more than {most} of train.batch_size {train.batch_size}; lower it")
        groups = train.batch_size // train.samples_per_problem
        if train.method == "grpo" and self.hinted.rollouts % groups:
            raise ValueError(f"{hinted} is not a multiple of the {groups} groups of an update, which share it equally")
        if train.grpo_weight:
            raise ValueError(f"{hinted} does not go with train.grpo_weight, whose groups they would tear; set it to 0")
        if self.views.answer == "only":
            raise ValueError(f"{hinted} needs a view that grows with its ratio; set views.answer: keep or withhold")
        if self.distils and self.exposure.reference_ablation != "off":
            raise ValueError(
                f"{hinted} shows the student the reference of which exposure.reference_ablation: "
                f"{self.exposure.reference_ablation} deprives the teacher; set it to off, or hinted.rollouts: 0"
            )
        if self.looks_ahead and self.alignment.success == "references":
            raise ValueError(f"{hinted} is not read by alignment.success: references; set hinted.rollouts: 0")

    @property
    def distils(self) -> bool:
        """Whether a teacher is distilled; the baselines have none."""
        return self.train.method == "distill"

    @property
    def decides(self) -> bool:
        """Whether ratios are decided during the run, and decisions are rewarded and logged."""
        return self.distils and self.exposure.decides

    @property
    def looks_ahead(self) -> bool:
        """Whether exposure or gate follow the first-order look-ahead."""
        return self.distils and (
            isinstance(self.exposure, AlignedSettings) or isinstance(self.loss.gate, LookAheadGate)
        )

    @property
    def reads_advantages(self) -> bool:
        """Whether each rollout's verdict is compared with others: by a policy gradient, or by the gate."""
        return self.train.has_policy_gradient or (self.distils and self.loss.gate.kind == "influence")

    @property
    def centres_by_difficulty(self) -> bool:
        """Whether it is compared with those of its difficulty, and not with a group of its own problem."""
        return self.reads_advantages and self.train.samples_per_problem == 1

    @property
    def publishes_weights(self) -> bool:
        """Whether servers are given all weights, also where an adapter is trained."""
        return self.sampling.engine == "server" and self.sampling.server.publish == "weights"

    @property
    def granularity(self) -> Granularity:
        """What has a ratio of its own."""
        return self.exposure.granularity if isinstance(self.exposure, GranularSettings) else "update"

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest ratio that is drawn."""
        settings = self.exposure
        return (settings.ratio_min, settings.ratio_max) if isinstance(settings, BoundedSettings) else (0.0, 1.0)

    @property
    def policy(self) -> PolicyConfig:
        """The policy of the learned exposure; the usual one where another exposure decides."""
        return self.exposure.policy if isinstance(self.exposure, LearnedSettings) else PolicyConfig()

    @property
    def loss_temperature(self) -> float:
        """What both logits are divided by in the loss."""
        return self.loss.temperature if self.loss.temperature is not None else self.sampling.temperature

    @property
    def rule_note(self) -> str:
        """What the run can tell the rule that decides its ratios; empty where no rule does."""
        run = Run(self.credit, self.train.num_updates, self.train.seed)
        return self.exposure.budget(run, self.train.batch_size) if self.decides else ""

    @property
    def group_note(self) -> str:
        """That a ratio for each difficulty is one for all where the data has no difficulties; else empty."""
        if "difficulty" not in self.granularity or self.data.has_difficulties:
            return ""
        return (
            f"exposure.granularity: {self.granularity}, and data.source: {self.data.source_name} names no difficulty: "
            "all problems count as one; set data.columns.difficulty where there is one"
        )

    @property
    def estimate_note(self) -> str:
        """That the tokens come from another distribution than the loss's estimate takes for granted; else empty."""
        mend = self.sampling.filters_off + ["loss.temperature: null"] * (
            self.loss_temperature != self.sampling.temperature
        )
        if not (mend and DIVERGENCES[self.loss.divergence.kind].estimates):
            return ""
        kind = f"loss.divergence {self.loss.divergence.kind}"
        return f"{kind}: biased, as the tokens are not drawn from the student itself; set {', '.join(mend)}"

    @property
    def evaluation_tokens(self) -> int:
        """Longest completion in evaluation, tokens."""
        return self.evaluation.completion_tokens or self.sampling.completion_tokens

    @property
    def factories(self) -> dict[str, str]:
        """What of this run functions of the user's decide: the name of each by the setting that names it."""
        named = {
            "exposure.factory": getattr(self.exposure, "factory", "") if self.distils else "",
            "credit.reward": self.credit.reward if self.decides else "",
            "data.segmenter": self.data.segmenter if self.data.source != "world" else "",
            "data.checker": self.data.checker,
        }
        return {setting: name for setting, name in named.items() if is_named(name)}

    @property
    def checker(self) -> str:
        """The answer checker in force: exact, math, none, or the user's."""
        if self.data.checker == "auto":
            return "exact" if self.data.source == "world" else "math"
        return self.data.checker
