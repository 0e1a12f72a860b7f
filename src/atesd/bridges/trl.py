"""A controller inside TRL's SDFTTrainer and SDPOTrainer (trl >= 1.16, < 1.17). Nothing of TRL is patched.

    trainer = SDFTTrainer(...)
    expose(trainer, {"exposure": {"kind": "learned"}, "credit": {"progress_signal": "train_success"}}, out="runs/trl")
    trainer.train()

In SDFT the exposure cuts `privileged_context`, in SDPO the successful rollout and the feedback that the teacher reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, cast, final

from accelerate.utils import gather_object
from transformers import TrainerCallback

from atesd.bridges.core import Feedback, Handle
from atesd.bridges.log import Log, checkpoint_of
from atesd.bridges.problems import Judge, columns, problem_in, require_problems
from atesd.bridges.settings import Settings, bridge_config, means_of, require_whole_batches, taken, updates_per_batch
from atesd.bridges.trl_sdpo import Rollouts
from atesd.config import Config
from atesd.control.interface import Measurement
from atesd.data.own_segmenter import segmenter_of
from atesd.errors import ConfigError, DataError
from atesd.records import Problem

Measure = Mapping[Measurement, Callable[[], float]]
_LOSSES = "self_distillation/distillation_loss"


def expose(trainer: Any, settings: Settings, out: Path | str, measure: Measure | None = None) -> Exposed:
    """Let an exposure decide what the trainer's teacher reads; to be called before `train()`.

    `out` is the run folder. `measure` has a function for each probe that TRL does not measure, called before the step
    of an update for which the exposure wants it; it must leave torch's generator as it was. Raises `ConfigError` for a
    trainer, a setting or a prompt limit that will not do, and `DataError` for a row.
    """
    names = [kind.__name__ for kind in type(trainer.teacher_context_builder).__mro__]
    contexts = next((kind for kind in (Demonstrations, Rollouts) if kind.of in names), None)
    if contexts is None:
        raise ConfigError(
            f"trainer: builds contexts by {names[0]}; expected the SDFTTrainer or SDPOTrainer of trl 1.16"
        )
    if trainer.args.max_prompt_length is not None:
        raise ConfigError(
            f"max_prompt_length: {trainer.args.max_prompt_length}: TRL keeps the last tokens of a prompt, so that the "
            "problem and the beginning of the reference would go first; set max_prompt_length=None"
        )
    exposed = Exposed(trainer, settings, Path(out), measure or {}, contexts)
    trainer.teacher_context_builder = exposed.contexts
    trainer.add_callback(exposed)
    return exposed


class Exposed(TrainerCallback):
    """Tells the exposure of every step, and saves it beside every checkpoint. To be closed if the training raised."""

    def __init__(self, trainer: Any, settings: Settings, out: Path, measure: Measure, contexts: type[Any]) -> None:
        self.trainer, self._settings, self._out, self._measure = trainer, settings, out, measure
        every = trainer.args.steps_per_generation * trainer.num_iterations
        self._batch_updates = updates_per_batch(int(every), int(trainer.args.gradient_accumulation_steps))
        self.config, self.handle = self._config(1), cast("Handle | None", None)
        self._shown: list[tuple[float, float]] = []  # ratio and effective ratio of each view since the last batch
        if trainer.args.save_strategy == "steps" and trainer.args.save_steps >= 1:
            require_whole_batches(self.config, self._batch_updates, int(trainer.args.save_steps), "save_steps")
        self.contexts = contexts(self)
        self._fingerprint = self.contexts.fingerprint()

    def visible(self, problem: Problem) -> str:
        """What the teacher sees of a reference; all of it in an evaluation, which so stays comparable."""
        if self.handle is None or not self.trainer.model.training:
            return problem.reference
        ratio, view = self.handle.look(self.trainer.state.global_step, problem)
        self._shown.append((ratio, view.effective_ratio))
        return view.text

    def require_room(self, built: Mapping[str, Any]) -> None:
        """Raise `DataError` for teacher's rows that are longer than the positions of the model."""
        tokens = int(built["teacher_attention_mask"].sum(dim=1).max())
        room = getattr(self.trainer.model.config, "max_position_embeddings", None) or tokens
        if tokens > room:
            raise DataError(
                f"a teacher's prompt and completion have {tokens} tokens, the model {room} positions "
                "(max_position_embeddings); leave out the longest references, or lower max_completion_length"
            )

    def graded(self, verdicts: list[tuple[str, int, float]]) -> None:
        """Note verdicts and views of a generation batch, of all processes, for every update that it serves."""
        if self.handle is not None and self.trainer.model.training:
            shown, self._shown = gather_object(self._shown), []
            self.handle.note(self.trainer.state.global_step, shown, self._batch_updates)
            self.handle.grade(self.trainer.state.global_step, gather_object(verdicts), self._batch_updates)

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.config = self._config(state.max_steps)
        require_whole_batches(self.config, self._batch_updates, state.global_step, "resume_from_checkpoint")
        self.handle = Handle(self.config)
        named, places = f"trl {metadata.version('trl')}", {"rank": args.process_index, "ranks": args.world_size}
        self._log = Log(self._out, self.handle, trainer=named, fingerprint=self._fingerprint, **places)
        self._log.start(args, state)

    def on_step_begin(self, args: Any, state: Any, *_: Any, **parts: Any) -> None:  # noqa: ARG002
        assert self.handle is not None
        measured = gather_object([taken(self._measure, self.handle.measurements(state.global_step))])
        self._measured = means_of(measured)
        self._rate = float(parts["optimizer"].param_groups[0]["lr"])
        self._before = len(self._losses())

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        assert self.handle is not None
        update, losses = state.global_step - 1, self._losses()[self._before :]
        loss = sum(losses) / len(losses) if losses else math.nan  # SDPO with distillation_weight 0 has none
        feedback = Feedback(loss, loss if _is_forward_kl(args) else None, self._rate, self._measured)
        self._log.write(self.handle.observe(update, feedback))

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._log.save(checkpoint_of(args, state), state.global_step)

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002
        self._log.end("finished" if state.global_step >= state.max_steps else "stopped")
        self.contexts.close()

    def close(self) -> None:
        """Release the run folder and end the answer checker."""
        self._log.close()
        self.contexts.close()

    def _losses(self) -> list[float]:
        """The divergences that the trainer has noted since it last logged: one a micro-batch, a mean over all ranks."""
        return list(self.trainer._metrics["train"][_LOSSES])

    def _config(self, num_updates: int) -> Config:
        args, model = self.trainer.args, self.trainer.model.config
        rollouts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        longest = max(getattr(model, "max_position_embeddings", 0), args.max_completion_length + 1)
        train = {"num_updates": num_updates, "batch_size": rollouts, "seed": args.seed, "evaluate_every": 0}
        facts = {
            "model": {"path": model._name_or_path or "unnamed", "max_context_tokens": longest},
            "sampling": {"temperature": float(args.temperature), "completion_tokens": args.max_completion_length},
            "train": {**train, "learning_rate": float(args.learning_rate)},
        }
        measurable = frozenset({"train_kl", "train_success", *self._measure})
        return bridge_config(
            self._settings,
            facts,
            trainer="trl",
            measurable=measurable,
            updates_per_batch=self._batch_updates,
            processes=args.world_size,
        )


