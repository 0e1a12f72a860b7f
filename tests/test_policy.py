"""The Beta policy: where it starts, its REINFORCE gradient, what an update does, its state."""

import json
import math

import pytest
import scipy.stats
import torch
from torch.distributions import Beta

from atesd.config import PolicyConfig
from atesd.control.policy import BetaPolicy

STATES = [[0.1, -0.4, 1.0], [0.9, 0.2, -1.0], [0.0, 0.0, 0.5]]
DRAWS = [[0.2], [0.7], [0.9]]
ADVANTAGES = [1.0, -0.5, -0.5]


def policy(seed: int = 0, trained: bool = True, **settings) -> BetaPolicy:
    made = BetaPolicy(PolicyConfig(hidden=5, **settings), state_size=3, seed=seed)
    if trained:  # away from the zero-initialised output, so that every gradient is alive
        with torch.no_grad():
            made.parameters["output_weight"].copy_(torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(5, 2))
            made.parameters["output_bias"].copy_(torch.tensor([0.3, -0.6], dtype=torch.float64))
    return made


def means(made: BetaPolicy, states=STATES) -> list[float]:
    concentration1, concentration0 = made.concentrations(states)
    return (concentration1 / (concentration1 + concentration0)).tolist()


def test_an_untrained_policy_is_beta_169_169_in_every_state():
    concentration1, concentration0 = policy(trained=False).concentrations(STATES)
    assert concentration1.tolist() == concentration0.tolist() == pytest.approx([1.6931] * 3, abs=1e-4)


