r"""A controller inside verl's on-policy distillation (verl >= 0.9.1, < 0.10; its V1 trainer, mode sync).

    VERL_USE_EXTERNAL_MODULES=atesd.bridges.verl python -m verl.trainer.main_ppo ... \
        trainer.v1.trainer_mode=atesd \
        actor_rollout_ref.rollout.agent.agent_loop_manager_class=atesd.bridges.verl.ExposedManager \
        +bridge.settings=exposure.yaml +bridge.out=runs/verl

Every row's `extra_info` holds `reference`, and may hold `answer` and `difficulty`. An actor beside the driver owns the
exposure; each agent-loop worker asks it what the teacher may see, and scores the response behind that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import ray
from torch import Tensor
from torch.nn import functional as F
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, register_trainer
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from atesd.bridges.owner import Owner
from atesd.bridges.problems import message_text
from atesd.bridges.settings import bridge_config, logged_as, require_probes, require_template
from atesd.config import Config, ViewsConfig, dump_config
from atesd.errors import ConfigError, DataError

ACTOR = "atesd_exposure"
_LOSS = "actor/distillation/loss"
_KEYS = ("settings", "out", "template", "metrics")
_VIEWS = ViewsConfig()
_TEMPLATE = f"{{prompt}}\n\n{_VIEWS.reference_begin}{{reference}}{_VIEWS.reference_end}\n\n{_VIEWS.transition}"


@register_trainer("atesd")
class ExposedTrainer(PPOTrainerSync):
    """verl's synchronous trainer, which tells the actor of every step."""

    _saved: str | None = None
    _probed: Mapping[str, Any] = {}  # what the last validation found
    _before: Mapping[str, Any] = {}  # what was found before the running step

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._own = own_settings(self.config)
        config = run_config(self.config, self._own, self.total_training_steps)
        actor, named = ray.remote(Owner).options(name=ACTOR), f"verl {metadata.version('verl')}"
        self._exposure = actor.remote(dump_config(config), self._own["out"], named, self.global_steps, self._folder())
        ray.get(self._exposure.__ray_ready__.remote())

    def fit(self, agent_loop_manager: Any) -> None:
        if not isinstance(agent_loop_manager, ExposedManager):
            found = type(agent_loop_manager).__name__
            raise ConfigError(f"agent_loop_manager_class: {found}; set it to atesd.bridges.verl.ExposedManager")
        super().fit(agent_loop_manager)
        ray.get(self._exposure.end.remote(self.global_steps > self.total_training_steps))

    def on_step_begin(self) -> None:
        super().on_step_begin()
        self._before, self._probed = self._probed, {}

    def _validate(self) -> Any:
        self._probed = super()._validate()
        return self._probed

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        self._saved = self._folder()

    def _compute_metrics(self, batch: Any, metrics: Any, timing_raw: Any, global_steps: int, epoch: int) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        found = {**self._before, **{name: value for name, value in metrics.items() if name not in self._probed}}
        due = ray.get(self._exposure.due.remote(global_steps - 1))
        values = logged_as(self._own["metrics"], found, due)
        loss, rate = float(metrics.get(_LOSS, "nan")), float(metrics.get("actor/lr", 0.0))
        saved, self._saved = self._saved, None
        ray.get(self._exposure.told.remote(global_steps - 1, loss, rate, values, saved))

    def _folder(self) -> str:
        return os.path.abspath(os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}"))


class ExposedWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__):
    """verl's agent-loop worker, whose teacher reads the row's view in front of the response."""

    async def _compute_teacher_logprobs(
        self,
        output: Any,
        prompt_ids: list[int],
        response_ids: list[int],
        validate: bool,
        sample_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not self.distillation_enabled or validate:
            await super()._compute_teacher_logprobs(output, prompt_ids, response_ids, validate, sample_kwargs)
            return
        actor = ray.get_actor(ACTOR)
        try:
            teacher_ids = await self._teacher_ids(actor, sample_kwargs or {})
            self._require_room(len(teacher_ids) + len(response_ids) + 1)
        except Exception as error:
            await actor.failed.remote(f"{type(error).__name__}: {error}")
            raise
        await super()._compute_teacher_logprobs(output, teacher_ids, response_ids, validate, sample_kwargs)
        length, fields = len(prompt_ids) + len(response_ids), output.extra_fields
        for name in ("teacher_ids", "teacher_logprobs"):
            fields[name] = in_students_frame(fields[name], length)

    async def _teacher_ids(self, actor: Any, row: Mapping[str, Any]) -> list[int]:
        prompt, extra = list(row["raw_prompt"]), row.get("extra_info") or {}
        context = {name: extra[name] for name in ("reference", "answer", "difficulty") if name in extra}
        visible = await actor.show.remote(int(row["global_steps"]) - 1, message_text(prompt), context)
        chat = teacher_messages(prompt, visible, own_settings(self.config)["template"])
        options = {**self.config.data.get("apply_chat_template_kwargs", {}), "return_dict": True}
        return list(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, **options)["input_ids"])

    def _require_room(self, tokens: int) -> None:
        """Raise `DataError` where a teacher's server would have no room for view, response and one token."""
        for name, teacher in self.teacher_server_manager.teacher_model_configs.items():
            room = (
                teacher.inference.max_model_len or teacher.inference.prompt_length + teacher.inference.response_length
            )
            if tokens > room:
                raise DataError(
                    f"distillation.teacher_models.{name}.inference: room for {room} tokens, but view and response need "
                    f"{tokens}; raise max_model_len"
                )


class ExposedManager(AgentLoopManagerTQ):
    """verl's manager of agent loops with our workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(ExposedWorker)


def own_settings(config: Any) -> dict[str, Any]:
    """The group `bridge` of verl's config. Raises `ConfigError` for what is missing, not known there or no template."""
    mine = {"template": _TEMPLATE, "metrics": {}, **dict(config.get("bridge") or {})}
    missing, unknown = [name for name in _KEYS if name not in mine], sorted(set(mine) - {*_KEYS})
    if missing or unknown:
        raise ConfigError(f"bridge: missing {missing}, unknown {unknown}; allowed are {', '.join(_KEYS)}")
    return {**mine, "metrics": dict(mine["metrics"]), "template": require_template(mine["template"], "bridge.template")}


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


def in_students_frame(scored: Tensor, length: int) -> Tensor:
    """[teacher's tokens, k] as [length, k]: the response stays at the end; what is in front of it enters no loss."""
    return scored[-length:] if len(scored) >= length else F.pad(scored, (0, 0, length - len(scored), 0))


print(f"atesd {metadata.version('atesd')}: registered verl trainer 'atesd'", file=sys.stderr)
