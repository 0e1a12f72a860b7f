r"""The embedded world: chains of sums modulo 10 in a language of single words, with solutions in segments.

A problem is a start value and 2 to 6 clauses, `4 a + 3 b - 9`; its solution writes one value per clause and then the
boxed answer, `a 7 ; b 8 ; \boxed{8}`. The number of clauses is the difficulty. A reference may *leap*: a step is
elided (`~` in place of its value) and the next value folds both. A segment is a group: one detailed step, or an elided
step with the value that folds it. Leaps were put here on purpose, as a style beyond the tiny student; they show a
mechanism and say nothing about language models.

Every message has the same length, unused slots hold a filler word, and the clause, the reference slot and the written
step of one index lie at constant distances, so that copying by position works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atesd.config import DataConfig, ViewsConfig
from atesd.data.splits import ProblemSets, fingerprint, split_of
from atesd.errors import DataError
from atesd.maths.keyed import generator, uniforms
from atesd.records import Problem, Split

Bools = NDArray[np.bool_]

MODULUS = 10
MIN_CLAUSES, MAX_CLAUSES = 2, 6
MIN_OPERAND, MAX_OPERAND = 1, 9
WORDS_PER_STEP = 3

FILLER, SKIP, SEPARATOR = "_", "~", ";"
REFERENCE, ANSWER, SOLVE = "ref", "ans", "go"
PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
DIGITS = tuple(str(value) for value in range(MODULUS))
BOXED = tuple(f"\\boxed{{{value}}}" for value in range(MODULUS))
LABELS = tuple("abcdef")
OPERATORS = ("+", "-")
VOCABULARY = (
    *(PAD, END, UNKNOWN, FILLER, SKIP, SEPARATOR, REFERENCE, ANSWER, SOLVE),
    *OPERATORS,
    *LABELS,
    *DIGITS,
    *BOXED,
)
"""Every word; its place is its token id."""

SLOT_WORDS = MAX_CLAUSES * WORDS_PER_STEP
MESSAGE_WORDS = 1 + SLOT_WORDS + 1 + SLOT_WORDS + 3
COMPLETION_WORDS = SLOT_WORDS + 2  # the steps, the boxed answer, the end token

LATE_LEAPS: dict[int, tuple[int, ...]] = {2: (), 3: (1,), 4: (2,), 5: (3,), 6: (2, 4)}
"""Elided steps (from 0) of a late-leaping reference by number of clauses: detailed first, terse at the end."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A start value and clauses (operator, operand), all modulo 10."""

    start: int
    clauses: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        """The problem as it is written: `4 a + 3 b - 9`."""
        clauses = (f"{label} {op} {x}" for label, (op, x) in zip(LABELS, self.clauses, strict=False))
        return " ".join((str(self.start), *clauses))

    @property
    def values(self) -> tuple[int, ...]:
        """The true value after each clause."""
        value, values = self.start, []
        for operator, operand in self.clauses:
            value = (value + (operand if operator == "+" else -operand)) % MODULUS
            values.append(value)
        return tuple(values)


