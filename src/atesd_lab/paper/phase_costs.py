"""Equal time at the prices of a language model: who is ahead if an update costs what its phases cost there.

    python -m atesd_lab.paper.phase_costs OUT... [--times FOLDER] [--model FOLDER]

Accuracies are those of the runs in OUT; another model gives only the seconds of an update: a few measured updates of a
language model (`--model`), and 8 billion parameters by arithmetic.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from atesd.config import Config, FixedSettings, FullSettings, load_config
from atesd.errors import AtesdError, RunError
from atesd.forecast.arithmetic import Lengths, ModelShape, Reached, Work, seconds
from atesd.forecast.devices import KINDS
from atesd.rows import Estimate
from atesd.runs import RunFolder
from atesd.table import Table
from atesd.text import MISSING
from atesd_lab.paper.aligned_measure import BEST_FIXED, GATE, GRPO, SDAR, Scored
from atesd_lab.paper.aligned_results import WORLDS
from atesd_lab.report.honest import capital, markdown
from atesd_lab.sweep.pivot import SweptCell, SweptTable, read_cells, read_tables, require_axis

PHASES: Mapping[str, tuple[str, ...]] = {
    "sampling": ("sample",),
    "teacher": ("teacher",),
    "student and step": ("student", "loss_backward", "step"),
    "look-ahead": ("control",),
}
"""The columns, and the phases of `metrics.jsonl` or of the arithmetic in each."""
Prices = Mapping[str, Mapping[str, float]]
"""Seconds of an update of each arm, by the columns of `PHASES`."""

FIRST_HOLD = 2  # updates of the plan `smollm2-costs`, in which nothing looks ahead
PROBLEM, REFERENCE, COMPLETION, ROLLOUTS = 200, 2048, 2048, 64
"""Tokens of each, and the rollouts of an update: assumed."""
REACHED = Reached(flops=0.45, bandwidth=0.50, link=1.0, layer_step=20e-6)
"""Shares of an H100's data sheet, assumed."""
CORRECT = 1.0
"""Share of the rollouts that give the gate's direction: all of them, the most that it can cost."""
GATE_PRODUCTS = {"none": 0, "correct": 0, "random": 0, "sdar": 2, "aligned": 3}
"""Products with the output head for each token, beside those of the loss: log-probabilities of student and teacher
(SDAR); both logits and their derivative along the direction (`alignment.parameters: features`)."""


def qwen3_8b() -> ModelShape:
    """The shape of Qwen3-8B."""
    layers, hidden, inner, heads, keys, width, vocabulary = 36, 4096, 12288, 32, 8, 128, 151936
    ends = {"q_proj": (hidden, heads * width), "o_proj": (heads * width, hidden)}
    ends |= dict.fromkeys(("k_proj", "v_proj"), (hidden, keys * width))
    ends |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    linears = tuple((f"{layer}.{name}", *sizes) for layer in range(layers) for name, sizes in ends.items())
    norms = layers * (2 * hidden + 2 * width) + hidden
    parameters = sum(i * o for _, i, o in linears) + 2 * vocabulary * hidden + norms
    return ModelShape(layers, hidden, heads, keys, width, inner, vocabulary, False, True, parameters, linears)


@dataclass(frozen=True, slots=True)
class PriceList:
    """Prices with their name, and what they rest on."""

    name: str
    source: str
    prices: Prices

    @property
    def whole(self) -> dict[str, float]:
        """Seconds of an update of each arm."""
        return {arm: sum(phases.values()) for arm, phases in self.prices.items()}


def measured(cells: Sequence[SweptCell], skip: int = 0) -> Prices:
    """Seconds of each phase: means over a run's updates but the first `skip`, medians over the runs of an arm."""
    spent: dict[str, list[dict[str, float]]] = {}
    require_axis(cells, "arm")
    for cell in cells:
        if cell.state == "finished":
            run = RunFolder.open(cell.folder)
            rows = [row["seconds"] for row in run.rows("metrics") if row["seconds"] and row["update"] >= skip]
            if not rows:
                raise RunError(f"{run.path}: no update from {skip} on has `seconds`; its phases have no price")
            means = {name: fmean(_sum(row, phases) for row in rows) for name, phases in PHASES.items()}
            spent.setdefault(cell.points["arm"], []).append(means)
    return {arm: {name: median(run[name] for run in runs) for name in PHASES} for arm, runs in spent.items()}


