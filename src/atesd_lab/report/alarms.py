"""What a run's rows warn of: the known ways in which on-policy self-distillation goes wrong, with fixed thresholds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sized
from dataclasses import dataclass

from atesd.text import finite, number, percent
from atesd_lab.report.rows import RunRows, average, peak

# Thresholds are ours. They are meant to make a reader look, not to judge.
LENGTH_COLLAPSE = 0.5  # share of the early completion length
SHARE_RISE = 0.10  # of rollouts, absolute
KL_SPIKE = 5.0  # times the median of the updates before
KL_HISTORY = 20  # updates
DECLINE = 0.05  # Average@k below the peak, absolute
UNVERIFIED = 0.10  # of completions without a verdict on the answer
SATURATED = 0.05  # mean reveal ratio from either end


@dataclass(frozen=True, slots=True)
class Alarm:
    """A warning: what was seen, in numbers, and what it may mean."""

    title: str
    detail: str


def find_alarms(run: RunRows) -> list[Alarm]:
    """Every warning that the rows of a run give, in a fixed order."""
    return [alarm for check in _CHECKS for alarm in check(run)]


def _failed(run: RunRows) -> list[Alarm]:
    if run.manifest.get("status") != "failed":
        return []
    return [
        Alarm("Run failed", f"It ended with an error after {run.updates_done} updates; what follows is what it left.")
    ]


def _length_collapse(run: RunRows) -> list[Alarm]:
    early, late = _early_and_late(run, "completion_tokens")
    if early is None or late is None or late >= LENGTH_COLLAPSE * early:
        return []
    detail = f"Mean completion length fell from {number(early)} to {number(late)} tokens."
    return [Alarm("Length collapse", f"{detail} Check that the student still reasons.")]


def _rising_share(key: str, title: str, meaning: str) -> Callable[[RunRows], list[Alarm]]:
    def check(run: RunRows) -> list[Alarm]:
        early, late = _early_and_late(run, key)
        if early is None or late is None or late - early < SHARE_RISE:
            return []
        return [Alarm(title, f"From {percent(early)} % to {percent(late)} % of the rollouts. {meaning}")]

    return check


def _kl_spikes(run: RunRows) -> list[Alarm]:
    updates, values = run.series("kl")
    spikes = [
        update
        for place, (update, value) in enumerate(zip(updates, values, strict=True))
        if place >= KL_HISTORY and value > KL_SPIKE * statistics.median(values[place - KL_HISTORY : place])
    ]
    if not spikes:
        return []
    detail = f"{_count(spikes, 'update')} above {KL_SPIKE:g} times the median of the {KL_HISTORY} before."
    return [Alarm("KL spikes", f"{detail} First at update {spikes[0]}.")]


def _decline(run: RunRows) -> list[Alarm]:
    alarms = []
    for split in run.splits:
        rows = run.evaluated(split)
        best, last = peak(rows), rows[-1]
        if best and average(best) - average(last) > DECLINE:
            detail = (
                f"On {split} from {percent(average(best))} % at update {best['update']} "
                f"to {percent(average(last))} % at update {last['update']}. "
                "OPSD decays after 100 to 200 updates; but a maximum of noisy evaluations also falls by itself."
            )
            alarms.append(Alarm("Decline after a peak", detail))
    return alarms


def _skipped(run: RunRows) -> list[Alarm]:
    skipped = [row for row in run.metrics if row.get("skipped")]
    if not skipped:
        return []
    reasons = ", ".join(sorted({str(row["skipped"]) for row in skipped}))
    return [Alarm("Skipped updates", f"{_count(skipped, 'update')} of {len(run.metrics)} skipped: {reasons}.")]


def _unverified(run: RunRows) -> list[Alarm]:
    if not run.evaluations:
        return []
    verdicts = run.evaluations[-1]["verdicts"]
    total = sum(verdicts.values())
    unverified = verdicts.get("unparseable", 0) + verdicts.get("timeout", 0)
    if not total or unverified < UNVERIFIED * total:
        return []
    detail = f"{percent(unverified / total)} % of the last evaluation had no answer that could be read in time."
    return [Alarm("Answers not read", f"{detail} They count as not correct; look at the samples before the score.")]


def _saturated(run: RunRows) -> list[Alarm]:
    if run.config.exposure.kind not in ("learned", "bandit"):
        return []
    _, late = _early_and_late(run, "reveal_ratio")
    if late is None or SATURATED <= late <= 1 - SATURATED:
        return []
    return [Alarm("Exposure at its bound", f"Mean reveal ratio {late:.2f} late in the run: it hardly explores.")]


def _drift(run: RunRows) -> list[Alarm]:
    alarm = run.config.sampling.server.drift_alarm
    updates, drifts = run.series("rollout_drift")
    far = [(drift, update) for update, drift in zip(updates, drifts, strict=True) if drift > alarm]
    if not far:
        return []
    worst, update = max(far)
    detail = f"In {_count(far, 'update')} above {alarm:g} nats per token, {number(worst)} at update {update}."
    return [Alarm("Rollouts drift", f"{detail} A server rounds otherwise, or does not have the student's weights.")]


_CHECKS: tuple[Callable[[RunRows], list[Alarm]], ...] = (
    _failed,
    _length_collapse,
    _rising_share("truncated_share", "Truncation rising", "A cut completion holds no answer."),
    _rising_share("loop_share", "Loops rising", "The student repeats itself."),
    _kl_spikes,
    _decline,
    _skipped,
    _unverified,
    _saturated,
    _drift,
)


def _early_and_late(run: RunRows, key: str) -> tuple[float | None, float | None]:
    """Means over the first and the last tenth of the updates (at least 3); None for a run of fewer than 6."""
    values = [value for row in run.metrics if (value := finite(row.get(key))) is not None]
    width = max(3, len(values) // 10)
    if len(values) < 2 * width:
        return None, None
    return statistics.fmean(values[:width]), statistics.fmean(values[-width:])


def _count(items: Sized, noun: str) -> str:
    return f"{len(items)} {noun}" if len(items) == 1 else f"{len(items)} {noun}s"
