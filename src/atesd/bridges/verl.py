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
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import ray
from torch import Tensor
from torch.nn import functional as F
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, register_trainer
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from atesd.bridges.problems import message_text
from atesd.bridges.verl_driver import Driver, own_settings, run_config, teacher_messages
from atesd.errors import ConfigError, DataError

ACTOR = "atesd_exposure"
_LOSS = "actor/distillation/loss"


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
        actor = ray.remote(Driver).options(name=ACTOR)
        self._exposure = actor.remote(config, self._own["out"], self.global_steps, self._folder())
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
        values = {name: float(found[key]) for name, key in self._own["metrics"].items() if key in found}
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


def in_students_frame(scored: Tensor, length: int) -> Tensor:
    """[teacher's tokens, k] as [length, k]: the response stays at the end; what is in front of it enters no loss."""
    return scored[-length:] if len(scored) >= length else F.pad(scored, (0, 0, length - len(scored), 0))


print(f"atesd {metadata.version('atesd')}: registered verl trainer 'atesd'", file=sys.stderr)
