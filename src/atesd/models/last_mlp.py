"""The end of the last layer that works token by token: what it read in a pass, and its derivative by its weights.

It is the last feed-forward block, or that and the output projection of the attention before it. Neither the rest of the
model nor any other token has to be read again, and the derivative is exact: forward-mode differentiation instead of two
displaced passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from atesd.models.token_tree import Backbone


@final
@dataclass(slots=True)
class Read:
    """What the block was given in one pass, without gradient: of each module that it hears, the input."""

    inputs: dict[int, Tensor] = field(default_factory=dict)

    def at(self, *tokens: Int[Tensor, " N"]) -> Float[Tensor, "N F"]:
        """The inputs side by side, at some tokens (rows and columns) or at all."""
        return torch.cat([self.inputs[place][tokens] for place in sorted(self.inputs)], dim=-1)


class _Mlp(nn.Module):
    """norm(x + mlp(before(x)))."""

    def __init__(self, before: nn.Module, mlp: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.before, self.mlp, self.norm = before, mlp, norm

    def forward(self, states: Tensor) -> Tensor:
        """The backbone's output at these states of the residual stream."""
        output: Tensor = self.norm(states + self.mlp(self.before(states)))
        return output


class _Half(nn.Module):
    """The same behind x = residual + project(attended)."""

    def __init__(self, project: nn.Module, mlp: _Mlp, width: int) -> None:
        super().__init__()
        self.project, self.mlp, self.width = project, mlp, width

    def forward(self, states: Tensor) -> Tensor:
        """The backbone's output at the layer's input and, side by side with it, what its attention gives per head."""
        output: Tensor = self.mlp(states[..., : self.width] + self.project(states[..., self.width :]))
        return output


@final
class LastMlp:
    """The end of a backbone from its last feed-forward block on, or from the projection before it."""

    def __init__(self, block: nn.Module, hears: tuple[nn.Module, ...]) -> None:
        self._hears = hears
        self._block = (block,)  # in a tuple: nobody takes it for a part of the model

    def parameters(self) -> set[int]:
        """The ids of its parameters."""
        return {id(parameter) for parameter in self._block[0].parameters()}

    def still(self) -> dict[int, Tensor]:
        """A movement of no length, for trying."""
        return {id(parameter): torch.zeros_like(parameter) for parameter in self._block[0].parameters()}

    @contextmanager
    def heard(self) -> Iterator[Read]:
        """Inside, a pass of the backbone tells what it gives to the block."""
        read = Read()

        def hear(place: int) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
            def keep(_module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
                read.inputs[place] = (arguments[0] if arguments else options["hidden_states"]).detach()

            return keep

        handles = [
            module.register_forward_pre_hook(hear(place), with_kwargs=True) for place, module in enumerate(self._hears)
        ]
        try:
            yield read
        finally:
            for handle in handles:
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
            value, tangent = forward_ad.unpack_dual(output)  # type: ignore[no-untyped-call]
        change: Tensor = torch.zeros_like(value) if tangent is None else tangent
        return change


def last_mlp_of(backbone: Backbone, ids: Tensor) -> LastMlp | None:
    """The last feed-forward block with the norms before and behind it, if it is used (`_tried`); None if not."""
    block = _mlp_of(backbone)
    return None if block is None else _tried(LastMlp(block, (block.before,)), backbone, ids)


def last_half_of(backbone: Backbone, ids: Tensor) -> LastMlp | None:
    """That and the output projection of the attention before it, if it is used (`_tried`); None if not."""
    block, layer = _mlp_of(backbone), _last_layer(backbone)
    project = getattr(getattr(layer, "self_attn", None), "o_proj", None)
    width = getattr(project, "out_features", None)
    if block is None or layer is None or not isinstance(project, nn.Module) or not isinstance(width, int):
        return None
    return _tried(LastMlp(_Half(project, block, width), (layer, project)), backbone, ids)


def _last_layer(backbone: Backbone) -> nn.Module | None:
    layers = getattr(backbone, "layers", None)
    return layers[-1] if isinstance(layers, nn.ModuleList) else None


def _mlp_of(backbone: Backbone) -> _Mlp | None:
    layer, norm = _last_layer(backbone), getattr(backbone, "norm", None)
    before, mlp = getattr(layer, "post_attention_layernorm", None), getattr(layer, "mlp", None)
    parts = [part for part in (before, mlp, norm) if isinstance(part, nn.Module)]
    return _Mlp(*parts) if len(parts) == 3 else None


@torch.no_grad()
def _tried(found: LastMlp, backbone: Backbone, ids: Tensor) -> LastMlp | None:
    """The block, if it gives the backbone's own output on some ids, and its derivative; None if not.

    The same bit for bit on all of them; up to rounding where it is given some tokens alone, in another order and
    without their rows, as it will be: so no block passes that mixes tokens or asks for rows.
    """
    columns = torch.arange(ids.shape[1] - 1, -1, -2, device=ids.device)
    rows = torch.zeros_like(columns)
    try:
        with found.heard() as read:
            wanted = backbone(input_ids=ids, use_cache=False).last_hidden_state
        if not read.inputs:
            return None
        some = read.at(rows, columns)
        same = torch.equal(found.output(read.at()), wanted)
        alone = _near(found.output(some), wanted[rows, columns])
        with warnings.catch_warnings():  # torch itself calls what it deprecates, at its first derivative of this kind
            warnings.simplefilter("ignore", DeprecationWarning)
            found.change(some, found.still())
    except (
        RuntimeError,
        TypeError,
        ValueError,
        KeyError,
    ):  # it returns or hears other things; a kernel has no derivative
        return None
    return found if same and alone else None


def _near(ours: Tensor, wanted: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    scale = float(wanted.abs().max())
    return (
        ours.shape == wanted.shape and float((ours - wanted).abs().max()) <= 32 * torch.finfo(wanted.dtype).eps * scale
    )
