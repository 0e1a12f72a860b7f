"""The Beta distribution against scipy, torch.distributions and a symmetry, in float64."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Beta

from atesd.maths.beta import SAMPLE_MARGIN, concentrations, entropy, entropy_penalty, log_density, quantile

above_one = st.floats(1.0, 50.0)
open_ratio = st.floats(1e-6, 1 - 1e-6)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_raw_zeros_give_no_opinion():
    # 1 + softplus(0) = 1 + ln 2
    concentration1, concentration0 = concentrations(torch.zeros(3, 2, dtype=torch.float64))
    assert concentration1.tolist() == concentration0.tolist() == pytest.approx([1 + math.log(2)] * 3)


@given(st.floats(-700, 700), st.floats(-700, 700))
def test_concentrations_never_fall_below_one_and_keep_their_order(raw1, raw0):
    concentration1, concentration0 = concentrations(tensor(raw1, raw0))
    assert concentration1 >= 1
    assert concentration0 >= 1
    assert (concentration1 - concentration0).sign() in ((tensor(raw1 - raw0).sign()), 0)


@given(open_ratio, above_one, above_one)
def test_the_log_density_is_scipys(ratio, a, b):
    ours = log_density(tensor(ratio), tensor(a), tensor(b)).item()
    assert ours == pytest.approx(scipy.stats.beta.logpdf(ratio, a, b), rel=1e-9, abs=1e-9)


@given(above_one, above_one)
def test_the_entropy_is_scipys(a, b):
    assert entropy(tensor(a), tensor(b)).item() == pytest.approx(scipy.stats.beta.entropy(a, b), rel=1e-7, abs=1e-8)


def test_the_default_entropy_ceiling_is_the_entropy_of_beta_3_3():
    assert entropy(tensor(3.0), tensor(3.0)).item() == pytest.approx(-0.27, abs=0.005)


def test_the_uniform_distribution_has_entropy_zero():
    assert entropy(tensor(1.0), tensor(1.0)).item() == pytest.approx(0.0, abs=1e-15)


def test_gradients_of_density_and_entropy_are_torch_distributions():
    a, b, ratio = tensor(1.7, 4.0).requires_grad_(), tensor(2.5, 1.2).requires_grad_(), tensor(0.3, 0.9)
    theirs = Beta(a, b)
    for ours, expected in ((log_density(ratio, a, b), theirs.log_prob(ratio)), (entropy(a, b), theirs.entropy())):
        for mine, reference in zip(
            torch.autograd.grad(ours.sum(), (a, b)), torch.autograd.grad(expected.sum(), (a, b)), strict=True
        ):
            torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)


def test_gradients_pass_gradcheck_through_the_policy_head():
    raw = tensor(0.3, -1.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: log_density(tensor(0.25), *(c[None] for c in concentrations(r))), raw)
    assert torch.autograd.gradcheck(lambda r: entropy(*concentrations(r)), raw)


def test_one_beta_scores_several_draws():
    draws = tensor(0.2, 0.5, 0.8)
    expected = [scipy.stats.beta.logpdf(x, 2.0, 3.0) for x in (0.2, 0.5, 0.8)]
    assert log_density(draws, tensor(2.0), tensor(3.0)).tolist() == pytest.approx(expected)


@given(st.integers(0, 2**53 - 1), above_one, above_one)
def test_the_quantile_is_scipys_inside_the_margin(numerator, a, b):
    uniform = numerator / 2**53  # the uniforms that numpy draws
    expected = min(max(scipy.stats.beta.ppf(uniform, a, b), SAMPLE_MARGIN), 1 - SAMPLE_MARGIN)
    assert quantile(uniform, a, b) == pytest.approx(expected, rel=1e-9)


def test_the_density_of_every_draw_and_its_gradient_stay_finite():
    a, b = tensor(1.0, 40.0).requires_grad_(), tensor(40.0, 1.0).requires_grad_()
    draws = tensor(quantile(0.0, 1.0, 40.0), quantile(math.nextafter(1.0, 0.0), 40.0, 1.0))
    assert 0 < draws[0] < draws[1] < 1
    density = log_density(draws, a, b)
    assert density.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(density.sum(), (a, b)))


def test_draws_from_uniforms_follow_the_distribution():
    uniforms = [(i + 0.5) / 2000 for i in range(2000)]
    draws = [quantile(uniform, 2.0, 5.0) for uniform in uniforms]
    assert scipy.stats.kstest(draws, scipy.stats.beta(2.0, 5.0).cdf).statistic < 0.001


def test_only_entropy_above_the_ceiling_is_penalised():
    # The uniform Beta(1, 1) has entropy 0: 0.5 above a ceiling of -0.5, below one of 0.5
    assert entropy_penalty(tensor(1.0), tensor(1.0), -0.5).item() == pytest.approx(0.25)
    assert entropy_penalty(tensor(1.0), tensor(1.0), 0.5).item() == 0.0
