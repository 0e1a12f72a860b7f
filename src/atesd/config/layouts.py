"""Where settings stood in the flat layout of earlier versions. Their run folders still open and resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from atesd.component import choice_in
from atesd.config.settings import Config

ALIGNMENT = ("success", "direction_rollouts", "min_correct", "logit_change", "metric")
_CONTROLLERS = {"bandit": "bandit", "setpoint": "setpoint", "per_problem": "search"}
_FALLBACK = {
    "full": (),
    "fixed": ("reveal_ratio",),
    "random": ("ratio_min", "ratio_max"),
    "schedule": ("schedule", "schedule_start", "schedule_end"),
}
_RECORDED = {"exposure", "credit", "policy", "bandit", "setpoint", "search", "loss", "teacher", "train"}
"""Groups that a config recorded in the old layout has, all written out."""
_INSIDE = {
    "policy": ("hidden", "learning_rate", "beta1", "decisions_per_policy_update", "entropy_ceiling", "entropy_cost"),
    "bandit": ("arms", "prior_deviation", "smoothness", "discount"),
    "setpoint": ("target_kl", "gain", "start"),
    "search": ("step_solved", "step_unsolved", "start"),
    "aligned": ("ratios", "smoothing", "fallback"),
}

MOVED: dict[str, str] = {
    "exposure.control": "exposure.reference_ablation",
    "loss.token_gate": "loss.gate",
    "loss.gate_share": "loss.gate.share",
    "loss.gate_side": "loss.gate.side",
    "loss.jsd_weight": "loss.divergence.teacher_weight",
    "loss.top_k": "loss.divergence.k",
    "teacher.ema_decay": "teacher.decay",
    "teacher.refresh_every": "teacher.every",
    **{f"aligned.{name}": f"alignment.{name}" for name in ALIGNMENT},
    **{
        f"{group}.{name}": f"exposure.policy.{name}" if group == "policy" else f"exposure.{name}"
        for group, names in _INSIDE.items()
        for name in names
    },
    "policy.ema_decay": "exposure.policy.ema_decay",
}
"""Old path -> new path of the settings that moved."""
GONE = {"model.lora.dropout": "it never acted, as no pass is in training mode"}
"""Settings that are no more, and why."""
KIND_OF_GROUP = {
    "policy": "learned",
    "bandit": "bandit",
    "setpoint": "setpoint",
    "search": "staircase",
    "aligned": "aligned",
}
"""The exposure whose settings a former group held."""


def is_recorded_flat(values: Mapping[str, Any]) -> bool:
    """Whether it is a whole config as earlier versions recorded it, every setting written out, acting or not."""
    return set(values) >= _RECORDED and all(isinstance(group, Mapping) for group in values.values())


def from_flat(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded flat config in the present layout, without what the kinds that it chose do not read."""
    values = {name: dict(group) for name, group in recorded.items() if name not in KIND_OF_GROUP}
    old = {name: dict(recorded.get(name, {})) for name in KIND_OF_GROUP}
    if isinstance(values.get("model", {}).get("lora"), Mapping):
        values["model"]["lora"] = {k: v for k, v in values["model"]["lora"].items() if k != "dropout"}
    values["exposure"] = _exposure(values["exposure"], old)
    values["alignment"] = {name: old["aligned"][name] for name in ALIGNMENT if name in old["aligned"]}
    for group in ("loss", "teacher"):
        values[group] = _moved(group, values[group])
    return {**values, **dict(_only_known(values))}


def _exposure(settings: dict[str, Any], old: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The exposure with what its kind reads of other groups."""
    kind = settings["kind"]
    found = {**settings, "reference_ablation": settings.get("control", "off"), "policy": old["policy"]}
    if kind in _CONTROLLERS or kind == "custom":
        found["reward_buffer"] = old["policy"].get("decisions_per_policy_update", 4)
        found |= old[_CONTROLLERS[kind]] if kind in _CONTROLLERS else {}
    if kind == "aligned":
        word = old["aligned"].get("fallback", "full")
        found |= {**old["aligned"], "fallback": {"kind": word, **{name: settings[name] for name in _FALLBACK[word]}}}
    return found


def _moved(group: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A group whose kinds have become groups of their own: `loss.gate_share` stands in `loss.gate`."""
    found: dict[str, Any] = {}
    words = {
        name: {"kind": settings[old]}
        for name, old in (("divergence", "divergence"), ("gate", "token_gate"))
        if old in settings
    }
    for name, value in settings.items():
        new = MOVED.get(f"{group}.{name}", f"{group}.{name}").split(".")[1:]
        if len(new) == 2:
            words[new[0]][new[1]] = value
        elif new[0] not in words:
            found[new[0]] = value
    return {**found, **words}


def _only_known(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The groups that vary with a kind, each without the settings that its kind does not have."""
    for name in ("exposure", "teacher"):
        yield name, _known(Config, name, values[name])
    loss = values["loss"]
    parts = {name: _known(type(Config().loss), name, loss[name]) for name in ("divergence", "gate") if name in loss}
    yield "loss", {**loss, **parts}


def _known(component: Any, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    choice, kinds = choice_in(component, name) or (None, {})
    if choice is None:
        return dict(settings)
    tagged = choice.with_tag(settings)
    kind = kinds.get(tagged[choice.tag])
    return {key: value for key, value in tagged.items() if kind is None or key in kind.model_fields}
