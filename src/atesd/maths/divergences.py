"""The registry of divergences: each in its readable form, its closed form where it has one, and what it can be asked.

A divergence is added here and nowhere else: both losses (`maths.divergence` by autograd, `maths.fused` by closed
forms), `loss.divergence` with its settings, and all error messages read `DIVERGENCES`. Everything takes logits that
were divided by the temperature, teacher before student, in float32 or better, and gives nats. The teacher is detached
in every function, so that no caller can leak a gradient into it. Nothing here imports torch when it is read: settings
are checked without it.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float, Int

if TYPE_CHECKING or "torch" in sys.modules:  # the tests, which check shapes, load torch first
    from torch import Tensor


class Compared(NamedTuple):
    """Two distributions over the vocabulary, [n, V] each, in the form in which no small difference is lost.

    `ratio` r = log p - log q; `sign` that of r; `decay` = expm1(-|r|); `excess` q - p; `kl` [n] = sum p r + (q - p).
    """

    p: Tensor
    q: Tensor
    ratio: Tensor
    sign: Tensor
    decay: Tensor
    excess: Tensor
    kl: Tensor


class Terms(NamedTuple):
    """A divergence [n], its slope in the student's logits [n, V] and, where they were asked for, entries and pulls.

    An entry [n, V] depends on the logits through its own log q_v alone; its pull is its derivative, so that the slope
    of the sum is pull - q sum(pull).
    """

    value: Tensor
    slope: Tensor
    entries: Tensor | None = None
    pull: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """The one number that a divergence may be asked for: its name in the settings, its default, its open bounds."""

    name: str
    default: float
    description: str
    above: float = 0.0
    below: float = math.inf
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Divergence:
    """What a divergence consists of.

    `entries` are its vocabulary terms [N, V], which a clip per entry needs; one without them gives its `values` [N]
    from the logits and the sampled tokens. `closed_form` gives value and slope without autograd; without one the loss
    is computed in blocks by autograd. Each is given the parameter, or 0 where there is none. One that `estimates` its
    value from a draw is right on average only, which a clip of single values would end.
    """

    name: str
    summary: str
    entries: Callable[[Tensor, Tensor, float], Tensor] | None = None
    values: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None
    closed_form: Callable[[Compared, float, bool], Terms] | None = None
    parameter: Parameter | None = None
    estimates: bool = False

    @property
    def clips_entries(self) -> bool:
        """Whether it has vocabulary terms to clip."""
        return self.entries is not None


def forward_kl_entries(
    teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"], _: float = 0.0
) -> Float[Tensor, "N V"]:
    """Vocabulary terms of KL(teacher || student): p (log p - log q), in nats; single terms may be negative."""
    log_p, log_q = log_softmax(teacher_logits.detach()), log_softmax(student_logits)
    return weighted_gap(log_p, log_q)


def forward_kl_terms(compared: Compared, _: float, by_entry: bool) -> Terms:
    """KL(teacher || student) = sum p r + (q - p), slope q - p (closed form)."""
    c = compared
    centred = c.excess.addcmul(c.p, c.excess.sum(-1, keepdim=True), value=-1)
    return Terms(c.kl, centred, c.p * c.ratio, -c.p) if by_entry else Terms(c.kl, centred)


def reverse_kl_entries(
    teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"], _: float = 0.0
) -> Float[Tensor, "N V"]:
    """Vocabulary terms of KL(student || teacher): q (log q - log p), in nats."""
    log_p, log_q = log_softmax(teacher_logits.detach()), log_softmax(student_logits)
    return weighted_gap(log_q, log_p)


def reverse_kl_terms(compared: Compared, _: float, by_entry: bool) -> Terms:
    """KL(student || teacher) = sum -q r - (q - p), slope q (-r - sum q (-r)) (closed form)."""
    entries = -compared.q * compared.ratio
    slope = entries.addcmul(compared.q, entries.sum(-1, keepdim=True), value=-1)
    value = (entries - compared.excess).sum(-1)
    return Terms(value, slope, entries, entries + compared.q) if by_entry else Terms(value, slope)


def jensen_shannon_entries(
    teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"], weight: float
) -> Float[Tensor, "N V"]:
    """Vocabulary terms of the generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649), in nats.

    w p (log p - log m) + (1 - w) q (log q - log m) with m = w p + (1 - w) q and 0 < w < 1 the teacher's share.
    """
    log_p, log_q = log_softmax(teacher_logits.detach()), log_softmax(student_logits)
    log_m = (math.log(weight) + log_p).logaddexp(math.log1p(-weight) + log_q)
    return weight * weighted_gap(log_p, log_m) + (1 - weight) * weighted_gap(log_q, log_m)


def jensen_shannon_terms(compared: Compared, w: float, by_entry: bool) -> Terms:
    """Sum of w p log p/m + (1-w) q log q/m, slope (1-w) q (log q/m - sum q log q/m) (closed form)."""
    c = compared
    # log max(p, q)/m = -log(1 + s (exp(-|r|) - 1)), s the other one's share of m; log q/m from it, never overflowing
    share = 0.5 if w == 0.5 else 0.5 - (w - 0.5) * c.sign
    log_q_to_mixture = (c.decay * share).log1p_().add_(c.ratio.clamp(min=0)).neg_()
    entries = (w * c.p).mul_(c.ratio).addcmul_(c.q.add(c.excess, alpha=-w), log_q_to_mixture)
    pull = log_q_to_mixture.mul_(c.q).mul_(1 - w)
    slope = pull.addcmul(c.q, pull.sum(-1, keepdim=True), value=-1)
    return Terms(entries.sum(-1), slope, entries, pull) if by_entry else Terms(entries.sum(-1), slope)


def top_k_kl(
    teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"], k: float
) -> Float[Tensor, " N"]:
    """KL(teacher || student) over the teacher's k largest entries and one bucket for all others, in nats.

    A lower bound of the forward KL (data processing inequality), equal to it at k >= V. The bucket keeps the value
    non-negative and the student's mass outside the k entries under control; a renormalised top-k would not.
    """
    log_p, log_q = log_softmax(teacher_logits.detach()), log_softmax(student_logits)
    if k >= log_p.shape[-1]:
        return weighted_gap(log_p, log_q).sum(-1)
    top_p, index = log_p.topk(int(k), dim=-1)
    top_q = log_q.gather(-1, index)
    kept = (log_p > math.inf).scatter(-1, index, True)  # nothing is above infinity: a mask of False, then the k
    tail_p = log_p.masked_fill(kept, -math.inf).logsumexp(-1)
    tail_q = log_q.masked_fill(kept, -math.inf).logsumexp(-1)
    return weighted_gap(top_p, top_q).sum(-1) + weighted_gap(tail_p, tail_q)


def sampled_token(
    teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """One-sample estimate of KL(student || teacher) from the student's own token, in nats.

    The value is log q(y) - log p(y). The gradient is that of the expectation (score function): the value, detached,
    times the gradient of log q(y). Unbiased where y was drawn from the student at the same temperature without
    truncation.
    """
    log_p, log_q = log_softmax(teacher_logits.detach()), log_softmax(student_logits)
    own_p = log_p.gather(-1, tokens[:, None]).squeeze(-1)
    own_q = log_q.gather(-1, tokens[:, None]).squeeze(-1)
    value = (own_q - own_p).detach()
    return value + value * (own_q - own_q.detach())


def weighted_gap(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Every a (log a - log b), in nats; 0 where a is 0, whatever b is: a token that `a` rules out counts nothing."""
    ruled_out = log_a == -math.inf
    log_a, log_b = log_a.masked_fill(ruled_out, 0.0), log_b.masked_fill(ruled_out, 0.0)
    return log_a.exp() * (log_a - log_b)


