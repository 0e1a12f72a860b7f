"""One self-contained page about a grid of runs: accuracy of every cell, arms against a baseline, small multiples."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from atesd.table import Table
from atesd.text import MISSING, percent, percent_interval
from atesd_lab.report.grid import ArmScore, GridCell, GridTable, ScoredTable, absent, score_table
from atesd_lab.report.grid_figures import Multiples, accuracies, ratios
from atesd_lab.report.page import Figure, content_policy, figures_of, page_environment

LEVELS = 9
STYLES = {"better": "better", "worse": "worse"}


@dataclass(frozen=True, slots=True)
class HeatCell:
    """A cell of a heat map: what it says, its class, a link or nothing, and what a pointer over it shows."""

    text: str
    style: str = ""
    link: str | None = None
    title: str = ""


@dataclass(frozen=True, slots=True)
class HeatTable:
    """A table of which some cells are shaded: the first cell of a row names it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[HeatCell, ...]], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gallery:
    """Drawn panels under one sentence on how to read them."""

    figures: tuple[Figure, ...]
    reading: str


@dataclass(frozen=True, slots=True)
class Part:
    """One table of the grid with its figures drawn; `scored` holds no rows any more."""

    scored: ScoredTable
    learning: Gallery
    exposure: Gallery


@dataclass(frozen=True, slots=True)
class PartView:
    """What the page says of one table of the grid."""

    anchor: str
    name: str
    heat: HeatTable
    learning: Gallery
    exposure: Gallery
    runs: HeatTable


@dataclass(frozen=True, slots=True)
class Head:
    """What the grid is as a whole: its name, facts about it in order, and warnings."""

    name: str
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """From which share to which the shades go."""

    low: float
    high: float

    def style(self, share: float) -> str:
        """The class of a share: h0, the lightest, to h8."""
        place = (share - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return f"h{min(LEVELS - 1, max(0, int(place * LEVELS)))}"


def read_part(table: GridTable, baseline: str | None, scope: str) -> Part:
    """Score and draw one table, then let its rows go: those of a large grid need not fit in memory together."""
    scored = score_table(table, baseline)
    learning, exposure = (_gallery(draw(scored, scope)) for draw in (accuracies, ratios))
    cells = {arm: {seed: replace(cell, run=None) for seed, cell in row.items()} for arm, row in scored.cells.items()}
    return Part(replace(scored, cells=cells, groups={}), learning, exposure)


def _gallery(drawn: Multiples) -> Gallery:
    return Gallery(figures_of(drawn.charts), drawn.reading)


def render_grid(head: Head, parts: Sequence[Part]) -> str:
    """The page as HTML text."""
    folder = importlib.resources.files("atesd_lab.report") / "templates"
    style = "".join((folder / name).read_text("utf-8") for name in ("page.css", "grid.css"))
    tables = [part.scored for part in parts]
    shares = [share for table in tables for score in table.scores for share in score.shares.values()]
    scale = Scale(min(shares, default=0.0), max(shares, default=0.0))
    missing = tuple(absent(tables))
    return (
        page_environment()
        .get_template("grid.html.jinja")
        .render(
            title=head.name,
            policy=content_policy(style),
            style=Markup(style),  # ours; the policy's hash is of exactly this text
            warnings=head.warnings,
            facts=Table("The grid", ("", head.name), head.facts),
            overview=_overview(tables, scale) if len(tables) > 1 else None,
            missing=Table("Not in any mean", ("folder", "table", "why"), tuple((f, t, why) for t, f, why in missing)),
            parts=[_view(part, scale, f"table{place}", len(parts)) for place, part in enumerate(parts, start=1)],
            low=percent(scale.low),
            high=percent(scale.high),
            levels=range(LEVELS),
            measured=bool(shares),
        )
    )


def _overview(tables: Sequence[ScoredTable], scale: Scale) -> HeatTable:
    """The mean of every arm in every table."""
    arms = dict.fromkeys(score.arm for table in tables for score in table.scores)
    means = [{score.arm: score for score in table.scores} for table in tables]
    rows = tuple((arm, tuple(_mean(by_arm.get(arm), scale) for by_arm in means)) for arm in arms)
    splits = ", ".join(dict.fromkeys(table.split for table in tables))
    notes = (
        f"Means with 95 % intervals over seeds and problems, on {splits}. {MISSING}: no finished and evaluated run, or "
        "the arm is not in that table.",
    )
    return HeatTable("Accuracy after the last update, %", ("", *(table.name for table in tables)), rows, notes)


def _mean(score: ArmScore | None, scale: Scale) -> HeatCell:
    if score is None or score.mean is None:
        return HeatCell(MISSING)
    return HeatCell(percent_interval(score.mean), scale.style(score.mean["value"]))


def _view(part: Part, scale: Scale, anchor: str, parts: int) -> PartView:
    table = part.scored
    rows = tuple((score.arm, _row(table, score, scale)) for score in table.scores)
    gap = f"- {table.baseline}, points" if table.baseline else "difference, points"
    columns = ("arm", "mean", gap, "verdict", *(f"seed {seed}" for seed in table.seeds))
    notes = [
        f"After the last update on {table.split} ({table.size}), nothing selected. Brackets: 95 % interval over seeds "
        "and problems (Student's t on the crossed mean squares). Differences are paired by seed and problem unless a "
        "note says not."
    ]
    if len(table.scores) > 2:
        notes.append(
            f"{len(table.scores) - 1} arms against one, each interval at 95 %: if none differs, one in twenty seems to."
        )
    heat = HeatTable(f"{table.name}: accuracy on {table.split}, %", columns, rows, (*notes, *table.notes))
    return PartView(anchor, table.name if parts > 1 else "Results", heat, part.learning, part.exposure, _runs(table))


def _row(table: ScoredTable, score: ArmScore, scale: Scale) -> tuple[HeatCell, ...]:
    cells = [_cell(table.cells[score.arm].get(seed), score.shares.get(seed), scale) for seed in table.seeds]
    word = HeatCell(score.verdict, STYLES.get(score.verdict.partition(",")[0], ""), title=score.sentence)
    return (_mean(score, scale), HeatCell(score.difference), word, *cells)


def _cell(cell: GridCell | None, share: float | None, scale: Scale) -> HeatCell:
    if cell is None:
        return HeatCell("not planned", "absent")
    if share is None:
        return HeatCell(cell.state, "absent", cell.link, f"{cell.folder}: {cell.detail}")
    return HeatCell(percent(share), scale.style(share), cell.link, cell.folder)


def _runs(table: ScoredTable) -> HeatTable:
    """The folder of every cell, with a link to its page where it has one."""
    cells = [(arm, seed, cell) for arm, row in table.cells.items() for seed, cell in row.items()]
    rows = tuple(
        (arm, (HeatCell(str(seed)), HeatCell(cell.folder, "", cell.link), HeatCell(cell.detail or cell.state)))
        for arm, seed, cell in cells
    )
    notes = ("A folder that is no link has no page yet: `atesd report FOLDER` writes it.",)
    linked = all(cell.link for _, _, cell in cells)
    return HeatTable(f"{len(rows)} run folders", ("arm", "seed", "folder", "state"), rows, () if linked else notes)
