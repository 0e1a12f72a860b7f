"""What `atesd profile` prints and writes: tables, profile.json, a figure, and the suggested recipe."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atesd.build import build, close
from atesd.config import Config, dump_config, with_overrides
from atesd.records import Alignment
from atesd.table import Table, render_text
from atesd.text import MISSING, duration, number, percent
from atesd_lab.profile.measure import ALL, FIRST_TOKENS, AlignmentProfile
from atesd_lab.profile.profile import Profile, RatioProfile, measure_profile, profiled_config, ratios_of
from atesd_lab.report.canvas import PALETTE, colour, dash, plain, save_figure, styled
from atesd_lab.stats.contrast import NORMAL_95

FIRST_COLUMNS = tuple(f"first {count}, %" for count in FIRST_TOKENS)
FEW_SEGMENTS = 2  # with so few the ratio is a step function
TEACHER_COLUMNS = (
    "student right, %",
    "teacher right, %",
    "log p(answer)",
    "view, tokens",
    "longest",
    "shortened",
    "segments shown, %",
    "rollouts",
)
GREY = "#57606a"
WIDTH = 100  # characters of a line of prose


def run_profile(config: Config, problems: int | None, say: Callable[[str], None]) -> Profile:
    """Build the recipe's model and data without its controller, and profile it; `say` hears how it goes."""
    parts = build(profiled_config(config))
    try:
        return measure_profile(parts, problems, say, ratios_of(config))
    finally:
        close(parts)


def write_profile(profile: Profile, config: Config, name: str, folder: Path) -> list[Path]:
    """Write profile.json, profile.txt, profile.svg, profile.png and recipe.yaml into `folder`, which exists."""
    texts = {
        "profile.json": json.dumps(profile_json(profile), indent=1, allow_nan=False) + "\n",
        "profile.txt": profile_text(profile, name),
        "recipe.yaml": recipe_of(profile, config, name),
    }
    for file, text in texts.items():
        (folder / file).write_text(text, "utf-8")
    draw_profile(profile, name, folder / "profile")
    return [folder / file for file in (*texts, "profile.svg", "profile.png")]


def profile_json(profile: Profile) -> dict[str, Any]:
    """The profile as JSON values."""
    found = asdict(profile)
    return {**found, "cost": {**found["cost"], "total_seconds": profile.cost.total}}


def suggested_config(profile: Profile, config: Config) -> Config:
    """The recipe with the suggested exposure; rows that cannot be used are skipped where there are any."""
    ratio = profile.suggestion.reveal_ratio
    data = profile.data
    exposure = ["exposure.kind=full"] if ratio == 1 else ["exposure.kind=fixed", f"exposure.reveal_ratio={ratio}"]
    faulty = bool(data.gold_missing + data.gold_disagrees + data.other_faults)
    return with_overrides(config, [*exposure, *(["data.on_bad_row=skip"] if faulty else [])])


def recipe_of(profile: Profile, config: Config, name: str) -> str:
    """The suggested recipe as YAML that `load_config` reads, every setting resolved, the reasons as comments on top."""
    suggested = suggested_config(profile, config)
    lines = [f"{name} with the exposure that its profile suggests.", *suggestion_lines(profile)]
    if suggested.data.on_bad_row != config.data.on_bad_row:
        lines.append("data.on_bad_row is skip here: the data has rows that cannot be used, which profile.txt lists.")
    comments = [part for line in lines for part in textwrap.wrap(line, WIDTH)]
    return "".join(f"# {line}\n" for line in comments) + dump_config(suggested)


def profile_text(profile: Profile, name: str) -> str:
    """The whole profile for a terminal: the suggestion first, then what it rests on."""
    parts = [render_text(without_flat(table)) for table in tables(profile, name)]
    head, prose = (
        [textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines]
        for lines in (suggestion_lines(profile), [*reference_lines(profile), *cost_lines(profile)])
    )
    return "\n".join([*head, "", *parts, *prose]) + "\n"


