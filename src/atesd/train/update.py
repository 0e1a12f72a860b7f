"""One update's gradient: the losses, and their sum over micro-batches that change nothing.

Each method is a loss per token and a weight per token. The weights are counted over the whole optimiser step before the
first micro-batch is scored. So neither the micro-batches nor the order of the examples change the gradient, nor the
number of ranks: each backpropagates its shard of the examples, and the caller adds the gradients up
(`Weights.add_up_gradients`). Under `torch.no_grad` everything is measured and nothing is accumulated.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atesd.maths.divergence import Objective
from atesd.maths.fused import fused_divergence, fused_likelihood
from atesd.models.ranks import Gathered, interleave
from atesd.models.score import Pair, Scored, Scorer, completion_tokens, hidden_logprobs, micro_batches, pair_length
from atesd.models.shared_prefix import shared_hidden
from atesd.models.teacher import Teacher
from atesd.train.stopwatch import Stopwatch

Meters = dict[str, Float[Tensor, " N"]]
"""What is measured of each token, by name."""

_ANSWER = "answer_logprob"


@dataclass(frozen=True, slots=True)
class Candidate:
    """The teacher's context at one of the ratios among which every token has its choice."""

    context: tuple[int, ...]
    reveal_ratio: float
    effective_ratio: float


@dataclass(frozen=True, slots=True)
class Example:
    """One completion of an optimiser step under the student's context and, to distil, under the teacher's.

    `advantage` weighs the log-likelihood of the completion: 1 in SFT, GRPO's advantage in GRPO, and in distillation
    that times `train.grpo_weight`, 0 where no likelihood is added to the divergence. `outcome` is the verdict less its
    baseline, which the gate `influence` reads. `answer` is a second completion,
    only measured: the teacher reads it in the same pass, after the context that both share. `key` names the rollout in
    keyed draws, `correct` says that it was verified. With `candidates` the teacher reads the completion under each of
    them instead of `teacher_context`; all examples of a step have as many.
    """

    context: tuple[int, ...]
    completion: tuple[int, ...]
    teacher_context: tuple[int, ...] = ()
    advantage: float = 0.0
    answer: tuple[int, ...] = ()
    key: tuple[int | str, ...] = ()
    correct: bool = False
    candidates: tuple[Candidate, ...] = ()
    outcome: float = 0.0

    @property
    def student_pair(self) -> Pair:
        """Context and completion as the student reads them."""
        return self.context, self.completion

    @property
    def teacher_pairs(self) -> list[Pair]:
        """Every context of the teacher with the completion: the same completion ids."""
        contexts = [candidate.context for candidate in self.candidates] or [self.teacher_context]
        return [(context, self.completion) for context in contexts]

    @property
    def length(self) -> int:
        """The most tokens that a model reads of this example at once."""
        return max(pair_length(pair) for pair in (self.student_pair, *self.teacher_pairs))


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How an update's examples are weighed and divided: micro-batches change no gradient, `reduction` is the loss's."""

    reduction: Literal["sequence", "token"] = "sequence"
    micro_batch_size: int = 8
    micro_batch_tokens: int | None = None

    def weights(self, examples: Sequence[Example]) -> list[float]:
        """Weight of each example's tokens: 1 / (examples |y|) for `sequence` (the paper), 1 / tokens for `token`."""
        if self.reduction == "token":
            total = sum(len(example.completion) for example in examples)
            return [1 / total for _ in examples]
        return [1 / (len(examples) * len(example.completion)) for example in examples]

    def micro_batches(self, examples: Sequence[Example]) -> list[list[int]]:
        """The places of the examples that go through the model together: those of about the same length."""
        return micro_batches([example.length for example in examples], self.micro_batch_size, self.micro_batch_tokens)


@dataclass(frozen=True, slots=True)
class StepMeters:
    """What one step measured, on all ranks. `means` are weighted as the loss is, `tokens` is per meter, row and token.

    `answers` is the log-probability under the teacher, in nats, of each token of each example's answer (an example
    without one: empty).
    """

    loss: float
    means: dict[str, float]
    tokens: dict[str, list[list[float]]]
    answers: list[list[float]]

    @property
    def grounding(self) -> float | None:
        """g_t in nats: each answer's mean log-probability per token, over the examples that have one; else None."""
        means = [statistics.fmean(answer) for answer in self.answers if answer]
        return statistics.fmean(means) if means else None


@dataclass(frozen=True, slots=True)
class Targets:
    """What the teacher makes of some examples: its states under each of its contexts, and the answers in nats."""

    teachers: Sequence[Scored]
    answers: list[list[float]]


@dataclass(frozen=True, slots=True)
class Selection:
    """What every token is distilled from, the factor of its weight (None: 1), and what was measured to find them."""

    teacher: Scored
    factors: Float[Tensor, " N"] | None = None
    meters: Meters = field(default_factory=dict)


