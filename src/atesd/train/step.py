"""One update's gradient: distillation, and the two baselines, over micro-batches that change nothing.

Each method is a loss per token and a weight per token. The weights are counted over the whole optimiser step before the
first micro-batch is scored, so that neither the cut into micro-batches nor the order of the rows changes the gradient,
nor the number of ranks: each backpropagates its share of the rows, and the caller adds the gradients up
(`Weights.add_up_gradients`). Under `torch.no_grad` everything is measured and nothing accumulated.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from atesd.maths.divergence import Objective
from atesd.maths.fused import fused_divergence, fused_likelihood
from atesd.maths.head import Head
from atesd.models.ranks import interleave
from atesd.models.score import Pair, Scored, Scorer, completion_tokens, hidden_logprobs, micro_batches, pair_length
from atesd.models.shared_prefix import shared_hidden
from atesd.models.teacher import Teacher


@dataclass(frozen=True, slots=True)
class Candidate:
    """The teacher's context at one of the ratios among which every token has its choice."""

    context: tuple[int, ...]
    reveal_ratio: float
    effective_ratio: float


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an optimiser step: a completion under the student's context and, to distil, under the teacher's.

    `scale` multiplies the row's weight: the advantage in GRPO, else 1. `answer` is a second completion, only measured:
    the teacher reads it in the pass in which it reads the first, after the context that both share. `key` names the
    rollout in keyed draws, `correct` says that it was verified. A distilled row with an `advantage` has that times its
    negative log-likelihood added to its loss, under the same weights: GRPO's loss beside the divergence. With
    `candidates` the teacher reads the completion under each of them instead of `teacher_context`; all rows of a step
    have as many.
    """

    context: tuple[int, ...]
    completion: tuple[int, ...]
    teacher_context: tuple[int, ...] = ()
    scale: float = 1.0
    answer: tuple[int, ...] = ()
    key: tuple[int | str, ...] = ()
    correct: bool = False
    advantage: float = 0.0
    candidates: tuple[Candidate, ...] = ()

    @property
    def student_pair(self) -> Pair:
        """Context and completion as the student reads them."""
        return self.context, self.completion

    @property
    def teacher_pair(self) -> Pair:
        """Context and completion as the teacher reads them: the same completion ids."""
        return self.teacher_context, self.completion

    @property
    def teacher_pairs(self) -> list[Pair]:
        """Every context of the teacher with the completion."""
        contexts = [candidate.context for candidate in self.candidates] or [self.teacher_context]
        return [(context, self.completion) for context in contexts]

    @property
    def length(self) -> int:
        """The most tokens that a model reads of this row at once."""
        return max(pair_length(pair) for pair in (self.student_pair, *self.teacher_pairs))


@dataclass(frozen=True, slots=True)
class StepMeters:
    """What one step measured, on all ranks. `means` are weighted as the loss is, `tokens` is per meter, row and token.

    `answers` is the log-probability under the teacher, in nats, of each token of each row's answer (a row
    without one: empty). `seconds` are those of this rank alone.
    """

    loss: float
    means: dict[str, float]
    tokens: dict[str, list[list[float]]]
    answers: list[list[float]]
    seconds: dict[str, float] = field(compare=False)

    @property
    def grounding(self) -> float | None:
        """g_t: each answer's mean log-probability per token, over the rows that have one; None if none has, nats."""
        means = [statistics.fmean(answer) for answer in self.answers if answer]
        return statistics.fmean(means) if means else None


