"""Bytes and seconds of an update as sums and products: of the settings, the model's shape and the contexts' lengths.

Bytes follow what this program allocates and what autograd keeps of a Llama or Qwen layer, tensor by tensor; they were
held against measured peaks (`benchmarks/memory.py`). Seconds are operations and bytes over the vendors' speeds times
shares that are assumed to be reached, a high and a low one; no run on a GPU has checked them. Neither torch nor
transformers is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from atesd.config import Config, LoraConfig
from atesd.forecast.devices import BETWEEN_NODES, PER_NODE, DeviceKind
from atesd.maths.divergences import DIVERGENCES

Sharding = Literal["none", "full", "hybrid"]


@dataclass(frozen=True, slots=True)
class Reached:
    """Shares of the vendors' speeds that are reached: of products, of reading weights and cache, of links in a machine.

    `layer_step`: seconds that a layer of one decoding step takes at least, which is about ten kernels.
    """

    flops: float
    bandwidth: float
    link: float
    layer_step: float


FAST, SLOW = Reached(0.60, 0.75, 0.85, 20e-6), Reached(0.25, 0.30, 0.40, 200e-6)
"""The ends of the range of seconds, both assumed: well-fed kernels and captured graphs; small ones, launched singly."""

_ENTRY = {"float32": 4, "bfloat16": 2}
_BLOCK = 256  # tokens; the KV cache grows by whole blocks
_COPIED = 2**30  # bytes of weights up to which the builtin decoder copies them
_BUCKET = 2**24  # entries of gradients that are added up in one message
_CPU_LOGITS, _CUDA_LOGITS = 28 << 20, 3 << 27  # bytes of one matrix of logits in the loss
_TILE = 8192  # entries of the vocabulary whose weights a CPU widens at one time
_DENSE = 8  # matrices of logits that a divergence without a closed form holds


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder. `parameters` counts a tied head once; `linears` has each linear layer's name, width in and out.

    `plain`: whether its layers are those of Llama, Qwen2 or Qwen3, for which the arithmetic was checked.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    qk_norm: bool
    parameters: int
    linears: tuple[tuple[str, int, int], ...] = field(repr=False)
    plain: bool = True

    @property
    def head_entries(self) -> int:
        """Of the output projection; the embedding has as many."""
        return self.vocabulary * self.hidden

    @property
    def products(self) -> int:
        """Weights that multiply every token, the head left out."""
        return sum(inside * outside for _, inside, outside in self.linears)

    def adapter_entries(self, lora: LoraConfig) -> int:
        """Trained entries of an adapter on the linear layers that it names."""
        named = (lora.target_modules,) if isinstance(lora.target_modules, str) else lora.target_modules
        every = named == ("all-linear",)
        ends = tuple(f".{name}" for name in named)
        hit = [i + o for name, i, o in self.linears if every or name in named or name.endswith(ends)]
        return lora.rank * sum(hit)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the contexts: the longest decide about bytes, the means about seconds. `teacher` is 0 without one."""

    student_longest: int
    student_mean: float
    teacher_longest: int
    teacher_mean: float
    reference_longest: int
    reference_mean: float


