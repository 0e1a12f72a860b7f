"""The divergence on hidden states: value, meters and gradient in one sweep, a chunk of tokens at a time.

`maths/divergence.py` says what is computed, from logits and by autograd; here the same numbers come from the closed
forms of `maths/closed_forms.py`, and the gradient is formed in the forward pass. Per chunk two float32 logit matrices
exist, the student's and the teacher's; the gradient overwrites the first. The element-wise work on them goes over few
rows at a time, so that what lies between stays in the processor's cache; on CUDA it is compiled.

Where teacher and student share one head, the second matrix is the projected difference of their hidden states (the
gap) instead of the teacher's logits: as many operations, but a small divergence is not lost in the logits' rounding.

bfloat16 states and weights: on CUDA their products come out in float32, and the logits' gradient is rounded to
bfloat16 for the products that follow; on a CPU the head is cast to float32 a tile of the vocabulary at a time.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atesd.maths.closed_forms import Meters, divergence_rows, likelihood_rows
from atesd.maths.divergence import Objective, chunked_loss
from atesd.maths.head import Head, multiplies_into_float32, project, tiles

Rows = Callable[..., Meters]
"""A function of `closed_forms` whose first arguments are bound: projections, tokens and weights are still to come."""

CPU_LOGIT_BYTES = 28 << 20
CUDA_LOGIT_BYTES = 3 << 27
CPU_ROW_BYTES = 1 << 20
CUDA_ROW_BYTES = 1 << 26


def fused_divergence(
    objective: Objective,
    student: Float[Tensor, "N F"],
    student_head: Head,
    teacher: Float[Tensor, "N G"],
    teacher_head: Head,
    tokens: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    *,
    chunk_tokens: int | None = None,
) -> tuple[Float[Tensor, ""], Meters]:
    """sum_n weights[n] D_n in nats, to be backpropagated once, and the meters of `Objective` and `loss`, each [N].

    The gradient reaches the student's hidden states and whatever of `student_head` requires it; neither the teacher
    nor the weights (mask, normaliser) receive one. Tokens of weight 0 are measured, but no gradient is computed for
    them. `top1_disagreement` is 0 where both share a most likely token. `chunk_tokens`: see `chunk_size`. The
    objectives without a closed form go through `chunked_loss`.

    Raises `ValueError` without tokens, or if the two vocabularies differ in size.
    """
    if objective.kind.closed_form is None:
        chunk = chunk_size(_vocabulary(student, student_head), student.device, chunk_tokens)
        block_loss = partial(_block_loss, objective, student_head, teacher, teacher_head, tokens)
        return chunked_loss(block_loss, student, weights, student_head.trained, chunk)
    chunked = _divergence_pass(objective, student, student_head, (teacher,), teacher_head, tokens, chunk_tokens)
    weights, gradient = weights.detach().to(_wide(student)), _Gradient.of(student, student_head)
    (meters,) = chunked.run(weights, gradient)
    return _attached(meters, weights, gradient, student, student_head), meters


def fused_likelihood(
    student: Float[Tensor, "N F"],
    head: Head,
    tokens: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Float[Tensor, ""], Meters]:
    """-sum_n weights[n] log q(token_n) in nats, as `fused_divergence` gives its sum; weights may be negative.

    Meters, each [N]: `loss` (-log q), `logprob`, `student_entropy`. Raises `ValueError` without tokens.
    """
    rows = partial(likelihood_rows, replace(head, weight=None), temperature)
    chunked = ChunkedPass(rows, student, head, (), head, False, tokens, chunk_tokens)
    weights, gradient = weights.detach().to(_wide(student)), _Gradient.of(student, head)
    (meters,) = chunked.run(weights, gradient)
    return _attached(meters, weights, gradient, student, head), meters


def divergence_profile(
    objective: Objective,
    student: Float[Tensor, "N F"],
    student_head: Head,
    teachers: Sequence[Float[Tensor, "N G"]],
    teacher_head: Head,
    tokens: Int[Tensor, " N"],
    *,
    chunk_tokens: int | None = None,
) -> list[Meters]:
    """The meters of `fused_divergence` against each of several teachers, without gradient.

    The student's hidden states are projected once: K teachers cost K + 1 projections instead of 2 K.
    """
    if objective.kind.closed_form is None:
        with torch.no_grad():
            ones = torch.ones(len(tokens), dtype=_wide(student), device=student.device)
            pairs = [(student, student_head, teacher, teacher_head, tokens, ones) for teacher in teachers]
            return [fused_divergence(objective, *pair, chunk_tokens=chunk_tokens)[1] for pair in pairs]
    with torch.no_grad():
        chunked = _divergence_pass(objective, student, student_head, teachers, teacher_head, tokens, chunk_tokens)
        return chunked.run()


def chunk_size(vocabulary: int, device: torch.device, chunk_tokens: int | None = None) -> int:
    """Tokens whose logits exist at one time: `chunk_tokens`, or as many as fit a byte budget.

    On a CPU 28 MiB per logit matrix but at least 256 tokens, since fewer make slow matrix products; elsewhere 384 MiB,
    which is 640 tokens at 151,936 entries. No result depends on it beyond rounding.
    """
    if chunk_tokens is not None:
        return chunk_tokens
    if device.type == "cpu":
        return max(256, CPU_LOGIT_BYTES // (4 * vocabulary))
    return max(64, CUDA_LOGIT_BYTES // (4 * vocabulary) // 64 * 64)


def token_blocks(count: int, vocabulary: int, device: torch.device, chunk_tokens: int | None = None) -> Iterator[slice]:
    """Blocks of `chunk_size` of the `count` tokens, in order; the last may reach beyond them."""
    size = chunk_size(vocabulary, device, chunk_tokens)
    return (slice(start, start + size) for start in range(0, count, size))


@dataclass(frozen=True, slots=True)
class ChunkedPass:
    """One pass over all tokens against none, one or several teachers."""

    rows: partial[Meters]
    student: Tensor
    head: Head
    teachers: Sequence[Tensor]
    teacher_head: Head
    gap_form: bool
    tokens: Tensor
    chunk_tokens: int | None

    @torch.no_grad()
    def run(self, weights: Tensor | None = None, gradient: _Gradient | None = None) -> list[Meters]:
        """The meters against each teacher (or the one list without any); fills the gradient of the weighted sum."""
        count, vocabulary = len(self.student), _vocabulary(self.student, self.head)
        if count == 0:
            raise ValueError("no tokens: a loss needs at least one")
        live, order = _weighted_first(weights) if weights is not None and gradient is not None else (0, None)
        chunk = chunk_size(vocabulary, self.student.device, self.chunk_tokens)
        kept = _Matrices(self.student, vocabulary)
        found: list[list[Meters]] = [[] for _ in self.teachers or (None,)]
        for start, stop in (*_pieces(0, live, chunk), *_pieces(live, count, chunk)):
            block = slice(start, stop) if order is None else order[start:stop]
            hidden, tokens = self.student[block], self.tokens[block]
            own = kept.projection(0, hidden, self.head)
            wanted = weights[block] if weights is not None and start < live else None
            for parts, teacher in zip(found, self.teachers or (None,), strict=True):
                matrices = [own] if teacher is None else [own, self._project_teacher(kept, teacher[block], hidden)]
                parts.append(_measure(self.rows, matrices, tokens, wanted))  # with weights, `own` now holds the slope
                if gradient is not None and wanted is not None:
                    gradient.add(block, own, hidden)
        return [_joined(parts, order) for parts in found]

    def _project_teacher(self, kept: _Matrices, teacher: Tensor, student: Tensor) -> Tensor:
        if self.gap_form:
            wide = _wide(student)
            teacher = teacher.to(wide) - student.to(wide)
        return kept.projection(1, teacher, self.teacher_head)


def _divergence_pass(
    objective: Objective,
    student: Tensor,
    student_head: Head,
    teachers: Sequence[Tensor],
    teacher_head: Head,
    tokens: Tensor,
    chunk_tokens: int | None,
) -> ChunkedPass:
    size = _vocabulary(student, student_head)
    if any(_vocabulary(teacher, teacher_head) != size for teacher in teachers):
        raise ValueError(f"the student has {size} logits per token, the teacher another number")
    gap_form = student_head.is_linear_twin(teacher_head)
    heads = replace(student_head, weight=None), replace(teacher_head, weight=None)
    rows: partial[Meters] = partial(divergence_rows, objective, heads[0], heads[1], gap_form)
    return ChunkedPass(rows, student, student_head, teachers, teacher_head, gap_form, tokens, chunk_tokens)


def _block_loss(
    objective: Objective,
    student_head: Head,
    teacher: Tensor,
    teacher_head: Head,
    tokens: Tensor,
    student: Tensor,
    block: slice,
) -> tuple[Tensor, Meters]:
    """The loss of a block of tokens by autograd, given the student's hidden states of that block."""
    with torch.no_grad():
        teacher_logits = teacher_head.logits(teacher[block])
    return objective(teacher_logits, student_head.logits(student), tokens[block])