class Selector(Protocol):
    """Decides, token by token, which teacher it is distilled from and whether it is distilled at all."""

    def select(
        self, examples: Sequence[Example], student: Scored, teachers: Sequence[Scored], tokens: Int[Tensor, " N"]
    ) -> Selection:
        """The selection for the tokens of some examples, given the student and the teacher under each context."""
        ...


@final
class EveryToken:
    """Distils every token from the one teacher."""

    def select(
        self,
        examples: Sequence[Example],  # noqa: ARG002
        student: Scored,  # noqa: ARG002
        teachers: Sequence[Scored],
        tokens: Int[Tensor, " N"],  # noqa: ARG002
    ) -> Selection:
        """No factors, and nothing measured."""
        [teacher] = teachers
        return Selection(teacher)


class Method(Protocol):
    """A loss of an update's examples: first the teacher's pass, then the loss on the student's states."""

    @property
    def scorer(self) -> Scorer:
        """The model: the student, and inside `Teacher.weights` the teacher."""
        ...

    @property
    def watch(self) -> Stopwatch:
        """Where the seconds of each phase are booked."""
        ...

    def targets(self, examples: Sequence[Example], free: bool) -> Targets:
        """What the teacher makes of a micro-batch; `free`: the number of passes may differ between the ranks."""
        ...

    def loss(
        self,
        examples: Sequence[Example],
        student: Scored,
        tokens: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
        targets: Targets,
    ) -> tuple[Float[Tensor, ""], Meters]:
        """The weighted sum of the loss over the tokens, to be backpropagated once, and its meters."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Distillation:
    """The mean divergence from teacher to student on the student's own tokens (ATESD, OPSD).

    loss = mean over rollouts of 1/|y| sum_n D(teacher(. | view, y_<n) || student(. | x, y_<n))

    `selector` multiplies the weights of single tokens, or picks the view that a token is distilled from.
    """

    scorer: Scorer
    watch: Stopwatch
    teacher: Teacher
    objective: Objective
    selector: Selector = field(default_factory=EveryToken)
    chunk_tokens: int | None = None

    def targets(self, examples: Sequence[Example], free: bool) -> Targets:
        """The teacher's pass. Contexts that a completion, its candidates and its answer share are computed once."""
        whole = self.scorer.whole() if free else nullcontext()
        with self.watch.phase("teacher"), self.teacher.weights(), whole:
            head = self.scorer.head()
            contexts = len(examples[0].teacher_pairs)
            answers = [[(e.teacher_context, e.answer)] if e.answer else [] for e in examples]
            if not any(answers) and contexts == 1:
                hidden = self.scorer.hidden([example.teacher_pairs[0] for example in examples])
                return Targets([Scored(hidden, head)], [[] for _ in examples])
            read = [[*example.teacher_pairs, *more] for example, more in zip(examples, answers, strict=True)]
            states = shared_hidden(self.scorer, read)
            teachers = [Scored(torch.cat([own[k] for own in states]), head) for k in range(contexts)]
            if not any(answers):
                return Targets(teachers, [[] for _ in examples])
            tokens = completion_tokens([pair for more in answers for pair in more], self.scorer.device)
            hidden = torch.cat([state for own in states for state in own[contexts:]])
            logprobs = torch.split(hidden_logprobs(head, hidden, tokens), [len(e.answer) for e in examples])
            return Targets(teachers, [own.tolist() for own in logprobs])

    def loss(
        self,
        examples: Sequence[Example],
        student: Scored,
        tokens: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
        targets: Targets,
    ) -> tuple[Float[Tensor, ""], Meters]:
        """The divergence of the selected tokens, plus the advantage times -log q where examples have one."""
        weights = weights.float()
        with self.watch.phase("control"), torch.no_grad():
            own = Scored(student.hidden.detach(), student.head.detached(), student.tail)
            chosen = self.selector.select(examples, own, targets.teachers, tokens)
        kept, meters = weights, chosen.meters
        if chosen.factors is not None:
            kept, meters = weights * chosen.factors, {**meters, "kept": chosen.factors}
        sides = student.hidden, student.head, chosen.teacher.hidden, chosen.teacher.head
        loss, measured = fused_divergence(self.objective, *sides, tokens, kept, chunk_tokens=self.chunk_tokens)
        if any(example.advantage for example in examples):
            scaled = weights * per_token([e.advantage for e in examples], examples, weights.device).float()
            temperature = self.objective.temperature
            likelihood, _ = fused_likelihood(
                student.hidden, student.head, tokens, scaled, temperature=temperature, chunk_tokens=self.chunk_tokens
            )
            loss = loss + likelihood
        return loss, measured | meters


