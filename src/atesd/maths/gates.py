"""Token weights: what the loss of a token is multiplied by, out of what is known of it. None receives a gradient.

The weights of a cut are 0 or 1. The others are smooth; where it is said that they keep the mass of the loss, their mean
over the tokens they are given, those of one rollout, is 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atesd.maths.alignment import token_alignment
from atesd.maths.divergence import Objective


def soft_weights(alignment: Float[Tensor, " N"], sharpness: float) -> Float[Tensor, " N"]:
    """Sigmoid weights of the tokens of one rollout, of mean 1: a smooth form of the cut at alignment 0. Ours.

    weight_n = s_n / mean(s), s_n = sigmoid(sharpness * a_n / rms(a)), with a the alignments and rms their root mean
    square. Without any alignment all are 1; as `sharpness` grows s becomes the cut, or where no alignment is positive
    the largest alone.
    """
    least = torch.finfo(alignment.dtype).tiny
    share = alignment / alignment.abs().amax().clamp(min=least)  # first of the largest: squares of small ones are 0
    scaled = sharpness * share / share.square().mean().sqrt().clamp(min=least)
    # Each over the largest, by their logarithms: of large negative numbers all sigmoids are 0, and 0 / 0 is no weight.
    logs = torch.nn.functional.logsigmoid(scaled)
    gate = torch.exp(logs - logs.amax())
    return gate / gate.mean()


def sdar_weights(
    teacher_logprob: Float[Tensor, " N"], student_logprob: Float[Tensor, " N"], beta: float
) -> Float[Tensor, " N"]:
    """SDAR's gate (arXiv 2605.15155): sigmoid(beta * (log p(y) - log q(y))) at the sampled token y, in (0, 1).

    Log-probabilities in nats, of the teacher p and the student q. One half where both find y equally likely.
    """
    return torch.sigmoid(beta * (teacher_logprob - student_logprob))


def influence(
    objective: Objective,
    teacher_logits: Float[Tensor, "N V"],
    student_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    advantages: Float[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """How far a step on a token's divergence D raises the policy-gradient surrogate S at that token, to first order.

    influence = - dD/dlogits . dS/dlogits, S = A log q(y): for forward KL A (p - q) . (e_y - q) / T^2, with e_y the
    one-hot vector of the sampled token y and A the advantage of its rollout. The logits of each prefix are taken for
    parameters of its own, so that no derivative of the network is needed, and no pass.
    """
    slope = -torch.softmax(student_logits / objective.temperature, -1)
    slope.scatter_add_(-1, tokens[:, None], torch.ones_like(slope[:, :1]))
    slope *= (advantages / objective.temperature)[:, None]
    return token_alignment(objective, teacher_logits, student_logits, slope, tokens)


def bounded_weights(influence: Float[Tensor, " N"], scale: float, bound: float) -> Float[Tensor, " N"]:
    """Bounded weights of the tokens of one rollout, of mean 1, after ICSD (arXiv 2608.14945); the form is ours.

    weight_n = b_n / mean(b), b_n = 1 + bound * tanh(influence_n / scale), 0 < bound < 1: every weight lies within
    (1 - bound) / (1 + bound) and its inverse.
    """
    raw = 1 + bound * torch.tanh(influence / scale)
    return raw / raw.mean()