def _attached(meters: Meters, weights: Tensor, gradient: _Gradient | None, student: Tensor, head: Head) -> Tensor:
    """The weighted sum of the meter `loss`, with its gradient attached."""
    with torch.no_grad():
        loss = (meters["loss"] * weights).sum()
    if gradient is None:
        return loss
    attached: Tensor = _Attached.apply(loss, gradient.parts, *_trained(student, head))  # type: ignore[no-untyped-call]
    return attached


def _trained(student: Tensor, head: Head) -> list[Tensor]:
    """What receives a gradient: the hidden states, and what of the head is trained."""
    return [tensor for tensor in (student, *head.trained) if tensor.requires_grad]


class _Gradient:
    """The gradients of one sweep as they fill up: of the hidden states, and of what is trained of the head."""

    @classmethod
    def of(cls, student: Tensor, head: Head) -> _Gradient | None:
        """Empty gradients; None where none is wanted."""
        return cls(student, head) if torch.is_grad_enabled() and _trained(student, head) else None

    @torch.no_grad()
    def __init__(self, student: Tensor, head: Head) -> None:
        self._head = head
        self._hidden = torch.zeros_like(student) if student.requires_grad else None
        self._weight, self._bias = (
            None if t is None or not t.requires_grad else torch.zeros_like(t, dtype=_wide(t))
            for t in (head.weight, head.bias)
        )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """In the order hidden states, weight, bias; only those that require one."""
        return tuple(part for part in (self._hidden, self._weight, self._bias) if part is not None)

    def add(self, block: slice | Tensor, slope: Tensor, hidden: Tensor) -> None:
        """Take in one chunk: `slope` is the gradient in its projections, [n, V]."""
        weight = self._head.weight
        if self._hidden is not None:
            self._hidden[block] = (slope if weight is None else _times_head(slope, weight)).to(self._hidden.dtype)
        if self._weight is not None:
            _add_outer(self._weight, slope, hidden)
        if self._bias is not None:
            self._bias += slope.sum(0)


