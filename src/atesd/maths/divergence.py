"""Per-token divergences between teacher and student, their clips and their meters.

Everything here takes logits that the caller has already divided by the temperature, teacher before student, and works
in float32 or better. The teacher is detached in every function, so that no caller can leak a gradient into it. These
plain forms are the reference; `chunked_loss` runs them a block of tokens at a time, so that the logits of a whole
batch never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DivergenceName = Literal["forward_kl", "reverse_kl", "jensen_shannon", "top_k", "sampled_token"]
ClipName = Literal["none", "per_token", "per_entry"]


def forward_kl_entries(
    teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"]
) -> Float[Tensor, "N V"]:
    """Vocabulary terms of KL(teacher || student): p (log p - log q), in nats; single terms may be negative."""
    log_p, log_q = _log_softmax(teacher_logits.detach()), _log_softmax(student_logits)
    return log_p.exp() * (log_p - log_q)


def reverse_kl_entries(
    teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"]
) -> Float[Tensor, "N V"]:
    """Vocabulary terms of KL(student || teacher): q (log q - log p), in nats."""
    log_p, log_q = _log_softmax(teacher_logits.detach()), _log_softmax(student_logits)
    return log_q.exp() * (log_q - log_p)


def jensen_shannon_entries(
    teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"], weight: float
) -> Float[Tensor, "N V"]:
    """Vocabulary terms of the generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649), in nats.

    w p (log p - log m) + (1 - w) q (log q - log m) with m = w p + (1 - w) q and 0 < w < 1 the teacher's share.
    """
    log_p, log_q = _log_softmax(teacher_logits.detach()), _log_softmax(student_logits)
    log_w, log_rest = torch.tensor([weight, 1 - weight], dtype=log_p.dtype, device=log_p.device).log()
    log_m = torch.logaddexp(log_w + log_p, log_rest + log_q)
    return weight * log_p.exp() * (log_p - log_m) + (1 - weight) * log_q.exp() * (log_q - log_m)


def forward_kl(teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(teacher || student) at every token, in nats: the per-token objective of OPSD (arXiv 2601.18734)."""
    return forward_kl_entries(teacher_logits, student_logits).sum(-1)


