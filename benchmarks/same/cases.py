"""What is compared: every packaged CPU recipe, method, exposure, gate, loss, teacher and control, at twelve updates.

A case gives only settings that act. `settings` are written for the tree before a change; the tree after it gets the
same, with the paths in `RENAMED` replaced, unless the case says `after` itself.

In a setting `{run:NAME}` stands for the run folder of another case on the same side, `{material}` for the folder that
`benchmarks.same.material` makes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

RENAMED: Mapping[str, str] = {}
"""Setting of the tree before -> setting of the tree after, such as "policy.hidden": "exposure.policy.hidden"."""

UPDATES, CUT = 12, 6
"""Updates of a run, and those after which a resumed one was cut off."""

_RUN = re.compile(r"\{run:([^}]+)\}")


@dataclass(frozen=True, slots=True)
class Case:
    """One run on each side. `resumed`: the side after is cut back to `CUT` updates and goes on from there."""

    name: str
    settings: tuple[str, ...]
    recipe: str = "micro"
    after: tuple[str, ...] | None = None
    resumed: bool = False
    real: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the cases whose runs this one reads."""
        return tuple(dict.fromkeys(_RUN.findall(" ".join([*self.settings, *(self.after or ())]))))

    @property
    def settings_after(self) -> tuple[str, ...]:
        """Its settings for the tree after the change."""
        return self.after if self.after is not None else tuple(_renamed(setting) for setting in self.settings)

    def key(self, others: Mapping[str, Case]) -> str:
        """A name for the folder of its run before the change, which changes with anything that the run depends on."""
        content = [self.recipe, self.settings, [others[name].key(others) for name in self.needs]]
        return f"{self.name}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]}"


def _renamed(setting: str) -> str:
    path, equals, value = setting.partition("=")
    return f"{RENAMED.get(path, path)}{equals}{value}"


SHORT = (
    "data.train_size=96",
    "data.validation_size=8",
    "data.test_size=8",
    "data.probe_size=16",
    f"train.num_updates={UPDATES}",
    f"train.evaluate_every={CUT}",
    f"train.checkpoint_every={CUT}",
    "evaluation.samples=1",
)
"""Enough to see every part at work in a second; a large step, so that the student moves."""
SMALL = (*SHORT, "train.batch_size=16", "train.micro_batch_size=8", "train.learning_rate=2e-3")
HOLD = ("credit.hold_updates=2",)
DECIDES = (*HOLD, "credit.lookahead_updates=2")
LEARNED = (*DECIDES, "exposure.kind=learned", "exposure.policy.decisions_per_policy_update=2")
ALIGNED = (*HOLD, "alignment.min_correct=2")
FULL = "exposure.kind=full"
RIVALS = (
    "success_setpoint",
    "control_share",
    "success_trend",
    "thresholds",
    "item_response",
    "annealing",
    "binary_search",
)
ABLATIONS = ("none", "shuffled", "wrong_answer", "filler")
BY_TOKENS = {"micro_batch_tokens": ["train.micro_batch_tokens=200"]}
HALF = ("exposure.kind=fixed", "exposure.reveal_ratio=0.5")


def _group(
    prefix: str, shared: Iterable[str], variants: Mapping[str, Sequence[str]], base: Sequence[str]
) -> list[Case]:
    """A case `prefix-name` for each variant; an empty name is the prefix alone."""
    return [
        Case(f"{prefix}-{name}" if name else prefix, (*base, *shared, *settings)) for name, settings in variants.items()
    ]


def _without(path: str) -> tuple[str, ...]:
    """`SMALL` less one setting, which another one rules out."""
    return tuple(setting for setting in SMALL if setting.partition("=")[0] != path)


def _recipes() -> list[Case]:
    """Each packaged CPU recipe with its own settings, at fewer updates and fewer evaluation problems."""
    names = ("micro", "micro-bandit", "micro-opsd", "micro-paper", "micro-steps")
    return [Case(f"recipe-{name}", SHORT, recipe=name) for name in names]


