"""A controller inside prime-rl's on-policy self-distillation (`algo.type = "opsd"`; no release, see docs/bridges.md).

    # my_exposure.py, which the orchestrator's process has to import before it makes its environments
    from atesd.bridges.prime_rl import expose

    settings = {"exposure": {"kind": "bandit"}, "credit": {"progress_signal": "train_success"}}
    expose(settings, out="runs/prime", updates=200)

A demonstration is what prime-rl finds under `demo_key`: text, or {reference, answer, difficulty}. An update is a step
of the orchestrator. A rollout is scored when it arrives, at the ratio of the step that is then being collected, and
ships in that step or in a later one; what the exposure is told of a step is of the rollouts that shipped in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, final

from prime_rl import monitors
from prime_rl.orchestrator import ckpt
from prime_rl.orchestrator.algo import ALGORITHM_CLASSES, OPSDAlgorithm
from prime_rl.orchestrator.ckpt import CheckpointManager

from atesd.bridges.core import Feedback, Handle
from atesd.bridges.log import Log
from atesd.bridges.problems import problem_in, require_problems
from atesd.bridges.settings import Settings, bridge_config
from atesd.config import ModelConfig
from atesd.data.own_segmenter import segmenter_of
from atesd.errors import ConfigError, TrainingError

_NOTE = "atesd"  # the key in a trace's info that says what its teacher read
_MEASURABLE = frozenset({"train_kl", "train_success"})


def expose(settings: Settings, out: Path | str, updates: int, solved_from: float = 1.0) -> Exposed:
    """Make prime-rl's `opsd` show its teacher what an exposure chooses; to be called in the orchestrator's process.

    `out` is the run folder, `updates` the orchestrator's `max_steps`; a rollout counts as solved from the reward
    `solved_from` on. Raises `ConfigError` for a setting that will not do, or a second exposure in one process.
    """
    if Exposed.active is not None:
        raise ConfigError("prime-rl bridge: expose() was called before in this process; call it once")
    train = {"num_updates": updates, "evaluate_every": 0}
    facts: dict[str, dict[str, Any]] = {"model": {"path": "unnamed"}, "train": train}
    config = bridge_config(settings, facts, trainer="prime-rl", measurable=_MEASURABLE)
    Exposed.active = Exposed(Handle(config), Path(out), solved_from)
    ALGORITHM_CLASSES["opsd"] = ExposedOPSD
    ckpt.CheckpointManager = ExposedCheckpoints
    return Exposed.active


@final
class Exposed:
    """The exposure of an orchestrator with its run folder. It hears of a step as a monitor of prime-rl's does.

    prime-rl only logs what a monitor raises, so that an error is kept and stops the run at the next rollout.
    """

    active: ClassVar[Exposed | None] = None

    def __init__(self, handle: Handle, out: Path, solved_from: float) -> None:
        self.handle, self._solved_from, self._update = handle, solved_from, 0
        self._log = Log(out, handle, trainer="prime-rl", fingerprint="of prime-rl's tasks, which come one by one")
        self._begun, self._failure = False, ""

    def listen(self, model: str) -> None:
        """Hear of every step; prime-rl has set up its monitors before it sets up its algorithms, one an environment."""
        if self not in monitors.MONITORS:
            monitors.MONITORS.append(self)
            self.handle.config = self.handle.config.model_copy(update={"model": ModelConfig(path=model)})

    def visible(self, trace: Any, demonstration: Any) -> str:
        """What the teacher sees of a rollout's demonstration, which is noted in the rollout's `info`.

        Raises `DataError` for one that cannot be used, `TrainingError` past the last update or after a failure.
        """
        self._raise_failure()
        config, last = self.handle.config, self.handle.config.train.num_updates
        if self._update >= last:
            raise TrainingError(f"updates: {last}: step {self._update + 1} begins; give expose() prime-rl's max_steps")
        if not self._begun:
            self._log.begin()
            self._begun = True
        pair = (question_of(trace), demonstration)
        require_problems([pair], config, f"'{pair[0]:.40}', row")
        problem = problem_in(*pair, segmenter_of(config.data))
        ratio, view = self.handle.look(self._update, problem)
        shown = {"reveal_ratio": ratio, "effective_ratio": view.effective_ratio}
        trace.info[_NOTE] = {"update": self._update, "problem": problem.id, "difficulty": problem.difficulty, **shown}
        return view.text

    async def log(self, data: Any, step: int, kind: str = "train", subset: str = "effective") -> None:
        """See prime-rl's `Monitor`: the rollouts that ship in a step are the update `step` - 1."""
        if isinstance(data, dict) or (kind, subset) != ("train", "effective"):
            return
        try:
            self._shipped([trace for episode in data for trace in episode.traces if _NOTE in trace.info], step - 1)
        except Exception as error:
            self._failure = f"step {step}: {type(error).__name__}: {error}"
            raise

    async def finalize(self) -> None:
        """See prime-rl's `Monitor`: called when the loop has ended by itself."""
        if self._begun:
            self._log.end("finished" if self._update >= self.handle.config.train.num_updates else "stopped")

    def save(self, folder: Path, step: int) -> None:
        """Write the controller's state beside prime-rl's own of a step."""
        self._raise_failure()
        if self._begun:
            self._log.save(folder, step)

    def resume(self, folder: Path, step: int) -> None:
        """Go on after a step."""
        self._log.resume(folder, step)
        self._begun, self._update = True, step

    def close(self) -> None:
        """Release the run folder, as after a run that raised; `expose` may then be called again."""
        self._log.close()
        if self in monitors.MONITORS:
            monitors.MONITORS.remove(self)
        Exposed.active = None

    def _shipped(self, traces: Sequence[Any], update: int) -> None:
        self._update = update + 1
        notes = [trace.info[_NOTE] for trace in traces]
        if not notes:
            return  # a step of other environments alone: it counts as lost once another is told
        self.handle.note(update, [(note["reveal_ratio"], note["effective_ratio"]) for note in notes])
        right = [float(trace.reward >= self._solved_from) for trace in traces]
        self.handle.grade(
            update, [(note["problem"], note["difficulty"], one) for note, one in zip(notes, right, strict=True)]
        )
        gaps = [gap for trace in traces for gap in sampled_gaps(trace)]
        self._log.write(self.handle.observe(update, Feedback(fmean(gaps) if gaps else math.nan)))

    def _raise_failure(self) -> None:
        if self._failure:
            raise TrainingError(f"{self._failure}; prime-rl logged it as a warning, and the exposure learns no more")


