"""What of the verl bridge needs neither verl nor ray: its settings, and what the actor beside the driver runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, final

from atesd.bridges.core import Feedback, Handle
from atesd.bridges.log import Log
from atesd.bridges.problems import message_text, problem_in, require_problems
from atesd.bridges.settings import bridge_config, require_probes
from atesd.config import Config, ViewsConfig
from atesd.errors import ConfigError, TrainingError

_KEYS = ("settings", "out", "template", "metrics")
_VIEWS = ViewsConfig()
_TEMPLATE = f"{{prompt}}\n\n{_VIEWS.reference_begin}{{reference}}{_VIEWS.reference_end}\n\n{_VIEWS.transition}"


@final
class Driver:
    """The exposure and its run folder, for one call at a time: everything that workers and trainer ask."""

    def __init__(self, config: Config, out: str, updates_done: int, folder: str) -> None:
        self._handle, self._failures = Handle(config), list[str]()
        fingerprint = "of verl's data files, which the bridge does not read"
        self._log = Log(out, self._handle, trainer=f"verl {metadata.version('verl')}", fingerprint=fingerprint)
        if updates_done:
            self._log.resume(Path(folder), updates_done, may_lose=1)
        else:
            self._log.begin()

    def show(self, update: int, prompt: str, context: Mapping[str, Any]) -> str:
        """What the teacher sees of a row's reference at an update."""
        config = self._handle.config
        require_problems([(prompt, dict(context))], config, f"'{prompt:.40}', row")
        return self._handle.show(update, problem_in(prompt, dict(context), config.data.segmenter)).text

    def failed(self, message: str) -> None:
        """Remember an error of a worker, which verl only writes to its log."""
        self._failures.append(message)

    def told(self, update: int, loss: float, rate: float, values: Mapping[str, float], saved: str | None) -> None:
        """Take in a step and what was validated before it; save the state where verl has just saved.

        Raises `TrainingError` if a worker could not show the teacher its view.
        """
        if self._failures:
            count = len(self._failures)
            raise TrainingError(f"update {update}: {count} rollouts had no teacher; the first: {self._failures[0]}")
        measured = {name: value for name, value in values.items() if name != "train_success"}
        if "train_success" in values:
            self._handle.grade(update, [("", 0, values["train_success"])])
        self._log.write(self._handle.observe(update, Feedback(loss, None, rate, measured)))
        if saved is not None:
            self._log.save(Path(saved), update + 1)

    def end(self, finished: bool) -> None:
        """Close the run."""
        self._log.end("finished" if finished else "stopped")


def own_settings(config: Any) -> dict[str, Any]:
    """The group `bridge` of verl's config. Raises `ConfigError` for what is missing or not known there."""
    mine = {"template": _TEMPLATE, "metrics": {}, **dict(config.get("bridge") or {})}
    missing, unknown = [name for name in _KEYS if name not in mine], sorted(set(mine) - {*_KEYS})
    if missing or unknown:
        raise ConfigError(f"bridge: missing {missing}, unknown {unknown}; allowed are {', '.join(_KEYS)}")
    return {**mine, "metrics": dict(mine["metrics"])}


def run_config(config: Any, mine: Mapping[str, Any], num_updates: int) -> Config:
    """What the controller is told, and what verl says of its run."""
    rollout, metrics = config.actor_rollout_ref.rollout, mine["metrics"]
    train = {"num_updates": num_updates, "batch_size": config.data.train_batch_size * rollout.n, "evaluate_every": 0}
    known = () if config.distillation.distillation_loss.use_policy_gradient else ("train_kl",)
    facts = {
        "model": {
            "path": config.actor_rollout_ref.model.path,
            "max_context_tokens": rollout.prompt_length + rollout.response_length,
        },
        "sampling": {"temperature": float(rollout.temperature), "completion_tokens": rollout.response_length},
        "train": {**train, "learning_rate": float(config.actor_rollout_ref.actor.optim.lr)},
    }
    made = bridge_config(mine["settings"], facts, trainer="verl", measurable=frozenset({*known, *metrics}))
    first = None if config.trainer.get("val_before_train", True) else "trainer.val_before_train"
    require_probes(made, config.trainer.test_freq, metrics, "trainer.test_freq", first)
    return made


def teacher_messages(prompt: Sequence[Mapping[str, Any]], visible: str, template: str) -> list[dict[str, Any]]:
    """The student's chat, its last message worded with the visible reference."""
    last = template.format(prompt=message_text(list(prompt)), reference=visible)
    return [*map(dict, prompt[:-1]), {"role": "user", "content": last}]
