"""From settings to an exposure."""

from __future__ import annotations

from collections.abc import Sequence

from atesd.config import Config
from atesd.control.fixed import FixedExposure, ramp, random_ratios, replayed
from atesd.control.interface import Exposure
from atesd.control.learned import LearnedExposure


def make_exposure(config: Config, num_updates: int, seed: int, replay: Sequence[float] = ()) -> Exposure:
    """The exposure that `exposure.kind` names; `replay` holds the per-update ratios of `exposure.replay_run`.

    The baselines (sft, grpo) have no teacher to show anything to: nothing is decided there and nothing is measured.
    Raises `ConfigError` if the recorded run is shorter than `num_updates`.
    """
    settings = config.exposure
    if config.train.method != "distill":
        return FixedExposure(1.0)
    match settings.kind:
        case "full":
            return FixedExposure(1.0)
        case "fixed":
            return FixedExposure(settings.reveal_ratio)
        case "random":
            hold = config.credit.hold_updates
            return FixedExposure(random_ratios(settings.ratio_min, settings.ratio_max, hold, seed))
        case "schedule":
            start, end = settings.schedule_start, settings.schedule_end
            return FixedExposure(ramp(settings.schedule, start, end, num_updates))
        case "replay":
            return FixedExposure(replayed(replay, settings.replay_order, num_updates, seed))
        case "learned":
            return LearnedExposure(
                num_updates=num_updates,
                credit=config.credit,
                policy=config.policy,
                seed=seed,
                ratio_min=settings.ratio_min,
                ratio_max=settings.ratio_max,
                granularity=settings.granularity,
            )