class ExposedOPSD(OPSDAlgorithm):
    """prime-rl's self-distillation, whose demonstrations are shown in part."""

    async def setup(self) -> None:
        await super().setup()
        _active().listen(self.policy_pool.model_name)

    def _demonstration(self, episode: Any, trace: Any) -> str:
        return _active().visible(trace, super()._demonstration(episode, trace))


class ExposedCheckpoints(CheckpointManager):
    """prime-rl's checkpoints of the orchestrator, with the controller's state beside each."""

    def save(self, progress: Any, train_source: Any, step: int) -> None:
        super().save(progress, train_source, step)
        _active().save(self.get_ckpt_path(step), step)

    def load(self, progress: Any, train_source: Any, step: int, path: Path | None = None) -> None:
        super().load(progress, train_source, step, path)
        _active().resume(self.get_ckpt_path(step) if path is None else path, step)


def question_of(trace: Any) -> str:
    """What the user says first in a rollout, of a message with pictures its texts; else the task's number."""
    said = [node.message.content for node in trace.nodes if node.message.role == "user"]
    content = said[0] if said else f"task {trace.task.data.idx}"
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content if getattr(part, "text", None))


def sampled_gaps(trace: Any) -> Iterator[float]:
    """Per sampled token, the student's log-probability when it was drawn minus the teacher's; their mean estimates the
    reverse KL.
    """
    for node in trace.nodes:
        if node.reference_logprobs is not None:
            yield from (own - other for own, other in zip(node.logprobs, node.reference_logprobs, strict=True))


def _active() -> Exposed:
    if Exposed.active is None:
        raise ConfigError("prime-rl bridge: no exposure; call atesd.bridges.prime_rl.expose() first")
    return Exposed.active
