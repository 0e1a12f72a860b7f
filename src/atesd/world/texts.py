"""Pretraining texts of the embedded world, a batch at a time in numpy.

What makes the world what it is (and is measured in `world_models/*/gates.json`):

- *Unknown facts*: for 20 % of the facts (value, operator, operand) the result is drawn at random wherever no reference
  reveals it, so that the student is stuck near 0.8^n and more pretraining does not help.
- *References*: a share of the texts shows the first k segments and the answer; there the text copies the revealed
  values as long as it is on their track, and where the last step is an unknown fact it falls back on the answer,
  unless it has left the track.
- *Off-track data*: in a share of those one value is wrong (and no target), and the chain goes on from it. This teaches
  the teacher what to do after a student's mistake.
- *Leaps*: references may leap, and the text follows the style of what is revealed, or writes the leap out against it
  (and then that value is no target).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atesd.data.splits import split_of
from atesd.world.problems import (
    ANSWER,
    BOXED,
    COMPLETION_WORDS,
    DIGITS,
    END,
    FILLER,
    LABELS,
    LATE_LEAPS,
    MAX_CLAUSES,
    MAX_OPERAND,
    MESSAGE_WORDS,
    MIN_CLAUSES,
    MIN_OPERAND,
    MODULUS,
    OPERATORS,
    PAD,
    REFERENCE,
    SEPARATOR,
    SKIP,
    SLOT_WORDS,
    SOLVE,
    VOCABULARY,
    WORDS_PER_STEP,
    Bools,
    Chain,
)

Ints = NDArray[np.int64]

_ID = {word: place for place, word in enumerate(VOCABULARY)}
_DIGIT, _BOXED = _ID[DIGITS[0]], _ID[BOXED[0]]
_LABEL, _OPERATOR = _ID[LABELS[0]], _ID[OPERATORS[0]]
_LATE = np.array([[step in LATE_LEAPS.get(n, ()) for step in range(MAX_CLAUSES)] for n in range(MAX_CLAUSES + 1)])


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of pretraining text."""

    reference: float = 0.5  # texts with a reference
    off_track: float = 0.5  # of those: one wrong value
    late_leaps: float = 0.4  # of the references: late leaps
    leaps_anywhere: float = 0.2  # of the references: leaps anywhere
    leap_rate: float = 0.4  # chance that a step starts a leap, where leaps are anywhere
    written_out: float = 0.5  # of the texts with a reference: revealed leaps written out against it
    own_leaps: float = 0.05  # of what is written without a reference: leaping style


@dataclass(frozen=True)
class Texts:
    """A batch of texts: `ids` [B, message + completion]; `targets` [B, completion], true where a token is learned."""

    ids: Ints
    targets: Bools


@dataclass(frozen=True)
class _Chains:
    """Problems as arrays: `clauses` [B], `start` [B], `operator` and `operand` [B, 6]."""

    clauses: Ints
    start: Ints
    operator: Ints
    operand: Ints

    @property
    def signed(self) -> Ints:
        """What each clause adds [B, 6]."""
        return np.where(self.operator == 0, self.operand, -self.operand)

    @property
    def values(self) -> Ints:
        """The start value, then the true value after each clause [B, 7]."""
        steps = np.concatenate([self.start[:, None], self.signed], axis=1)
        return np.asarray(np.cumsum(steps, axis=1) % MODULUS)


def training_chains(rng: np.random.Generator, size: int, max_clauses: int) -> _Chains:
    """Problems of the train split only, with 2 to `max_clauses` clauses, uniformly."""
    draw = size * 2 + 16
    clauses = rng.integers(MIN_CLAUSES, max_clauses + 1, size=draw)
    start = rng.integers(MODULUS, size=draw)
    operator = rng.integers(len(OPERATORS), size=(draw, MAX_CLAUSES))
    operand = rng.integers(MIN_OPERAND, MAX_OPERAND + 1, size=(draw, MAX_CLAUSES))
    kept: list[int] = []
    for row in range(draw):
        pairs = zip(operator[row, : clauses[row]], operand[row, : clauses[row]], strict=True)
        if split_of(Chain(int(start[row]), tuple((OPERATORS[op], int(x)) for op, x in pairs)).text) == "train":
            kept.append(row)
        if len(kept) == size:
            break
    return _Chains(clauses[kept], start[kept], operator[kept], operand[kept])


def draw_texts(rng: np.random.Generator, size: int, max_clauses: int, mixture: Mixture, known: Bools) -> Texts:
    """A batch of pretraining texts about problems of the train split."""
    chains = training_chains(rng, size, max_clauses)
    with_reference = rng.random(size) < mixture.reference
    elided = _styles(rng, chains.clauses, mixture.late_leaps, mixture.leaps_anywhere, mixture.leap_rate)
    anywhere = mixture.leaps_anywhere / max(mixture.late_leaps + mixture.leaps_anywhere, 1e-9)
    own_late, own_anywhere = mixture.own_leaps * (1 - anywhere), mixture.own_leaps * anywhere
    own = _styles(rng, chains.clauses, own_late, own_anywhere, mixture.leap_rate)
    revealed = _revealed_steps(rng, chains.clauses, elided) * with_reference
    off_track = with_reference & (rng.random(size) < mixture.off_track)
    written_out = with_reference & (rng.random(size) < mixture.written_out)
    wrong_step = np.where(off_track, (rng.random(size) * chains.clauses).astype(np.int64), -1)
    written, targets = _write(rng, chains, elided, own, revealed, with_reference, written_out, wrong_step, known)
    message = _messages(chains, elided, revealed, with_reference)
    return Texts(np.concatenate([message, written], axis=1), targets)