@dataclass(frozen=True, slots=True)
class Phase:
    """A moment of an update, and the bytes on one device by what they hold."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


def sharding_of(config: Config) -> Sharding:
    """`model.sharding` where this version has it."""
    found: Sharding = getattr(config.model, "sharding", "none")
    return found


@dataclass(frozen=True, slots=True)
class Work:
    """Settings, shape, lengths and devices, and what follows from them for one device."""

    config: Config
    shape: ModelShape
    lengths: Lengths
    kind: DeviceKind
    devices: int = 1

    @property
    def entry(self) -> int:
        """Bytes of a weight as it is multiplied."""
        return _ENTRY[getattr(self.config.model, "compute_dtype", None) or self.config.model.dtype]

    @property
    def master(self) -> int:
        """Bytes of a trained weight as it is kept: an adapter is always float32."""
        return 4 if self.config.model.lora is not None else _ENTRY[self.config.model.dtype]

    @property
    def shards(self) -> int:
        """Devices between which one copy of the state is divided."""
        return {"none": 1, "full": self.devices, "hybrid": min(self.devices, PER_NODE)}[sharding_of(self.config)]

    @property
    def trained(self) -> int:
        """Entries that the optimiser moves."""
        lora = self.config.model.lora
        return self.shape.parameters if lora is None else self.shape.adapter_entries(lora)

    @property
    def completion(self) -> int:
        """Tokens of the longest completion that is trained on."""
        if self.config.train.method == "sft":
            return max(1, self.lengths.reference_longest)
        return self.config.sampling.completion_tokens

    @property
    def rows(self) -> int:
        """Rows of an update on the device that has most of them."""
        return math.ceil(self.config.train.batch_size / self.devices)

    @property
    def student_tokens(self) -> int:
        """The most tokens that the student reads of one row."""
        return self.lengths.student_longest + self.completion - 1

    @property
    def teacher_tokens(self) -> int:
        """The same of the teacher; 0 where there is none."""
        return self.lengths.teacher_longest + self.completion - 1 if self.config.distils else 0

    @property
    def together(self) -> int:
        """Rows of one micro-batch."""
        train, longest = self.config.train, max(self.student_tokens, self.teacher_tokens)
        most = train.micro_batch_size if train.micro_batch_tokens is None else train.micro_batch_tokens // longest
        return max(1, min(self.rows, most))

    @property
    def has_copy(self) -> bool:
        """Whether the teacher keeps values of its own."""
        if not self.config.distils:
            return False
        weights = self.config.teacher.weights
        return weights != "live" and not (weights == "frozen" and self.config.model.lora is not None)

    @property
    def averages(self) -> bool:
        """Whether the teacher's own values are an average, which is kept in float32."""
        return self.has_copy and self.config.teacher.weights == "ema"

    @property
    def rounded(self) -> bool:
        """Whether attention is eager and adapters compute in bfloat16: the choice of a CPU that computes in it."""
        return self.kind.on_cpu and self.config.model.prefers_eager_on_cpu


def saved_bytes(shape: ModelShape, entry: int, rank: int | None, eager_tokens: int = 0, rounded: bool = False) -> int:
    """Bytes per token that autograd keeps of one layer; `rank` None: every weight is trained.

    A norm keeps its input in float32; a trained one also its output. Beside them: queries and keys as rotated, values,
    what attention gives, and gate, its activation and up. Trained linear layers keep their inputs, adapters a float32
    copy of each, or with `rounded`, where they compute in the type of what they read, that itself. Eager attention over
    `eager_tokens` keys also keeps its weights, and repeats keys and values.
    """
    hidden, inner = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    normed = 2 * hidden + (queries + keys) * shape.qk_norm
    roots = 2 + (shape.heads + shape.kv_heads) * shape.qk_norm
    kept = 4 * (normed + roots) + entry * (2 * queries + 2 * keys + 3 * inner)
    if eager_tokens:
        kept += shape.heads * eager_tokens * (4 if entry == 4 else 6) + entry * 2 * (queries - keys)
        if rank is not None and entry == 2 and not rounded:
            kept -= entry * queries  # of what attention gives, the adapter's copy alone
    else:
        kept += 4 * shape.heads
    if rank is None:
        return kept + entry * (normed + 2 * hidden + inner)
    if entry == 4 or rounded:
        return kept + entry * (2 * hidden + inner + 7 * rank)
    copies = 5 * hidden + queries + inner
    return kept + 4 * (copies + 7 * rank)


def memory(work: Work) -> list[Phase]:
    """The bytes of each phase of an update on one device; what a run needs is the largest total."""
    state, made = _state(work), _gradients(work)
    method = work.config.train.method
    phases = [] if method == "sft" else [_sampling(work, state, "sample", *_sampled(work))]
    if work.config.distils:
        phases.append(_teacher(work, state, made))
    phases += [_loss(work, state, made), _backward(work, state, made)]
    if work.devices > 1 and work.shards == 1:
        bucket = 4 * min(max(_BUCKET, work.shape.head_entries), work.trained)
        phases.append(Phase("exchange", {**state, **made, "buffers": bucket * (1 if work.master == 4 else 2)}))
    largest = work.shape.head_entries if work.config.model.lora is None else _widest(work)
    phases.append(Phase("step", {**state, **made, "buffers": 2 * work.master * largest / work.shards}))
    evaluated = _evaluated(work)
    return phases + ([_sampling(work, state, "evaluate", *evaluated)] if evaluated else [])