def known_facts() -> Bools:
    """Which facts the student can know: [value, operator, operand]; for each clause 2 values of 10 are unknown."""
    known = np.ones((MODULUS, len(OPERATORS), MAX_OPERAND + 1), dtype=np.bool_)
    rng = generator(0, "world", "unknown facts")
    for operator in range(len(OPERATORS)):
        for operand in range(MIN_OPERAND, MAX_OPERAND + 1):
            known[rng.choice(MODULUS, size=MODULUS // 5, replace=False), operator, operand] = False
    return known


def segments_of(values: Sequence[int], elided: Sequence[int] = ()) -> tuple[str, ...]:
    """The written solution as groups: one detailed step each, or an elided step with the step that folds it.

    Each group ends with a blank, so that groups and the boxed answer concatenate to the solution.
    """
    segments, group = [], ""
    for step, value in enumerate(values):
        group += f"{LABELS[step]} {SKIP if step in elided else value} {SEPARATOR} "
        if step not in elided:
            segments.append(group)
            group = ""
    return tuple(segments)


def elided_steps(chain: Chain, config: DataConfig) -> tuple[int, ...]:
    """The steps (from 0) that this problem's reference elides under `leap_share` or `leap_probability`.

    Keyed by the problem, so that a higher share leaps on a superset of the problems. The last step is never elided and
    no two neighbours are.
    """
    clauses = len(chain.clauses)
    if config.leap_probability is None:
        leaps = uniforms(1, config.seed, "world", "leap", chain.text)[0] < config.leap_share
        return LATE_LEAPS[clauses] if leaps else ()
    elided: list[int] = []
    for step, draw in enumerate(uniforms(clauses - 1, config.seed, "world", "leap anywhere", chain.text)):
        if draw < config.leap_probability and step - 1 not in elided:
            elided.append(step)
    return tuple(elided)


def world_problem(chain: Chain, elided: Sequence[int] = ()) -> Problem:
    """The problem with its reference in segments."""
    answer = chain.values[-1]
    segments = segments_of(chain.values, elided)
    return Problem(chain.text, chain.text, segments, BOXED[answer], str(answer), difficulty=len(chain.clauses))


def draw_chain(rng: np.random.Generator, clauses: int) -> Chain:
    """A chain drawn uniformly among those of `clauses` clauses."""
    start = int(rng.integers(MODULUS))
    operators = rng.integers(len(OPERATORS), size=clauses)
    operands = rng.integers(MIN_OPERAND, MAX_OPERAND + 1, size=clauses)
    return Chain(start, tuple((OPERATORS[op], int(x)) for op, x in zip(operators, operands, strict=True)))


def draw_lacking_chain(rng: np.random.Generator, clauses: int, unknown: int, known: Bools) -> Chain:
    """A chain whose true path needs exactly `unknown` facts that `known` lacks, at steps drawn uniformly.

    Each step's clause is drawn uniformly among those that are known, or not, at the value reached.
    """
    lacking = set(rng.choice(clauses, size=unknown, replace=False).tolist())
    start = value = int(rng.integers(MODULUS))
    drawn = []
    for step in range(clauses):
        facts = np.argwhere(known[value, :, MIN_OPERAND:] != (step in lacking))
        operator, operand = facts[rng.integers(len(facts))] + (0, MIN_OPERAND)
        drawn.append((OPERATORS[operator], int(operand)))
        value = Chain(value, (drawn[-1],)).values[-1]
    return Chain(start, tuple(drawn))


def world_problems(config: DataConfig) -> ProblemSets:
    """Distinct problems for every split, with `min_difficulty` to `max_difficulty` clauses in turn.

    A split's problems are a prefix of those under a larger size. Raises `DataError` when a size is more than the world
    holds, or absent.
    """
    if config.train_size is None:
        raise DataError("data.train_size: none given, but the world has no end; set a number, for example 4096")
    train = _problems(config, "train", config.train_size)
    validation = _problems(config, "validation", config.validation_size)
    probe = _problems(config, "probe", config.probe_size)
    test = _problems(config, "test", config.test_size)
    return ProblemSets(train, validation, probe, test, fingerprint=fingerprint(train, validation, probe, test))


def _problems(config: DataConfig, split: Split, size: int) -> tuple[Problem, ...]:
    levels = range(config.min_difficulty, config.max_difficulty + 1)
    chains = [_chains(config, split, level, len(range(place, size, len(levels)))) for place, level in enumerate(levels)]
    ordered = (chains[index % len(levels)][index // len(levels)] for index in range(size))
    return tuple(world_problem(chain, elided_steps(chain, config)) for chain in ordered)


def _chains(config: DataConfig, split: Split, clauses: int, size: int) -> list[Chain]:
    """`size` distinct chains that the hash of their text puts into `split`."""
    rng = generator(config.seed, "world", split, clauses)
    unknown, known = config.unknown_facts, known_facts()
    chains: dict[str, Chain] = {}
    fruitless = 0
    while len(chains) < size:
        chain = draw_chain(rng, clauses) if unknown is None else draw_lacking_chain(rng, clauses, unknown, known)
        fruitless += 1
        if chain.text not in chains and split_of(chain.text) == split:
            chains[chain.text] = chain
            fruitless = 0
        if fruitless > 5000:
            raise DataError(
                f"data.{split}_size: the world has about {len(chains)} different {split} problems of {clauses} "
                f"clauses, {size} were asked for; lower data.{split}_size"
            )
    return list(chains.values())


class WorldRenderer:
    """Messages of the world: fixed length, filler words wherever something is not shown."""

    def __init__(self, config: ViewsConfig) -> None:
        """Of the settings only the answer policy has a meaning here: the world knows no wording."""
        self._answer = config.answer

    def student(self, problem: Problem) -> str:
        """The problem with an empty reference and an empty answer slot."""
        return _message(problem.text, "", FILLER)

    def teacher(self, problem: Problem, shown: int, whole: bool) -> str:
        """The problem with the first `shown` segments and the answer, as the answer policy says.

        `whole` shows every segment; the closing of a world reference is its boxed answer, so the answer slot shows it.
        """
        segments = problem.segments if whole else problem.segments[:shown]
        reference = "" if self._answer == "only" else "".join(segments)
        return _message(
            problem.text, reference, FILLER if self._answer == "withhold" else f"\\boxed{{{problem.answer}}}"
        )


def _message(text: str, reference: str, answer: str) -> str:
    """Fixed layout: start, 6 clause slots, `ref`, 6 step slots, `ans`, answer slot, `go`.

    Words of a reference or answer that the world does not know, as a control may put there, become fillers.
    """
    words = [_known(word) for word in reference.split()]
    start = _padded(text.split(), 1 + SLOT_WORDS)
    return " ".join((*start, REFERENCE, *_padded(words, SLOT_WORDS), ANSWER, _known(answer), SOLVE))


def _known(word: str) -> str:
    return word if word in VOCABULARY else FILLER


def _padded(words: list[str], length: int) -> list[str]:
    return (words + [FILLER] * length)[:length]
