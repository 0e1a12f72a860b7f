"""How many rows `atesd evaluate` decodes together, and how long a server may take, by the length of the completions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from atesd.build import make_renderer
from atesd.cli.forecast import this_machine
from atesd.cli.options import say
from atesd.config import Config
from atesd.forecast.advice import rows_together
from atesd.forecast.arithmetic import Lengths, Work, decoding
from atesd.models.load import load_tokenizer
from atesd.models.prompts import PromptEncoder
from atesd.models.ranks import Ranks
from atesd.models.shape import described_shape
from atesd.records import Problem
from atesd.text import duration

_BATCH = "sampling.batch_size"


def that_fits(config: Config, problems: Sequence[Problem], overrides: Sequence[str], ranks: Ranks) -> Config:
    """The config with as large a `sampling.batch_size` as fits beside the longest completions; rank 0 decides and says.

    One that is set by an override stays, and what is expected of it is said. It changes no draw.
    """
    if config.sampling.engine == "server":
        return config
    rows = ranks.broadcast(lambda: _decided(config, problems, overrides, ranks.size))
    sampling = config.sampling.model_copy(update={"batch_size": rows})
    return config.model_copy(update={"sampling": sampling})


def say_time(config: Config, problems: int, ranks: Ranks) -> None:
    """How long a server may take for one answer, of as many as an evaluation asks for at once."""
    if ranks.first and config.sampling.engine == "server":
        server, samples = config.sampling.server, config.evaluation.samples
        at_once = min(problems * samples, math.lcm(samples, ranks.size * config.sampling.batch_size))
        seconds = server.answer_seconds(config.evaluation_tokens, at_once / len(server.urls))
        say(f"a server may take {duration(seconds)} for an answer (sampling.server.timeout)", err=True)


def _decided(config: Config, problems: Sequence[Problem], overrides: Sequence[str], ranks: int) -> int:
    """Rows together, said where it is not what fits anyway."""
    asked, room = config.sampling.batch_size, config.model.max_context_tokens - config.evaluation_tokens
    work = _work(config, max(1, room), ranks)
    if rows_together(work) == asked:
        return asked
    renderer, encoder = make_renderer(config), PromptEncoder(load_tokenizer(config.model), config.model)
    longest = max((len(ids) for ids in encoder.students([renderer.student(one) for one in problems])), default=1)
    work = _work(config, longest, ranks)
    rows, needed = rows_together(work), decoding(work, asked, config.evaluation_tokens).total
    if rows == asked:
        return asked
    reason = (
        f"prompts of up to {longest:,} and completions of up to {config.evaluation_tokens:,} tokens: {asked} would "
        f"need {needed / 1e9:,.1f} GB of {work.kind.usable / 1e9:,.1f} GB that may be filled"
    )
    if any(override.partition("=")[0].strip() == _BATCH for override in overrides):
        say(f"rows together: {asked}, as set, though {reason}; {rows} should fit", err=True)
        return asked
    say(f"rows together: {rows}, for {reason}; --set {_BATCH}=N decides otherwise", err=True)
    return rows


def _work(config: Config, prompt: int, ranks: int) -> Work:
    lengths = Lengths(prompt, prompt, prompt, prompt, 0, 0)
    return Work(config, described_shape(config.model), lengths, this_machine(config, ranks), ranks)
