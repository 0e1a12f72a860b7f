"""The tables of a report, as text: results with intervals, paired differences, health of the evaluations, settings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from atesd.config import Config, describe_settings, method_name
from atesd.maths.statistics import detectable_difference, paired_bootstrap
from atesd.rows import EvaluationRow
from atesd.table import Table
from atesd.text import MISSING, number, percent, percent_interval, points_interval
from atesd_lab.report.rows import RunRows, average, peak

_PINNED = {"pinned": "as pinned", "expected": "as expected", "no": "not pinned yet"}
_THINKING = {True: "thinking", False: "not thinking", None: "no thinking mode known"}
_CLEAN = {
    True: "Clean by date: no problem was public when the model's family was released.",
    False: "Not clean by date: problems were public when the model's family was released.",
    None: "Whether the problems are clean by date for the model is not known.",
}
PEAK_COLUMN = "peak (selected on the same data)"


def results_table(runs: Sequence[RunRows], split: str) -> Table:
    """Average@k in percent for each run: last, paired gain, base, the best common update of several runs, peak.

    The score stands first, where it is seen on a narrow screen.
    """
    common = best_common_update(runs, split)
    columns = ["run", "last", "last - base, points", "base", "method"]
    columns += [f"best common (update {common})"] if common is not None else []
    rows = []
    for run in runs:
        evaluations = run.evaluated(split)
        base, last = run.at(split, 0), evaluations[-1] if evaluations else None
        trained = last if last is not base else None
        cells = [run.name, _dated(trained), paired_points(base, trained), _average(base), method_name(run.config)]
        cells += [_average(run.at(split, common))] if common is not None else []
        rows.append((*cells, _dated(peak(evaluations) if trained else None)))
    return Table(
        f"Average@k on {split}, %", (*columns, PEAK_COLUMN), tuple(rows), tuple(result_notes(runs, split, common))
    )


def result_notes(runs: Sequence[RunRows], split: str, common: int | None) -> list[str]:
    """What a reader must know before believing the results table."""
    rows = [row for run in runs for row in run.evaluated(split)]
    if not rows:
        return [f"No evaluations on {split} yet."]
    sizes = sorted({(int(row["problems"]), int(row["samples"])) for row in rows})
    notes = [
        "Problems and samples each: " + ", ".join(f"{problems} x {samples}" for problems, samples in sizes) + ".",
        "Brackets: 95 % bootstrap interval over problems; it does not cover the choice of seed.",
        "The peak is picked and reported on the same data, so it is too high; compare runs at last"
        + (", or at the best common update, which is picked on their mean." if common is not None else "."),
    ]
    notes += _power_notes(runs, split) + _benchmark_notes(rows)
    if split == "validation":
        notes.append("Validation problems are evaluated again and again; the held-out claim is the one on test.")
    if any(run.config.data != runs[0].config.data for run in runs):
        notes.append("The runs use different data: only rows of the same data can be compared.")
    lasts = {int(run.evaluated(split)[-1]["update"]) for run in runs if run.evaluated(split)}
    if len(lasts) > 1:
        notes.append(f"The runs end at different updates ({', '.join(map(str, sorted(lasts)))}).")
    if len({str(sorted((key, value) for key, value in row["sampler"].items() if key != "seed")) for row in rows}) > 1:
        notes.append("The evaluations did not all use the same sampler settings.")
    if any(run.config.data.source == "world" and run.config.data.leaps for run in runs):
        notes.append("The leap world is designed so that the best ratio is interior: no evidence on language models.")
    return notes


def _power_notes(runs: Sequence[RunRows], split: str) -> list[str]:
    """What the last evaluation of each run tells apart from another of its kind."""
    lasts = {run.name: evaluated[-1] for run in runs if (evaluated := run.evaluated(split))}
    shares = {
        name: detectable_difference(list(row["correct_counts"].values()), row["samples"])
        for name, row in lasts.items()
        if row.get("correct_counts")
    }
    told = ", ".join(f"{name} {100 * share:.1f}" for name, share in shares.items() if share is not None)
    words = "points (80 % power, from the sampling alone: another seed of training is not in it)"
    return [f"One such evaluation tells apart differences of {told} {words}."] if told else []


def _benchmark_notes(rows: Sequence[EvaluationRow]) -> list[str]:
    """Where a benchmark's problems came from, and what of the model they say."""
    found = [row["benchmark"] for row in rows if "benchmark" in row]
    sources = dict.fromkeys(f"{one['source']} ({_PINNED[one['pinned']]}, {one['sha256'][:12]})" for one in found)
    clean = {one["clean"] for one in found}
    engines = dict.fromkeys(one["engine"] for one in found)
    thinking = dict.fromkeys(_THINKING[one["thinking"]] for one in found)
    if not found:
        return []
    return [
        f"Problems: {', '.join(sources)}. Sampled by {', '.join(engines)}, {', '.join(thinking)}.",
        _CLEAN[next(iter(clean)) if len(clean) == 1 else None],
    ]