def _exposures() -> list[Case]:
    plain = {
        "full": [FULL],
        "fixed": ["exposure.kind=fixed", "exposure.reveal_ratio=0.75"],
        "fixed-nothing": ["exposure.kind=fixed", "exposure.reveal_ratio=0"],
        "schedule-linear": ["exposure.kind=schedule"],
        "schedule-cosine": ["exposure.kind=schedule", "exposure.schedule=cosine"],
        "schedule-down": ["exposure.kind=schedule", "exposure.schedule_start=0.9", "exposure.schedule_end=0.1"],
        "replay": ["exposure.kind=replay", "exposure.replay_run={run:learned}"],
        "replay-shuffled": [
            "exposure.kind=replay",
            "exposure.replay_run={run:learned}",
            "exposure.replay_order=shuffled",
        ],
        "custom": ["exposure.kind=custom", "exposure.factory=benchmarks.same.exposure:make"],
        "custom-settings": [
            "exposure.kind=custom",
            "exposure.factory=benchmarks.same.exposure:make",
            "exposure.factory_settings={gain: 0.5}",
        ],
    }
    random = {
        "": [],
        "bounds": ["exposure.ratio_min=0.2", "exposure.ratio_max=0.6"],
        "per_difficulty": ["exposure.granularity=per_difficulty"],
        "per_problem": ["exposure.granularity=per_problem"],
    }
    decided = {
        "bandit": ["exposure.kind=bandit"],
        "bandit-settings": [
            "exposure.kind=bandit",
            "exposure.arms=3",
            "exposure.prior_deviation=2.0",
            "exposure.smoothness=0.1",
            "exposure.discount=0.9",
        ],
        "bandit-bounds": ["exposure.kind=bandit", "exposure.ratio_min=0.25", "exposure.ratio_max=0.75"],
        "setpoint": ["exposure.kind=setpoint"],
        "setpoint-target": [
            "exposure.kind=setpoint",
            "exposure.target_kl=0.02",
            "exposure.gain=0.3",
            "exposure.start=0.8",
        ],
        "setpoint-bounds": [
            "exposure.kind=setpoint",
            "exposure.gain=2.0",
            "exposure.ratio_min=0.48",
            "exposure.ratio_max=0.52",
        ],
        "search": ["exposure.kind=staircase"],
        "search-settings": [
            "exposure.kind=staircase",
            "exposure.step_solved=0.3",
            "exposure.step_unsolved=-0.2",
            "exposure.start=0.9",
        ],
        **{name: [f"exposure.kind={name}"] for name in RIVALS},
        "search-per_difficulty": ["exposure.kind=staircase", "exposure.granularity=per_difficulty"],
    }
    return [
        *(Case(name, (*SMALL, *settings)) for name, settings in plain.items()),
        *_group("random", ["exposure.kind=random", *HOLD], random, SMALL),
        *(Case(name, (*SMALL, *DECIDES, *settings)) for name, settings in decided.items()),
    ]


