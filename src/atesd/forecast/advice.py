"""Whether a run fits its devices, and which settings would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from atesd.config import Config, LoraConfig, ModelConfig, yaml_value
from atesd.forecast.arithmetic import Work, decoding, memory, peak
from atesd.forecast.devices import KINDS


@dataclass(frozen=True, slots=True)
class Change:
    """Settings by their paths, and what else they do than save memory."""

    settings: Mapping[str, Any]
    cost: str

    def __str__(self) -> str:
        return " --set ".join(f"{path}={_word(value)}" for path, value in self.settings.items())


def bytes_needed(work: Work) -> float:
    """The most that one device holds at any moment."""
    return peak(memory(work)).total


def fits(work: Work) -> bool:
    """Whether the device has as much."""
    return bytes_needed(work) <= work.kind.usable


def rows_together(work: Work) -> int:
    """How many rows an evaluation decodes together: `sampling.batch_size`, halved until they fit; 1 at least."""
    rows = work.config.sampling.batch_size
    while rows > 1 and decoding(work, rows, work.config.evaluation_tokens).total > work.kind.usable:
        rows //= 2
    return rows


def single_changes(work: Work) -> list[tuple[Change, float]]:
    """The changes that make it fit, each alone, and what is then needed."""
    needed = [(change, bytes_needed(with_change(work, change))) for change in changes(work)]
    return [(change, size) for change, size in needed if size <= work.kind.usable]


def several_changes(work: Work) -> tuple[list[Change], float]:
    """Changes that help, one after another until it fits, without those that were not needed; and what is then needed.

    If nothing makes it fit, all that help.
    """
    taken: list[Change] = []
    current = work
    for _ in range(len(changes(work))):
        better = [(bytes_needed(with_change(current, one)), i, one) for i, one in enumerate(changes(current))]
        size, _, best = min(better, default=(bytes_needed(current), 0, None))
        if best is None or size >= bytes_needed(current) or fits(current):
            break
        taken.append(best)
        current = with_change(current, best)
    for change in list(taken) if fits(current) else []:
        fewer = work
        for other in taken:
            fewer = fewer if other is change else with_change(fewer, other)
        if fits(fewer):
            taken.remove(change)
            current = fewer
    return taken, bytes_needed(current)


def changes(work: Work) -> list[Change]:
    """What this run could change, those that cost least first; counts are halved until it fits."""
    config = work.config
    model, train, sampling = config.model, config.train, config.sampling
    found = []
    if not model.gradient_checkpointing:
        found.append(Change({"model.gradient_checkpointing": True}, "a second student forward"))
    if train.micro_batch_tokens is None and train.micro_batch_size > 1:
        found.append(
            _halved(work, "train.micro_batch_size", min(train.micro_batch_size, work.rows), "smaller products")
        )
    if train.micro_batch_tokens is not None and work.together > 1:
        found.append(Change({"train.micro_batch_tokens": work.student_tokens}, "smaller products"))
    if sampling.engine != "server":
        if sampling.batch_size > 1:
            found.append(_halved(work, "sampling.batch_size", sampling.batch_size, "decoding takes longer"))
        found.append(Change({"sampling.engine": "server"}, "rollouts by vLLM on other GPUs: atesd serve"))
    if "sharding" in ModelConfig.model_fields and work.devices > 1 and work.shards == 1:
        found.append(Change({"model.sharding": "full"}, "weights travel between devices"))
    if model.lora is None:
        found.append(
            Change({"model.lora": LoraConfig(), "model.dtype": "bfloat16"}, "trains an adapter instead of all weights")
        )
    return found


def with_change(work: Work, change: Change) -> Work:
    """The same work under other settings."""
    return replace(work, config=changed(work.config, change.settings))


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """A copy of the config with these settings by path; their values are taken as they are."""
    for path, value in settings.items():
        group, _, name = path.partition(".")
        config = config.model_copy(update={group: getattr(config, group).model_copy(update={name: value})})
    return config


def kinds_that_fit(work: Work) -> Iterator[str]:
    """The kinds on which the same number of devices would do."""
    for kind in KINDS.values():
        if fits(replace(work, kind=kind)):
            yield kind.name


def _halved(work: Work, path: str, value: int, cost: str) -> Change:
    """The setting halved once, and again until it fits or is 1."""
    while True:
        value = max(1, value // 2)
        change = Change({path: value}, cost)
        if value == 1 or fits(with_change(work, change)):
            return change


def _word(value: Any) -> str:
    if isinstance(value, LoraConfig):
        return f"'{{rank: {value.rank}, alpha: {value.alpha}}}'"
    return str(yaml_value(value))
