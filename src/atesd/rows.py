"""The rows of a run folder: what one line of each of its four files holds. Plain Python.

`atesd.runs` writes and reads them. None stands for what was not measured or is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict, cast


class Estimate(TypedDict):
    value: float
    low: float
    high: float


"""A mean with its 95 % interval, shares."""


class AlignmentRow(TypedDict):
    """`records.Alignment` as it is written."""

    ratios: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float]
    rollouts: int


class HintedRow(TypedDict):
    """The hinted rollouts of an update: how many, at which ratio, the verified share; see `train.hinted`."""

    rollouts: int
    reveal_ratio: float
    effective_ratio: float
    accuracy: float


NOT_ALWAYS = frozenset({"rollout_drift", "hinted", "token_alignment", "held_back"})
"""What a row of metrics.jsonl has only where something made it."""


class MetricsRow(TypedDict):
    """One update, in metrics.jsonl. Means per token where nothing else is said, divergences in nats.

    `token_alignment`: of all tokens, before the gate. `held_back`: no step was taken (`loss.gate.skip: update`).
    """

    update: int
    loss: float | None
    kl: float | None
    top1_disagreement: float | None
    student_confidence: float | None
    teacher_entropy: float | None
    student_entropy: float | None
    clipped_share: float | None
    reversed_mass: float | None
    reveal_ratio: float | None
    effective_ratio: float | None
    completion_tokens: float | None
    truncated_share: float | None
    loop_share: float | None
    accuracy: float | None
    probe_nll: float | None
    probe_success: float | None
    probe_gain: float | None
    probe_kl: float | None
    grounding: float | None
    alignment: AlignmentRow | None
    kept_share: float | None
    curvature: float | None
    grad_norm: float | None
    learning_rate: float
    skipped: str | None
    seconds: Mapping[str, float]
    rollout_drift: NotRequired[float | None]
    token_alignment: NotRequired[float | None]
    held_back: NotRequired[bool]
    hinted: NotRequired[HintedRow]


class DecisionRow(TypedDict):
    """One exposure decision, in decisions.jsonl; see `records.FinishedDecision`."""

    update: int
    state: list[float]
    concentration1: float | None
    concentration0: float | None
    samples: dict[str, float]
    reveal_ratio: float
    effective_ratio: float
    window: list[int]
    progress_signal: list[float | None]
    grounding_signal: list[float | None]
    ratios_in_window: list[float]
    progress: float | None
    grounding: float | None
    reward: float | None
    advantage: float | None
    status: Literal["finished", "pending"]
    logged_at: int


class LevelRow(TypedDict):
    """Average@k of the problems of one difficulty."""

    average: Estimate
    problems: int


class BenchmarkRow(TypedDict):
    """What of an evaluation on a benchmark its settings do not say; `cli.pack` writes it.

    `source`: the hub id, or the name of a file. `pinned`: by what its content was checked, the registry's hash, one
    that was expected, or nothing. `clean`: no problem was public when the family was released. `pass_at`: unbiased, by
    k. `key`: what the grades depend on, hashed.
    """

    source: str
    sha256: str
    pinned: Literal["pinned", "expected", "no"]
    held: str
    family: str | None
    clean: bool | None
    thinking: bool | None
    engine: str
    pass_at: dict[str, float]
    key: str


class ContentRow(TypedDict):
    """What a run was evaluated on: the hash of a file's problems and answers, and who judged the answers.

    Of several benchmarks together the hash of their hashes, without a checker.
    """

    sha256: str
    checker: NotRequired[str]


class EvaluationRow(TypedDict):
    """One evaluation of one split, in evaluations.jsonl: Average@k and pass@k, and what became of the answers."""

    update: int
    split: str
    problems: int
    samples: int
    average: Estimate
    pass_at_k: Estimate
    by_difficulty: dict[str, LevelRow]
    verdicts: dict[str, int]
    mean_tokens: float
    truncated_share: float
    loop_share: float
    sampler: dict[str, float | int | bool]
    correct_counts: dict[str, int]
    benchmark: NotRequired[BenchmarkRow]
    content: NotRequired[ContentRow]


class SampleRow(TypedDict):
    """One rollout with both contexts, in samples.jsonl; the lists at its end run over the completion's tokens."""

    update: int
    problem_id: str
    difficulty: int
    reveal_ratio: float
    effective_ratio: float
    student_context: str
    teacher_context: str
    completion: str
    verdict: str | None
    truncated: bool
    tokens: list[str]
    token_kl: list[float | None]
    token_alignment: list[float | None]
    token_ratio: list[float | None]


Row = MetricsRow | DecisionRow | EvaluationRow | SampleRow
RowKind = Literal["metrics", "decisions", "evaluations", "samples"]


def revealed(rows: Sequence[MetricsRow]) -> list[float]:
    """The reveal ratio of every update that had one: all of a distilling run but the skipped ones."""
    return [row["reveal_ratio"] for row in rows if row["reveal_ratio"] is not None]


def late_mean(ratios: Sequence[float]) -> float:
    """The mean over the last quarter of some reveal ratios, of at least one."""
    late = ratios[-max(1, len(ratios) // 4) :]
    return sum(late) / len(late)


def skipped_row(update: int, reason: str, learning_rate: float) -> MetricsRow:
    """The row of an update that never came to a step: nothing measured, and why."""
    unknown: Mapping[str, Any] = dict.fromkeys(MetricsRow.__annotations__.keys() - NOT_ALWAYS)
    known = {"update": update, "learning_rate": learning_rate, "skipped": reason, "seconds": {}}
    return cast(MetricsRow, {**unknown, **known})
