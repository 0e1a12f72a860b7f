"""The student's logits along the success direction: their value and derivative, a block of tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

from jaxtyping import Float
from torch import Tensor

from atesd.maths.alignment import Displaced
from atesd.models.score import Scored


@dataclass(frozen=True, slots=True)
class Tangent:
    """The logits of some tokens, their derivative along u, and how far from a straight line they are, if measured."""

    logits: Float[Tensor, "N V"]
    slope: Float[Tensor, "N V"]
    curvature: Float[Tensor, " N"] | None = None


class Line(Protocol):
    """A batch of completions, one row after another, as the student reads them along u."""

    @property
    def vocabulary(self) -> int:
        """How many entries the logits have."""
        ...

    def tangent(self, block: slice) -> Tangent:
        """Value and derivative at a block of the tokens."""
        ...


@final
@dataclass(frozen=True, slots=True)
class TwoPoints:
    """The student at theta + epsilon u and at theta - epsilon u; where `here`, at theta, is not given, their middle."""

    plus: Scored
    minus: Scored
    epsilon: float
    here: Scored | None

    @property
    def vocabulary(self) -> int:
        """How many entries the logits have."""
        return self.plus.vocabulary

    def tangent(self, block: slice) -> Tangent:
        """By the difference of both points."""
        displaced = Displaced(self.plus.logits(block), self.minus.logits(block), self.epsilon)
        if self.here is None:
            return Tangent(displaced.middle, displaced.slope)
        logits = self.here.logits(block)
        return Tangent(logits, displaced.slope, displaced.curvature(logits))


@final
@dataclass(frozen=True, slots=True)
class HiddenLine:
    """The student where `change` is the derivative of its last hidden states along u: exact, no weight is moved."""

    here: Scored
    change: Float[Tensor, "N F"]

    @property
    def vocabulary(self) -> int:
        """How many entries the logits have."""
        return self.here.vocabulary

    def tangent(self, block: slice) -> Tangent:
        """The derivative of a linear map: the map itself."""
        logits = self.here.logits(block)
        return Tangent(logits, self.here.head.slope(self.change[block], logits))