def peak(phases: list[Phase]) -> Phase:
    """The phase that needs most."""
    return max(phases, key=lambda phase: phase.total)


def seconds(work: Work, reached: Reached) -> dict[str, float]:
    """Seconds of each phase of an update at such speeds; every completion is as long as it may be.

    The phases are those of `metrics.jsonl`, and `step`, which is the gradients' sum and AdamW. Empty for a kind whose
    speeds are not known. Probes, evaluations and checkpoints are not in it.
    """
    kind, shape, lengths = work.kind, work.shape, work.lengths
    if not kind.flops:
        return {}
    config, flops = work.config, _operations(work, reached)
    completion = lengths.reference_mean if config.train.method == "sft" else config.sampling.completion_tokens
    read = {"student": lengths.student_mean + completion, "teacher": lengths.teacher_mean + completion}
    forward = {who: work.rows * _forward(shape, tokens) for who, tokens in read.items()}
    head = 2 * shape.head_entries * work.rows * completion
    again = 1 if config.model.gradient_checkpointing else 0
    backward = 1 if config.model.lora is not None else 2
    products = (2 if config.distils else 1) + (1 if config.model.lora is not None else 2)
    found = {
        "sample": 0.0 if config.train.method == "sft" else _decoding(work, completion, reached),
        "teacher": forward["teacher"] / flops if config.distils else 0.0,
        "student": forward["student"] / flops,
        "loss_backward": ((backward + again) * forward["student"] + products * head) / flops,
        "step": _traffic(work, reached)
        + 7 * work.master * work.trained / work.shards / (kind.bandwidth * reached.bandwidth),
    }
    return {name: value for name, value in found.items() if value}


def _state(work: Work) -> dict[str, float]:
    """What is there in every phase."""
    base = 0 if work.config.model.lora is None else work.shape.parameters * work.entry
    own = work.trained * work.master
    copy = work.trained * max(4, work.master) if work.averages else own
    held = {"weights": base + own, "teacher copy": copy * work.has_copy, "optimiser": 2 * own}
    return {name: size / work.shards for name, size in held.items()}


def _gradients(work: Work) -> dict[str, float]:
    return {"gradients": work.trained * work.master / work.shards}


def _gathered(work: Work) -> float:
    """Whole weights of the layers at work, and of embedding and head, where each device keeps a part of them."""
    if work.shards == 1:
        return 0.0
    shape = work.shape
    ends = shape.head_entries * (1 if shape.tied else 2)
    return work.entry * (2 * shape.products / shape.layers + ends)


def decoding(work: Work, rows: int, completion: int) -> Phase:
    """The bytes of an evaluation alone, which has neither optimiser nor gradients, with so many rows together."""
    return _sampling(work, {**_state(work), "optimiser": 0.0}, "evaluate", rows, completion)


def _sampled(work: Work) -> tuple[int, int]:
    """Rows that are decoded together, and the longest completion."""
    config = work.config
    probes = config.data.probe_size if config.decides and config.credit.probes else 0
    most = math.ceil(max(config.train.batch_size, probes) / work.devices)
    return min(config.sampling.batch_size, most), config.sampling.completion_tokens


def _evaluated(work: Work) -> tuple[int, int] | None:
    """The same in evaluations; None where there are none."""
    config = work.config
    problems = max(config.data.validation_size, config.data.test_size)
    if not (config.train.evaluate_every and problems):
        return None
    most = math.ceil(problems * config.evaluation.samples / work.devices)
    return min(config.sampling.batch_size, most), config.evaluation_tokens


