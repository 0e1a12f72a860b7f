"""The exposure policy: reveal_ratio ~ Beta(1 + softplus(f(state))), learned by REINFORCE (arXiv 2605.11458)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from atesd.control.learned import PolicyConfig
from atesd.maths import beta, keyed
from atesd.records import Decision


@final
class BetaPolicy:
    """f: state -> 2 raw outputs, one hidden layer of tanh units, in float64.

    The last layer starts at zero (ours), so the first policy is Beta(1.69, 1.69) in every state. The first layer starts
    at N(0, 1/state_size), drawn from this seed's own stream.
    """

    def __init__(self, config: PolicyConfig, state_size: int, seed: int) -> None:
        self._config = config
        hidden = config.hidden
        first = keyed.generator(seed, "policy").standard_normal((state_size, hidden)) / state_size**0.5
        self.parameters: dict[str, Tensor] = {
            "hidden_weight": torch.from_numpy(first),
            "hidden_bias": torch.zeros(hidden, dtype=torch.float64),
            "output_weight": torch.zeros(hidden, 2, dtype=torch.float64),
            "output_bias": torch.zeros(2, dtype=torch.float64),
        }
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self._optimiser = torch.optim.Adam(
            self.parameters.values(), lr=config.learning_rate, betas=(config.beta1, 0.999)
        )

    def concentrations(self, states: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
        """(concentration1, concentration0), each [decisions], for standardised states [decisions, state_size]."""
        inputs = torch.tensor(states, dtype=torch.float64)
        hidden = torch.tanh(inputs @ self.parameters["hidden_weight"] + self.parameters["hidden_bias"])
        return beta.concentrations(hidden @ self.parameters["output_weight"] + self.parameters["output_bias"])

    def draw(self, uniform: float, decision: Decision) -> float:
        """The ratio at a uniform number in [0, 1] under the Beta of a decision, taken now or before."""
        return beta.quantile(uniform, *decision.concentrations)

    def loss(
        self,
        states: Sequence[Sequence[float]],
        draws: Sequence[Sequence[float]],
        advantages: Sequence[float],
        entropy_cost: float,
    ) -> Tensor:
        """-mean(advantage * log pi(ratio | s)) + entropy_cost * mean(entropy_penalty): REINFORCE, to be minimised.

        `draws` holds the unclipped ratios of each decision. Under finer granularity a decision draws one per group from
        one Beta; its log-density is their mean (ours), so that a decision weighs the same however many groups it met.
        """
        concentration1, concentration0 = self.concentrations(states)
        log_density = torch.stack(
            [
                beta.log_density(torch.tensor(ratios, dtype=torch.float64), c1[None], c0[None]).mean()
                for ratios, c1, c0 in zip(draws, concentration1, concentration0, strict=True)
            ]
        )
        reinforce = -(torch.tensor(advantages, dtype=torch.float64) * log_density).mean()
        penalty = beta.entropy_penalty(concentration1, concentration0, self._config.entropy_ceiling)
        return reinforce + entropy_cost * penalty.mean()

    def update(
        self,
        states: Sequence[Sequence[float]],
        draws: Sequence[Sequence[float]],
        advantages: Sequence[float],
        training_progress: float,
    ) -> None:
        """One Adam step on `loss`, at the entropy cost c_t = entropy_cost * training_progress, progress in [0, 1]."""
        self._optimiser.zero_grad()
        loss = self.loss(states, draws, advantages, self._config.entropy_cost * training_progress)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()

    def state_dict(self) -> dict[str, Any]:
        """Parameters and Adam's moments: tensors and JSON values, copied."""
        moments = {name: self._optimiser.state.get(parameter) for name, parameter in self.parameters.items()}
        return {
            "parameters": {name: parameter.detach().clone() for name, parameter in self.parameters.items()},
            "adam": {name: _saved_moments(moment) for name, moment in moments.items() if moment},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; nested lists do in place of tensors."""
        self._optimiser.state.clear()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.as_tensor(state["parameters"][name], dtype=torch.float64))
        for name, moment in state["adam"].items():
            self._optimiser.state[self.parameters[name]] = _restored_moments(moment)


def _saved_moments(moment: dict[str, Any]) -> dict[str, Any]:
    first, second = moment["exp_avg"].clone(), moment["exp_avg_sq"].clone()
    return {"step": float(moment["step"]), "first": first, "second": second}


def _restored_moments(moment: dict[str, Any]) -> dict[str, Tensor]:
    first, second = (torch.as_tensor(moment[name], dtype=torch.float64).clone() for name in ("first", "second"))
    return {"step": torch.tensor(moment["step"], dtype=torch.float32), "exp_avg": first, "exp_avg_sq": second}
