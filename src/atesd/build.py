"""The one place that turns a config into wired objects, and the functions a notebook calls.

config = load_config("micro", ["train.num_updates=50"])
outcome = train(config, Path("runs/first"))
row = evaluate(config, split="test")
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import torch

from atesd.config import Config, dump_config
from atesd.control.make import make_exposure
from atesd.data.answers import Checker, make_checker
from atesd.data.sources import load_problems
from atesd.data.splits import ProblemSets
from atesd.data.views import Renderer, TextRenderer
from atesd.data.world import WorldRenderer
from atesd.errors import ConfigError, DataError, RunError
from atesd.evaluate.benchmark import evaluate_problems, is_looping, student_prompts
from atesd.evaluate.probe_set import ProbeSet
from atesd.models.load import LoadedModel, load_model, trainable_parameters
from atesd.models.prompts import PromptEncoder
from atesd.models.ranks import ALONE, Ranks, joined
from atesd.models.sample import Sampler, engine_note, engine_of
from atesd.models.score import Scorer
from atesd.models.teacher import Teacher
from atesd.records import Problem, Split, Verdict
from atesd.runs import RunFolder, new_manifest
from atesd.train.batches import rollout_sampler, teacher_view
from atesd.train.lookahead import Lookahead
from atesd.train.loop import Trainer, objective
from atesd.train.parts import Listener, Parts
from atesd.train.step import Choose, Gate
from atesd.train.success import SuccessDirection
from atesd.train.token_gate import AlignedChoice, AlignedGate, RandomGate, RankedGate, correct_gate


@final
class Silent:
    """A listener that shows nothing."""

    def update(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def evaluation(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `train` ended."""

    run: RunFolder
    status: Literal["finished", "stopped"]


def train(
    config: Config,
    out: Path,
    *,
    resume: Literal["auto", "never"] = "auto",
    listener: Listener | None = None,
    command: Sequence[str] = (),
) -> Outcome:
    """Train in the run folder `out`, from its newest valid checkpoint if it has one.

    Under torchrun every rank calls it with the same arguments; rank 0 alone writes and tells the listener. Raises
    `RunError` if another process owns the folder or its recorded config differs, and whatever `build` raises.
    """
    with joined(config.model.device) as ranks:
        listener = listener if listener is not None and ranks.first else Silent()
        known = ranks.from_first(lambda: _is_known(config, out, resume))
        parts = build(config, ranks=ranks)
        words = list(command) or sys.argv
        try:
            ranks.require_equal(lambda: [dump_config(config), parts.problems.fingerprint], "config and data")
            run = RunFolder(out, ranks.from_first(lambda: _run_id(parts, out, known, words)))
            with ExitStack() as held:
                ranks.from_first(lambda: held.enter_context(run.lock()))
                return _train_locked(Trainer(parts, run, listener), known, words, listener)
        finally:
            close(parts)


def _is_known(config: Config, out: Path, resume: Literal["auto", "never"]) -> bool:
    """Whether `out` holds a run, which is then to be resumed. What forbids it is said before a model is loaded."""
    known = RunFolder.exists(out)
    if known and resume == "never":
        raise RunError(f"{out} already holds a run; choose another --out, or resume it with --resume auto")
    if known:
        run = RunFolder.open(out)
        with run.lock():
            run.check_config(config)
    return known


def _run_id(parts: Parts, out: Path, known: bool, command: Sequence[str]) -> str:
    """The id of the run in `out`, begun there unless it is known."""
    if known:
        run = RunFolder.open(out)
        run.check_data(parts.problems.fingerprint)
        return run.run_id
    manifest = new_manifest(
        parts.config,
        data_fingerprint=parts.problems.fingerprint,
        command=command,
        threads=torch.get_num_threads(),
        ranks=parts.loaded.ranks.size,
    )
    return RunFolder.create(out, parts.config, {**manifest, "skipped_rows": list(parts.problems.skipped)}).run_id


def _train_locked(trainer: Trainer, known: bool, command: Sequence[str], listener: Listener) -> Outcome:
    run, config, ranks = trainer.run, trainer.parts.config, trainer.parts.loaded.ranks
    done = trainer.resume()
    choice = engine_note(trainer.parts.loaded, config.sampling.engine)
    if choice is not None:
        listener.message(choice)
    if known:
        threads = torch.get_num_threads()
        notes = ranks.from_first(
            lambda: run.begin_session(config, command=command, updates_done=done, threads=threads, ranks=ranks.size)
        )
        for note in notes:
            listener.message(note)
        listener.message(f"resumed after update {done} of {config.train.num_updates}")
    if config.model.dtype == "bfloat16" and config.model.lora is None:
        listener.message(
            "model.dtype: bfloat16 without model.lora: whatever changes a weight by less than its rounding (about "
            "1/256) is lost, most of an update at usual learning rates; set model.lora, or model.dtype: float32"
        )
    if not trainer.parts.scorer.takes_head_apart:
        listener.message(
            f"{type(trainer.parts.loaded.model).__name__}: no known scale or soft cap of its output head gives its own "
            "logits, so these are kept whole, in the model's dtype; lower train.micro_batch_size if memory runs out"
        )
    skipped = trainer.parts.problems.skipped
    if skipped:
        listener.message(f"{len(skipped)} rows skipped; manifest.json lists them all, the first is: {skipped[0]}")
    try:
        status = trainer.train(done)
    except BaseException:
        if ranks.first:
            run.end_session("failed")
        raise
    ranks.from_first(lambda: run.end_session(status))
    return Outcome(run, status)