def _sum(spent: Mapping[str, float], phases: Sequence[str]) -> float:
    return sum(spent.get(phase, 0.0) for phase in phases)


def composed(config: Config, gate: Mapping[str, float]) -> Mapping[str, float] | None:
    """An update of this arm from the phases of one of the gate: no look-ahead, for GRPO no teacher; None for others.

    A fixed ratio is counted like full exposure, SDAR's gate as if its weights cost nothing.
    """
    if not _is_plain(config):
        return None
    left_out = {"look-ahead": config.loss.gate.kind != "aligned" or not config.distils, "teacher": not config.distils}
    return {name: 0.0 if left_out.get(name) else spent for name, spent in gate.items()}


def _filled(prices: Prices, configs: Mapping[str, Config]) -> Prices:
    found = {arm: composed(config, prices[GATE]) for arm, config in configs.items()} if GATE in prices else {}
    return {**{arm: price for arm, price in found.items() if price is not None}, **prices}


def _is_plain(config: Config) -> bool:
    """GRPO, or full or fixed exposure with a gate of `GATE_PRODUCTS`, looking ahead by `features` alone."""
    if not config.distils:
        return config.train.method == "grpo"
    gate = config.loss.gate.kind
    ahead = gate != "aligned" or config.alignment.parameters == "features"
    return isinstance(config.exposure, FullSettings | FixedSettings) and gate in GATE_PRODUCTS and ahead


def by_arithmetic(config: Config) -> Mapping[str, float] | None:
    """Seconds of an update of this arm at 8 billion parameters; None if they are not known.

    The look-ahead reads the rollouts of its direction once more, without gradient, two products with the head a token.
    """
    if not _is_plain(config):
        return None
    exposure, gate = config.exposure, config.loss.gate.kind if config.distils else "none"
    words = ["exposure.kind=full" if config.distils else "train.method=grpo", f"train.batch_size={ROLLOUTS}"]
    words += [f"sampling.batch_size={ROLLOUTS}", f"sampling.completion_tokens={COMPLETION}"]
    view = PROBLEM + (exposure.reveal_ratio if isinstance(exposure, FixedSettings) else 1.0) * REFERENCE
    lengths = Lengths(PROBLEM, PROBLEM, round(view), view, REFERENCE, REFERENCE)
    shape, kind = qwen3_8b(), KINDS["h100-80gb"]
    found = seconds(Work(load_config("qwen3-8b", words), shape, lengths, kind), REACHED)
    product = 2 * shape.head_entries * ROLLOUTS * COMPLETION / (REACHED.flops * kind.flops)
    again = CORRECT * (found["student"] + 2 * product) if gate == "aligned" else 0.0
    found["control"] = GATE_PRODUCTS[gate] * product + again
    return {name: _sum(found, phases) for name, phases in PHASES.items()}


def price_table(given: PriceList) -> Table:
    """An arm per row: seconds by phase, and the whole over that of GRPO."""
    whole, rows = given.whole, []
    for arm, phases in given.prices.items():
        over = f"{whole[arm] / whole[GRPO]:.2f}" if GRPO in whole else MISSING
        rows.append((arm, *(f"{phases[name]:.3g}" for name in PHASES), f"{whole[arm]:.3g}", over))
    columns = ("arm", *PHASES, "an update, seconds", "over GRPO")
    return Table(f"Prices: {given.name}", columns, tuple(rows), (given.source,))