def differences_table(runs: Sequence[RunRows], split: str) -> Table | None:
    """Differences of the last evaluations of runs on the same data, two by two, paired by problem; or None."""
    rows = []
    for first, second in itertools.combinations(runs, 2):
        if first.config.data != second.config.data or not (first.evaluated(split) and second.evaluated(split)):
            continue
        before, after = first.evaluated(split)[-1], second.evaluated(split)[-1]
        shared = len(_shared_problems(before, after))
        rows.append((f"{second.name} - {first.name}", paired_points(before, after), str(shared)))
    if not rows:
        return None
    notes = ("Last evaluations, paired by problem: the interval covers the problems, not the choice of seed.",)
    return Table(f"Differences on {split}, points", ("runs", "difference", "problems in common"), tuple(rows), notes)


def evaluation_table(run: RunRows) -> Table:
    """Every evaluation of a run with its verdicts, lengths, truncation and loops."""
    columns = ("update", "split", "Average@k, %", "pass@k, %", "correct", "wrong", "unparseable", "timeout")
    rows = [
        (
            str(row["update"]),
            str(row["split"]),
            percent_interval(row["average"]),
            percent_interval(row.get("pass_at_k")),
            *(str(row["verdicts"].get(verdict, 0)) for verdict in columns[4:]),
            number(row.get("mean_tokens")),
            percent(row.get("truncated_share")),
            percent(row.get("loop_share")),
        )
        for row in run.evaluations
    ]
    return Table("Evaluations", (*columns, "mean tokens", "truncated, %", "looping, %"), tuple(rows))


def changed_settings(config: Config) -> Table:
    """The settings that differ from their defaults."""
    rows = [
        (setting.path, _value(setting.value), _value(setting.default))
        for setting in describe_settings(config)
        if setting.changed
    ]
    return Table("Settings that differ from the defaults", ("setting", "value", "default"), tuple(rows))


def best_common_update(runs: Sequence[RunRows], split: str) -> int | None:
    """The trained update, evaluated in every one of several runs on the same data, with the highest mean Average@k."""
    if len(runs) < 2 or any(run.config.data != runs[0].config.data for run in runs):
        return None
    scores = [{int(row["update"]): average(row) for row in run.evaluated(split)} for run in runs]
    common = set.intersection(*map(set, scores)) - {0}
    return max(sorted(common), key=lambda update: sum(score[update] for score in scores), default=None)


def paired_points(before: EvaluationRow | None, after: EvaluationRow | None) -> str:
    """The difference of two evaluations in points with its interval, over the problems that both hold."""
    shared = _shared_problems(before, after) if before and after else []
    if before is None or after is None or not shared:
        return MISSING
    old, new = ([row["correct_counts"][problem] / row["samples"] for problem in shared] for row in (before, after))
    low, high = paired_bootstrap(new, old)
    return points_interval((sum(new) - sum(old)) / len(shared), low, high)


def _shared_problems(before: EvaluationRow, after: EvaluationRow) -> list[str]:
    counts = before.get("correct_counts") or {}
    return sorted(set(counts) & set(after.get("correct_counts") or {}))


def _average(row: EvaluationRow | None) -> str:
    return percent_interval(row["average"]) if row else MISSING


def _dated(row: EvaluationRow | None) -> str:
    return f"{_average(row)} @{row['update']}" if row else MISSING


def _value(value: Any) -> str:
    return "none" if value is None else str(value)