def log_softmax(logits: Tensor) -> Tensor:
    """The log-softmax over the last dimension, in float32 or better."""
    wide = logits if logits.element_size() == 8 else logits.float()
    return wide.log_softmax(-1)


def _top_k_values(teacher: Tensor, student: Tensor, _: Tensor, k: float) -> Tensor:
    return top_k_kl(teacher, student, k)


def _sampled_values(teacher: Tensor, student: Tensor, tokens: Tensor, _: float) -> Tensor:
    return sampled_token(teacher, student, tokens)


DIVERGENCES = {
    divergence.name: divergence
    for divergence in (
        Divergence(
            "forward_kl",
            "KL(teacher || student) over the full vocabulary: OPSD and paper",
            entries=forward_kl_entries,
            closed_form=forward_kl_terms,
        ),
        Divergence(
            "reverse_kl",
            "KL(student || teacher) over the full vocabulary",
            entries=reverse_kl_entries,
            closed_form=reverse_kl_terms,
        ),
        Divergence(
            "jensen_shannon",
            "the generalised Jensen-Shannon divergence of GKD",
            entries=jensen_shannon_entries,
            closed_form=jensen_shannon_terms,
            parameter=Parameter("teacher_weight", 0.5, "the teacher's share of the mixture", above=0.0, below=1.0),
        ),
        Divergence(
            "top_k",
            "KL(teacher || student) over the teacher's largest entries and one bucket for the rest",
            values=_top_k_values,
            parameter=Parameter("k", 100.0, "how many of the teacher's largest entries", above=0.0, whole=True),
        ),
        Divergence(
            "sampled_token",
            "a one-sample estimate of KL(student || teacher) from the student's own token",
            values=_sampled_values,
            estimates=True,
        ),
    )
}
"""Every divergence by its name in the settings."""


def divergence_named(name: str) -> Divergence:
    """The divergence of this name. Raises `ValueError` that lists the names and the nearest one."""
    if name not in DIVERGENCES:
        close = difflib.get_close_matches(name, DIVERGENCES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown divergence {name!r}{hint}; there are: {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name]