def _learned() -> list[Case]:
    """The learned exposure: granularity, credit and policy. The recipe's kind is learned."""
    signals = ("train_kl", "probe_nll", "probe_gain", "probe_kl", "train_success")
    variants = {
        "": [],
        "per_difficulty": ["exposure.granularity=per_difficulty"],
        "per_problem": ["exposure.granularity=per_problem"],
        "bounds": ["exposure.ratio_min=0.2", "exposure.ratio_max=0.6"],
        "seed": ["train.seed=7"],
        "paper": ["credit.preset=paper"],
        "paper-signed": ["credit.preset=paper", "credit.drop=signed"],
        **{f"{signal}": [f"credit.progress_signal={signal}"] for signal in signals},
        "probe_ratio": ["credit.progress_signal=probe_kl", "credit.probe_ratio=0.5"],
        "positive": ["credit.progress_signal=probe_nll", "credit.drop=positive"],
        "grounding": ["credit.grounding_weight=0.2"],
        "withheld": ["credit.grounding_weight=0.2", "credit.grounding=withheld"],
        "standardised": ["credit.mixing=standardised", "credit.grounding_weight=0.2"],
        "hold_end": ["credit.window_start=hold_end"],
        "probe_every": ["credit.probe_every=1"],
        "discount": ["credit.discount=0.5", "credit.probe_every=1"],
        "shuffled": ["credit.shuffle_rewards=true", "exposure.policy.decisions_per_policy_update=3"],
        "untrained": ["exposure.policy.learning_rate=0"],
        "policy": [
            "exposure.policy.hidden=8",
            "exposure.policy.learning_rate=0.05",
            "exposure.policy.beta1=0.9",
            "exposure.policy.entropy_ceiling=-0.5",
            "exposure.policy.entropy_cost=3.0",
            "exposure.policy.ema_decay=0.5",
        ],
        "long_window": ["credit.lookahead_updates=4"],
    }
    shuffled = ("exposure.kind=bandit", "credit.shuffle_rewards=true")
    return [
        *_group("learned", LEARNED, variants, SMALL),
        Case("learned-unverified", (*_without("evaluation.samples"), *LEARNED, "data.checker=none")),
        Case("bandit-shuffled", (*SMALL, *DECIDES, *shuffled)),
    ]


def _aligned() -> list[Case]:
    """The look-ahead as a controller."""
    granularities = ("update", "per_difficulty", "per_problem", "per_token")
    successes = ("centred", "references", "shuffled")
    fallbacks = {
        "fixed": ["exposure.fallback.reveal_ratio=0.3"],
        "random": [],
        "schedule": ["exposure.fallback.schedule=cosine"],
    }
    variants = {
        **{name: [f"exposure.granularity={name}"] for name in granularities},
        "per_token-gated": ["exposure.granularity=per_token", "loss.gate=aligned"],
        "gated": ["loss.gate=aligned"],
        **{name: [f"alignment.success={name}"] for name in successes},
        "per_token-shuffled": ["exposure.granularity=per_token", "alignment.success=shuffled"],
        "ratios": ["exposure.ratios=[0, 0.5, 1]"],
        "few_rollouts": ["alignment.direction_rollouts=4"],
        "smoothing": ["exposure.smoothing=0.9"],
        "logit_change": ["alignment.logit_change=0.2"],
        "optimiser": ["alignment.metric=optimiser"],
        "memory": ["alignment.memory=0.9"],
        **{name: [f"alignment.parameters={name}"] for name in ("last_layer", "last_half", "last_mlp", "features")},
        "token_reduction": ["loss.reduction=token"],
        "micro_batch_tokens": ["train.micro_batch_tokens=200"],
        **{
            f"fallback-{name}": ["alignment.min_correct=14", f"exposure.fallback.kind={name}", *own]
            for name, own in fallbacks.items()
        },
    }
    return _group("aligned", [*ALIGNED, "exposure.kind=aligned"], variants, SMALL)


