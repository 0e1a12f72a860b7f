"""Tables from results: on the terminal after a run, and in docs/performance.md between its markers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Goal, Result, ratio
from benchmarks.record import ROOT, read

REPORTED = "reported"  # a record written by hand, of figures that somebody told; its `note` says so
DOCS = ROOT / "docs" / "performance.md"
Records = dict[str, dict[str, tuple[Result, dict[str, Any]]]]
"""What was measured: machine, name of the result, and there the result with its provenance."""
MARKED = re.compile(r"(<!-- begin (?P<name>[\w-]+) -->\n).*?(<!-- end (?P=name) -->)", re.DOTALL)


def goals_table(goals: Sequence[Goal]) -> str:
    """Goal, figure, verdict."""
    rows = [
        (goal.what, f"{goal.bound} {quantity(goal.limit)} {goal.unit}", measured(goal), goal.verdict) for goal in goals
    ]
    return markdown(("work", "goal", "measured (range of rounds)", "verdict"), rows)


def measured(goal: Goal) -> str:
    """The median, and the range if there was more than one round."""
    found, unit = goal.measured, f" {goal.unit}".rstrip()
    if found.low == found.high:
        return f"{quantity(found.median)}{unit}"
    return f"{quantity(found.median)}{unit} ({quantity(found.low)} to {quantity(found.high)})"


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


def figures_table(case: Case, corner: str = "") -> str:
    """Whatever else a case measured: one row per name, one column per figure; `corner` stands above the names."""
    figures = dict(case.figures or {})
    if figures and all(isinstance(row, dict) for row in figures.values()):
        columns = list(dict.fromkeys(key for row in figures.values() for key in row))
        return markdown(
            [corner, *columns], [[name, *(cell(row.get(key)) for key in columns)] for name, row in figures.items()]
        )
    return markdown((corner or "figure", "value"), [(name, cell(value)) for name, value in figures.items()])


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


def records(results: Path) -> Records:
    """Every machine's results under RESULTS/MACHINE/NAME.json, by machine and name."""
    found: Records = {}
    for path in sorted(results.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = read(path)
    return found


def update_docs(results: Path, docs: Path = DOCS) -> list[str]:
    """Rewrite what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; returns the names.

    NAME is a result, `goals` for the goals of all results, or `machines`. A marker without its result says so in the
    document.
    """
    found = records(results)
    names: list[str] = []

    def filled(match: re.Match[str]) -> str:
        name = match["name"]
        names.append(name)
        return f"{match[1]}{section(name, found)}\n{match[3]}"

    docs.write_text(MARKED.sub(filled, docs.read_text("utf-8")), "utf-8")
    return names


def section(name: str, found: Records) -> str:
    """What belongs between the markers of this name; a column per machine that has it."""
    if found and name in ("goals", "machines"):
        return goals_beside(found) if name == "goals" else machines_table(found)
    having = {machine: results[name] for machine, results in found.items() if name in results}
    if not having:
        return "No result is recorded."
    titles = dict.fromkeys(case.name for result, _ in having.values() for case in result.cases)
    cases = [
        cases_beside({m: case for m, (result, _) in having.items() for case in result.cases if case.name == title})
        for title in titles
    ]
    return "\n\n".join([*cases, *(f"{machine}: {origin(facts)}" for machine, (_, facts) in having.items())])


def goals_beside(found: Records) -> str:
    """Each goal, and on every machine its figure and verdict."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    names = {name for results in found.values() for name in results}
    for name in sorted(names, key=lambda name: (name == REPORTED, name)):  # its goals are those of the others
        for machine, results in found.items():
            for goal in results[name][0].goals if name in results else ():
                asked = f"{goal.bound} {quantity(goal.limit)} {goal.unit}".strip()
                rows.setdefault((goal.what, asked), {})[machine] = f"{measured(goal)}: {goal.verdict}"
    body = [[*key, *(row.get(machine, "") for machine in found)] for key, row in rows.items()]
    return markdown(("work", "goal", *found), body)


def machines_table(found: Records) -> str:
    """What every machine is: its processor, instructions, threads and packages, as its records say."""
    rows = []
    for machine, results in found.items():
        told = [facts for _, facts in results.values()]
        columns: list[dict[str, None]] = [
            dict.fromkeys(str(facts["processor"]) for facts in told),
            dict.fromkeys(" ".join(facts.get("instructions") or ["not recorded"]) for facts in told),
            dict.fromkeys(str(facts["threads"]) for facts in told),
            dict.fromkeys(packages(facts) for facts in told),
            dict.fromkeys(str(facts.get("note", facts["date"])) for facts in told),
        ]
        rows.append([machine, *("; ".join(column) for column in columns)])
    return markdown(("machine", "processor", "instructions", "threads", "packages", "measured"), rows)


def cases_beside(cases: Mapping[str, Case]) -> str:
    """One case on several machines: seconds, ratio and peak memory of every variant in one cell per machine."""
    parts = [f"**{next(iter(cases.values())).name}**"]
    timed = {machine: timings(case) for machine, case in cases.items() if case.rounds or case.memory}
    if timed:
        variants = dict.fromkeys(name for cells in timed.values() for name in cells)
        rows = [[name, *(cells.get(name, "") for cells in timed.values())] for name in variants]
        parts += [markdown(("variant", *timed), rows)]
    for machine, case in cases.items():
        if case.figures:
            parts.append(figures_table(case, machine if len(cases) > 1 else ""))
        parts += [f"Not run on {machine}: {name} ({why})." for name, why in (case.peers_absent or {}).items()]
    return "\n\n".join(parts)


def timings(case: Case) -> dict[str, str]:
    """Each variant's row of `case_table`, in one cell."""
    lines = [line.strip("| ").split(" | ") for line in case_table(case).splitlines()[2:]]
    return {name: "; ".join(part for part in map(str.strip, parts) if part) for name, *parts in lines}


def origin(facts: dict[str, Any]) -> str:
    """Command, commit, date and machine in one line; the note of what was only reported."""
    if "note" in facts:
        return f"{facts['note']}; {facts['processor']}, {facts['threads']} thread; {packages(facts)}."
    where = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    note = "" if facts["size"] == "full" else f" Size `{facts['size']}`: not the figures of the goals."
    return (
        f"`{facts['command']}` at `{facts['commit']}`, {facts['date']}; {where}, {facts['threads']} thread; "
        f"{packages(facts)}.{note}"
    )


def packages(facts: dict[str, Any]) -> str:
    """The versions that a record names."""
    named = {"Python": facts["python"], **facts["versions"]}
    return ", ".join(f"{name} {number}" for name, number in named.items() if number)


def lines(result: Result) -> Iterator[str]:
    """For the terminal: one line per goal, then the tables."""
    for goal in result.goals:
        asked = f"goal {goal.bound} {quantity(goal.limit)} {goal.unit}"
        yield f"  {goal.verdict:>14}  {goal.what}: {measured(goal)}, {asked}"
    yield ""
    yield render(Result(result.name, result.cases))