def without_flat(table: Table) -> Table:
    """A table of several rows without the columns that say the same in each; a note says it once.

    The first two columns name a row, and stay.
    """
    places = range(len(table.columns))
    flat = [place for place in places[2:] if len({row[place] for row in table.rows}) == 1]
    if len(table.rows) < 2 or not flat:
        return table
    kept = [place for place in places if place not in flat]
    once = ", ".join(f"{table.columns[place]} {table.rows[0][place]}" for place in flat)
    return replace(
        table,
        columns=tuple(table.columns[place] for place in kept),
        rows=tuple(tuple(row[place] for place in kept) for row in table.rows),
        notes=(*table.notes, f"The same in every row: {once}."),
    )


def tables(profile: Profile, name: str) -> list[Table]:
    """Mismatch, teacher and alignment by ratio and difficulty."""
    groups = list(dict.fromkeys(row.group for row in profile.rows))
    rows = [row for group in groups for row in profile.rows if row.group == group]
    several = len(groups) > 1
    rollouts = next(row.rollouts for row in profile.rows if row.group == ALL)
    mismatch = Table(
        f"{name}: how far the teacher is from the student, on {rollouts} rollouts",
        (
            "difficulty",
            "ratio",
            "KL, nats",
            "p95",
            "p99",
            "tail mean",
            "tail share, %",
            *FIRST_COLUMNS,
            "top-1 differs, %",
            "tokens",
        ),
        tuple(_mismatch_cells(row) for row in rows),
        (
            "Forward KL of teacher and student per token. Tail: the 5 % of the tokens with the largest KL.",
            "First: share of the KL on the first tokens of each completion; a large one comes from chat templates that "
            "end differently (atesd preview shows both ends).",
        ),
    )
    teacher = Table(
        "What the teacher would write and read",
        ("difficulty", "ratio", *TEACHER_COLUMNS),
        tuple(_teacher_cells(profile, row) for row in rows),
        (
            "Teacher right: its own completion from the view, one sample a problem, the same random numbers at every "
            "ratio.",
            "log p(answer): of the boxed answer right after the view, nats per token.",
        ),
    )
    aligned = [_alignment_table(profile.alignment, several)] if isinstance(profile.alignment, AlignmentProfile) else []
    return [mismatch, teacher, *aligned]


def reference_lines(profile: Profile) -> list[str]:
    """Lengths of the completions; segments, lengths and faults of the references."""
    data = profile.data
    total = sum(data.segments.values())
    few = sum(count for m, count in data.segments.items() if 0 < m <= FEW_SEGMENTS)
    made = profile.completions
    lines = [
        f"completions: mean {made.mean:.1f} tokens, 95 % up to {made.p95}, longest {made.longest}; "
        f"{percent(made.truncated)} % cut off at sampling.completion_tokens {made.most}"
    ]
    lines += ["segments in a reference: " + ", ".join(f"{m}: {count}" for m, count in data.segments.items())]
    if few:
        lines.append(
            f"{percent(few / total)} % of the references have one or two segments: for them the ratio is a step "
            "function (with one segment every ratio below 1 shows nothing of it, with two 0.5 to 0.99 are one view); "
            "data.segmenter cuts finer"
        )
    if data.segments.get(0):
        lines.append(f"{percent(data.segments[0] / total)} % have no segment: only ratio 1 shows more than the answer")
    lines.append(
        f"over-long: {data.too_long} of the first {data.views_measured} references do not fit whole into "
        "model.max_context_tokens"
    )
    lines.append(
        f"rows left out: {data.gold_missing} without a gold answer, {data.gold_disagrees} whose reference comes to "
        f"another answer, {data.other_faults} for other reasons" + ("; the first:" if data.faults else "")
    )
    return [*lines, *(f"  {fault}" for fault in data.faults)]