def answer_table(tables: Sequence[SweptTable], given: Sequence[PriceList], rival: str) -> Table:
    """The gate less a rival on validation at equal time: a row per price list, a column per world."""
    rows, counts = [], []
    for one in given:
        cells, words = [], []
        paces = {arm: Estimate(value=cost, low=cost, high=cost) for arm, cost in one.whole.items()}
        for table in tables:
            scored = Scored(table, _fixed(table), paces)
            name = scored.best_fixed if rival == BEST_FIXED else rival
            if name is None or not scored.is_timed(name, GATE) or not scored.arms.common(name, GATE):
                cells.append(MISSING)
                continue
            timed = scored.timed(name, GATE)
            gap, text = timed.gap, timed.gap.contrast.in_points
            words.append(gap.word)
            bold = f"**{text}**" if gap.word in ("ahead", "behind") else text
            cells.append(f"{bold} ({timed.candidate_updates:.0f} / {timed.baseline_updates:.0f})")
        rows.append((one.name, *cells))
        said = ", ".join(f"{word} in {words.count(word)}" for word in dict.fromkeys(words))
        counts.append(f"{capital(one.name)}: {said or 'nothing to compare'}, of {len(tables)} worlds.")
    columns = ("prices", *(WORLDS.get(table.name, table.name) for table in tables))
    note = "Bold: the 95 % interval leaves out 0. In parentheses the updates of the gate and of its rival."
    return Table(f"The gate less {rival} at equal time, points of validation", columns, tuple(rows), (*counts, note))


def _fixed(table: SweptTable) -> str:
    """An arm of full or fixed exposure without a gate, from which `Scored` knows the others. Raises `RunError`."""
    configs = {arm: group.runs[0].config for arm, group in table.groups.items()}
    for arm, one in configs.items():
        if one.distils and _is_plain(one) and one.loss.gate.kind == "none":
            return arm
    raise RunError(
        f"{table.name}: no finished run of full or fixed exposure without a gate, with which the others are compared; "
        f"finished are {', '.join(configs)}: go on with the sweep"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the prices, then the gate against GRPO, the best fixed ratio and SDAR's gate under each list."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("out", type=Path, nargs="+", help="the --out of a finished sweep over world and arm")
    asked.add_argument("--times", type=Path, help="the folder whose seconds count; default: those of OUT")
    asked.add_argument("--model", type=Path, help="the --out of `atesd sweep smollm2-costs`")
    given = asked.parse_args(arguments)
    try:
        print(page(given.out, given.times, given.model))
    except AtesdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def page(out: Sequence[Path], times: Path | None, model: Path | None) -> str:
    """All tables as Markdown. Raises `RunError` for folders that cannot be read so."""
    tables = [one for folder in out for one in read_tables(folder, table_axis="world", arm_axis="arm") if one.groups]
    cells = [cell for folder in ([times] if times else out) for cell in read_cells(folder)]
    configs = {arm: group.runs[0].config for table in tables for arm, group in table.groups.items()}
    source = "Means over updates, medians over runs. An arm that was not measured is made of the phases of the gate."
    lists = [PriceList("micro, measured", source, _filled(measured(cells), configs))]
    if model is not None:
        found = _filled(measured(read_cells(model), FIRST_HOLD), configs)
        source += f" Without the first {FIRST_HOLD} updates, in which nothing looks ahead."
        lists.append(PriceList("a language model, measured", source, found))
    found = {arm: price for arm, config in configs.items() if (price := by_arithmetic(config)) is not None}
    speed = f"{REACHED.flops:.0%} of an H100's operations and {REACHED.bandwidth:.0%} of its bandwidth"
    source = f"Qwen3-8B, LoRA of rank 64, {speed}, {ROLLOUTS} rollouts of {COMPLETION:,} tokens. Nothing was measured."
    lists.append(PriceList("8B, by arithmetic", source, found))
    answers = [answer_table(tables, lists, rival) for rival in (GRPO, BEST_FIXED, SDAR)]
    answers = [one for one in answers if any(set(row[1:]) != {MISSING} for row in one.rows)]
    return "\n".join(map(markdown, [*map(price_table, lists), *answers]))


if __name__ == "__main__":
    sys.exit(main())
