"""The teacher's contexts in TRL's SDPOTrainer (trl >= 1.16, < 1.17); `atesd.bridges.trl.expose` puts them in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final

from atesd.bridges.problems import columns, fingerprint_of, message_text, problem_of
from atesd.data.own_segmenter import segmenter_of
from atesd.errors import DataError

if TYPE_CHECKING:
    from atesd.bridges.trl import Exposed

_MARK = "\0"


@final
class Rollouts:
    """SDPO's teacher contexts: TRL's own builder, whose solution and feedback are cut before they are put together.

    A rollout counts as solved from `success_reward_threshold` on.
    """

    of: ClassVar[str] = "SuccessfulRolloutTeacherContextBuilder"

    def __init__(self, exposed: Exposed) -> None:
        self._exposed, self._plain = exposed, exposed.trainer.teacher_context_builder
        self._compose, self._plain._build_reprompt_text = self._plain._build_reprompt_text, self._cut

    @property
    def last_metrics(self) -> Any:
        """See TRL's builder."""
        return self._plain.last_metrics

    def fingerprint(self) -> str:
        told, rows = self._exposed.trainer.args.include_environment_feedback, self._exposed.trainer.train_dataset
        needed = ("prompt", "privileged_context") if told else ("prompt",)
        return fingerprint_of(columns(rows, *needed, optional="" if told else "privileged_context"))

    def build(self, output: Any, prompts: list[Any], rewards: Any, feedbacks: list[Any] | None = None) -> Any:
        """See TRL's builder: the teacher's ids and mask. Raises `DataError` where its limit would cut a prompt."""
        args = self._exposed.trainer.args
        ids = [problem_of(message_text(prompt), "").id for prompt in prompts]
        right = [float(reward >= args.success_reward_threshold) for reward in rewards.tolist()]
        built = self._plain.build(output, prompts, rewards, feedbacks=feedbacks)
        self._exposed.graded([(name, 0, one) for name, one in zip(ids, right, strict=True)])
        if built["teacher_input_ids"].shape[1] - output["completion_ids"].shape[1] >= args.max_reprompt_len:
            raise DataError(
                f"max_reprompt_len: {args.max_reprompt_len}: a teacher's prompt has as many tokens or more, of which "
                "TRL keeps the last: the problem would be cut. Raise it"
            )
        self._exposed.require_room(built)
        return built

    def close(self) -> None: ...

    def _cut(self, prompt_text: str, solution_text: str, feedback_text: str) -> Any:
        args, show = self._exposed.trainer.args, partial(self._visible, prompt_text)
        solution = _within(args.solution_template, "successful_previous_attempt", solution_text, show)
        return self._compose(
            prompt_text, solution, _within(args.feedback_template, "feedback_raw", feedback_text, show)
        )

    def _visible(self, prompt_text: str, text: str) -> str:
        return self._exposed.visible(problem_of(prompt_text, text, segmenter=segmenter_of(self._exposed.config.data)))


def _within(template: str, name: str, text: str, change: Callable[[str], str]) -> str:
    """A filled template with what fills it changed; an empty text was never filled."""
    before, _, after = template.format(**{name: _MARK}).partition(_MARK)
    return text and before + change(text[len(before) : len(text) - len(after)]) + after
