"""Every experiment by name, and what is written of it: tables and claims as Markdown, figures as SVG and PNG."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from atesd.errors import AtesdError, ConfigError
from atesd.runs import write_atomic
from atesd.table import Table, render_text
from atesd_lab.paper import (
    clocks,
    controllers,
    controls,
    credit,
    exposure,
    granularity,
    main,
    policy,
    sweep,
    tokens,
    words,
)
from atesd_lab.paper.bench import Bench, Findings, pooling_for, read_bench
from atesd_lab.paper.claims import Claim, Verdict
from atesd_lab.paper.drawing import write_figure
from atesd_lab.paper.numbers import source
from atesd_lab.paper.pooling import Pooling
from atesd_lab.paper.scale import Scale
from atesd_lab.report.honest import markdown
from atesd_lab.sweep.plan import Cell

EXPERIMENTS: Mapping[str, Callable[[Bench], Findings]] = {
    "sweep": sweep.report,
    "main": main.report,
    "credit": credit.report,
    "exposure": exposure.report,
    "policy": policy.report,
    "tokens": tokens.report,
    "controls": controls.report,
    "clocks": clocks.report,
    "granularity": granularity.report,
    "controllers": controllers.report,
    "words": words.report,
}
UNFORESEEN = (ValueError, LookupError, TypeError, ArithmeticError, StopIteration)
"""What rows that nobody thought of raise: the other experiments are written all the same."""
RULE = (
    "Each row is one claim: of the paper, with its number, or ours. Beside it stand our difference or differences with "
    "their 95 % intervals. The claim *agrees* if all intervals are above 0, and *disagrees* if one is below 0; "
    "otherwise it is *not distinguishable*. The intervals are not widened where a claim has several."
)
TOYS = (
    "The worlds are embedded toys of a 101,056-parameter model; the leap world is made so that its best ratio is "
    "interior. The word problems are nobody's here; their model, of 2.2 million parameters, and what it cannot do "
    "alone are ours. A verdict here is about a mechanism and no evidence about large language models."
)


@dataclass(frozen=True, slots=True)
class Written:
    """An experiment that was written, or why it was not."""

    name: str
    findings: Findings | None
    missing: str = ""


def named(name: str, scale: Scale) -> list[str]:
    """One experiment of a scale, or all of them. Raises `ConfigError` for an unknown name."""
    if name == "all":
        return list(scale.experiments)
    if name not in scale.experiments:
        raise ConfigError(f"reproduce {name}: expected all or one of {', '.join(scale.experiments)}")
    return [name]


def write_experiments(
    scale: Scale, names: Sequence[str], cells: Sequence[Cell], finished: Set[Path], out: Path
) -> list[Written]:
    """Write NAME.md and figures/NAME-*.svg and .png for every experiment whose cells are finished, and results.md.

    One that cannot be made does not keep the others back: it is named with the reason. What results.md says of
    experiments that are not asked for stays there.
    """
    pooling = pooling_for(cells, finished)
    written = [_write(name, scale, cells, finished, out, pooling) for name in names]
    found = {**_sections(out / "results.md"), **{one.name: section(one) for one in written}}
    parts = [*preface(about(cells)), *(found[name] for name in scale.experiments if name in found)]
    write_atomic(out / "results.md", ("\n\n".join(parts).rstrip("\n") + "\n").encode())
    return written


def _sections(path: Path) -> dict[str, str]:
    """The sections of an earlier results.md by experiment; none where there is none."""
    parts = path.read_text("utf-8").removesuffix("\n").split("\n\n## ")[1:] if path.exists() else []
    heads = [part.partition("\n")[0] for part in parts]
    return {head.rpartition("([")[2].partition("]")[0]: f"## {part}" for head, part in zip(heads, parts, strict=True)}


def _write(
    name: str, scale: Scale, cells: Sequence[Cell], finished: Set[Path], out: Path, pooling: Pooling | None
) -> Written:
    pairs = scale.wanted([name])
    mine = [cell for cell in cells if (cell.points["world"], cell.points["arm"]) in pairs]
    left = [cell for cell in mine if cell.job.folder not in finished]
    if left:
        return Written(name, None, f"{len(left)} of {len(mine)} cells are not finished, such as {left[0].job.name}")
    try:
        findings = EXPERIMENTS[name](read_bench(mine, pairs, pooling))
    except AtesdError as error:
        return Written(name, None, str(error))
    except UNFORESEEN as error:
        cause = traceback.extract_tb(error.__traceback__)[-1]
        return Written(name, None, f"{type(error).__name__}: {error} ({Path(cause.filename).name}:{cause.lineno})")
    for key, figure in findings.figures.items():
        write_figure(figure, out / "figures" / f"{name}-{key}")
    notes = () if pooling is None else (about(cells),)
    write_atomic(out / f"{name}.md", page(name, replace(findings, notes=(*findings.notes, *notes))).encode())
    return Written(name, findings)


def page(name: str, findings: Findings) -> str:
    """Everything of one experiment as Markdown."""
    figures = [f"![{name}: {key}](figures/{name}-{key}.svg)" for key in findings.figures]
    parts = [f"# {findings.title}", markdown(claims_table(findings.claims)), *figures]
    parts += [markdown(table) for table in findings.tables]
    return "\n\n".join([*parts, *(f"- {note}" for note in findings.notes)]) + "\n"


def about(cells: Sequence[Cell]) -> str:
    """What a verdict is about: toys, or a model on benchmarks."""
    scoring = cells[0].job.scoring
    if scoring is None:
        return TOYS
    config, seeds = cells[0].job.config, len({cell.seed for cell in cells})
    names = ", ".join(f"{one.name} ({one.source})" for one in scoring.asked)
    chosen = "held-out problems of the training data (validation) choose between ratios and checkpoints"
    return (
        f"Model: {config.model.path}; {seeds} seeds; test: {names}, all problems together, after the last update; "
        f"{chosen}. Settings of the evaluation: {', '.join(scoring.settings)}. The paper's ablations are of Qwen3-1.7B "
        "on AIME 2024 alone."
    )


def preface(subject: str = TOYS) -> list[str]:
    """What stands above the claims: the rule of the verdicts, what they are about, the paper."""
    return ["# The claims of the paper, and what came out here", RULE, subject, f"The paper is {source()}."]


def section(one: Written) -> str:
    """What was claimed in an experiment and what came out, or why it was not written, as Markdown."""
    if one.findings is None:
        return f"## {one.name}\n\nNot written: {one.missing}"
    return f"## {one.findings.title} ([{one.name}]({one.name}.md))\n\n{markdown(claims_table(one.findings.claims))}"


def claims_table(claims: Sequence[Claim]) -> Table:
    """One row per claim: whose, the paper's number, ours, the verdict."""
    rows = [
        (claim.text, claim.origin, claim.printed, "; ".join(map(str, claim.contrasts)), claim.verdict)
        for claim in claims
    ]
    return Table("Claims", ("claim", "whose", "paper", "here: difference [95 % interval]", "verdict"), tuple(rows))


def verdict_lines(written: Sequence[Written]) -> str:
    """For a terminal: how many claims of each experiment came out how, and what was not written."""
    verdicts = get_args(Verdict)
    rows = []
    for one in written:
        found = [claim.verdict for claim in one.findings.claims] if one.findings else []
        rows.append((one.name, *(str(found.count(verdict)) for verdict in verdicts), one.missing or "written"))
    return render_text(Table("Claims by verdict", ("experiment", *verdicts, "state"), tuple(rows)))