Gate = Callable[[Sequence[Row], Scored, Scored, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(rows, student, teacher, tokens) to a factor of every token's weight, [N], and meters of the same shape."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What every token is distilled from, among candidates: the teacher's states [N, F], factors of the weights [N]."""

    teacher: Scored
    factors: Tensor
    meters: dict[str, Tensor]


Choose = Callable[[Sequence[Row], Scored, Sequence[Scored], Tensor], Choice]
"""(rows, student, teacher under each candidate, tokens) to the choice of every token."""


def token_weights(rows: Sequence[Row], reduction: str) -> list[float]:
    """Weight of every token of each row: 1 / (rows |y|) for `sequence` (the paper), 1 / tokens for `token`."""
    if reduction == "token":
        total = sum(len(row.completion) for row in rows)
        return [1 / total for _ in rows]
    return [1 / (len(rows) * len(row.completion)) for row in rows]


def distill(
    scorer: Scorer,
    teacher: Teacher,
    rows: Sequence[Row],
    objective: Objective,
    *,
    reduction: str,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
    chunk_tokens: int | None,
    gate: Gate | None = None,
    choose: Choose | None = None,
) -> StepMeters:
    """Accumulate the gradient of the mean divergence from teacher to student on the student's own tokens.

    loss = mean over rollouts of 1/|y| sum_n D(teacher(. | view, y_<n) || student(. | x, y_<n)) (ATESD, OPSD). A `gate`
    multiplies the weights of single tokens, and adds its meters and `kept`, the factors, to those of the loss. Where
    rows have candidates, `choose` picks for every token the one it is distilled from, and is its gate as well.
    """
    gating = 0.0

    def loss_of(batch: Sequence[Row], tokens: Tensor) -> Prepared:
        started = clock(scorer.device)
        with teacher.weights():
            head = scorer.head()
            hidden, answers = _read(scorer, head, batch)
            teachers = [Scored(states, head) for states in hidden]
        seconds = clock(scorer.device) - started

        def weighted_loss(student: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal gating
            rewarded = _advantages(batch, weights)
            begun = clock(scorer.device)
            with torch.no_grad():
                seen, factors, chosen = _aim(batch, Scored(student.detach(), scorer.head()), teachers, tokens)
            gating += clock(scorer.device) - begun
            if factors is not None:
                weights, chosen = weights * factors, {**chosen, "kept": factors}
            sides = student, scorer.head(), seen.hidden, seen.head
            loss, meters = fused_divergence(objective, *sides, tokens, weights, chunk_tokens=chunk_tokens)
            if rewarded is not None:
                policy, _ = fused_likelihood(
                    student,
                    scorer.head(),
                    tokens,
                    rewarded,
                    temperature=objective.temperature,
                    chunk_tokens=chunk_tokens,
                )
                loss = loss + policy
            return loss, meters | chosen

        return Prepared(weighted_loss, seconds, answers)

    def _aim(
        batch: Sequence[Row], student: Scored, teachers: Sequence[Scored], tokens: Tensor
    ) -> tuple[Scored, Tensor | None, dict[str, Tensor]]:
        """The teacher of every token, the factors of its weights, and what was measured to find them."""
        if choose is not None and batch[0].candidates:
            choice = choose(batch, student, teachers, tokens)
            return choice.teacher, choice.factors, choice.meters
        [teacher] = teachers
        return (teacher, None, {}) if gate is None else (teacher, *gate(batch, student, teacher, tokens))

    cut = _by_length(micro_batch_size, micro_batch_tokens)
    meters = _accumulate(scorer, rows, loss_of, reduction, cut)
    spent = meters.seconds
    seconds = {**spent, "loss_backward": spent["loss_backward"] - gating, "control": gating}
    return replace(meters, seconds=seconds)


def _advantages(rows: Sequence[Row], weights: Tensor) -> Tensor | None:
    """The weight of each token's negative log-likelihood; None if no row has an advantage."""
    if not any(row.advantage for row in rows):
        return None
    return weights * torch.tensor([row.advantage for row in rows for _ in row.completion], device=weights.device)


def _read(scorer: Scorer, head: Head, rows: Sequence[Row]) -> tuple[list[Tensor], list[list[float]]]:
    """The states that predict the completions under each context of the teacher, and the answers' log-probabilities.

    A row with an answer or with candidates is a tree, whose shared contexts are computed once.
    """
    contexts = len(rows[0].teacher_pairs)
    answers = [[(row.teacher_context, row.answer)] if row.answer else [] for row in rows]
    if not any(answers) and contexts == 1:
        return [scorer.hidden([row.teacher_pair for row in rows])], [[] for _ in rows]
    states = shared_hidden(scorer, [[*row.teacher_pairs, *more] for row, more in zip(rows, answers, strict=True)])
    completions = [torch.cat([state[k] for state in states]) for k in range(contexts)]
    if not any(answers):
        return completions, [[] for _ in rows]
    tokens = completion_tokens([pair for more in answers for pair in more], scorer.device)
    logprobs = hidden_logprobs(head, torch.cat([state for found in states for state in found[contexts:]]), tokens)
    split = torch.split(logprobs, [len(row.answer) for row in rows])
    return completions, [own.tolist() for own in split]


def maximise_likelihood(
    scorer: Scorer,
    rows: Sequence[Row],
    *,
    temperature: float,
    reduction: str,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
    chunk_tokens: int | None,
) -> StepMeters:
    """Accumulate the gradient of -scale * log q(y): SFT with scale 1, the on-policy GRPO step with scale = advantage.

    With one update per batch of rollouts the importance ratio of GRPO (arXiv 2402.03300) is 1 and its clip never acts,
    so that this is its exact gradient, without the KL term.
    """

    def loss_of(batch: Sequence[Row], tokens: Tensor) -> Prepared:
        def weighted_loss(student: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return fused_likelihood(
                student, scorer.head(), tokens, weights, temperature=temperature, chunk_tokens=chunk_tokens
            )

        return Prepared(weighted_loss, 0.0, [[] for _ in batch])

    cut = _by_length(micro_batch_size, micro_batch_tokens)
    return _accumulate(scorer, rows, loss_of, reduction, cut)


WeightedLoss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(student's hidden states, weight of each token) to the loss and its meters per token."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The loss of a micro-batch, the seconds its teacher took, and what the teacher thinks of the rows' answers."""

    loss: WeightedLoss
    seconds: float
    answers: list[list[float]]


LossOf = Callable[[Sequence[Row], Tensor], Prepared]
_ANSWER = "answer_logprob"
Cut = Callable[[Sequence[Row]], list[list[int]]]
"""Rows to the places of those that go through the model together."""


def _by_length(micro_batch_size: int, micro_batch_tokens: int | None) -> Cut:
    """Micro-batches of rows of about the same length."""
    return lambda rows: micro_batches([row.length for row in rows], micro_batch_size, micro_batch_tokens)


def _accumulate(scorer: Scorer, rows: Sequence[Row], loss_of: LossOf, reduction: str, cut: Cut) -> StepMeters:
    weights = token_weights(rows, reduction)
    seconds = {"teacher": 0.0, "student": 0.0, "loss_backward": 0.0}

    def own_share() -> tuple[float, dict[str, list[list[float]]]]:
        mine, own = scorer.ranks.shard(rows), scorer.ranks.shard(weights)
        return _backpropagate(scorer, mine, own, loss_of, cut, seconds)

    losses, tokens = zip(*scorer.ranks.gather(own_share), strict=True)
    tokens_of = {name: interleave([part.get(name, []) for part in tokens]) for name in tokens[0]}
    answers = tokens_of.pop(_ANSWER, [])
    means = {name: _weighted_mean(values, weights) for name, values in tokens_of.items()}
    means["confidence"] = _weighted_mean([torch.tensor(row).exp().tolist() for row in tokens_of["logprob"]], weights)
    return StepMeters(sum(losses), means, tokens_of, answers, seconds)


def _backpropagate(
    scorer: Scorer,
    rows: Sequence[Row],
    weights: Sequence[float],
    loss_of: LossOf,
    cut: Cut,
    seconds: dict[str, float],
) -> tuple[float, dict[str, list[list[float]]]]:
    """Accumulate the gradient of these rows. Returns their part of the loss, and each meter per row and token.

    Among the meters are the log-probabilities of the answers, whose tokens are not those of the completions.
    """
    loss = torch.zeros((), dtype=torch.float64, device=scorer.device)
    tokens_of: dict[str, dict[int, list[float]]] = {}
    for indices in cut(rows):
        batch = [rows[i] for i in indices]
        tokens = completion_tokens([row.student_pair for row in batch], scorer.device)
        prepared = loss_of(batch, tokens)
        begun = clock(scorer.device)
        hidden = scorer.hidden([row.student_pair for row in batch])
        scored = clock(scorer.device)
        lengths = [len(row.completion) for row in batch]
        scales = [weights[i] * rows[i].scale for i in indices]
        per_token = torch.tensor(
            [s for s, n in zip(scales, lengths, strict=True) for _ in range(n)], device=hidden.device
        )
        part, meters = prepared.loss(hidden, per_token)
        if part.requires_grad:
            part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
        for name, values in meters.items():
            split = [row.tolist() for row in torch.split(values.float(), lengths)]
            tokens_of.setdefault(name, {}).update(zip(indices, split, strict=True))
        tokens_of.setdefault(_ANSWER, {}).update(zip(indices, prepared.answers, strict=True))
        seconds["teacher"] += prepared.seconds
        seconds["student"] += scored - begun
        seconds["loss_backward"] += clock(scorer.device) - scored
    return float(loss), {name: [found[i] for i in range(len(rows))] for name, found in tokens_of.items()}


def _weighted_mean(rows: list[list[float]], weights: list[float]) -> float:
    return sum(weight * sum(row) for row, weight in zip(rows, weights, strict=True))


def clock(device: torch.device) -> float:
    """Seconds now, after the work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