def _losses() -> list[Case]:
    divergences = {
        name: [f"loss.divergence.kind={name}"]
        for name in ("forward_kl", "reverse_kl", "jensen_shannon", "top_k", "sampled_token")
    }
    own = {"jensen_shannon": ["loss.divergence.teacher_weight=0.3"], "top_k": ["loss.divergence.k=5"]}
    clip = {
        "per_token": ["loss.clip=per_token", "loss.clip_threshold=0.1"],
        "per_entry": ["loss.clip=per_entry", "loss.clip_threshold=0.01"],
    }
    clipped = {
        f"{name}-{kind}": [*setting, *own.get(name, []), *clip[kind]]
        for name, setting in divergences.items()
        for kind in clip
        if kind == "per_token" or name not in ("top_k", "sampled_token")
    }
    variants = {
        **{name: [*setting, *own.get(name, [])] for name, setting in divergences.items()},
        **clipped,
        "per_token-default": ["loss.clip=per_token"],
        "per_entry-default": ["loss.clip=per_entry"],
        "token": ["loss.reduction=token"],
        "temperature": ["loss.temperature=1.7"],
        "chunks": ["loss.chunk_tokens=7"],
    }
    gates = {
        "aligned": [*ALIGNED, "loss.gate=aligned"],
        "aligned-token": [*ALIGNED, "loss.gate=aligned", "loss.reduction=token"],
        "aligned-features": [*ALIGNED, "loss.gate=aligned", "alignment.parameters=features", "alignment.memory=0.9"],
        "aligned-permute": [*ALIGNED, "loss.gate.kind=aligned", "loss.gate.permute=true"],
        "aligned-skip": [*ALIGNED, "loss.gate.kind=aligned", "loss.gate.skip=rollouts"],
        "soft": [*ALIGNED, "loss.gate=soft"],
        "sdar": ["loss.gate=sdar"],
        "influence": ["loss.gate=influence"],
        "correct": ["loss.gate.kind=correct"],
        "random": ["loss.gate.kind=random", "loss.gate.share=0.3"],
        **{
            f"{kind}-{side}": [f"loss.gate.kind={kind}", "loss.gate.share=0.3", f"loss.gate.side={side}"]
            for kind in ("disagreement", "entropy")
            for side in ("high", "low")
        },
    }
    learned = {
        "aligned": ["loss.gate=aligned", "alignment.min_correct=2"],
        "disagreement": ["loss.gate.kind=disagreement", "loss.gate.share=0.3"],
    }
    return [
        *_group("loss", HALF, variants, SMALL),
        *_group("gate", HALF, gates, SMALL),
        *_group("learned-gate", LEARNED, learned, SMALL),
    ]


def _controls_and_views() -> list[Case]:
    controls = {name: [f"exposure.reference_ablation={name}"] for name in ABLATIONS}
    views = {
        "withhold": ["views.answer=withhold"],
        "only": ["views.answer=only"],
    }
    learned = {name: controls[name] for name in ("shuffled", "wrong_answer")}
    return [
        *_group("control", HALF, controls, SMALL),
        *_group("learned-control", LEARNED, learned, SMALL),
        *_group("views", HALF, views, SMALL),
    ]


def _teachers() -> list[Case]:
    variants = {
        "live": ["teacher.weights=live"],
        "ema": ["teacher.weights=ema", "teacher.decay=0.9"],
        "refresh": ["teacher.weights=refresh", "teacher.every=4"],
    }
    return [
        *_group("teacher", HALF, variants, SMALL),
        *_group("aligned-teacher", [*ALIGNED, "exposure.kind=aligned"], {"ema": variants["ema"]}, SMALL),
        *_group("learned-teacher", LEARNED, {"ema": variants["ema"], "refresh": variants["refresh"]}, SMALL),
    ]


def _methods() -> list[Case]:
    group = "train.group_size=4"
    variants = {
        "sft": ["train.method=sft"],
        "sft-token": ["train.method=sft", "loss.reduction=token"],
        "grpo": ["train.method=grpo"],
        "grpo-group": ["train.method=grpo", group],
        "grpo-token": ["train.method=grpo", group, "loss.reduction=token"],
        "grpo-difficulty": ["train.method=grpo", "train.baseline=difficulty"],
        "grpo-hinted": ["train.method=grpo", group, "hinted.rollouts=4", "hinted.prompt=student"],
        "gate-hinted": [*HALF, *ALIGNED, "loss.gate=aligned", "hinted.rollouts=4"],
        "grpo-temperature": ["train.method=grpo", group, "sampling.temperature=1.3"],
        "beside-full": [FULL, "train.grpo_weight=1.0", group],
        "beside-half": [*HALF, "train.grpo_weight=0.3", group],
        "beside-learned": [*LEARNED, "train.grpo_weight=0.3", group],
        "beside-aligned": [*ALIGNED, "exposure.kind=aligned", "train.grpo_weight=0.3", group],
        "beside-gate": [*HALF, *ALIGNED, "loss.gate=aligned", "train.grpo_weight=0.3", group],
    }
    return [
        *_group("method", [], variants, SMALL),
        *_group("method-sft", ["train.method=sft"], BY_TOKENS, _without("train.micro_batch_size")),
    ]


