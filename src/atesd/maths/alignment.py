"""Alignment: the change of the student's success, to first order, when it takes a small step on a divergence.

One gradient step on the loss of a token moves the parameters by -eta * dD/dtheta. If v is the gradient of success in
parameter space and d the derivative of the token's logits along v / |v|, success then changes in proportion to

    alignment = - sum over the vocabulary of (dD/dlogits) * d        [per unit of eta and of |v|]

For forward KL, dD/dlogits is student minus teacher (over the temperature), so that alignment = sum d (p - q) / T. The
teacher is constant. It is linear in the loss's gradient: the alignment of a rollout, of a batch, of a difficulty is
the weighted sum over its tokens, with the weights of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atesd.maths.closed_forms import divergence_rows
from atesd.maths.divergence import Objective
from atesd.maths.head import Head

_LOGITS = Head(None)  # what it is given are logits already


def logit_gradient(
    objective: Objective,
    teacher_logits: Float[Tensor, "N V"],
    student_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, "N V"]:
    """dD/dlogits of every token: what one unit of its loss does to the student's logits, clip and temperature included.

    Whatever the objective calls constant (the scale of `per_token`, the value of `sampled_token`) is constant here too:
    it is the gradient that the optimiser gets.
    """
    if objective.kind.closed_form is not None:
        gradient, ones = student_logits.detach().clone(), torch.ones_like(student_logits[:, 0])
        divergence_rows(objective, _LOGITS, _LOGITS, False, gradient, teacher_logits.detach(), tokens, ones)
        return gradient
    with torch.enable_grad():
        student = student_logits.detach().requires_grad_()
        losses, _ = objective(teacher_logits, student, tokens)
        return torch.autograd.grad(losses.sum(), student)[0]


def token_alignment(
    objective: Objective,
    teacher_logits: Float[Tensor, "N V"],
    student_logits: Float[Tensor, "N V"],
    slope: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """- dD/dlogits . slope for every token, where `slope` is the derivative of its logits along v / |v|."""
    return -(logit_gradient(objective, teacher_logits, student_logits, tokens) * slope).sum(-1)


@dataclass(frozen=True, slots=True)
class Displaced:
    """The student's logits of a block of tokens at theta + epsilon u and theta - epsilon u, u = v / |v|."""

    plus: Float[Tensor, "N V"]
    minus: Float[Tensor, "N V"]
    epsilon: float

    @property
    def slope(self) -> Float[Tensor, "N V"]:
        """The two-point derivative of the logits along u; its error is of the order of epsilon squared."""
        return (self.plus - self.minus) / (2 * self.epsilon)

    @property
    def middle(self) -> Float[Tensor, "N V"]:
        """The logits at theta, to the same order; saves a forward pass where they are not at hand."""
        return (self.plus + self.minus) / 2

    def curvature(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """How far from a straight line: |plus + minus - 2 logits| / |plus - minus| per token, `logits` those at theta.

        0 for a linear model. Rounding shows here as well, when epsilon is too small. Differences that are the same for
        the whole vocabulary change no probability and do not count.
        """
        bend: Tensor = _centred(self.plus + self.minus - 2 * logits).norm(dim=-1)
        straight: Tensor = _centred(self.plus - self.minus).norm(dim=-1)
        ratio: Tensor = bend / straight.clamp(min=torch.finfo(bend.dtype).tiny)
        return ratio


def alignments(
    objective: Objective,
    teachers: Sequence[Float[Tensor, "N V"]],
    student: Float[Tensor, "N V"],
    slope: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, "K N"]:
    """`token_alignment` of every token under each of K teachers; the student's work is done once."""
    return torch.stack([token_alignment(objective, teacher, student, slope, tokens) for teacher in teachers])


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(-1, keepdim=True)
