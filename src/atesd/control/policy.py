"""The exposure policy: reveal_ratio ~ Beta(1 + softplus(f(state))), learned by REINFORCE (arXiv 2605.11458)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, cast, final

import torch
from torch import Tensor

from atesd.control.learned import PolicyConfig
from atesd.maths import beta, credit, keyed
from atesd.records import Decision


class Moments(TypedDict):
    """What Adam remembers of one parameter."""

    step: float
    first: Tensor
    second: Tensor


class PolicyState(TypedDict):
    """What a checkpoint holds of a policy, by the names of its parameters; Adam's moments once it has any."""

    parameters: dict[str, Tensor]
    adam: dict[str, Moments]


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
        drawn_from: Sequence[tuple[float, float]] | None = None,
    ) -> Tensor:
        """-mean(w * advantage * log pi(ratio | s)) + entropy_cost * mean(entropy_penalty): REINFORCE, to be minimised.

        `draws` holds the unclipped ratios of each decision, `drawn_from` the concentrations of the Beta that drew them.
        w, without a gradient, is the density of a draw under today's Beta over the one under that Beta, at most
        `importance_cap` (ours): decisions overlap, so that some were drawn before the last policy update. 1 without
        `drawn_from` or a cap. Under finer granularity a decision draws one ratio per group from one Beta; their mean
        counts (ours), so that a decision weighs the same however many groups it met.
        """
        origins: Sequence[tuple[float, float] | None] = drawn_from or [None] * len(draws)
        concentration1, concentration0 = self.concentrations(states)
        log_density = torch.stack(
            [
                self._weighted(beta.log_density(_column(ratios), c1[None], c0[None]), ratios, then).mean()
                for ratios, c1, c0, then in zip(draws, concentration1, concentration0, origins, strict=True)
            ]
        )
        reinforce = -(_column(advantages) * log_density).mean()
        penalty = beta.entropy_penalty(concentration1, concentration0, self._config.entropy_ceiling)
        return reinforce + entropy_cost * penalty.mean()

    def update(
        self,
        states: Sequence[Sequence[float]],
        draws: Sequence[Sequence[float]],
        advantages: Sequence[float],
        training_progress: float,
        drawn_from: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        """One Adam step on `loss`, at the entropy cost c_t = entropy_cost * training_progress, progress in [0, 1]."""
        self._optimiser.zero_grad()
        loss = self.loss(states, draws, advantages, self._config.entropy_cost * training_progress, drawn_from)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()

    def _weighted(self, now: Tensor, ratios: Sequence[float], then: tuple[float, float] | None) -> Tensor:
        cap = self._config.importance_cap
        if then is None or cap is None:
            return now
        before = beta.log_density(_column(ratios), *_column(then))
        return _column(credit.importance_weights(before.tolist(), now.tolist(), cap)) * now

    def state_dict(self) -> dict[str, object]:
        """Parameters and Adam's moments: tensors and JSON values, copied."""
        moments = {name: self._optimiser.state.get(parameter) for name, parameter in self.parameters.items()}
        return {
            "parameters": {name: parameter.detach().clone() for name, parameter in self.parameters.items()},
            "adam": {name: _saved_moments(moment) for name, moment in moments.items() if moment},
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave; nested lists do in place of tensors."""
        kept = cast(PolicyState, state)
        self._optimiser.state.clear()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.as_tensor(kept["parameters"][name], dtype=torch.float64))
        for name, moment in kept["adam"].items():
            self._optimiser.state[self.parameters[name]] = _restored_moments(moment)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _saved_moments(moment: Mapping[str, Tensor]) -> Moments:
    first, second = moment["exp_avg"].clone(), moment["exp_avg_sq"].clone()
    return {"step": float(moment["step"]), "first": first, "second": second}


def _restored_moments(moment: Moments) -> dict[str, Tensor]:
    first, second = (torch.as_tensor(m, dtype=torch.float64).clone() for m in (moment["first"], moment["second"]))
    return {"step": torch.tensor(moment["step"], dtype=torch.float32), "exp_avg": first, "exp_avg_sq": second}
