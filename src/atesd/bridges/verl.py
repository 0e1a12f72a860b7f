"""A controller inside verl's on-policy distillation (verl >= 0.9.1, < 0.10; its V1 trainer, mode sync).

    VERL_USE_EXTERNAL_MODULES=atesd.bridges.verl python -m verl.trainer.main_ppo ... \\
        trainer.v1.trainer_mode=atesd \\
        actor_rollout_ref.rollout.agent.agent_loop_manager_class=atesd.bridges.verl.ExposedManager \\
        +atesd.settings=exposure.yaml +atesd.out=runs/verl

Every row's `extra_info` holds `reference`, and may hold `answer` and `difficulty`. An actor beside the driver owns the
exposure; each agent-loop worker asks it what the teacher may see, and scores the response behind that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, final

import ray
from torch import Tensor
from torch.nn import functional as F
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, register_trainer
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from atesd.bridges.core import Feedback, Handle
from atesd.bridges.log import Log
from atesd.bridges.problems import message_text, problem_in
from atesd.bridges.settings import bridge_config, require_probes
from atesd.config import Config, ViewsConfig
from atesd.errors import ConfigError, DataError, TrainingError

ACTOR = "atesd_exposure"
_KEYS = ("settings", "out", "template", "metrics")
_VIEWS = ViewsConfig()
_TEMPLATE = f"{{prompt}}\n\n{_VIEWS.reference_begin}{{reference}}{_VIEWS.reference_end}\n\n{_VIEWS.transition}"
_LOSS = "actor/distillation/loss"


@final
class Driver:
    """What the actor runs: the exposure and its run folder."""

    def __init__(self, config: Config, out: str, metrics: Mapping[str, str], updates_done: int, folder: str) -> None:
        self._handle, self._metrics, self._failures = Handle(config), metrics, list[str]()
        version = f"verl {metadata.version('verl')}"
        self._log = Log(
            out, self._handle, trainer=version, fingerprint="of verl's data files, which the bridge does not read"
        )
        if updates_done:
            self._log.resume(Path(folder), updates_done, may_lose=1)
        else:
            self._log.begin()

    def show(self, update: int, prompt: str, context: Mapping[str, Any]) -> str:
        """What the teacher sees of a row's reference at an update."""
        config = self._handle.config
        problem = problem_in(prompt, dict(context), config.data.segmenter, f"the row of '{prompt:.60}'")
        if not problem.answer and config.views.answer != "withhold":
            raise DataError(f"'{prompt:.60}': no answer in extra_info; add it, or set views.answer: withhold")
        return self._handle.show(update, problem).text

    def failed(self, message: str) -> None:
        """Remember an error of a worker, which verl would only write to its log."""
        self._failures.append(message)

    def told(self, update: int, metrics: Mapping[str, float], probes: Mapping[str, float], saved: str | None) -> None:
        """Take in the metrics of a step and what was validated before it; save where verl has just saved.

        Raises `TrainingError` if a worker could not show the teacher its view.
        """
        if self._failures:
            raise TrainingError(
                f"update {update}: {len(self._failures)} rows had no teacher; the first: {self._failures[0]}"
            )
        found = {**metrics, **probes}
        values = {name: float(found[key]) for name, key in self._metrics.items() if key in found}
        if (success := values.pop("train_success", None)) is not None:
            self._handle.grade(update, [("", 0, success)])
        feedback = Feedback(metrics.get(_LOSS, float("nan")), None, metrics.get("actor/lr", 0.0), values)
        self._log.write(self._handle.observe(update, feedback))
        if saved is not None:
            self._log.save(Path(saved), update + 1)

    def end(self, finished: bool) -> None:
        """Close the run."""
        self._log.end("finished" if finished else "stopped")