class _Attached(torch.autograd.Function):
    """Gives a value the gradients that were formed together with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *_: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        return None, None, *(gradient.mul_(scale) for gradient in ctx.saved_tensors)


class _Matrices:
    """The two [chunk, V] matrices of a sweep, allocated once."""

    def __init__(self, like: Tensor, vocabulary: int) -> None:
        self._like, self._vocabulary = like, vocabulary
        self._kept: dict[int, Tensor] = {}

    def projection(self, which: int, hidden: Tensor, head: Head) -> Tensor:
        """Hidden W^T in float32 or better, in matrix `which`; what it held before is gone."""
        if which not in self._kept or len(self._kept[which]) < len(hidden):
            shape = (len(hidden), self._vocabulary)
            self._kept[which] = torch.empty(shape, dtype=_wide(self._like), device=self._like.device)
        out = self._kept[which][: len(hidden)]
        return out.copy_(hidden) if head.weight is None else project(hidden, head.weight, out)


def _times_head(slope: Tensor, weight: Tensor) -> Tensor:
    """Slope W, summed in float32 or better: [n, F]."""
    if weight.dtype == slope.dtype:
        return slope @ weight
    if multiplies_into_float32(weight):
        return torch.mm(slope.to(weight.dtype), weight, out_dtype=torch.float32)
    found = slope.new_zeros(len(slope), weight.shape[1])
    for tile in tiles(len(weight)):
        found.addmm_(slope[:, tile], weight[tile].to(slope.dtype))
    return found


def _add_outer(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """Total += slope^T hidden, summed in the total's dtype: [V, F]."""
    if multiplies_into_float32(hidden):
        slope = slope.to(hidden.dtype)
        for tile in tiles(len(total)):
            total[tile] += torch.mm(slope[:, tile].T, hidden, out_dtype=total.dtype)
    else:
        total.addmm_(slope.T, hidden.to(total.dtype))


