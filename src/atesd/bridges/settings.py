"""The settings of a run that another trainer makes: the controller's own, and what the trainer says of itself."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import fsum
from string import Formatter
from typing import Any

from atesd.bridges.core import MEASURED
from atesd.config import Config, config_from_mapping, parse_yaml, recipe_text
from atesd.errors import ConfigError

Settings = Mapping[str, Any] | str
"""The groups `exposure`, `credit`, `views` and `data`, or the name of a YAML file of them."""

_FOLLOWED: Mapping[str, set[str]] = {"setpoint": {"train_kl"}}
"""What a controller reads of every update, besides its rewards and the verdicts that its settings ask for."""
_GROUPS = ("exposure", "credit", "views", "data")
_VIEWS = ("answer", "wording", "partial_note", "answer_text")


def bridge_config(
    settings: Settings,
    facts: Mapping[str, Mapping[str, Any]],
    *,
    trainer: str,
    measurable: frozenset[str],
    updates_per_batch: int = 1,
    processes: int = 1,
) -> Config:
    """The config of a run of another trainer: the controller's own settings, and what the trainer says of itself.

    `facts` are groups of settings that are the trainer's; `measurable` is what its loop can measure; one generation
    batch serves `updates_per_batch` updates; each of `processes` has a copy of the exposure. Raises `ConfigError` for a
    setting that is misspelt, that nothing would read here, or that asks for what this trainer cannot do.
    """
    written = (parse_yaml(recipe_text(settings), settings) or {}) if isinstance(settings, str) else settings
    _refuse_foreign(written, trainer)
    if unknown := sorted(measurable - {"train_kl", "train_success", *MEASURED}):
        known = ", ".join(("train_success", *MEASURED))
        raise ConfigError(f"measured are {', '.join(unknown)}, which no exposure knows; allowed are {known}")
    data = {"source": "name-the-file-of-the-rows-in-data.source.jsonl", **written.get("data", {})}
    config = config_from_mapping({**facts, **written, "data": data}, f"{trainer} bridge")
    if config.exposure.reference_ablation != "off" or config.looks_ahead or config.granularity == "per_token":
        raise ConfigError(
            f"exposure: kind {config.exposure.kind} with reference_ablation {config.exposure.reference_ablation} needs "
            "our own loop (`atesd train`); here choose full, fixed, random, schedule, replay, learned, custom or a "
            "controller such as bandit, without an ablation"
        )
    rewarded = config.decides and config.exposure.learns_from_rewards
    needed = set(_FOLLOWED.get(config.exposure.kind, ())) | ({config.credit.progress_signal} if rewarded else set())
    needed |= {"train_success"} if config.exposure.follows_verdicts else set()
    needed |= {"grounding"} if config.decides and config.credit.grounding_weight else set()
    if missing := sorted(needed - measurable):
        raise ConfigError(
            f"credit.progress_signal: {config.credit.progress_signal}: {', '.join(missing)} is not measured in "
            f"{trainer}'s loop; measured are {', '.join(sorted(measurable))}. Set credit.progress_signal to one of "
            "them, or pass measure=, a function that measures it"
        )
    if processes > 1 and config.granularity != "update":
        raise ConfigError(
            f"exposure.granularity: {config.granularity}: {processes} processes share one ratio; set update"
        )
    held = config.exposure.holds or config.decides
    if updates_per_batch > 1 and held and config.credit.hold_updates % updates_per_batch:
        raise ConfigError(
            f"credit.hold_updates: {config.credit.hold_updates} is no multiple of {updates_per_batch}, the updates "
            f"that one generation batch of {trainer} serves: its teacher's contexts keep one ratio. Set a multiple"
        )
    return config


def require_probes(config: Config, every: int, metrics: Container[str], setting: str, first: str | None = None) -> None:
    """Raise `ConfigError` where the trainer, evaluating `every` so many updates, has no probe when one is wanted.

    `first` is the setting that would have it evaluate before update 0, if it does not.
    """
    signal = config.credit.progress_signal
    if not (config.decides and config.credit.probes and signal in metrics):
        return
    due = (update for update in range(config.train.num_updates) if config.credit.probe_is_due(update))
    missed = next((update for update in due if every <= 0 or update % every or (first and not update)), None)
    if missed == 0:
        raise ConfigError(f"{first or setting}: the exposure wants {signal} before update 0; let it be evaluated there")
    if missed is not None:
        raise ConfigError(
            f"{setting}: {every}: the exposure wants {signal} before update {missed}, where nothing is evaluated; set "
            f"credit.hold_updates and credit.lookahead_updates to multiples of {setting}"
        )


def require_whole_batches(config: Config, updates_per_batch: int, steps: int, what: str) -> None:
    """Raise `ConfigError` where a checkpoint after `steps` updates lies within a generation batch, and ratios change.

    The trainers begin a generation batch when they resume: from then on it would reach into the next hold. `what` names
    the setting or folder that has the number.
    """
    held = config.exposure.holds or config.decides
    if held and steps % updates_per_batch:
        raise ConfigError(
            f"{what}: {steps} is no multiple of {updates_per_batch}, the updates that one generation batch serves; a "
            "run resumed there would give updates of two holds one ratio. Save, and resume, at a multiple"
        )


def require_template(template: str, setting: str) -> str:
    """The wording of a teacher's message. `ConfigError` unless it has `{prompt}`, `{reference}` and no other field."""
    try:
        fields = {one[1:] for one in Formatter().parse(template) if one[1] is not None}
    except ValueError as error:
        raise ConfigError(f"{setting}: {template!r}: {error}; write a brace that is text twice, {{{{ or }}}}") from None
    if fields != {("prompt", "", None), ("reference", "", None)}:
        raise ConfigError(
            f"{setting}: {template!r} must hold {{prompt}} and {{reference}}, and no other field; write a brace that "
            "is text twice"
        )
    return template