@final
class Demonstrations:
    """SDFT's teacher contexts: TRL's own builder is given the visible part of every `privileged_context`.

    That is the reference as text, or {reference, answer, difficulty}. A completion counts as solved by its last box.
    """

    of: ClassVar[str] = "DemonstrationTeacherContextBuilder"

    def __init__(self, exposed: Exposed) -> None:
        self._exposed, self._plain = exposed, exposed.trainer.teacher_context_builder
        self._judge = Judge(exposed.config)
        self.close = self._judge.close

    def fingerprint(self) -> str:
        pairs = columns(self._exposed.trainer.train_dataset, "prompt", "privileged_context")
        return require_problems(pairs, self._exposed.config)

    def select_generation_prompts(self, prompts: list[Any], privileged_contexts: list[Any]) -> Any:
        """See TRL's builder: what a teacher that writes the rollouts itself reads."""
        problems = self._problems(prompts, privileged_contexts)
        return self._plain.select_generation_prompts(prompts, [self._exposed.visible(p) for p in problems])

    def build(
        self, prompts: list[Any], privileged_contexts: list[Any], completion_ids: Any, completion_mask: Any
    ) -> Any:
        """See TRL's builder: the teacher's ids and mask."""
        problems = self._problems(prompts, privileged_contexts)
        visible = [self._exposed.visible(problem) for problem in problems]
        if self._exposed.trainer.model.training:
            texts = self._exposed.trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
            self._exposed.graded(self._judge.verdicts(problems, texts))
        built = self._plain.build(prompts, visible, completion_ids, completion_mask)
        self._exposed.require_room(built)
        return built

    def _problems(self, prompts: list[Any], contexts: list[Any]) -> list[Problem]:
        segmenter = segmenter_of(self._exposed.config.data)
        return [problem_in(prompt, context, segmenter) for prompt, context in zip(prompts, contexts, strict=True)]


def _is_forward_kl(args: Any) -> bool:
    return (args.distillation_mode, args.distillation_alpha, args.distillation_is_clip) == ("full_logits", 0.0, None)
