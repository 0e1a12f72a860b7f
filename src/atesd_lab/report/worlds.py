"""Runs of one page by what they were trained on, and one style for the same method wherever it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atesd.config import method_name
from atesd_lab.report.canvas import plain
from atesd_lab.report.rows import RunRows


@dataclass(frozen=True, slots=True)
class World:
    """Runs that can be compared: the same data, model and teacher's weights.

    `name` says which; it is empty where the page has one world only. `styles` and `labels` are those of the lines.
    """

    name: str
    runs: tuple[RunRows, ...]
    styles: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def lines(self) -> list[tuple[tuple[int, str], RunRows]]:
        """Each run behind the style and the label of its line."""
        return list(zip(zip(self.styles, self.labels, strict=True), self.runs, strict=True))

    def key(self, key: str) -> str:
        """A chart's key that no other world of the page has."""
        return f"{key}-{self.name}" if self.name else key

    def title(self, title: str) -> str:
        """A chart's title with the world's name before it."""
        return f"{plain(self.name)}: {title}" if self.name else title


def as_world(runs: Sequence[RunRows] | World) -> World:
    """Plain runs as one world without a name, each with a style of its own and its own name."""
    if isinstance(runs, World):
        return runs
    return World("", tuple(runs), tuple(range(len(runs))), tuple(run.name for run in runs))


def worlds_of(runs: Sequence[RunRows]) -> list[World]:
    """The runs by world, in their order. A method has one style in all worlds, unless a world has two runs of it."""
    members: dict[str, list[RunRows]] = {}
    for run in runs:
        members.setdefault(_identity(run), []).append(run)
    if len(members) == 1:
        return [as_world(runs)]
    methods = list(dict.fromkeys(method_name(run.config) for run in runs))
    by_method = all(len({method_name(run.config) for run in some}) == len(some) for some in members.values())
    names = _names(list(members.values()))
    found = []
    for name, some in zip(names, members.values(), strict=True):
        labels = tuple(method_name(run.config) if by_method else run.name for run in some)
        styles = tuple(methods.index(label) for label in labels) if by_method else tuple(range(len(some)))
        found.append(World(name, tuple(some), styles, labels))
    return found


def _identity(run: RunRows) -> str:
    config = run.config
    return f"{config.data.model_dump_json()} {config.model.path} {config.teacher.model_dump_json()}"


def _names(worlds: Sequence[Sequence[RunRows]]) -> list[str]:
    """What tells the worlds apart: the data in words, and the model where the data is the same."""
    names = [data_words(some[0]) for some in worlds]
    if len(set(names)) < len(names):
        names = [f"{name}, {some[0].config.model.path}" for name, some in zip(names, worlds, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} ({place})" for place, name in enumerate(names, start=1)]
    return names


def data_words(run: RunRows) -> str:
    """The data of a run in a few words; an embedded world by what its references are like."""
    data = run.config.data
    if data.source != "world":
        return data.source_name
    if data.leap_probability is not None:
        return "leaps anywhere"
    return "leap world" if data.leap_share else "steps world"
