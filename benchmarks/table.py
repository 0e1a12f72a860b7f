"""Tables from results: on the terminal after a run, and in docs/performance.md between its markers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Goal, Result, ratio
from benchmarks.record import ROOT, read

DOCS = ROOT / "docs" / "performance.md"
MARKED = re.compile(r"(<!-- begin (?P<name>[\w-]+) -->\n).*?(<!-- end (?P=name) -->)", re.DOTALL)


def goals_table(goals: Sequence[Goal]) -> str:
    """Goal, figure, verdict."""
    rows = [
        (goal.what, f"{goal.bound} {quantity(goal.limit)} {goal.unit}", measured(goal), goal.verdict) for goal in goals
    ]
    return markdown(("work", "goal", "measured (range of rounds)", "verdict"), rows)


def measured(goal: Goal) -> str:
    """The median, and the range if there was more than one round."""
    found = goal.measured
    if found.low == found.high:
        return f"{quantity(found.median)} {goal.unit}"
    return f"{quantity(found.median)} {goal.unit} ({quantity(found.low)} to {quantity(found.high)})"


def case_table(case: Case) -> str:
    """Each variant of a case: its median time, over the first variant's, and its peak memory."""
    memory = dict(case.memory or {})
    names = list(dict.fromkeys([*(case.rounds[0] if case.rounds else ()), *memory]))
    base = next(iter(case.rounds[0])) if case.rounds else ""
    rows = []
    for name in names:
        cells = [name]
        if case.rounds:
            timed = name in case.rounds[0]
            seconds = sorted(row[name] for row in case.rounds)[len(case.rounds) // 2] if timed else 0.0
            found = ratio(case.rounds, name, base) if timed else None
            cells += (
                [f"{seconds:.3g} s", f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"] if found else ["", ""]
            )
        if memory:
            cells.append(f"{memory[name] / 1e6:,.0f} MB" if name in memory else "")
        rows.append(cells)
    columns = ["variant", *(["median", f"over {base}"] if case.rounds else []), *(["peak memory"] if memory else [])]
    return markdown(columns, rows)


def figures_table(case: Case) -> str:
    """Whatever else a case measured: one row per name, one column per figure."""
    figures = dict(case.figures or {})
    if figures and all(isinstance(row, dict) for row in figures.values()):
        columns = list(dict.fromkeys(key for row in figures.values() for key in row))
        return markdown(
            ["", *columns], [[name, *(cell(row.get(key)) for key in columns)] for name, row in figures.items()]
        )
    return markdown(("figure", "value"), [(name, cell(value)) for name, value in figures.items()])


def render(result: Result) -> str:
    """All tables of a result."""
    parts = [goals_table(result.goals)] if result.goals else []
    for case in result.cases:
        parts.append(f"**{case.name}**")
        if case.rounds or case.memory:
            parts.append(case_table(case))
        if case.figures:
            parts.append(figures_table(case))
        parts += [f"Not run here: {name} ({why})." for name, why in (case.peers_absent or {}).items()]
    return "\n\n".join(parts)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quantity(value: float) -> str:
    """Three digits, no exponent where it is not needed."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(value: Any) -> str:
    """A figure of any kind."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"


def update_docs(results: Path, docs: Path = DOCS) -> list[str]:
    """Rewrite what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; returns the names.

    NAME is a result, or `goals` for the goals of all results. A marker without its result says so in the document.
    """
    found = {path.stem: read(path) for path in sorted(results.glob("*.json"))}
    names: list[str] = []

    def filled(match: re.Match[str]) -> str:
        name = match["name"]
        names.append(name)
        return f"{match[1]}{section(name, found)}\n{match[3]}"

    docs.write_text(MARKED.sub(filled, docs.read_text("utf-8")), "utf-8")
    return names


def section(name: str, found: dict[str, tuple[Result, dict[str, Any]]]) -> str:
    """What belongs between the markers of this name."""
    if name == "goals":
        goals = [goal for result, _ in found.values() for goal in result.goals]
        return goals_table(goals) if goals else "No result is recorded."
    if name not in found:
        return "No result is recorded."
    result, facts = found[name]
    without_goals = Result(result.name, result.cases)
    return "\n\n".join([render(without_goals), origin(facts)])


def origin(facts: dict[str, Any]) -> str:
    """Command, commit, date and machine in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    where = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    note = "" if facts["size"] == "full" else f" Size `{facts['size']}`: not the figures of the goals."
    return (
        f"`{facts['command']}` at `{facts['commit']}`, {facts['date']}; {where}, {facts['threads']} thread; "
        f"Python {facts['python']}, {versions}.{note}"
    )


def lines(result: Result) -> Iterator[str]:
    """For the terminal: one line per goal, then the tables."""
    for goal in result.goals:
        asked = f"goal {goal.bound} {quantity(goal.limit)} {goal.unit}"
        yield f"  {goal.verdict:>14}  {goal.what}: {measured(goal)}, {asked}"
    yield ""
    yield render(Result(result.name, result.cases))