def taken(measure: Mapping[Any, Callable[[], float]], wanted: Iterable[str]) -> dict[str, float]:
    """What the user's functions measure of what is wanted. Raises `ConfigError` for a result that is no number."""
    found: dict[str, Any] = {name: function() for name, function in measure.items() if name in set(wanted)}
    for name, value in found.items():
        if not isinstance(value, int | float):
            raise ConfigError(f"measure: {name} gave {value!r:.40}; expected a number (a tensor: its .item())")
    return {name: float(value) for name, value in found.items()}


def means_of(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What all processes measured, the same on each of them: their exposures must not drift apart."""
    return {name: fsum(one[name] for one in measured) / len(measured) for name in measured[0]}


def logged_as(metrics: Mapping[str, str], logged: Mapping[str, Any], due: Container[str]) -> dict[str, float]:
    """What a trainer logged, by measurement. Raises `ConfigError` where one that is `due` has another name there."""
    for name, key in metrics.items():
        if key not in logged and name in due:
            near = ", ".join(get_close_matches(key, map(str, logged), cutoff=0.0)) or "nothing"
            raise ConfigError(f"metrics: {name}: {key} was not logged when it was due; nearest was {near}. Correct it")
    return {name: float(logged[key]) for name, key in metrics.items() if key in logged}


def updates_per_batch(every: int, accumulated: int) -> int:
    """How many updates a generation batch of `every` micro-batches serves, with `accumulated` of them in an update.

    Raises `ConfigError` where an update would begin in the middle of one.
    """
    if every % accumulated and accumulated % every:
        raise ConfigError(
            f"a generation batch of {every} micro-batches (steps_per_generation, num_iterations) and "
            f"gradient_accumulation_steps {accumulated}: an update would have teacher's contexts of two ratios; make "
            "one a multiple of the other"
        )
    return max(every // accumulated, 1)


def _refuse_foreign(written: Mapping[str, Any], trainer: str) -> None:
    if not isinstance(written, Mapping):
        raise ConfigError(
            f"settings: {written!s:.60}: expected a mapping, such as {{'exposure': {{'kind': 'bandit'}}}}"
        )
    foreign = [name for name in written if name not in _GROUPS]
    views = written.get("views") or {}
    foreign += [f"views.{name}" for name in views if isinstance(views, Mapping) and name not in _VIEWS]
    if foreign:
        raise ConfigError(
            f"{', '.join(foreign)}: not read in a bridge; allowed are the groups {', '.join(_GROUPS)}, and of views "
            f"{', '.join(_VIEWS)}. All else is {trainer}'s: set it there"
        )
    if "exposure" not in written:
        raise ConfigError("exposure: missing; name one, such as {'exposure': {'kind': 'bandit'}}")