def _measure(rows: partial[Meters], matrices: list[Tensor], tokens: Tensor, weights: Tensor | None) -> Meters:
    """`rows` on one chunk: compiled in one piece on CUDA, else a few rows at a time."""
    compiled = _measure_compiled(rows, matrices, tokens, weights) if matrices[0].is_cuda else None
    if compiled is not None:
        return compiled
    count, vocabulary = matrices[0].shape
    budget = CPU_ROW_BYTES if tokens.device.type == "cpu" else CUDA_ROW_BYTES
    size = max(1, budget // (vocabulary * matrices[0].element_size()))
    _keep_freed_memory()
    if count <= size:
        return rows(*matrices, tokens, weights)
    found: Meters = {}
    for start in range(0, count, size):
        block = slice(start, start + size)
        meters = rows(*(m[block] for m in matrices), tokens[block], None if weights is None else weights[block])
        # Copied: kept as they are, such small tensors would stop the memory around them from being used again.
        found = found or {name: values.new_empty(count) for name, values in meters.items()}
        for name, values in meters.items():
            found[name][block] = values
    return found


def _measure_compiled(
    rows: partial[Meters], matrices: list[Tensor], tokens: Tensor, weights: Tensor | None
) -> Meters | None:
    """`rows` compiled, on one chunk; None where the compiler could not, which is said once."""
    if rows.func in _NOT_COMPILABLE:
        return None
    try:
        return _compiled(rows.func)(*rows.args, *matrices, tokens, weights)
    except _compiler_errors() as error:
        _NOT_COMPILABLE.add(rows.func)
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"the loss runs uncompiled, and slower, on {matrices[0].device}: {reason}", stacklevel=2)
        return None


@lru_cache(maxsize=1)
def _keep_freed_memory() -> None:
    """Once: free a block of 28 MiB that was never touched, from which glibc learns to keep up to twice as much.

    As it starts it gives all but little back to the system after every few rows, and a third of the element-wise time
    is spent on getting fresh pages. It learns from blocks of up to 32 MiB.
    """
    torch.empty(28 << 20, dtype=torch.uint8)


_NOT_COMPILABLE: set[Rows] = set()


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    return TorchDynamoException, ImportError, OSError


@lru_cache
def _compiled(function: Rows) -> Rows:
    return torch.compile(function)


def _pieces(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """Cuts of [start, stop) into as few pieces as `most` tokens allow, of nearly equal length."""
    count = math.ceil((stop - start) / most)
    cuts = [start + (stop - start) * i // max(count, 1) for i in range(count + 1)]
    return itertools.pairwise(cuts)


def _weighted_first(weights: Tensor) -> tuple[int, Tensor | None]:
    """How many tokens have a weight, and the order that puts them first; None if all have one."""
    live = weights != 0
    count = int(live.sum())
    return count, None if count == len(weights) else torch.argsort((~live).to(torch.uint8), stable=True)


def _joined(parts: list[Meters], order: Tensor | None = None) -> Meters:
    """The meters of all pieces in the order of the tokens."""
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]
    return (
        joined if order is None else {name: v.new_empty(v.shape).index_copy_(0, order, v) for name, v in joined.items()}
    )


def _vocabulary(hidden: Tensor, head: Head) -> int:
    return hidden.shape[-1] if head.weight is None else len(head.weight)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