@register_trainer("atesd")
class ExposedTrainer(PPOTrainerSync):
    """verl's synchronous trainer, which tells the actor of every step."""

    _saved: str | None = None
    _found: Mapping[str, float] = {}
    _probes: Mapping[str, float] = {}

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        mine = own_settings(self.config)
        config = run_config(self.config, mine, self.total_training_steps)
        actor = ray.remote(Driver).options(name=ACTOR, max_concurrency=8)
        arguments = (config, mine["out"], mine["metrics"], self.global_steps, self._folder())
        self._exposure = actor.remote(*arguments)
        ray.get(self._exposure.__ray_ready__.remote())

    def fit(self, agent_loop_manager: Any) -> None:
        if not isinstance(agent_loop_manager, ExposedManager):
            raise ConfigError(
                f"agent_loop_manager_class: {type(agent_loop_manager).__name__}; set it to atesd.bridges.verl.ExposedManager"
            )
        super().fit(agent_loop_manager)
        ray.get(self._exposure.end.remote(self.global_steps > self.total_training_steps))

    def on_step_begin(self) -> None:
        super().on_step_begin()
        self._probes, self._found = self._found, {}

    def _validate(self) -> Any:
        metrics = super()._validate()
        self._found = _numbers(metrics)
        return metrics

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        self._saved = self._folder()

    def _compute_metrics(self, batch: Any, metrics: Any, timing_raw: Any, global_steps: int, epoch: int) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        saved, self._saved = self._saved, None
        ray.get(self._exposure.told.remote(global_steps - 1, _numbers(metrics), self._probes, saved))

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
        for name in ("teacher_ids", "teacher_logprobs"):
            output.extra_fields[name] = in_students_frame(
                output.extra_fields[name], len(prompt_ids) + len(response_ids)
            )

    async def _teacher_ids(self, actor: Any, row: Mapping[str, Any]) -> list[int]:
        update, mine, prompt = int(row["global_steps"]) - 1, own_settings(self.config), list(row["raw_prompt"])
        extra = row.get("extra_info") or {}
        context = {name: extra[name] for name in ("reference", "answer", "difficulty") if name in extra}
        visible = await actor.show.remote(update, message_text(prompt), context)
        options = self.config.data.get("apply_chat_template_kwargs", {})
        chat = teacher_messages(prompt, visible, mine["template"])
        read = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, **options
        )
        return list(read["input_ids"])

    def _require_room(self, tokens: int) -> None:
        """Raise `DataError` where a teacher's server would have no room for view, response and one token."""
        for name, teacher in self.teacher_server_manager.teacher_model_configs.items():
            inference = teacher.inference
            room = inference.max_model_len or inference.prompt_length + inference.response_length
            if tokens > room:
                raise DataError(
                    f"distillation.teacher_models.{name}.inference: room for {room} tokens, but view and response need "
                    f"{tokens}; raise max_model_len"
                )


class ExposedManager(AgentLoopManagerTQ):
    """verl's manager of agent loops with our workers."""

    async def _init_agent_loop_workers(self) -> None:
        self.agent_loop_workers_class = ray.remote(ExposedWorker)
        await super()._init_agent_loop_workers()


def own_settings(config: Any) -> dict[str, Any]:
    """The group `atesd` of verl's config. Raises `ConfigError` for what is missing or not known there."""
    mine = {"template": _TEMPLATE, "metrics": {}, **dict(config.get("atesd") or {})}
    missing, unknown = [name for name in _KEYS if name not in mine], sorted(set(mine) - {*_KEYS})
    if missing or unknown:
        raise ConfigError(f"atesd: missing {missing}, unknown {unknown}; allowed are {', '.join(_KEYS)}")
    return {**mine, "metrics": dict(mine["metrics"])}


def run_config(config: Any, mine: Mapping[str, Any], num_updates: int) -> Config:
    """What the controller is told, and what verl says of its run."""
    rollout, actor, loss = (
        config.actor_rollout_ref.rollout,
        config.actor_rollout_ref.actor,
        config.distillation.distillation_loss,
    )
    length = rollout.prompt_length + rollout.response_length
    train = {"num_updates": num_updates, "batch_size": config.data.train_batch_size * rollout.n, "evaluate_every": 0}
    made = bridge_config(
        mine["settings"],
        {
            "model": {"path": config.actor_rollout_ref.model.path, "max_context_tokens": length},
            "sampling": {"temperature": float(rollout.temperature), "completion_tokens": rollout.response_length},
            "train": {**train, "learning_rate": float(actor.optim.lr)},
        },
        trainer="verl",
        measurable=frozenset({*mine["metrics"], *(() if loss.use_policy_gradient else ("train_kl",))}),
    )
    require_probes(made, config.trainer.test_freq, mine["metrics"], "trainer.test_freq")
    if (
        not config.trainer.get("val_before_train", True)
        and made.decides
        and made.credit.progress_signal in mine["metrics"]
    ):
        raise ConfigError(
            "trainer.val_before_train: false: the exposure wants its probe before update 0; set it to true"
        )
    return made


def teacher_messages(prompt: Sequence[Mapping[str, Any]], visible: str, template: str) -> list[dict[str, Any]]:
    """The student's chat, its last message worded with the visible reference."""
    last = template.format(prompt=message_text(list(prompt)), reference=visible)
    return [*map(dict, prompt[:-1]), {"role": "user", "content": last}]


def in_students_frame(scored: Tensor, length: int) -> Tensor:
    """[teacher's prompt and response, k] as [`length`, k]: the response stays at the end, what is in front is masked."""
    return scored[-length:] if len(scored) >= length else F.pad(scored, (0, 0, length - len(scored), 0))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) or hasattr(value, "item")
    }


print(f"atesd {metadata.version('atesd')}: registered verl trainer 'atesd'", file=sys.stderr)