def test_two_seeds_start_with_different_hidden_layers_and_one_seed_with_the_same():
    first = [policy(seed).parameters["hidden_weight"] for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_the_network_is_one_tanh_layer_written_out():
    made = policy()
    p = {name: parameter.detach().tolist() for name, parameter in made.parameters.items()}
    hidden = [
        math.tanh(sum(STATES[0][i] * p["hidden_weight"][i][j] for i in range(3)) + p["hidden_bias"][j])
        for j in range(5)
    ]
    raw = [sum(hidden[j] * p["output_weight"][j][k] for j in range(5)) + p["output_bias"][k] for k in range(2)]
    expected = [1 + math.log1p(math.exp(value)) for value in raw]
    assert [c[0].item() for c in made.concentrations(STATES)] == pytest.approx(expected)


def test_the_loss_is_the_formula_through_torch_distributions():
    made = policy(entropy_ceiling=-0.5)
    distribution = Beta(*made.concentrations(STATES))
    score = distribution.log_prob(torch.tensor([0.2, 0.7, 0.9], dtype=torch.float64))
    excess = (distribution.entropy() + 0.5).clamp(min=0)
    expected = -(torch.tensor(ADVANTAGES, dtype=torch.float64) * score).mean() + 0.3 * (excess**2).mean()
    assert (excess > 0).any()
    torch.testing.assert_close(made.loss(STATES, DRAWS, ADVANTAGES, 0.3), expected, rtol=1e-10, atol=1e-12)


BEFORE = [(1.7, 1.7), (3.0, 1.2), (1.1, 4.0)]


def test_a_draw_of_an_older_policy_weighs_its_density_now_over_its_density_then_up_to_a_cap():
    made = policy()
    now, then = Beta(*made.concentrations(STATES)), Beta(*torch.tensor(BEFORE, dtype=torch.float64).T)
    draws = torch.tensor(DRAWS, dtype=torch.float64)[:, 0]
    ratio = (now.log_prob(draws) - then.log_prob(draws)).exp().detach()
    assert (ratio > 2).any()
    assert (ratio < 2).any()
    expected = -(ratio.clamp(max=2) * torch.tensor(ADVANTAGES, dtype=torch.float64) * now.log_prob(draws)).mean()
    torch.testing.assert_close(made.loss(STATES, DRAWS, ADVANTAGES, 0.0, BEFORE), expected, rtol=1e-10, atol=1e-12)
    unweighted = policy(importance_cap=None)
    assert unweighted.loss(STATES, DRAWS, ADVANTAGES, 0.0, BEFORE) == made.loss(STATES, DRAWS, ADVANTAGES, 0.0)


def test_a_draw_of_the_same_policy_weighs_one():
    made = policy()
    then = [(a.item(), b.item()) for a, b in zip(*made.concentrations(STATES), strict=True)]
    unweighted = made.loss(STATES, DRAWS, ADVANTAGES, 0.3)
    torch.testing.assert_close(made.loss(STATES, DRAWS, ADVANTAGES, 0.3, then), unweighted, rtol=1e-12, atol=0)


def test_importance_weights_make_the_gradient_of_stale_draws_that_of_fresh_ones():
    # E under then of w * A(x) * grad log pi(x) is E under now of A(x) * grad log pi(x), by quadrature over x.
    made, then, points = policy(importance_cap=1e9), (1.5, 2.5), [(i + 0.5) / 4000 for i in range(4000)]
    a, b = (c[0].item() for c in made.concentrations(STATES[:1]))

    def gradient(density, drawn_from):
        weights = [density(x) * (x - 0.4) for x in points]
        loss = made.loss(STATES[:1] * len(points), [[x] for x in points], weights, 0.0, drawn_from)
        return torch.autograd.grad(loss, made.parameters["output_bias"])[0]

    fresh = gradient(lambda x: scipy.stats.beta.pdf(x, a, b), None)
    stale = gradient(lambda x: scipy.stats.beta.pdf(x, *then), [then] * len(points))
    biased = gradient(lambda x: scipy.stats.beta.pdf(x, *then), None)
    torch.testing.assert_close(stale, fresh, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(biased, fresh, rtol=0.1)


def test_the_gradient_equals_finite_differences_for_every_parameter():
    made = policy(entropy_ceiling=-0.5)
    gradients = torch.autograd.grad(made.loss(STATES, DRAWS, ADVANTAGES, 0.3), list(made.parameters.values()))
    for parameter, gradient in zip(made.parameters.values(), gradients, strict=True):
        flat = parameter.detach().view(-1)
        for i in range(flat.numel()):
            original, losses = flat[i].item(), []
            for step in (1e-6, -1e-6):
                flat[i] = original + step
                losses.append(made.loss(STATES, DRAWS, ADVANTAGES, 0.3).item())
            flat[i] = original
            numeric = (losses[0] - losses[1]) / 2e-6
            assert gradient.reshape(-1)[i].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


def test_several_draws_of_one_decision_count_with_their_mean_density():
    made = policy()
    a, b = (c[0].item() for c in made.concentrations(STATES[:1]))
    expected = -sum(scipy.stats.beta.logpdf(x, a, b) for x in (0.1, 0.6)) / 2
    assert made.loss(STATES[:1], [[0.1, 0.6]], [1.0], 0.0).item() == pytest.approx(expected)


def test_an_update_moves_the_mean_toward_the_rewarded_ratio():
    made = policy(trained=False)
    for _ in range(20):
        made.update([STATES[0]] * 2, [[0.9], [0.1]], [1.0, -1.0], 0.0)
    assert means(made)[0] > 0.6


def test_too_much_entropy_is_penalised_but_never_too_little():
    # The first policy has entropy -0.08 nats: above a ceiling of -0.27, below one of 5.
    above, below = policy(trained=False), policy(trained=False, entropy_ceiling=5.0)
    for _ in range(100):
        above.update(STATES, DRAWS, [0.0, 0.0, 0.0], training_progress=1.0)
        below.update(STATES, DRAWS, [0.0, 0.0, 0.0], training_progress=1.0)
    assert Beta(*above.concentrations(STATES)).entropy().tolist() == pytest.approx([-0.27] * 3, abs=0.05)
    assert below.concentrations(STATES)[0].tolist() == pytest.approx([1 + math.log(2)] * 3, abs=1e-12)


def test_the_entropy_cost_rises_from_nothing_with_the_training_progress():
    made = policy(trained=False, entropy_cost=2.0)
    made.update(STATES, DRAWS, [0.0, 0.0, 0.0], training_progress=0.0)
    assert means(made) == [0.5, 0.5, 0.5]
    assert made.concentrations(STATES)[0].tolist() == pytest.approx([1 + math.log(2)] * 3, abs=1e-12)


def test_learning_rate_zero_is_an_untrained_policy():
    made = policy(trained=False, learning_rate=0.0)
    made.update(STATES, DRAWS, ADVANTAGES, 1.0)
    assert means(made) == [0.5, 0.5, 0.5]


def test_the_first_adam_step_moves_each_output_bias_by_the_learning_rate():
    # Adam's first step is lr * gradient / |gradient|.
    made = policy(trained=False, learning_rate=0.01)
    made.update([STATES[0]] * 2, [[0.9], [0.1]], [1.0, -1.0], 0.0)
    assert made.parameters["output_bias"].tolist() == pytest.approx([0.01, -0.01], rel=1e-5)


def test_a_restored_policy_continues_bit_for_bit_after_json():
    made, other = policy(beta1=0.5), policy(seed=9, beta1=0.5)
    made.update(STATES, DRAWS, ADVANTAGES, 0.5)
    text = json.dumps(made.state_dict(), default=torch.Tensor.tolist, allow_nan=False)
    other.load_state_dict(json.loads(text))
    for _ in range(3):
        made.update(STATES, DRAWS, ADVANTAGES, 0.6)
        other.update(STATES, DRAWS, ADVANTAGES, 0.6)
    assert all(torch.equal(made.parameters[name], other.parameters[name]) for name in made.parameters)


def test_a_saved_state_does_not_change_with_later_updates():
    made = policy()
    made.update(STATES, DRAWS, ADVANTAGES, 0.5)
    saved = made.state_dict()
    before = json.dumps(saved, default=torch.Tensor.tolist)
    made.update(STATES, DRAWS, ADVANTAGES, 0.5)
    assert json.dumps(saved, default=torch.Tensor.tolist) == before


def test_a_fresh_state_undoes_adams_memory():
    fresh = policy().state_dict()
    made = policy()
    made.update(STATES, DRAWS, ADVANTAGES, 0.5)
    made.load_state_dict(fresh)
    assert made.state_dict()["adam"] == {}
    assert torch.equal(made.parameters["output_bias"], policy().parameters["output_bias"])
