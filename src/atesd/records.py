"""The frozen records that cross borders between rooms. Plain Python: no torch, no pydantic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["correct", "wrong", "unparseable", "timeout"]
Split = Literal["train", "validation", "probe", "test"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with its segmented reference solution.

    `segments` are the r_1..r_m of the paper (arXiv 2605.11458); `closing` is the last part of the reference, the one
    that states the boxed final answer. It is not a segment. `reference` is their exact concatenation.
    """

    id: str
    text: str
    segments: tuple[str, ...]
    closing: str
    answer: str
    difficulty: int = 0

    @property
    def reference(self) -> str:
        """The whole reference solution, byte for byte as it was read."""
        return "".join(self.segments) + self.closing


@dataclass(frozen=True, slots=True)
class View:
    """What the teacher reads before it scores a completion: the message, and how much of the reference is in it."""

    text: str
    shown_segments: int
    total_segments: int

    @property
    def effective_ratio(self) -> float:
        """Share of the segments really shown, in [0, 1]; 1 for a reference without segments."""
        return self.shown_segments / self.total_segments if self.total_segments else 1.0


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion with the student context that produced it. Token ids are never re-tokenised.

    `logprobs` holds the log-probability (nats) of each completion token under the student's distribution at the rollout
    temperature, before top-k, top-p or min-p. `truncated` means that no end token came within the limit.
    """

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    truncated: bool


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What an exposure may know of one student update; losses and probes are measured *before* the optimiser step.

    `kl` is the mean forward KL per token in nats, whatever the training divergence. `None` means not measured.
    `top1_disagreement` is the share of tokens at which teacher and student differ in the likeliest token; `grounding`
    the teacher's mean log-probability per token of the final answer, or of what was withheld, at the ratio that acted.
    `train_success` pairs each graded rollout of the update with its difficulty: (difficulty, 1.0 or 0.0);
    `group_success` with the group for which a ratio was asked.
    """

    reveal_ratio: float
    effective_ratio: float
    loss: float
    kl: float
    top1_disagreement: float
    student_confidence: float
    probe_nll: float | None = None
    probe_success: float | None = None
    probe_gain: float | None = None
    probe_kl: float | None = None
    grounding: float | None = None
    train_success: tuple[tuple[int, float], ...] = ()
    group_success: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Alignment:
    """What one small step on each ratio's loss would do to the student's success, for one group of rollouts.

    `values` and their standard errors over rollouts belong to `ratios`, in the same order: change of success per unit
    of learning rate and of the length of the success gradient (`atesd.maths.alignment`).
    """

    ratios: tuple[float, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...]
    rollouts: int


@dataclass(frozen=True, slots=True)
class Decision:
    """One exposure decision: what the controller knew, and what it chose, before student update `update`.

    `samples` maps a group (the empty string for one ratio per update, else a difficulty or a problem id) to its
    unclipped ratio: a draw from Beta(concentration1, concentration0), or another controller's choice; that has no Beta.
    """

    update: int
    state: tuple[float, ...]
    concentration1: float | None
    concentration0: float | None
    samples: dict[str, float]

    @property
    def concentrations(self) -> tuple[float, float]:
        """(concentration1, concentration0). Raises `ValueError` for a decision that was not drawn from a Beta."""
        if self.concentration1 is None or self.concentration0 is None:
            raise ValueError(f"the decision before update {self.update} was not drawn from a Beta")
        return self.concentration1, self.concentration0


@dataclass(frozen=True, slots=True)
class FinishedDecision:
    """A decision whose look-ahead window has closed, with everything its reward was made of.

    The ratios are means over the updates of its hold. The series run over the updates of the window; `None` marks an
    update at which the signal was not measured. `advantage` is None until the policy update that consumes the
    decision.
    """

    decision: Decision
    reveal_ratio: float
    effective_ratio: float
    window: tuple[int, int]
    progress_signal: tuple[float | None, ...]
    grounding_signal: tuple[float | None, ...]
    ratios_in_window: tuple[float, ...]
    progress: float
    grounding: float
    reward: float
    advantage: float | None = None


@dataclass(frozen=True, slots=True)
class Graded:
    """One completion with its verdict; `tokens` is its length, with the end token."""

    problem_id: str
    difficulty: int
    sample: int
    verdict: Verdict
    tokens: int
    truncated: bool
    looping: bool