@final
class SharedChecker:
    """Each rank checks its share of the answers and learns all verdicts, so that a time-out is one on every rank."""

    def __init__(self, checker: Checker, ranks: Ranks) -> None:
        self._checker = checker
        self._ranks = ranks

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """The verdict on each (completion, gold), in order."""
        return self._ranks.spread(pairs, self._checker.check)

    def close(self) -> None:
        """End this rank's processes."""
        self._checker.close()


def build(config: Config, problems: ProblemSets | None = None, *, ranks: Ranks = ALONE) -> Parts:
    """Load model and problems and wire them. `problems` replaces what `config.data` names.

    With several `ranks` each holds a model of its own; sampling, scoring and checking are shared between them.

    Raises `ModelError`, `DataError` or `ConfigError` that names the setting or the row. Call `close` afterwards.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    problems = problems or load_problems(config.data)
    loaded = replace(load_model(config.model, config.train.seed), ranks=ranks)
    engine_of(loaded, config.sampling.engine)  # one that cannot decode this model is refused before anything is run
    encoder = PromptEncoder(loaded.tokenizer, config.model, loaded.end_ids)
    renderer = make_renderer(config)
    problems = problems_that_fit(problems, config, encoder, renderer)
    scorer, teacher = Scorer(loaded), Teacher(loaded.model, config.teacher)
    checker = make_checker(config.checker, config.data.checker_workers)
    if checker is not None and ranks.size > 1:
        checker = SharedChecker(checker, ranks)

    def evaluate_split(split: Split, update: int) -> dict[str, Any]:
        if checker is None:
            raise ConfigError("data.checker: none leaves nothing to evaluate by; set data.checker: math")
        return evaluate_problems(
            loaded,
            getattr(problems, split),
            encoder=encoder,
            renderer=renderer,
            checker=checker,
            sampler=evaluation_sampler(config),
            samples=config.evaluation.samples,
            seed=config.train.seed,
            split=split,
            update=update,
        )

    lookahead = make_lookahead(config, loaded, scorer, teacher, encoder)
    return Parts(
        config=config,
        loaded=loaded,
        scorer=scorer,
        teacher=teacher,
        encoder=encoder,
        renderer=renderer,
        problems=problems,
        exposure=make_exposure(config, config.train.num_updates, config.train.seed, replayed_ratios(config)),
        checker=checker,
        probes=ProbeSet(
            loaded=loaded,
            scorer=scorer,
            teacher=teacher,
            problems=problems.probe,
            encoder=encoder,
            renderer=renderer,
            checker=checker,
            sampler=rollout_sampler(config),
            objective=objective(config),
            see=lambda problem: teacher_view(
                problem, config.credit.probe_ratio, config, encoder, renderer, problems.train
            )[1],
            seed=config.train.seed,
            micro_batch_size=config.train.micro_batch_size,
        ),
        evaluate=evaluate_split,
        looping=is_looping,
        lookahead=lookahead,
        gate=make_gate(config, lookahead),
        choose=make_choice(config, lookahead),
    )


def close(parts: Parts) -> None:
    """End the checker's processes."""
    if parts.checker is not None:
        parts.checker.close()


def evaluate(config: Config, split: Split = "test", *, update: int = 0) -> dict[str, Any]:
    """Average@k of the configured model on a split of the configured problems, as a row of evaluations.jsonl.

    `update` is what the row is labelled with: how many updates the model has behind it.
    """
    with joined(config.model.device) as ranks:
        parts = build(config, ranks=ranks)
        try:
            return parts.evaluate(split, update)
        finally:
            close(parts)


def config_of_trained(run: RunFolder) -> Config:
    """The config of a run with its trained model in place of the initial one; `RunError` if it is not finished."""
    if not run.final.is_dir():
        raise RunError(f"{run.path} has no trained model yet ({run.final.name}/ is missing); let `atesd train` finish")
    config = run.config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(run.final), "lora": None})})


def make_renderer(config: Config) -> Renderer:
    """Who writes the two contexts of a problem: the world in its own language, else plain text."""
    return WorldRenderer(config.views) if config.data.source == "world" else TextRenderer(config.views)


def evaluation_sampler(config: Config) -> Sampler:
    """How completions are drawn in evaluation."""
    e, s = config.evaluation, config.sampling
    return Sampler(e.temperature, e.top_p, e.top_k, e.min_p, config.evaluation_tokens, s.batch_size, s.engine)


