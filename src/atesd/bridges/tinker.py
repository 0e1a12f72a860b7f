"""A controller inside tinker-cookbook's SDFT (tinker-cookbook >= 0.6.1, < 0.7). Nothing of it is changed for good.

    exposed = expose(sdft_dataset, cfg, {"exposure": {"kind": "random"}}, out="runs/tinker")
    with exposed.listening():
        asyncio.run(sdft.main(cfg, exposed, test_dataset))

The batches go through a wrapper, which shows the teacher the view of every golden answer. What comes of an update goes
only to the logger that `main` makes for itself, so while `listening` that logger has a tap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, final

from atesd.bridges.core import Feedback, Handle
from atesd.bridges.log import Log
from atesd.bridges.problems import problem_in, require_problems
from atesd.bridges.settings import Settings, bridge_config, logged_as, require_probes
from atesd.config import Config
from atesd.control.interface import Measurement
from atesd.data.own_segmenter import segmenter_of
from atesd.errors import ConfigError

_LOSSES: Mapping[str, float] = {"sdft/reverse_kl_mean": 1.0, "sdft/mean_advantage": -1.0}
"""Metrics that are a divergence per token, with their sign. The forward top-K loss stays on the server."""


def expose(
    dataset: Any, cfg: Any, settings: Settings, out: Path | str, metrics: Mapping[Measurement, str] | None = None
) -> Exposed:
    """A batch provider for `main(cfg, ...)` whose golden answers are shown in part.

    `out` is the run folder. `metrics` says which logged metric is which measurement, such as {"probe_success":
    "test/gsm8k/correct"} of an evaluator, or {"train_success": "env/all/reward/total"}. Raises `ConfigError` for a
    setting that will not do, also where `cfg.eval_every` does not evaluate when the exposure wants its probe.
    """
    measured: dict[str, str] = {str(name): key for name, key in (metrics or {}).items()}
    known = {"train_kl"} if cfg.reverse or cfg.topk == 0 else set()
    num_updates = min(len(dataset), cfg.max_steps if cfg.max_steps is not None else len(dataset))
    facts = {
        "model": {"path": cfg.model_name, "max_context_tokens": cfg.max_context_length},
        "sampling": {"temperature": float(cfg.temperature), "completion_tokens": cfg.max_tokens},
        "train": {"num_updates": num_updates, "learning_rate": float(cfg.learning_rate), "evaluate_every": 0},
    }
    config = bridge_config(settings, facts, trainer="tinker-cookbook", measurable=frozenset({*known, *measured}))
    require_probes(config, cfg.eval_every, measured, "eval_every")
    return Exposed(dataset, cfg, config, Path(out), measured)


@final
class Exposed:
    """An `SDFTBatchProvider` around another. One generation batch is one update; nothing comes late."""

    def __init__(self, dataset: Any, cfg: Any, config: Config, out: Path, metrics: Mapping[str, str]) -> None:
        self._dataset, self._cfg, self._metrics = dataset, cfg, metrics
        self.config, self.handle = config, Handle(config)
        version = f"tinker-cookbook {metadata.version('tinker-cookbook')}"
        self._log = Log(
            out, self.handle, trainer=version, fingerprint="of a batch provider, not known before it is read"
        )
        self._begun, self._listening = False, False
        self._resumed, self._seen = False, set[str]()

    def __len__(self) -> int:
        return len(self._dataset)

    def get_batch(self, index: int) -> tuple[Sequence[Any], list[str], list[str]]:
        """The batch with what the teacher sees of every golden answer, which is text or {reference, answer, ...}.

        Raises `ConfigError` outside of `listening`, as nothing would be learned there, and `DataError` for an answer
        that is to be shown but is not known.
        """
        if not self._listening:
            raise ConfigError("tinker bridge: main() runs outside of exposed.listening(); nothing would be learned")
        if not self._begun:
            self._begin(index)
        builders, questions, answers = self._dataset.get_batch(index)
        pairs = list(zip(questions, answers, strict=True))
        require_problems(pairs, self.config)
        problems = [problem_in(*pair, segmenter_of(self.config.data)) for pair in pairs]
        return builders, questions, [self.handle.show(index, problem).text for problem in problems]

    @contextmanager
    def listening(self) -> Iterator[Exposed]:
        """While it lasts, what `main` logs is told to the exposure; afterwards the run is ended."""
        from tinker_cookbook.utils import ml_log

        made: Callable[..., Any] = ml_log.setup_logging
        ml_log.setup_logging = lambda *given, **named: Tap(made(*given, **named), self.told)
        self._listening = True
        try:
            yield self
            if self._begun:
                self._log.end("finished")
        finally:
            self._listening = False
            ml_log.setup_logging = made
            self._log.close()

    def told(self, metrics: Mapping[str, Any], update: int) -> None:
        """What `main` logs at the end of an update: its evaluations came before the step, its means with it.

        Raises `ConfigError` where a metric that is named was not logged the first time that it is due.
        """
        losses = [sign * metrics[name] for name, sign in _LOSSES.items() if name in metrics]
        values = logged_as(self._metrics, metrics, set() if self._resumed else self.handle.due(update) - self._seen)
        self._seen |= values.keys()
        if (success := values.pop("train_success", None)) is not None:
            self.handle.grade(update, [("", 0, success)])
        if "sdft/mean_teacher_entropy" in metrics:
            values["teacher_entropy"] = float(metrics["sdft/mean_teacher_entropy"])
        loss = float(losses[0]) if losses else math.nan
        self._log.write(self.handle.observe(update, Feedback(loss, None, float(metrics["optim/lr"]), values)))
        self._log.save(Path(self._cfg.log_path), update + 1, keep=self._cfg.save_every + 1)

    def _begin(self, index: int) -> None:
        """A first batch that is not batch 0 is that of a resume. Its checkpoint may be one update ahead of the log."""
        if index:
            self._log.resume(Path(self._cfg.log_path), index, may_lose=1)
            self._resumed = True
        else:
            self._log.begin()
        self._begun = True


@final
class Tap:
    """A logger of tinker-cookbook that also tells what is logged of a step."""

    def __init__(self, logger: Any, told: Callable[[Mapping[str, Any], int], None]) -> None:
        self._logger, self._told = logger, told

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """See `ml_log.Logger`. What belongs to no training step is logged alone."""
        self._logger.log_metrics(metrics, step=step)
        if step is not None and "progress/batch" in metrics:
            self._told(metrics, step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name)