def _styles(rng: np.random.Generator, clauses: Ints, late: float, anywhere: float, leap_rate: float) -> Bools:
    """Which steps are elided [B, 6]: late leaps, leaps anywhere, or (the rest) none."""
    size = len(clauses)
    kind = rng.random(size)
    draws = rng.random((size, MAX_CLAUSES)) < leap_rate
    elided = np.zeros((size, MAX_CLAUSES), dtype=np.bool_)
    for step in range(MAX_CLAUSES - 1):
        before = elided[:, step - 1] if step else np.zeros(size, dtype=np.bool_)
        elided[:, step] = draws[:, step] & ~before & (step < clauses - 1)
    styles = np.where((kind < late)[:, None], _LATE[clauses], elided & (kind < late + anywhere)[:, None])
    return np.asarray(styles)


def _revealed_steps(rng: np.random.Generator, clauses: Ints, elided: Bools) -> Ints:
    """How many steps the first k groups cover [B], k uniform from 0 to all groups."""
    exists = np.arange(MAX_CLAUSES) < clauses[:, None]
    closes = exists & ~elided
    groups = np.cumsum(closes, axis=1)
    shown = rng.integers(0, groups[:, -1] + 1)
    within = exists & (groups - closes < shown[:, None])
    return np.asarray(within.sum(axis=1))


def _messages(chains: _Chains, elided: Bools, revealed: Ints, with_reference: Bools) -> Ints:
    """Token ids of the messages, [B, message]: the layout of `WorldRenderer`."""
    size = len(chains.clauses)
    ids = np.full((size, MESSAGE_WORDS), _ID[FILLER], dtype=np.int64)
    steps = np.arange(MAX_CLAUSES)
    label = np.broadcast_to(_LABEL + steps, (size, MAX_CLAUSES))
    clause = np.stack([label, _OPERATOR + chains.operator, _DIGIT + chains.operand], axis=2)
    values = np.where(elided, _ID[SKIP], _DIGIT + chains.values[:, 1:])
    step = np.stack([label, values, np.full_like(values, _ID[SEPARATOR])], axis=2)
    exists, shown = steps < chains.clauses[:, None], steps < revealed[:, None]
    ids[:, 0] = _DIGIT + chains.start
    ids[:, 1 : 1 + SLOT_WORDS] = np.where(exists[:, :, None], clause, _ID[FILLER]).reshape(size, -1)
    ids[:, 1 + SLOT_WORDS] = _ID[REFERENCE]
    ids[:, 2 + SLOT_WORDS : 2 + 2 * SLOT_WORDS] = np.where(shown[:, :, None], step, _ID[FILLER]).reshape(size, -1)
    answer = chains.values[np.arange(size), chains.clauses]
    ids[:, -3], ids[:, -1] = _ID[ANSWER], _ID[SOLVE]
    ids[:, -2] = np.where(with_reference, _BOXED + answer, _ID[FILLER])
    return ids


def _write(
    rng: np.random.Generator,
    chains: _Chains,
    elided: Bools,
    own: Bools,
    revealed: Ints,
    with_reference: Bools,
    written_out: Bools,
    wrong_step: Ints,
    known: Bools,
) -> tuple[Ints, Bools]:
    """The completions [B, completion] and their targets: what an ideal reader of the message would write.

    `state` is the last written value; a step after a skipped one (`pending`) folds two facts. A revealed value is
    copied while the state is the true one; otherwise a known fact is applied and an unknown one guessed, but for the
    last step of a text with a reference that it does not contradict: there the guess is the answer.
    """
    size, rows = len(chains.clauses), np.arange(len(chains.clauses))
    ids = np.full((size, COMPLETION_WORDS), _ID[PAD], dtype=np.int64)
    targets = np.zeros((size, COMPLETION_WORDS), dtype=np.bool_)
    truth, signed = chains.values, chains.signed
    state, pending, contradicts = chains.start.copy(), np.zeros(size, dtype=np.bool_), ~with_reference
    for step in range(MAX_CLAUSES):
        here, shown = step < chains.clauses, step < revealed
        against = shown & elided[:, step] & written_out
        style = np.where(shown, elided[:, step] & ~written_out, own[:, step])
        skip = style & ~pending & here
        before = np.where(pending, (state + signed[:, step - 1]) % MODULUS, state)
        sure = known[before, chains.operator[:, step], chains.operand[:, step]]
        sure &= ~pending | known[state, chains.operator[:, step - 1], chains.operand[:, step - 1]]
        copied = shown & ~elided[:, step] & (before == truth[:, step])
        copied |= ~sure & ~contradicts & (step == chains.clauses - 1)
        value = np.where(sure, (before + signed[:, step]) % MODULUS, rng.integers(MODULUS, size=size))
        value = np.where(copied, truth[:, step + 1], value)
        wrong = (wrong_step == step) & ~skip
        value = np.where(wrong, rng.integers(MODULUS, size=size), value)
        contradicts |= shown & ~elided[:, step] & (value != truth[:, step + 1])
        at = step * WORDS_PER_STEP
        ids[here, at] = _LABEL + step
        ids[here, at + 1] = np.where(skip, _ID[SKIP], _DIGIT + value)[here]
        ids[here, at + 2] = _ID[SEPARATOR]
        targets[:, at : at + WORDS_PER_STEP] = here[:, None]
        targets[:, at + 1] &= ~(against | wrong)
        state = np.where(here & ~skip, value, state)
        pending = np.where(here, skip, pending)
    end = chains.clauses * WORDS_PER_STEP
    ids[rows, end], ids[rows, end + 1] = _BOXED + state, _ID[END]
    targets[rows, end] = targets[rows, end + 1] = True
    return ids, targets