def _sampling(work: Work, state: Mapping[str, float], name: str, rows: int, completion: int) -> Phase:
    """Cache, logits, the prompts' pass and the decoder's own copy of the weights; with servers, nothing of it."""
    if work.config.sampling.engine == "server":
        return Phase(name, dict(state))
    shape, entry, prompt = work.shape, work.entry, work.lengths.student_longest
    keys = shape.kv_heads * shape.head_dim
    room = min(math.ceil((prompt + completion) / _BLOCK) * _BLOCK, prompt + completion)
    drawn = 12 if work.config.sampling.top_k > 0 else 24
    whole = 0.0 if work.shards == 1 else entry * shape.parameters
    return Phase(
        name,
        {
            **state,
            "activations": rows * prompt * entry * (4 * shape.intermediate + 3 * shape.hidden),
            "KV cache": 2 * (shape.layers + 1) * rows * room * keys * entry,
            "logits": rows * shape.vocabulary * drawn,
            "buffers": whole + _decoders_copy(work),
        },
    )


def _decoders_copy(work: Work) -> float:
    """Bytes of the weights that the builtin decoder lays out anew: on a CPU all, else what it joins or merges."""
    shape, entry, lora = work.shape, work.entry, work.config.model.lora
    every = entry * shape.parameters + (4 * work.trained if lora is not None else 0)
    if every > _COPIED or not shape.plain or work.config.sampling.engine == "transformers":
        return 0.0
    if work.kind.on_cpu:
        return entry * (shape.products + shape.head_entries)
    joined = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    merged = lora is not None and entry == 4
    return entry * sum(i * o for name, i, o in shape.linears if merged or name.endswith(joined))


def _teacher(work: Work, state: Mapping[str, float], made: Mapping[str, float]) -> Phase:
    """One layer's working tensors over the longest contexts, and the states that go on to the loss."""
    shape, tokens = work.shape, work.together * work.teacher_tokens
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widest = max(3 * shape.intermediate + 3 * shape.hidden, 2 * shape.hidden + 3 * queries + 2 * keys)
    before = made if work.rows > work.together else {}
    rounded = work.trained * work.master / work.shards if work.averages and work.master < 4 else 0.0
    return Phase(
        "teacher",
        {
            **state,
            **before,
            "teacher copy": state["teacher copy"] + rounded,
            "activations": work.entry * tokens * widest,
            "buffers": _gathered(work),
        },
    )


def _saved(work: Work) -> tuple[float, float]:
    """Bytes that the student's pass leaves for its backward pass, and those of one layer that is computed again."""
    shape, model = work.shape, work.config.model
    tokens = work.together * work.student_tokens
    eager = work.student_tokens if model.attention == "eager" or work.rounded else 0
    layer = saved_bytes(shape, work.entry, None if model.lora is None else model.lora.rank, eager, work.rounded)
    last = 4 * (shape.hidden + 1) + (work.entry * shape.hidden if model.lora is None else 0)
    if model.gradient_checkpointing:
        return tokens * (shape.layers * work.entry * shape.hidden + last), tokens * layer
    return tokens * (shape.layers * layer + last), 0.0


def _states(work: Work) -> float:
    """Bytes of the hidden states of both sides at the completions' tokens, and of their gradient."""
    sides = 3 if work.config.distils else 2
    return sides * work.together * work.completion * work.shape.hidden * work.entry


def _with_earlier(work: Work, made: Mapping[str, float]) -> dict[str, float]:
    """The gradients of earlier micro-batches, and that of a trained head, which the loss forms at once."""
    earlier = made["gradients"] if work.rows > work.together else 0.0
    head = 4 * work.shape.head_entries if work.config.model.lora is None else 0
    return {"gradients": earlier + head}