def _models() -> list[Case]:
    lora = "model.lora={rank: 4, alpha: 8}"
    bfloat = "model.dtype=bfloat16"
    variants = {
        "lora": [*HALF, lora],
        "lora-some": [*HALF, "model.lora={rank: 2, alpha: 4, target_modules: [q_proj, v_proj]}"],
        "lora-ema": [*HALF, lora, "teacher.weights=ema", "teacher.decay=0.9"],
        "lora-live": [*HALF, lora, "teacher.weights=live"],
        "lora-sft": [lora, "train.method=sft"],
        "lora-learned": [*LEARNED, lora],
        "lora-aligned": [*ALIGNED, lora, "exposure.kind=aligned"],
        "bfloat16": [*HALF, bfloat],
        "bfloat16-lora": [*HALF, bfloat, lora],
        "bfloat16-lora-gate": [*HALF, *ALIGNED, bfloat, lora, "loss.gate=aligned"],
        "checkpointing": [*HALF, "model.gradient_checkpointing=true"],
        "eager": [*HALF, "model.attention=eager"],
        "system": [*HALF, "model.system_prompt=a"],
        "short_context": [FULL, "model.max_context_tokens=110"],
        **{f"world-{name}": [*HALF, f"model.path=world:{name}"] for name in ("b", "c", "bad")},
    }
    return _group("model", [], variants, SMALL)


def _draws() -> list[Case]:
    """Sampling, evaluation, the optimiser and the problems."""
    variants = {
        "sampling": [
            "sampling.temperature=1.2",
            "sampling.top_p=0.9",
            "sampling.top_k=12",
            "sampling.min_p=0.02",
            "sampling.completion_tokens=30",
        ],
        "decode_rows": ["sampling.batch_size=5"],
        "engine-transformers": ["sampling.engine=transformers"],
        "engine-builtin": ["sampling.engine=builtin"],
        "greedy": ["evaluation.temperature=0"],
        "evaluation": [
            "evaluation.samples=3",
            "evaluation.temperature=0.8",
            "evaluation.top_p=0.9",
            "evaluation.top_k=8",
            "evaluation.min_p=0.02",
            "evaluation.completion_tokens=24",
        ],
        "no_evaluation": ["train.evaluate_every=0"],
        "samples": ["train.log_samples=6"],
        "linear": ["train.learning_rate_schedule=linear", "train.warmup_updates=4"],
        "cosine": ["train.learning_rate_schedule=cosine", "train.warmup_updates=2", "train.weight_decay=0.1"],
        "norm": ["train.max_grad_norm=0.05"],
        "steps": ["data.leap_share=0"],
        "leaps-anywhere": ["data.leap_probability=0.4"],
        "problems": ["data.unknown_facts=2", "data.min_difficulty=3", "data.max_difficulty=5", "data.seed=3"],
    }
    return [
        *_group("draws", HALF, variants, SMALL),
        *_group("draws", HALF, BY_TOKENS, _without("train.micro_batch_size")),
    ]


