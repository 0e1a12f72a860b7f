"""Per-token divergences between teacher and student by autograd, their clips and their meters.

Everything here takes logits that the caller has already divided by the temperature, teacher before student, and works
in float32 or better. The teacher is detached in every function, so that no caller can leak a gradient into it. The
divergences are those of `maths.divergences`. These plain forms are the reference of `maths.fused`; `chunked_loss` runs
them a block of tokens at a time, so that the logits of a whole batch never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atesd.maths.divergences import (
    Divergence,
    divergence_named,
    forward_kl_entries,
    jensen_shannon_entries,
    log_softmax,
    reverse_kl_entries,
    weighted_gap,
)

ClipName = Literal["none", "per_token", "per_entry"]


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


def clip_per_entry(entries: Float[Tensor, "N V"], threshold: float) -> Float[Tensor, " N"]:
    """Sum over the vocabulary of min(entry, threshold), in nats: the clip of OPSD, third version.

    A clamped entry stops pulling, but the normaliser of the softmax still pushes it: its gradient is reversed. See
    `reversed_share`.
    """
    return entries.clamp(max=threshold).sum(-1)


def clip_per_token(divergence: Float[Tensor, " N"], threshold: float) -> Float[Tensor, " N"]:
    """Scale every token above the threshold down to it, in nats; the direction of its gradient stays.

    min(1, threshold / D) is held constant in the gradient. A hard clamp would instead remove the gradient at exactly
    the tokens that carry the information (in the embedded world it stopped learning altogether).
    """
    return divergence * (threshold / divergence.detach().clamp(min=threshold))


@torch.enable_grad()
def reversed_share(
    kind: Divergence,
    teacher_logits: Float[Tensor, "N V"],
    student_logits: Float[Tensor, "N V"],
    number: float,
    threshold: float,
) -> Float[Tensor, " N"]:
    """Share, per token, of the logit gradient clipped per entry that points against the unclipped one, in [0, 1].

    |d/dz_v sum_u min(entry_u, threshold)| summed over the v at which its sign is not that of d/dz_v sum_u entry_u, over
    its sum over all v; both by autograd. 0 where nothing is clipped. For the forward KL, with C the clipped entries and
    P the teacher's mass outside C, the clipped gradient is q_v P - p_v [v not in C], the unclipped one q_v - p_v.
    """
    assert kind.entries is not None
    student = student_logits.detach().requires_grad_()
    entries = kind.entries(teacher_logits.detach(), student, number)
    (unclipped,) = torch.autograd.grad(entries.sum(), student, retain_graph=True)
    (clipped,) = torch.autograd.grad(entries.clamp(max=threshold).sum(), student)
    size = clipped.abs()
    share = size.masked_fill(clipped * unclipped >= 0, 0.0).sum(-1) / size.sum(-1).clamp(
        min=torch.finfo(size.dtype).tiny
    )
    return share.masked_fill(~(entries > threshold).any(-1), 0.0).detach()


@dataclass(frozen=True, slots=True)
class Objective:
    """Which divergence, how it is clipped, and the temperature that divides both logits.

    `parameter` is the divergence's own number, None for its default. Raises `ValueError` for an unknown divergence, a
    parameter that it does not have, and a clip per entry where it has no entries.
    """

    divergence: str = "forward_kl"
    clip: ClipName = "none"
    threshold: float = float("inf")
    temperature: float = 1.0
    parameter: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be computed."""
        kind = divergence_named(self.divergence)
        if self.parameter is not None and kind.parameter is None:
            raise ValueError(f"{self.divergence} has no parameter; {self.parameter} is given")
        if self.clip == "per_entry" and not kind.clips_entries:
            raise ValueError(f"{self.divergence} has no entries to clip; use clip none or per_token")

    @property
    def kind(self) -> Divergence:
        """The divergence."""
        return divergence_named(self.divergence)

    @property
    def number(self) -> float:
        """The parameter in force; 0 where there is none."""
        if self.parameter is not None:
            return self.parameter
        return self.kind.parameter.default if self.kind.parameter else 0.0

    def __call__(
        self, teacher_logits: Float[Tensor, "N V"], student_logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]
    ) -> tuple[Float[Tensor, " N"], dict[str, Tensor]]:
        """The clipped divergence of every token (nats, differentiable) and its meters (detached, [N] each).

        Meters: `kl` (forward KL, unclipped, whatever the objective), `logprob` of the token under the student,
        `top1_disagreement`, `teacher_entropy`, `student_entropy`, `clipped_mass` (nats cut off), `reversed_mass`.
        """
        teacher, student = teacher_logits.detach() / self.temperature, student_logits / self.temperature
        entries = self.kind.entries(teacher, student, self.number) if self.kind.entries else None
        if entries is not None:
            raw = entries.sum(-1)
        else:
            assert self.kind.values is not None
            raw = self.kind.values(teacher, student, tokens, self.number)
        clipped = raw
        if self.clip == "per_entry" and entries is not None:
            clipped = clip_per_entry(entries, self.threshold)
        elif self.clip == "per_token":
            clipped = clip_per_token(raw, self.threshold)
        return clipped, self._meters(teacher, student.detach(), tokens, entries, raw.detach(), clipped.detach())

    @torch.no_grad()
    def _meters(
        self, teacher: Tensor, student: Tensor, tokens: Tensor, entries: Tensor | None, raw: Tensor, clipped: Tensor
    ) -> dict[str, Tensor]:
        log_p, log_q = log_softmax(teacher), log_softmax(student)
        reversed_mass = torch.zeros_like(raw)
        if self.clip == "per_entry" and entries is not None:
            reversed_mass = reversed_share(self.kind, teacher, student, self.number, self.threshold)
        return {
            "kl": weighted_gap(log_p, log_q).sum(-1),
            "logprob": log_q.gather(-1, tokens[:, None]).squeeze(-1),
            "top1_disagreement": (log_p.argmax(-1) != log_q.argmax(-1)).to(raw.dtype),
            "teacher_entropy": -weighted_gap(log_p, torch.zeros_like(log_p)).sum(-1),
            "student_entropy": -weighted_gap(log_q, torch.zeros_like(log_q)).sum(-1),
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
