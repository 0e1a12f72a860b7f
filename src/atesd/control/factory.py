"""From settings to an exposure."""

from __future__ import annotations

from collections.abc import Sequence

from atesd.config import Config
from atesd.control.aligned import AlignedExposure
from atesd.control.bandit import Bandit
from atesd.control.controlled import ControlledExposure, Controller
from atesd.control.fixed import FixedExposure, ramp, random_ratios, replayed
from atesd.control.interface import Exposure
from atesd.control.learned import LearnedExposure
from atesd.control.search import GroupSearch
from atesd.control.setpoint import Setpoint
from atesd.importing import named_function, require_offers


def make_exposure(config: Config, num_updates: int, seed: int, replay: Sequence[float] = ()) -> Exposure:
    """The exposure that `exposure.kind` names; `replay` holds the per-update ratios of `exposure.replay_run`.

    The baselines (sft, grpo) have no teacher to show anything to: nothing is decided there and nothing is measured.
    Raises `ConfigError` if the recorded run is shorter than `num_updates`, or if no exposure comes of
    `exposure.factory`.
    """
    settings = config.exposure
    bounds = (settings.ratio_min, settings.ratio_max)
    if config.train.method != "distill":
        return FixedExposure(1.0)
    match settings.kind:
        case "full":
            return FixedExposure(1.0)
        case "fixed":
            return FixedExposure(settings.reveal_ratio)
        case "random":
            hold = config.credit.hold_updates
            return FixedExposure(random_ratios(*bounds, hold, seed))
        case "schedule":
            start, end = settings.schedule_start, settings.schedule_end
            return FixedExposure(ramp(settings.schedule, start, end, num_updates))
        case "replay":
            return FixedExposure(replayed(replay, settings.replay_order, num_updates, seed))
        case "aligned":
            settings = settings.model_copy(update={"kind": config.aligned.fallback})
            fallback = make_exposure(config.model_copy(update={"exposure": settings}), num_updates, seed)
            return AlignedExposure(
                config.aligned,
                hold_updates=config.credit.hold_updates,
                granularity=settings.granularity,
                fallback=fallback,
            )
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
        case "bandit":
            return controlled(Bandit(config.bandit, *bounds), config, seed)
        case "setpoint":
            return controlled(Setpoint(config.setpoint, *bounds), config, seed)
        case "per_problem":
            return controlled(GroupSearch(config.search, *bounds), config, seed)
        case "custom":
            return _made_by_factory(config, num_updates, seed)


def controlled(controller: Controller, config: Config, seed: int) -> ControlledExposure:
    """The exposure of a controller under the settings of a run: its holds, rewards, bounds and granularity."""
    return ControlledExposure(
        controller,
        credit=config.credit,
        seed=seed,
        ratio_min=config.exposure.ratio_min,
        ratio_max=config.exposure.ratio_max,
        granularity=config.exposure.granularity,
        buffer=config.policy.decisions_per_policy_update,
    )


def _made_by_factory(config: Config, num_updates: int, seed: int) -> Exposure:
    """What `exposure.factory` makes of (config, num_updates, seed). It must be importable; nothing else is asked."""
    name = config.exposure.factory or ""
    made: Exposure = named_function(name, "exposure.factory")(config, num_updates, seed)
    require_offers(
        made,
        Exposure,
        f"exposure.factory: {name}",
        "a controller becomes an exposure by atesd.control.factory.controlled(controller, config, seed)",
    )
    return made
