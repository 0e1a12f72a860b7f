"""Closed forms of the losses on rows of logits: meters, and the slope in the logits, without autograd.

With p the teacher's, q the student's distribution, r = log p - log q, m = w p + (1-w) q and u the student's logits
after scale, soft cap and temperature:

    forward KL      sum p r               = sum [p r + (q - p)]     d/du = q - p
    reverse KL      sum q (-r)            = sum [-q r - (q - p)]    d/du = q (-r - sum q (-r))
    Jensen-Shannon  sum w p log p/m + (1-w) q log q/m               d/du = (1-w) q (log q/m - sum q log q/m)

Every term of the middle column (and of the last sum, entry by entry) is >= 0, so that no small divergence is the
difference of large numbers; and q - p = sign(r) max(p, q) expm1(-|r|) stays exact where p and q agree in most digits.
The rounding of the normalisers leaves the same error in r for the whole vocabulary. To first order it changes none of
these values and cancels in the last two gradients; from q - p it is taken out by its sum, which must be 0.

`maths/divergence.py` has the readable forms that these must equal. Everything here is element-wise or a sum over the
vocabulary, out of few tensors, so that it can be compiled as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atesd.maths.divergence import Objective
from atesd.maths.divergences import Compared
from atesd.maths.head import Head

Meters = dict[str, Tensor]

_LEAST = torch.finfo(torch.float32).min / 4


def divergence_rows(
    objective: Objective,
    student_head: Head,
    teacher_head: Head,
    gap_form: bool,
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    weights: Tensor | None,
) -> Meters:
    """The meters of `Objective` and `loss`, for some rows; with weights, their slope is written over `student`.

    `student` and `teacher` hold projections, before bias, scale, soft cap and temperature; in the gap form `teacher` is
    the teacher's less the student's, and is overwritten. The slope is that of weights[n] D_n in the student's
    projection.
    """
    u_q = _logits(student, student_head, objective.temperature)
    if gap_form:
        # The factor comes last: products that are then added may be fused, in one kernel and not in another, and the
        # logits would miss their own maximum by a rounding.
        u_p = _logits(student + teacher, student_head, objective.temperature)
        gap = _logits(teacher, Head(None, scale=teacher_head.scale), objective.temperature)
    else:
        u_p, u_q = _masked_alike(_logits(teacher, teacher_head, objective.temperature), u_q)
        gap = u_p - u_q
    top_p, top_q = u_p.amax(-1, keepdim=True), u_q.amax(-1, keepdim=True)
    agree = ((u_p == top_p) & (u_q == top_q)).any(-1)
    log_p, p, norm_p = _softmax(u_p, top_p)
    log_q, q, norm_q = _softmax(u_q, top_q)
    meters = {
        "logprob": (log_q.gather(-1, tokens[:, None]) - norm_q).squeeze(-1),
        "top1_disagreement": 1 - agree.to(u_q.dtype),
        "teacher_entropy": norm_p.squeeze(-1) - log_p.mul_(p).sum(-1),
        "student_entropy": norm_q.squeeze(-1) - log_q.mul_(q).sum(-1),
    }
    ratio = gap.sub_((top_p - top_q) + (norm_p - norm_q))
    decay = ratio.abs().neg_().expm1_()
    sign = ratio.sign()
    larger = torch.maximum(p, q)
    excess = (larger * decay).mul_(sign)
    q = larger.add_(excess.clamp(max=0))  # p and q anew, from one of them and their ratio: their own roundings differ
    p = q - excess
    kl = torch.addcmul(excess, p, ratio).sum(-1)
    compared = Compared(p, q, ratio, sign, decay, excess, kl)
    assert objective.kind.closed_form is not None
    terms = objective.kind.closed_form(compared, objective.number, objective.clip == "per_entry")
    raw, slope = terms.value, terms.slope
    loss, factor, reversed_mass = raw, weights, torch.zeros_like(raw)
    if objective.clip == "per_token":
        keep = objective.threshold / raw.clamp(min=objective.threshold)
        loss, factor = raw * keep, None if weights is None else weights * keep
    elif terms.entries is not None and terms.pull is not None:
        entries = terms.entries
        over = entries > objective.threshold
        cut = terms.pull * over
        clipped_slope = slope - torch.addcmul(cut, q, cut.sum(-1, keepdim=True), value=-1)
        loss = raw - (entries - objective.threshold).clamp_(min=0).sum(-1)
        reversed_mass = _reversed_share(clipped_slope, slope).masked_fill(~over.any(-1), 0.0)
        slope = clipped_slope
    meters |= {"kl": kl, "clipped_mass": raw - loss, "reversed_mass": reversed_mass, "loss": loss}
    if factor is not None:
        student.copy_(_projection_slope(slope, factor, u_q, student_head, objective.temperature))
    return meters


def _masked_alike(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """The logits with -inf made finite and very small, where the teacher has it: 0 times infinity is no number.

    What only the student rules out stays -inf, since the divergence from a teacher who does not is infinite.
    """
    teacher = teacher.clamp(min=_LEAST)
    return teacher, student.maximum(torch.where(teacher == _LEAST, _LEAST, -torch.inf))


def _reversed_share(clipped: Tensor, unclipped: Tensor) -> Tensor:
    """Share of |clipped gradient| whose sign is not that of the unclipped one; `divergence.reversed_share`."""
    size = clipped.abs()
    against = clipped * unclipped < 0
    return (size * against).sum(-1) / size.sum(-1).clamp(min=torch.finfo(size.dtype).tiny)


def likelihood_rows(head: Head, temperature: float, student: Tensor, tokens: Tensor, weights: Tensor | None) -> Meters:
    """`loss` = -log q(token), `logprob` and `student_entropy`; with weights, the slope is written over `student`."""
    u = _logits(student, head, temperature)
    log_q, q, norm = _softmax(u, u.amax(-1, keepdim=True))
    logprob = (log_q.gather(-1, tokens[:, None]) - norm).squeeze(-1)
    entropy = norm.squeeze(-1) - (q * log_q).sum(-1)
    if weights is not None:
        slope = q.scatter_add(-1, tokens[:, None], torch.full_like(norm, -1.0))
        student.copy_(_projection_slope(slope, weights, u, head, temperature))
    return {"loss": -logprob, "logprob": logprob, "student_entropy": entropy}


def _logits(projection: Tensor, head: Head, temperature: float) -> Tensor:
    """Bias, scale, soft cap and temperature on hidden W^T; may be the very tensor."""
    biased = projection if head.bias is None else projection + head.bias.to(projection.dtype)
    if head.soft_cap is not None:
        return (biased * (head.scale / head.soft_cap)).tanh_() * (head.soft_cap / temperature)
    factor = head.scale / temperature
    return biased if factor == 1 else biased * factor


def _projection_slope(slope: Tensor, weights: Tensor, logits: Tensor, head: Head, temperature: float) -> Tensor:
    """The chain rule of `_logits`, and the weight of each row."""
    slope = slope * (weights * (head.scale / temperature))[:, None]
    if head.soft_cap is None:
        return slope
    return slope * (1 - (logits * (temperature / head.soft_cap)).square())  # d tanh(z) = 1 - tanh(z)^2


def _softmax(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits - top, softmax, log-normaliser of logits - top)."""
    shifted = logits - top
    exped = shifted.exp()
    total = exped.sum(-1, keepdim=True)
    return shifted, exped.div_(total), total.log()
