"""The feed-forward block of the last layer by itself: what it read in a pass, and its derivative by its weights.

It works token by token. So neither the rest of the model nor any other token has to be read again, and the derivative
is exact: forward-mode differentiation instead of two displaced passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from atesd.models.token_tree import Backbone


@final
@dataclass(slots=True)
class Read:
    """What the block was given in one pass, without gradient: the residual stream behind the attention."""

    states: Float[Tensor, "B T F"] = field(default_factory=lambda: torch.empty(0))


class _Block(nn.Module):
    """norm(x + mlp(before(x)))."""

    def __init__(self, before: nn.Module, mlp: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.before, self.mlp, self.norm = before, mlp, norm

    def forward(self, states: Tensor) -> Tensor:
        """The backbone's output at these states."""
        output: Tensor = self.norm(states + self.mlp(self.before(states)))
        return output


@final
class LastMlp:
    """The last feed-forward block of a backbone with the norms before and behind it."""

    def __init__(self, before: nn.Module, mlp: nn.Module, norm: nn.Module) -> None:
        self._before = before
        self._block = (_Block(before, mlp, norm),)  # in a tuple: nobody takes it for a part of the model

    def parameters(self) -> set[int]:
        """The ids of its parameters."""
        return {id(parameter) for parameter in self._block[0].parameters()}

    @contextmanager
    def heard(self) -> Iterator[Read]:
        """Inside, a pass of the backbone tells what it gives to the block."""
        read = Read()

        def hear(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            read.states = arguments[0].detach()

        handle = self._before.register_forward_pre_hook(hear)
        try:
            yield read
        finally:
            handle.remove()

    def output(self, states: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
        """The backbone's last hidden states, from what the block reads."""
        output: Tensor = self._block[0](states)
        return output

    @torch.no_grad()
    def change(self, states: Float[Tensor, "N F"], along: Mapping[int, Tensor]) -> Float[Tensor, "N F"]:
        """The derivative of `output` when its parameters move along `along` (by the parameter's id), exact."""
        block = self._block[0]
        with forward_ad.dual_level():
            moved = {
                name: forward_ad.make_dual(  # type: ignore[no-untyped-call]
                    parameter.detach(), along[id(parameter)].to(parameter.dtype)
                )
                for name, parameter in block.named_parameters()
                if id(parameter) in along
            }
            output = functional_call(block, moved, (states,))
            tangent: Tensor | None = forward_ad.unpack_dual(output).tangent  # type: ignore[no-untyped-call]
        return torch.zeros_like(states) if tangent is None else tangent


@torch.no_grad()
def last_mlp_of(backbone: Backbone, ids: Tensor) -> LastMlp | None:
    """The block, if it gives the backbone's own output, bit for bit, on some ids, and its derivative; None if not."""
    layers, norm = getattr(backbone, "layers", None), getattr(backbone, "norm", None)
    if not isinstance(layers, nn.ModuleList) or norm is None:
        return None
    before, mlp = getattr(layers[-1], "post_attention_layernorm", None), getattr(layers[-1], "mlp", None)
    if not isinstance(before, nn.Module) or not isinstance(mlp, nn.Module):
        return None
    block = LastMlp(before, mlp, norm)
    with block.heard() as read:
        wanted = backbone(input_ids=ids, use_cache=False).last_hidden_state
    if not read.states.numel():
        return None
    try:
        same = torch.equal(block.output(read.states), wanted)
        with warnings.catch_warnings():  # torch itself calls what it deprecates, at its first derivative of this kind
            warnings.simplefilter("ignore", DeprecationWarning)
            block.change(read.states, {id(p): torch.zeros_like(p) for p in mlp.parameters()})
    except (RuntimeError, TypeError, NotImplementedError):  # a block that returns more, a kernel without a derivative
        return None
    return block if same else None