def _texts() -> list[Case]:
    """Problems from a file, text views, the checkers and both chat templates, under a model with random weights."""
    base = (
        *SHORT,
        "model.path={material}/qwen3",
        "data.source={material}/problems.jsonl",
        "data.train_size=null",
        "data.probe_size=8",
        "sampling.completion_tokens=24",
        "train.batch_size=8",
        "train.micro_batch_size=4",
        "train.learning_rate=2e-3",
        "train.max_grad_norm=1.0",
        "train.threads=1",
    )
    variants = {
        "learned": [*LEARNED, "credit.progress_signal=probe_nll"],
        "exact": [*HALF, "data.checker=exact"],
        **{f"segments-{kind}": [*HALF, f"data.segmenter={kind}"] for kind in ("line", "sentence", "step", "token")},
        "templates": [
            *HALF,
            "model.student_template={enable_thinking: false}",
            "model.teacher_template={enable_thinking: true}",
            "model.system_prompt=a b",
        ],
        "plain": [*HALF, "model.chat_template=false"],
        "llama": [*HALF, "model.path={material}/llama"],
        "columns": [
            *HALF,
            "data.source={material}/columns.jsonl",
            "data.columns={problem: question, solution: rationale, answer: final, id: name, difficulty: level}",
            "data.on_bad_row=skip",
        ],
        "test_source": [*HALF, "data.test_source={material}/test.jsonl"],
        "views": [
            *HALF,
            "views.problem_text='{problem} ;'",
            "views.instruction=a",
            "views.reference_begin=b",
            "views.reference_end=c",
            "views.partial_note=d",
            "views.answer_text=e {answer}",
            "views.transition=f",
        ],
        "constant": [*HALF, "views.wording=constant"],
        **{f"control-{name}": [*HALF, f"exposure.reference_ablation={name}"] for name in ABLATIONS},
        "sft": ["train.method=sft"],
        "gate-aligned": [*HALF, *HOLD, "alignment.min_correct=1", "loss.gate=aligned"],
    }
    return [
        Case(f"text-{name}", (*base, *settings), recipe="{material}/text.yaml") for name, settings in variants.items()
    ]


def _resumed(cases: Sequence[Case]) -> list[Case]:
    """Runs with state of every kind, cut off in the middle and resumed: equal to the uninterrupted run before."""
    names = (
        "learned",
        "learned-per_problem",
        "learned-paper",
        "learned-standardised",
        "learned-gate-aligned",
        "random",
        "bandit",
        "bandit-shuffled",
        "setpoint",
        "search",
        "custom",
        "aligned-update",
        "aligned-per_problem",
        "aligned-per_token-gated",
        "aligned-optimiser",
        "aligned-memory",
        "success_setpoint",
        "binary_search",
        "gate-aligned",
        "teacher-ema",
        "teacher-refresh",
        "method-sft",
        "method-grpo",
        "method-beside-learned",
        "model-lora",
        "model-lora-ema",
        "draws-cosine",
    )
    of = {case.name: case for case in cases}
    return [Case(f"resumed-{name}", of[name].settings, of[name].recipe, of[name].after, True) for name in names]


def _real() -> list[Case]:
    """SmolLM2, fetched first; minutes each."""
    few = (
        "data.train_size=64",
        "data.validation_size=4",
        "data.test_size=4",
        "data.probe_size=4",
        "sampling.completion_tokens=32",
        f"train.num_updates={UPDATES}",
        "train.batch_size=2",
        f"train.checkpoint_every={UPDATES}",
    )
    start = (*few, "model.path=smollm2", "train.method=sft")
    aligned = (*few, "model.path=smollm2", *ALIGNED, "exposure.kind=aligned")
    return [
        Case("real-gsm", (*few, *LEARNED, f"train.evaluate_every={CUT}"), "smollm2-gsm", real=True),
        Case("real-sums", (*few, *LEARNED, "model.path=smollm2"), "smollm2-sums", real=True),
        Case("real-sums-start", start, "smollm2-sums", real=True),
        Case("real-sums-aligned", aligned, "smollm2-sums", real=True),
    ]


def all_cases() -> dict[str, Case]:
    """Every case by name, those that others read before them."""
    parts = (_learned, _exposures, _aligned, _losses, _controls_and_views, _teachers, _methods, _models, _draws, _texts)
    trained = [case for part in (_recipes, *parts) for case in part()]
    cases = [*trained, *_resumed(trained), *_real()]
    return {case.name: case for case in cases}


def with_needs(names: Iterable[str], cases: Mapping[str, Case]) -> list[Case]:
    """The named cases, each after those that it reads."""
    ordered: dict[str, Case] = {}
    for name in names:
        ordered.update({needed.name: needed for needed in with_needs(cases[name].needs, cases)})
        ordered[name] = cases[name]
    return list(ordered.values())
