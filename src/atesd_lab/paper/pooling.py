"""A run's evaluations on the paper's benchmarks as the experiments read them: together, they are its test problems.

Contests of equal size weigh equally, so that the pooled Average@k is the mean of the benchmarks. Validation stays what
it is in training: held-out problems of the training data, which choose between ratios and checkpoints.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from atesd.errors import RunError
from atesd.maths.statistics import bootstrap_interval
from atesd.rows import Estimate, EvaluationRow
from atesd_lab.report.rows import RunRows


@dataclass(frozen=True, slots=True)
class Pooling:
    """Which benchmarks are pooled, and the rows of each seed's model before training, which one run of it holds."""

    names: tuple[str, ...]
    bases: Mapping[int, tuple[EvaluationRow, ...]]

    def pooled(self, run: RunRows) -> RunRows:
        """The run with pooled test rows in front of its own. Raises `RunError` for a benchmark that is missing."""
        end, seed = run.config.train.num_updates, run.config.train.seed
        last = [self._row(run, name, end) for name in self.names]
        base = self.bases.get(seed)
        if base is None:
            raise RunError(
                f"{run.name}: no run of seed {seed} was evaluated before training on {', '.join(self.names)}; give the "
                "same command again, or: atesd evaluate RUN --benchmark ... --update 0"
            )
        rows = [row for row in run.evaluations if row["split"] != "test"]
        first, end_row = pooled_row(base), pooled_row(last)
        if first.get("content") != end_row.get("content"):
            raise RunError(
                f"{run.name}: evaluated on other contents of {', '.join(self.names)} than its model before "
                "training, of which another run has the rows; give the same command again, or choose another --out"
            )
        return replace(run, evaluations=(first, *rows, end_row))

    def _row(self, run: RunRows, name: str, update: int) -> EvaluationRow:
        row = run.at(name, update)
        if row is None:
            raise RunError(
                f"{run.name}: not evaluated on {name} after {update} updates; give the same command again, or: "
                f"atesd evaluate RUN --benchmark {name}"
            )
        return row


def pooling_of(names: Sequence[str], runs: Sequence[RunRows]) -> Pooling:
    """The rows before training from whichever run of a seed has them all."""
    bases: dict[int, tuple[EvaluationRow, ...]] = {}
    for run in runs:
        rows = [run.at(name, 0) for name in names]
        found = tuple(row for row in rows if row is not None)
        if len(found) == len(names):
            bases.setdefault(run.config.train.seed, found)
    return Pooling(tuple(names), bases)


def pooled_row(rows: Sequence[EvaluationRow]) -> EvaluationRow:
    """Evaluations of one model on several benchmarks as one on all their problems; difficulty is the benchmark.

    Raises `RunError` for other numbers of samples, or other samplers.
    """
    first = rows[0]
    for row in rows[1:]:
        if (row["samples"], row["sampler"]) != (first["samples"], first["sampler"]):
            raise RunError(f"{first['split']} and {row['split']} were sampled differently; evaluate both alike")
    counts = {f"{row['split']}/{name}": count for row in rows for name, count in row["correct_counts"].items()}
    shares = [count / first["samples"] for count in counts.values()]
    solved = [float(count > 0) for count in counts.values()]
    verdicts: Counter[str] = Counter()
    for row in rows:
        verdicts.update(row["verdicts"])
    weights = [row["problems"] / len(counts) for row in rows]
    pairs = list(zip(weights, rows, strict=True))
    hashes = [row["benchmark"]["sha256"] for row in rows if "benchmark" in row]
    found: EvaluationRow = {
        "update": first["update"],
        "split": "test",
        "problems": len(counts),
        "samples": first["samples"],
        "average": _estimate(shares),
        "pass_at_k": _estimate(solved),
        "by_difficulty": {row["split"]: {"average": row["average"], "problems": row["problems"]} for row in rows},
        "verdicts": dict(verdicts),
        "mean_tokens": sum(weight * row["mean_tokens"] for weight, row in pairs),
        "truncated_share": sum(weight * row["truncated_share"] for weight, row in pairs),
        "loop_share": sum(weight * row["loop_share"] for weight, row in pairs),
        "sampler": first["sampler"],
        "correct_counts": counts,
    }
    if len(hashes) == len(rows):
        found["content"] = {"sha256": hashlib.sha256(" ".join(hashes).encode()).hexdigest()}
    return found


def _estimate(values: Sequence[float]) -> Estimate:
    low, high = bootstrap_interval(values, key="problems")
    return {"value": fmean(values), "low": low, "high": high}
