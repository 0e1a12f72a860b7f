"""The Beta distribution over reveal ratios: concentrations, density, entropy, and a draw from a given uniform."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.special import betaincinv
from torch import Tensor

SAMPLE_MARGIN = 1e-6
"""Draws lie in [1e-6, 1 - 1e-6] (ours): there log x and log(1 - x), the gradients of the log-density, stay below 14."""


def concentrations(raw: Float[Tensor, "*batch 2"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """(concentration1, concentration0) = 1 + softplus(raw), the policy head of ATESD (arXiv 2605.11458).

    Both exceed 1, so the density is unimodal and bounded. Raw zeros give 1 + ln 2 = 1.69 twice: mean 0.5, no opinion.
    """
    positive = 1.0 + F.softplus(raw)
    return positive[..., 0], positive[..., 1]


def log_density(
    ratio: Float[Tensor, "*#batch"], concentration1: Float[Tensor, "*#batch"], concentration0: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*#batch"]:
    """Log-density of Beta(concentration1, concentration0) at a ratio in the open interval (0, 1), in nats.

    log x^(a-1) (1-x)^(b-1) / B(a, b) with a = concentration1, b = concentration0. Differentiable in a and b.
    """
    numerator = (concentration1 - 1) * ratio.log() + (concentration0 - 1) * torch.log1p(-ratio)
    return numerator - _log_beta(concentration1, concentration0)


def entropy(
    concentration1: Float[Tensor, "*batch"], concentration0: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Differential entropy of the Beta, in nats: 0 for the uniform Beta(1, 1), negative for every other one.

    log B(a, b) - (a-1) psi(a) - (b-1) psi(b) + (a+b-2) psi(a+b), psi the digamma function.
    """
    total = concentration1 + concentration0
    return (
        _log_beta(concentration1, concentration0)
        - (concentration1 - 1) * torch.digamma(concentration1)
        - (concentration0 - 1) * torch.digamma(concentration0)
        + (total - 2) * torch.digamma(total)
    )


def entropy_penalty(
    concentration1: Float[Tensor, "*batch"], concentration0: Float[Tensor, "*batch"], ceiling: float
) -> Float[Tensor, "*batch"]:
    """max(0, entropy - ceiling)^2, in nats squared: the paper penalises too much entropy, never too little."""
    return torch.relu(entropy(concentration1, concentration0) - ceiling).square()


def quantile(uniform: float, concentration1: float, concentration0: float) -> float:
    """The draw that a uniform in [0, 1) gives: the inverse of the Beta's distribution function.

    Kept `SAMPLE_MARGIN` away from 0 and 1, so that the log-density of every draw is finite.
    """
    draw = float(betaincinv(concentration1, concentration0, uniform))
    return min(max(draw, SAMPLE_MARGIN), 1.0 - SAMPLE_MARGIN)


def _log_beta(
    concentration1: Float[Tensor, "*#batch"], concentration0: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*#batch"]:
    return torch.lgamma(concentration1) + torch.lgamma(concentration0) - torch.lgamma(concentration1 + concentration0)