def _loss(work: Work, state: Mapping[str, float], made: Mapping[str, float]) -> Phase:
    """What the student's pass has kept, and the logits of one chunk of tokens."""
    config, vocabulary = work.config, work.shape.vocabulary
    budget = max(256, _CPU_LOGITS // (4 * vocabulary)) if work.kind.on_cpu else 0
    chunk = config.loss.chunk_tokens or budget or max(64, _CUDA_LOGITS // (4 * vocabulary) // 64 * 64)
    tokens = work.together * work.completion
    piece = math.ceil(tokens / math.ceil(tokens / chunk))
    tile = 4 * _TILE * work.shape.hidden if work.kind.on_cpu and work.entry == 2 else 0
    closed = not config.distils or DIVERGENCES[config.loss.divergence.kind].closed_form is not None
    matrices = (2 if config.distils else 1) if closed else _DENSE
    return Phase(
        "loss",
        {
            **state,
            **_with_earlier(work, made),
            "activations": _saved(work)[0] + _states(work),
            "logits": matrices * 4 * piece * vocabulary + tile,
            "buffers": _gathered(work),
        },
    )


def _backward(work: Work, state: Mapping[str, float], made: Mapping[str, float]) -> Phase:
    """At its beginning, with all that was kept and the first layer's gradients; or at its end, with all gradients."""
    shape, entry = work.shape, work.entry
    saved, again = _saved(work)
    tokens = work.together * work.student_tokens
    wide = 4 * shape.intermediate if work.config.model.lora is not None and entry == 2 and not work.rounded else 0
    working = tokens * (entry * (3 * shape.intermediate + 2 * shape.hidden) + wide)
    begun = {**_with_earlier(work, made), "activations": saved + again + _states(work) + working}
    ends = (4 + entry) * shape.head_entries if work.config.model.lora is None else 0
    ended = {"gradients": made["gradients"] + ends, "activations": again + working}
    larger = max(begun, ended, key=lambda parts: sum(parts.values()))
    return Phase("backward", {**state, **larger, "buffers": _gathered(work)})


def _widest(work: Work) -> int:
    """Entries of the largest matrix of an adapter."""
    rank = work.config.model.lora.rank if work.config.model.lora is not None else 0
    return rank * max(max(i, o) for _, i, o in work.shape.linears)


def _forward(shape: ModelShape, tokens: float) -> float:
    """Operations of one row's pass without its head: products, and attention to half of the row on average."""
    return 2 * shape.products * tokens + 2 * shape.layers * shape.heads * shape.head_dim * tokens**2


def _decoding(work: Work, completion: float, reached: Reached) -> float:
    """Seconds to write one update's completions: prompts by operations, steps by bytes read, operations or kernels."""
    config, shape, kind = work.config, work.shape, work.kind
    served = config.sampling.engine == "server"
    rows = math.ceil(config.train.batch_size / len(config.sampling.server.urls)) if served else work.rows
    at_once = rows if served else min(rows, config.sampling.batch_size)
    flops, bandwidth = _operations(work, reached), kind.bandwidth * reached.bandwidth
    weights = shape.products + shape.head_entries
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * work.entry
    read = weights * work.entry + at_once * cache * (work.lengths.student_mean + completion / 2)
    step = max(read / bandwidth, 2 * weights * at_once / flops, reached.layer_step * shape.layers)
    prompts = rows * _forward(shape, work.lengths.student_mean) / flops
    gathering = 0.0 if work.shards == 1 or served else work.entry * shape.parameters / _link(work, reached)
    return prompts + math.ceil(rows / at_once) * completion * step + gathering


def _operations(work: Work, reached: Reached) -> float:
    """Operations per second of the model's products; float32 ones are made in float32."""
    return reached.flops * (work.kind.flops if work.entry == 2 else work.kind.flops32)


def _traffic(work: Work, reached: Reached) -> float:
    """Seconds of the gradients' sum; with sharded weights also of gathering them for every pass."""
    if work.devices == 1:
        return 0.0
    if work.shards == 1:
        return 2 * 4 * work.trained / _link(work, reached)
    passes = math.ceil(work.rows / work.together) * (3 if work.config.distils else 2)
    return (passes * work.entry * work.shape.parameters + 4 * work.trained) / _link(work, reached)


def _link(work: Work, reached: Reached) -> float:
    """Bytes per second between the devices that exchange most."""
    within = work.devices <= PER_NODE or sharding_of(work.config) == "hybrid"
    own = work.kind.link * reached.link
    return own if within else min(BETWEEN_NODES, own)