def cost_lines(profile: Profile) -> list[str]:
    """What an update and the run cost, and what the profile did."""
    cost = profile.cost
    phases = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in cost.seconds.items())
    return [
        f"one update of plain distillation at the suggested ratio: {duration(cost.total)} ({phases}); "
        f"train.num_updates {cost.num_updates}: about {duration(cost.total * cost.num_updates)} without evaluations; "
        f"peak memory {cost.peak_bytes / 2**20:,.0f} MiB, the profile included",
        f"this profile: {duration(sum(profile.seconds.values()))} ("
        + ", ".join(f"{part} {duration(seconds)}" for part, seconds in profile.seconds.items())
        + ")",
    ]


def suggestion_lines(profile: Profile) -> list[str]:
    """The suggestion and its reasons."""
    suggestion = profile.suggestion
    ratio = f"{suggestion.reveal_ratio:g}" + (" (full exposure)" if suggestion.reveal_ratio == 1 else "")
    return [f"suggested reveal ratio: {ratio}, by {suggestion.basis}", *(f"- {r}" for r in suggestion.reasons)]


@styled
def draw_profile(profile: Profile, name: str, path: Path) -> None:
    """Write PATH as SVG and PNG: mismatch, the teacher's accuracy, alignment and the answer, by ratio."""
    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    (kl, teacher), (alignment, answer) = figure.subplots(2, 2)
    groups = _drawn_groups(profile)
    _draw_mismatch(kl, [row for row in profile.rows if row.group == ALL])
    _draw_rows(teacher, profile, groups, _teacher_share)
    teacher.set(title="Teacher right, going on from its view", ylabel="%", ylim=(-2, 102))
    _draw_rows(answer, profile, groups, lambda row: row.answer_logprob)
    answer.set(title="The answer, right after the view", ylabel="nats per token")
    _draw_alignment(alignment, profile.alignment, groups)
    if profile.student is not None:
        rollouts = next(row.rollouts for row in profile.rows if row.group == ALL)
        teacher.axhline(100 * profile.student[ALL] / rollouts, color=GREY, linestyle=":", linewidth=1.4)
    for axes in (kl, teacher, alignment, answer):
        axes.axvline(profile.suggestion.reveal_ratio, color=GREY, linewidth=6, alpha=0.15, zorder=0)
        axes.set(xlabel="reveal ratio", xticks=profile.ratios, xlim=(-0.06, 1.06))
    kl.legend(loc="upper left", ncols=2)
    lines, labels = answer.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=8, title="difficulty", title_fontsize=9)
    dotted = "" if profile.student is None else "; dotted: the student"
    figure.suptitle(f"{plain(name)}. Grey: the suggested ratio, by {profile.suggestion.basis}{dotted}", fontsize=10)
    save_figure(figure, path)


def _drawn_groups(profile: Profile) -> dict[str, int]:
    """The index of each group's colour, all rollouts last and so on top; difficulties up to as many as can be told."""
    groups = list(dict.fromkeys(row.group for row in profile.rows))
    levels = [group for group in groups if group != ALL]
    return {**({g: i for i, g in enumerate(levels, 1)} if len(levels) < len(PALETTE) else {}), ALL: 0}


def _draw_mismatch(axes: Axes, rows: Sequence[RatioProfile]) -> None:
    ratios = [row.ratio for row in rows]
    curves = {
        "mean": [row.kl.mean for row in rows],
        "p95": [row.kl.p95 for row in rows],
        "p99": [row.kl.p99 for row in rows],
        "mean of the top 5 %": [row.kl.tail_mean for row in rows],
    }
    for index, (label, values) in enumerate(curves.items()):
        axes.plot(ratios, values, marker="o", markersize=4, color=colour(index), linestyle=dash(index), label=label)
    top = 1.4 * max(max(values) for values in curves.values())  # room for a legend
    axes.set(title="KL of teacher and student per token", ylabel="nats", ylim=(0, top or None))