def make_lookahead(
    config: Config, loaded: LoadedModel, scorer: Scorer, teacher: Teacher, encoder: PromptEncoder
) -> Lookahead | None:
    """The first-order look-ahead, where the exposure or the token gate needs it."""
    wanted = config.exposure.kind == "aligned" or config.loss.token_gate == "aligned"
    if not wanted or config.train.method != "distill":
        return None
    return Lookahead(
        SuccessDirection(trainable_parameters(loaded), scorer, encoder, config),
        scorer,
        teacher,
        objective(config),
        config.aligned.ratios,
        micro_batch_size=config.train.micro_batch_size,
        chunk_tokens=config.loss.chunk_tokens,
        reduction=config.loss.reduction,
    )


def make_choice(config: Config, lookahead: Lookahead | None) -> Choose | None:
    """The choice of a view for every token, and of the tokens, where the exposure has `granularity: per_token`."""
    if lookahead is None or config.exposure.granularity != "per_token":
        return None
    return AlignedChoice(lookahead, gated=config.loss.token_gate == "aligned")


def make_gate(config: Config, lookahead: Lookahead | None) -> Gate | None:
    """Which tokens are distilled: `loss.token_gate`."""
    loss = config.loss
    match loss.token_gate:
        case "aligned" if lookahead is not None:
            return AlignedGate(lookahead)
        case "correct":
            return correct_gate
        case "random":
            return RandomGate(loss.gate_share, config.train.seed)
        case "disagreement" | "entropy":
            return RankedGate(loss.token_gate, loss.gate_share, loss.gate_side, objective(config))
        case _:
            return None


def replayed_ratios(config: Config) -> list[float]:
    """The ratio of every update of `exposure.replay_run`; empty under every other kind."""
    if config.exposure.kind != "replay" or config.exposure.replay_run is None:
        return []
    return [row["reveal_ratio"] for row in RunFolder.open(config.exposure.replay_run).rows("metrics")]


def _perhaps_too_long(
    problems: Sequence[Problem], config: Config, encoder: PromptEncoder, renderer: Renderer
) -> Sequence[Problem]:
    """The problems whose shortest teacher context is too long; all of them where a control changes what it holds."""
    if config.train.method != "distill" or config.exposure.control != "off":
        return problems
    room = config.model.max_context_tokens - config.sampling.completion_tokens
    shortest = encoder.teachers([renderer.teacher(problem, 0, False) for problem in problems])
    return [problem for problem, context in zip(problems, shortest, strict=True) if len(context) > room]


def problems_that_fit(problems: ProblemSets, config: Config, encoder: PromptEncoder, renderer: Renderer) -> ProblemSets:
    """The problems whose contexts fit `model.max_context_tokens` even with nothing of the reference in them.

    A problem and an answer are never cut: a row that does not fit is refused (`DataError`), or skipped and listed where
    `data.on_bad_row` says so. References that have to lose segments are no reason to refuse. Room is left for the
    completions that a split's problems get, so that no setting of the evaluation decides what is trained on; a probe
    problem, and in SFT a training problem, needs room for its whole reference, which is scored as a completion.
    """
    lengths = {
        "sampling": (config.sampling.completion_tokens, (*problems.train, *problems.probe)),
        "evaluation": (config.evaluation_tokens, (*problems.validation, *problems.test)),
    }
    reasons: dict[str, str] = {}
    for problem in _perhaps_too_long(problems.train, config, encoder, renderer):
        try:
            teacher_view(problem, 0.0, config, encoder, renderer, problems.train)
        except DataError as error:
            reasons[problem.id] = str(error)
    for group, (completion_tokens, some) in lengths.items():
        room = config.model.max_context_tokens - completion_tokens
        for problem, prompt in zip(some, student_prompts(some, encoder, renderer), strict=True):
            if len(prompt) > room:
                reasons[problem.id] = (
                    f"problem {problem.id}: its student context has {len(prompt)} tokens, {group}.completion_tokens "
                    f"{completion_tokens} leaves room for {max(room, 0)}"
                )
    references = (*problems.probe, *(problems.train if config.train.method == "sft" else ()))
    for problem in references:
        length = len(encoder.student(renderer.student(problem))) + len(encoder.completion(problem.reference))
        if length > config.model.max_context_tokens:
            reasons[problem.id] = f"problem {problem.id}: its student context and reference have {length} tokens"
    if not reasons:
        return problems
    if config.data.on_bad_row == "refuse":
        listed = "\n  ".join(list(reasons.values())[:20])
        raise DataError(
            f"{len(reasons)} problems do not fit model.max_context_tokens {config.model.max_context_tokens}:\n  "
            f"{listed}\nRaise it, lower the completion_tokens of sampling or evaluation, or set data.on_bad_row: skip"
        )

    def fitting(split: tuple[Problem, ...]) -> tuple[Problem, ...]:
        return tuple(problem for problem in split if problem.id not in reasons)

    return replace(
        problems,
        train=fitting(problems.train),
        validation=fitting(problems.validation),
        probe=fitting(problems.probe),
        test=fitting(problems.test),
        skipped=(*problems.skipped, *reasons.values()),
    )
