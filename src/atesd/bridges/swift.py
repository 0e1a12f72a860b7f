"""A controller inside ms-swift's on-policy distillation with a teacher's prompt (ms-swift >= 4.6, < 4.7).

    # plugin.py: swift rlhf --rlhf_type gkd --external_plugins plugin.py --callbacks atesd --logging_steps 1 ...
    from atesd.bridges.swift import expose

    expose({"exposure": {"kind": "bandit"}, "credit": {"progress_signal": "train_kl"}}, out="runs/swift")

The column `teacher_prompt` holds the reference alone, as text or {reference, answer, difficulty}. A sample's teacher
view is made in one place of ms-swift; there the reference gives way to a prompt with its visible part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, cast

from accelerate.utils import gather_object
from swift.callbacks import callbacks_map
from swift.rl_core.data import OnPolicySample
from transformers import TrainerCallback

from atesd.bridges.core import Feedback, Handle
from atesd.bridges.log import Log, checkpoint_of
from atesd.bridges.problems import message_text, problem_in, require_problems
from atesd.bridges.settings import (
    Settings,
    bridge_config,
    means_of,
    require_template,
    require_whole_batches,
    taken,
    updates_per_batch,
)
from atesd.config import Config
from atesd.control.interface import Measurement
from atesd.data.own_segmenter import segmenter_of
from atesd.errors import ConfigError

TEMPLATE = "{prompt}\n\n{reference}"
_plain: Callable[[Any], bool] = OnPolicySample.build_teacher_view


def expose(
    settings: Settings,
    out: Path | str,
    template: str = TEMPLATE,
    measure: Mapping[Measurement, Callable[[], float]] | None = None,
) -> None:
    """Make the callback `atesd` known to ms-swift, and let its samples ask for their teacher's view.

    `out` is the run folder, `template` words the teacher's last message. `measure` has a function for each probe that
    the exposure wants before some updates. A mistake in `settings` is said when the trainer is made, one in `template`
    at once: `ConfigError`.
    """
    require_template(template, "template")
    callbacks_map["atesd"] = partial(Exposed, settings, Path(out), template, measure or {})
    OnPolicySample.build_teacher_view = _build_teacher_view


class Exposed(TrainerCallback):
    """Tells the exposure what is logged of every step, and saves it beside every checkpoint."""

    active: ClassVar[Exposed | None] = None

    def __init__(
        self, settings: Settings, out: Path, template: str, measure: Mapping[Any, Any], args: Any, trainer: Any
    ) -> None:
        if args.logging_steps != 1:
            raise ConfigError(f"logging_steps: {args.logging_steps}: the loss is known only where it is logged; set 1")
        self._settings, self._out, self._template, self._measure = settings, out, template, measure
        self._trainer, self.handle = trainer, cast("Handle | None", None)
        self._shown: list[tuple[float, float]] = []  # ratio and effective ratio of each view since the last step
        every = getattr(args, "steps_per_generation", None) or 1
        self._batch_updates = updates_per_batch(int(every), int(args.gradient_accumulation_steps))
        self.config = self._config(args, 1)
        if args.save_strategy == "steps" and args.save_steps >= 1:
            require_whole_batches(self.config, self._batch_updates, int(args.save_steps), "save_steps")
        Exposed.active = self

    def view(self, sample: Any) -> str:
        """The teacher's last message of a sample; with the whole reference in an evaluation."""
        prompt = next(message["content"] for message in reversed(sample.messages) if message["role"] == "user")
        pair = (message_text(prompt), sample.teacher_prompt)
        require_problems([pair], self.config, f"'{pair[0]:.40}', row")
        problem, reference = problem_in(*pair, segmenter_of(self.config.data)), None
        if self.handle is not None and self._trainer.model.training:
            ratio, view = self.handle.look(self._trainer.state.global_step, problem)
            self._shown.append((ratio, view.effective_ratio))
            reference = view.text
        return self._template.format(prompt=pair[0], reference=problem.reference if reference is None else reference)

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.config = self._config(args, state.max_steps)
        require_whole_batches(self.config, self._batch_updates, state.global_step, "resume_from_checkpoint")
        self.handle = Handle(self.config)
        named, places = (
            f"ms-swift {metadata.version('ms-swift')}",
            {"rank": args.process_index, "ranks": args.world_size},
        )
        fingerprint = "of ms-swift's data set, which the bridge reads as it comes"
        self._log = Log(self._out, self.handle, trainer=named, fingerprint=fingerprint, **places)
        self._log.start(args, state)

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002
        assert self.handle is not None
        measured = gather_object([taken(self._measure, self.handle.measurements(state.global_step))])
        self._measured = means_of(measured)

    def on_log(self, args: Any, state: Any, *_: Any, **parts: Any) -> None:  # noqa: ARG002
        logs = parts["logs"]
        if self.handle is not None and "loss" in logs:
            shown, self._shown = gather_object(self._shown), []
            self.handle.note(state.global_step - 1, shown, self._batch_updates)
            feedback = Feedback(float(logs["loss"]), None, float(logs["learning_rate"]), self._measured)
            self._log.write(self.handle.observe(state.global_step - 1, feedback))

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._log.save(checkpoint_of(args, state), state.global_step)

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002
        self._log.end("finished" if state.global_step >= state.max_steps else "stopped")

    def close(self) -> None:
        """Release the run folder, as after a training that raised."""
        self._log.close()

    def _config(self, args: Any, num_updates: int) -> Config:
        rollouts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        train = {"num_updates": num_updates, "batch_size": rollouts, "seed": args.seed, "evaluate_every": 0}
        facts = {
            "model": {"path": getattr(args, "model", None) or "unnamed"},
            "train": {**train, "learning_rate": float(args.learning_rate)},
        }
        return bridge_config(
            self._settings,
            facts,
            trainer="ms-swift",
            measurable=frozenset({"train_kl", *self._measure}),
            updates_per_batch=self._batch_updates,
            processes=args.world_size,
        )


def _build_teacher_view(sample: Any) -> bool:
    if sample.teacher_messages is None and sample.teacher_prompt:
        if Exposed.active is None:
            raise ConfigError("ms-swift bridge: no callback; add --callbacks atesd, or nothing would be learned")
        sample.teacher_prompt = Exposed.active.view(sample)
    return _plain(sample)