def _draw_rows(
    axes: Axes, profile: Profile, groups: Mapping[str, int], value: Callable[[RatioProfile], float | None]
) -> None:
    for group, index in groups.items():
        rows = [(row.ratio, value(row)) for row in profile.rows if row.group == group]
        known = [(ratio, found) for ratio, found in rows if found is not None]
        if not known:
            _say(axes, "nothing can be verified")
            return
        axes.plot(
            *zip(*known, strict=True),
            marker="o",
            markersize=4,
            linewidth=_width(group),
            color=colour(index),
            label=group,
        )


def _draw_alignment(axes: Axes, alignment: AlignmentProfile | str, groups: Mapping[str, int]) -> None:
    axes.set(title="Alignment with the student's success (95 %)")
    if isinstance(alignment, str):
        _say(axes, f"not measurable: {alignment}")
        return
    for place, (group, index) in enumerate(groups.items()):
        found = alignment.groups[group]
        reach = [NORMAL_95 * error for error in found.errors]
        beside = 0.012 * (place - (len(groups) - 1) / 2)
        ratios = [ratio + beside for ratio in found.ratios]
        axes.errorbar(ratios, found.values, yerr=reach, capsize=2, linewidth=_width(group), color=colour(index))
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_ylabel("gain in success per unit of\nlearning rate and gradient length")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, textwrap.fill(text, 44), ha="center", va="center", transform=axes.transAxes, fontsize=8.5)
    axes.set_yticks([])


def _width(group: str) -> float:
    return 2.4 if group == ALL else 1.0


def _mismatch_cells(row: RatioProfile) -> tuple[str, ...]:
    kl = row.kl
    spread = (kl.mean, kl.p95, kl.p99, kl.tail_mean)
    return (
        row.group,
        f"{row.ratio:g}",
        *(number(value) for value in spread),
        percent(kl.tail_share),
        *(percent(share) for share in row.first_shares),
        percent(row.top1_disagreement),
        str(row.tokens),
    )


def _teacher_cells(profile: Profile, row: RatioProfile) -> tuple[str, ...]:
    student = None if profile.student is None else profile.student[row.group] / row.rollouts
    teacher = _teacher_share(row)
    return (
        row.group,
        f"{row.ratio:g}",
        percent(student),
        MISSING if teacher is None else f"{teacher:.1f}",
        number(row.answer_logprob),
        f"{row.view_tokens:.0f}",
        str(row.longest_view),
        str(row.shortened_views),
        percent(row.effective_ratio),
        str(row.rollouts),
    )


def _teacher_share(row: RatioProfile) -> float | None:
    """The teacher's accuracy, %."""
    return None if row.teacher_correct is None else 100 * row.teacher_correct / row.rollouts


def _alignment_table(alignment: AlignmentProfile, several: bool) -> Table:
    ratios = alignment.groups[ALL].ratios
    named = {ALL: alignment.groups[ALL], "first half": alignment.halves[0], "second half": alignment.halves[1]}
    if several:
        named |= {group: found for group, found in alignment.groups.items() if group != ALL}
    return Table(
        "Alignment: what a small step on each ratio's loss would do to the student's success",
        ("difficulty", *(f"{ratio:g}" for ratio in ratios), "rollouts"),
        tuple((group, *_alignment_cells(found), str(found.rollouts)) for group, found in named.items()),
        (
            "Mean over rollouts ± standard error; each half along the success direction of the other "
            f"({alignment.correct[0]} and {alignment.correct[1]} correct rollouts gave them).",
            f"Cosine of the two directions: {alignment.cosine:.2f}. The errors leave out the noise of the directions.",
        ),
    )


def _alignment_cells(found: Alignment) -> list[str]:
    return [f"{value:+.4f} ± {error:.4f}" for value, error in zip(found.values, found.errors, strict=True)]
