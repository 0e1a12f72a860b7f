"""The figures of `aligned_results`: the main arms, and all arms, in all worlds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from atesd_lab.paper.aligned_measure import BEST_FIXED, GATE, GRPO, NULL_CONTROLS, SDAR, ArmResult, Gap, WorldResult
from atesd_lab.report.canvas import colour, plain, save_figure, styled
from atesd_lab.report.svg import INK

DESIGNED = "The leap worlds are designed so that exposure matters. They show a mechanism, nothing of language models."
KINDS = ("OPSD, fixed, ATESD, SDAR", "GRPO", "looks ahead", "null control of the gate")
LABELS = {
    BEST_FIXED: "best fixed ratio",
    "sound": "ATESD (sound)",
    GRPO: "GRPO",
    "aligned": "aligned ratio",
    GATE: "aligned token gate",
    "gate-shuffled": "gate, shuffled verdicts",
    "gate-random": "gate, random tokens",
    "gate-one-hold": "gate without memory",
    SDAR: "SDAR's gate",
}
BEHIND_TO_AHEAD = LinearSegmentedColormap.from_list("behind to ahead", ("#e58f3c", "#ffffff", "#4d9bd6"))
NARROWEST = 8.4  # inches, for the lines below
COLUMNS = 4
FULL_COLOUR = 0.4  # a gap of 40 points has the full colour


@styled
def draw_main(worlds: Sequence[WorldResult], names: Mapping[str, str], baseline: str, path: Path) -> None:
    """Write the README's comparison: a panel for every world, those in which the gate loses too."""
    rows = {baseline: "full exposure (OPSD)", **LABELS}
    rows = {name: label for name, label in rows.items() if any(world.arm(name) for world in worlds)}
    columns = min(COLUMNS, len(worlds))
    lines = -(-len(worlds) // columns)
    size = max(NARROWEST, 1.9 + 1.9 * columns), 0.9 + 2.9 * lines
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, world in zip(panels.flat, worlds, strict=False):
        _draw_world(axes, world, list(rows))
        axes.set_title(plain(names[world.world]))
        axes.tick_params(labelbottom=True)
    for axes in panels.flat[len(worlds) :]:
        axes.set_visible(False)
    first = panels[0][0]
    first.set_yticks(range(len(rows)), list(rows.values()))
    first.set(xlim=(0, 102), ylim=(len(rows) - 0.4, -0.6), xticks=(0, 50, 100))
    for index, kind in enumerate(KINDS):
        first.plot([], [], "o", color=colour(index), markersize=5, label=kind)
    first.plot([], [], color=INK, linestyle=":", linewidth=1, label="before training")
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    unit = "Average@k on test after the last update, %, with 95 % intervals over seeds and problems"
    figure.supxlabel(f"{unit}\n{DESIGNED}" if any(world.leaps for world in worlds) else unit, fontsize=9)
    save_figure(figure, path)


def _draw_world(axes: Axes, world: WorldResult, rows: Sequence[str]) -> None:
    axes.axvline(100 * world.arms[0].base, color=INK, linestyle=":", linewidth=1)
    for place, name in enumerate(rows):
        one = world.arm(name)
        if one is None:
            axes.annotate("no run", (2, place), va="center", fontsize=8)
            continue
        ink = colour(_kind(name))
        low, value, high = (100 * one.last[key] for key in ("low", "value", "high"))
        axes.plot([low, high], [place, place], color=ink, linewidth=1.8)
        axes.plot([value], [place], "o", color=ink, markersize=5)
        if name == BEST_FIXED and one.ratio is not None:
            left = high > 75
            place_of = (low - 2, place) if left else (high + 2, place)
            axes.annotate(f"at {one.ratio:g}", place_of, ha="right" if left else "left", va="center", fontsize=8)


def _kind(name: str) -> int:
    if name in NULL_CONTROLS:
        return 3
    return 1 if name == GRPO else 2 if name in (GATE, "gate-one-hold", "aligned") else 0


@styled
def draw_worlds(worlds: Sequence[WorldResult], names: Mapping[str, str], path: Path) -> None:
    """Write the table of all arms and worlds: accuracy, and below it the gap to the world's best fixed ratio."""
    arms = list(dict.fromkeys(one.arm for world in worlds for one in world.arms))
    figure = Figure(figsize=(max(NARROWEST, 1.8 + 1.25 * len(worlds)), 1.2 + 0.4 * len(arms)), layout="constrained")
    axes = figure.subplots()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for column, world in enumerate(worlds):
        for row, arm in enumerate(arms):
            _draw_cell(axes, column, row, world.arm(arm), arm == world.best_fixed)
    axes.set_yticks(range(len(arms)), [plain(arm) for arm in arms])
    heads = [f"{plain(names[world.world])}\nbase {100 * world.arms[0].base:.0f}" for world in worlds]
    axes.set_xticks(range(len(worlds)), heads)
    axes.xaxis.tick_top()
    axes.set(xlim=(-0.5, len(worlds) - 0.5), ylim=(len(arms) - 0.5, -0.5))
    figure.supxlabel(
        "Average@k on test, %; below it the difference from the world's best fixed ratio in points, 95 % interval;\n"
        f"coloured where the interval leaves out 0 (blue: ahead). {DESIGNED}",
        fontsize=9,
    )
    save_figure(figure, path)


def _draw_cell(axes: Axes, column: int, row: int, one: ArmResult | None, is_best_fixed: bool) -> None:
    if one is None:
        axes.text(column, row, "no run", ha="center", va="center", fontsize=7.5)
        return
    gap = one.gaps.get(BEST_FIXED)
    axes.fill_between((column - 0.48, column + 0.48), row - 0.46, row + 0.46, color=_shade(gap), linewidth=0)
    below = "best fixed" if is_best_fixed else "" if gap is None else _ends(gap)
    axes.text(column, row - 0.17, f"{100 * one.last['value']:.1f}", ha="center", va="center", fontsize=9)
    axes.text(column, row + 0.24, below, ha="center", va="center", fontsize=6.8)


def _shade(gap: Gap | None) -> tuple[float, float, float, float] | str:
    if gap is None or gap.word not in ("ahead", "behind"):
        return "#f3f4f6"
    return BEHIND_TO_AHEAD(0.5 + 0.5 * max(-1.0, min(1.0, gap.contrast.value / FULL_COLOUR)))


def _ends(gap: Gap) -> str:
    return "{:+.0f} [{:+.0f}, {:+.0f}]".format(*gap.contrast.in_unit)