@final
@dataclass(frozen=True, slots=True)
class Likelihood:
    """-advantage * log q(y): SFT with advantage 1, the on-policy GRPO step with the group's advantage.

    With one update per batch of rollouts the importance ratio of GRPO (arXiv 2402.03300) is 1 and its clip never acts,
    so that this is its exact gradient, without the KL term.
    """

    scorer: Scorer
    watch: Stopwatch
    temperature: float = 1.0
    chunk_tokens: int | None = None

    def targets(self, examples: Sequence[Example], free: bool) -> Targets:  # noqa: ARG002
        """There is no teacher."""
        return Targets([], [[] for _ in examples])

    def loss(
        self,
        examples: Sequence[Example],
        student: Scored,
        tokens: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
        targets: Targets,  # noqa: ARG002
    ) -> tuple[Float[Tensor, ""], Meters]:
        """The weighted negative log-likelihood of the completions."""
        scaled = (weights * per_token([e.advantage for e in examples], examples, weights.device)).float()
        return fused_likelihood(
            student.hidden,
            student.head,
            tokens,
            scaled,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
        )


_Part = tuple[float, dict[str, list[list[float]]]]
"""One rank's part of the loss, and each meter per row and token."""


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    """Examples that go through the model together, their places on this rank, and the weights of their tokens.

    Without places it is idle: nothing comes of it, and its rank only takes part in the passes of the others.
    """

    places: Sequence[int]
    examples: Sequence[Example]
    weights: Sequence[float]


def accumulate(method: Method, examples: Sequence[Example], plan: BatchPlan) -> StepMeters:
    """Accumulate the gradient of a method's loss on an update's examples; the meters are those of all ranks."""
    weights = plan.weights(examples)
    ranks = method.scorer.ranks
    own, own_weights = ranks.shard(examples), ranks.shard(weights)
    batches = [
        _MicroBatch(places, [own[place] for place in places], [own_weights[place] for place in places])
        for places in plan.micro_batches(own)
    ]
    in_step = method.scorer.in_step
    if in_step:
        most = max(len(plan.micro_batches(examples[rank :: ranks.size])) for rank in range(ranks.size))
        batches += [_MicroBatch((), [_least(examples[0])], [0.0])] * (most - len(batches))
    free = any(example.answer or example.candidates for example in examples)
    with ranks.gathering(Gathered[_Part](), in_step=in_step) as gathered:
        gathered.own = _backpropagate(method, batches, len(own), free)
    losses, shards = zip(*gathered.all, strict=True)
    tokens = {name: interleave([shard.get(name, []) for shard in shards]) for name in shards[0]}
    answers = tokens.pop(_ANSWER, [])
    means = {name: _weighted_sum(values, weights) for name, values in tokens.items()}
    means["confidence"] = _weighted_sum([torch.tensor(row).exp().tolist() for row in tokens["logprob"]], weights)
    return StepMeters(sum(losses), means, tokens, answers)


def per_token(values: Sequence[float], examples: Sequence[Example], device: torch.device) -> Float[Tensor, " N"]:
    """A number per example as one per completion token, in float64: whoever computes with it rounds it once."""
    repeated = [value for value, example in zip(values, examples, strict=True) for _ in example.completion]
    return torch.tensor(repeated, dtype=torch.float64, device=device)


def by_example(
    values: Float[Tensor, "*K N"], examples: Sequence[Example], dim: int = 0
) -> tuple[Float[Tensor, "*K n"], ...]:
    """The numbers of each example's completion tokens, out of those of all, which lie along `dim`; views, no copies."""
    return torch.split(values, [len(example.completion) for example in examples], dim=dim)


def _least(example: Example) -> Example:
    """The shortest example of the same kind: one token each of contexts and completion."""
    return replace(
        example,
        context=example.context[:1],
        completion=example.completion[:1],
        teacher_context=example.teacher_context[:1],
        candidates=tuple(replace(candidate, context=candidate.context[:1]) for candidate in example.candidates),
        answer=(),
    )


def _backpropagate(method: Method, batches: Sequence[_MicroBatch], count: int, free: bool) -> _Part:
    """Accumulate the gradient of the `count` examples in the batches.

    Returns their part of the loss, and each meter per row and token. Among the meters are the log-probabilities of the
    answers, whose tokens are not those of the completions.
    """
    scorer, watch = method.scorer, method.watch
    total = torch.zeros((), dtype=torch.float64, device=scorer.device)
    by_place: dict[str, dict[int, list[float]]] = {}
    for batch in batches:
        pairs = [example.student_pair for example in batch.examples]
        tokens = completion_tokens(pairs, scorer.device)
        targets = method.targets(batch.examples, free)
        with watch.phase("student"):
            student = scorer.scored(pairs)
        with watch.phase("loss_backward"):
            weight = per_token(batch.weights, batch.examples, scorer.device)
            loss, meters = method.loss(batch.examples, student, tokens, weight, targets)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        if not batch.places:
            continue
        total += loss.detach()
        for name, values in meters.items():
            split = by_example(values.float(), batch.examples)
            by_place.setdefault(name, {}).update(zip(batch.places, [row.tolist() for row in split], strict=True))
        by_place.setdefault(_ANSWER, {}).update(zip(batch.places, targets.answers, strict=True))
    return float(total), {name: [rows[i] for i in range(count)] for name, rows in by_place.items()}


def _weighted_sum(rows: list[list[float]], weights: Sequence[float]) -> float:
    return sum(weight * sum(row) for row, weight in zip(rows, weights, strict=True))