def reverse_kl(teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(student || teacher) at every token, in nats."""
    return reverse_kl_entries(teacher_logits, student_logits).sum(-1)


def jensen_shannon(
    teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"], weight: float
) -> Float[Tensor, " N"]:
    """Generalised Jensen-Shannon divergence at every token, in nats; see `jensen_shannon_entries`."""
    return jensen_shannon_entries(teacher_logits, student_logits, weight).sum(-1)


def top_k_kl(teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"], k: int) -> Float[Tensor, " N"]:
    """KL(teacher || student) over the teacher's k largest entries and one bucket for all others, in nats.

    A lower bound of `forward_kl` (data processing inequality), equal to it at k >= V. The bucket keeps the value
    non-negative and the student's mass outside the k entries under control; a renormalised top-k would not.
    """
    log_p, log_q = _log_softmax(teacher_logits.detach()), _log_softmax(student_logits)
    if k >= log_p.shape[-1]:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    top_p, index = log_p.topk(k, dim=-1)
    top_q = log_q.gather(-1, index)
    kept = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, index, True)
    tail_p = log_p.masked_fill(kept, -torch.inf).logsumexp(-1)
    tail_q = log_q.masked_fill(kept, -torch.inf).logsumexp(-1)
    return (top_p.exp() * (top_p - top_q)).sum(-1) + tail_p.exp() * (tail_p - tail_q)


def sampled_token(
    teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """One-sample estimate of KL(student || teacher) from the student's own token, in nats.

    The value is log q(y) - log p(y). The gradient is that of the expectation (score function): the value, detached,
    times the gradient of log q(y). Unbiased where y was drawn from the student at the same temperature without
    truncation.
    """
    log_p, log_q = _log_softmax(teacher_logits.detach()), _log_softmax(student_logits)
    own_p = log_p.gather(-1, tokens[:, None]).squeeze(-1)
    own_q = log_q.gather(-1, tokens[:, None]).squeeze(-1)
    value = (own_q - own_p).detach()
    return value + value * (own_q - own_q.detach())


def clip_per_entry(entries: Float[Tensor, "N V"], threshold: float) -> Float[Tensor, " N"]:
    """Sum over the vocabulary of min(entry, threshold), in nats: the clip of OPSD, third version.

    A clamped entry stops pulling, but the normaliser of the softmax still pushes it: its gradient is reversed. See
    `reversed_gradient_mass`.
    """
    return entries.clamp(max=threshold).sum(-1)


def clip_per_token(divergence: Float[Tensor, " N"], threshold: float) -> Float[Tensor, " N"]:
    """Scale every token above the threshold down to it, in nats; the direction of its gradient stays.

    min(1, threshold / D) is held constant in the gradient. A hard clamp would instead remove the gradient at exactly
    the tokens that carry the information (in the embedded world it stopped learning altogether).
    """
    return divergence * (threshold / divergence.detach().clamp(min=threshold))


def reversed_gradient_mass(
    entries_are_clipped: Bool[Tensor, "N V"], teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """Share, per token, of the clipped forward KL's logit gradient that points against the unclipped one, in [0, 1].

    With C the clipped entries and P the teacher's mass outside C, d/dz_j sum_v min(entry_v, tau) = q_j P - p_j [j not
    in C], where the unclipped gradient is q_j - p_j. The share is |gradient| summed over the entries whose sign
    differs, over |gradient| summed over all. 0 where nothing is clipped.
    """
    p, q = _log_softmax(teacher_logits.detach()).exp(), _log_softmax(student_logits.detach()).exp()
    outside = p.masked_fill(entries_are_clipped, 0.0)
    clipped = q * outside.sum(-1, keepdim=True) - outside
    against = clipped * (q - p) < 0
    total = clipped.abs().sum(-1)
    share = clipped.abs().masked_fill(~against, 0.0).sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return share.masked_fill(~entries_are_clipped.any(-1), 0.0)


@dataclass(frozen=True, slots=True)
class Objective:
    """Which divergence, how it is clipped, and the temperature that divides both logits."""

    divergence: DivergenceName = "forward_kl"
    clip: ClipName = "none"
    threshold: float = float("inf")
    temperature: float = 1.0
    jsd_weight: float = 0.5
    top_k: int = 100

    def __call__(
        self, teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]
    ) -> tuple[Float[Tensor, " N"], dict[str, Tensor]]:
        """The clipped divergence of every token (nats, differentiable) and its meters (detached, [N] each).

        Meters: `kl` (forward KL, unclipped, whatever the objective), `logprob` of the token under the student,
        `top1_disagreement`, `teacher_entropy`, `student_entropy`, `clipped_mass` (nats cut off), `reversed_mass`.
        """
        teacher, student = teacher_logits.detach() / self.temperature, student_logits / self.temperature
        entries = self._entries(teacher, student)
        if entries is not None:
            raw = entries.sum(-1)
        elif self.divergence == "top_k":
            raw = top_k_kl(teacher, student, self.top_k)
        else:
            raw = sampled_token(teacher, student, tokens)
        clipped = raw
        if self.clip == "per_entry" and entries is not None:
            clipped = clip_per_entry(entries, self.threshold)
        elif self.clip == "per_token":
            clipped = clip_per_token(raw, self.threshold)
        return clipped, self._meters(teacher, student.detach(), tokens, entries, raw.detach(), clipped.detach())

    def _entries(self, teacher: Tensor, student: Tensor) -> Tensor | None:
        if self.divergence == "forward_kl":
            return forward_kl_entries(teacher, student)
        if self.divergence == "reverse_kl":
            return reverse_kl_entries(teacher, student)
        if self.divergence == "jensen_shannon":
            return jensen_shannon_entries(teacher, student, self.jsd_weight)
        return None

    @torch.no_grad()
    def _meters(
        self, teacher: Tensor, student: Tensor, tokens: Tensor, entries: Tensor | None, raw: Tensor, clipped: Tensor
    ) -> dict[str, Tensor]:
        log_p, log_q = _log_softmax(teacher), _log_softmax(student)
        p, q = log_p.exp(), log_q.exp()
        reversed_mass = torch.zeros_like(raw)
        if self.clip == "per_entry" and self.divergence == "forward_kl" and entries is not None:
            reversed_mass = reversed_gradient_mass(entries.detach() > self.threshold, teacher, student)
        return {
            "kl": (p * (log_p - log_q)).sum(-1),
            "logprob": log_q.gather(-1, tokens[:, None]).squeeze(-1),
            "top1_disagreement": (log_p.argmax(-1) != log_q.argmax(-1)).to(raw.dtype),
            "teacher_entropy": -(p * log_p).sum(-1),
            "student_entropy": -(q * log_q).sum(-1),
            "clipped_mass": raw - clipped,
            "reversed_mass": reversed_mass,
        }


BlockLoss = Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]]


def chunked_loss(
    block_loss: BlockLoss,
    features: Float[Tensor, "N F"],
    weights: Float[Tensor, " N"],
    parameters: Sequence[Tensor] = (),
    chunk_tokens: int = 256,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """sum_n weights[n] * loss[n], a block of tokens at a time, with the gradient formed in the forward pass.

    `block_loss(features[block], block)` returns the loss of each token of the block and its meters; it may read the
    `parameters` (a trained head), which then receive their gradient too. Only one block's logits exist at a time. The
    weights must be known beforehand (mask, normaliser, advantage) and receive no gradient. Returns the scalar, which
    can be backpropagated once, and the meters over all tokens, detached: each [N].
    """
    meters: dict[str, list[Tensor]] = {}
    trained = [p for p in parameters if p.requires_grad]
    loss: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        block_loss, weights, chunk_tokens, meters, features, *trained
    )
    return loss, {name: torch.cat(parts) for name, parts in meters.items()}


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block_loss: BlockLoss,
        weights: Tensor,
        chunk_tokens: int,
        meters: dict[str, list[Tensor]],
        features: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(features.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=features.device)
        needs_grad = any(ctx.needs_input_grad[4:])
        feature_grad = torch.zeros_like(features) if needs_grad else features
        parameter_grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        for start in range(0, len(features), chunk_tokens):
            block = slice(start, start + chunk_tokens)
            part = features[block].detach().requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad):
                losses, block_meters = block_loss(part, block)
                weighted = (losses * weights[block]).sum()
            if needs_grad:
                grad, *others = torch.autograd.grad(weighted, [part, *parameters], allow_unused=True)
                feature_grad[block] = grad
                for mine, other in zip(parameter_grads, others, strict=True):
                    if other is not None:
                        mine.add_(other)
            total += weighted.detach()
            for name, values in block_meters.items():
                meters.setdefault(name, []).append(values.detach())
            meters.setdefault("loss", []).append(losses.detach())
        ctx.save_for_backward(feature_grad, *parameter_grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        features, *parameters = ctx.saved_tensors
        return None, None, None, None, features * scale, *(p * scale for p in parameters)


def _log_softmax(logits: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1)
