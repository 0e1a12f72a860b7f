"""The one place that turns a config into wired objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import torch

from atesd.aligned.direction import SuccessDirection
from atesd.aligned.foresight import AlignedForesight
from atesd.aligned.scorer import AlignmentScorer
from atesd.aligned.selectors import AlignedChoice, AlignedGate
from atesd.config import (
    AlignedGateSettings,
    AlignedSettings,
    Config,
    CorrectGateSettings,
    DataConfig,
    InfluenceGateSettings,
    LiveTeacher,
    PermutableGate,
    RandomGateSettings,
    RankedGateSettings,
    SdarGateSettings,
    SoftGateSettings,
)
from atesd.control.factory import make_exposure
from atesd.data.answers import Checker, Pair
from atesd.data.own_checker import configured_checker, require_runs
from atesd.data.sources import load_problems, require_consistent
from atesd.data.splits import ProblemSets
from atesd.data.views import Renderer, TextRenderer
from atesd.engine.factory import configured_engine
from atesd.engine.interface import Engine, SamplingParams
from atesd.evaluate.benchmark import SplitEvaluation
from atesd.evaluate.probe_set import ProbeSet
from atesd.maths.divergence import Objective
from atesd.models.load import LoadedModel, load_model
from atesd.models.prompts import PromptEncoder
from atesd.models.ranks import SINGLE_PROCESS, Ranks
from atesd.models.score import Part, Scorer
from atesd.models.teacher import Teacher
from atesd.models.weights import Weights, is_divided, weights_of
from atesd.records import Verdict
from atesd.runs import recorded_ratios
from atesd.train.components import Components
from atesd.train.fitting import problems_that_fit
from atesd.train.foresight import Foresight, NoForesight
from atesd.train.hinted import HintRatio, require_references
from atesd.train.optimiser import Optimiser
from atesd.train.rollouts import RolloutSampler, rollout_params
from atesd.train.selectors import CorrectGate, InfluenceGate, PermutedGate, RandomGate, RankedGate, SdarGate
from atesd.train.stopwatch import Stopwatch
from atesd.train.update import BatchPlan, Distillation, EveryToken, Likelihood, Method, Selector
from atesd.train.views import TeacherPrompts
from atesd.world.problems import WorldRenderer, world_problems


def build(
    config: Config,
    problems: ProblemSets | None = None,
    *,
    loaded: LoadedModel | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Components:
    """Load model and problems and wire them. `problems` and `loaded` replace what `config.data` and `model` name.

    With several `ranks` each holds a model of its own; sampling, scoring and checking are shared between them. Raises
    `ModelError`, `DataError` or `ConfigError` that names the setting or the row. Call `close` afterwards.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    problems = problems or problem_sets(config.data)
    checker = configured_checker(config)
    require_runs(checker, problems.train or problems.test)
    divided = is_divided(config.model, ranks)
    loaded = replace(loaded or load_model(config.model, config.train.seed, divided=divided), ranks=ranks)
    weights = weights_of(loaded, config.model)
    engine = configured_engine(loaded, config, weights)
    encoder, renderer = PromptEncoder(loaded.tokenizer, config.model, loaded.end_ids), make_renderer(config)
    problems = problems_that_fit(problems, config, encoder, renderer)
    require_references(problems.train, config)
    prompts = TeacherPrompts(config, encoder, renderer, problems.train)
    scorer = Scorer(loaded, weights, keeps=_read_again(config))
    teacher = Teacher(weights, config.teacher if config.distils else LiveTeacher())  # unread: no copy
    if checker is not None and ranks.size > 1:
        checker = SharedChecker(checker, ranks)
    optimiser = Optimiser(weights.trained, config.train)
    aligned = _alignment_scorer(config, weights, scorer, teacher, encoder, optimiser)
    return Components(
        config=config,
        problems=problems,
        loaded=loaded,
        weights=weights,
        engine=engine,
        encoder=encoder,
        renderer=renderer,
        prompts=prompts,
        scorer=scorer,
        teacher=teacher,
        checker=checker,
        sampler=RolloutSampler(
            problems.train,
            config,
            engine=engine,
            encoder=encoder,
            renderer=renderer,
            prompts=prompts,
            checker=checker,
        ),
        hints=HintRatio(config),
        exposure=make_exposure(config, config.train.num_updates, config.train.seed, *recorded_ratios(config)),
        probes=ProbeSet(
            engine=engine,
            scorer=scorer,
            teacher=teacher,
            problems=problems.probe,
            encoder=encoder,
            renderer=renderer,
            checker=checker,
            params=rollout_params(config),
            objective=objective(config),
            prompts=prompts,
            probe_ratio=config.credit.probe_ratio,
            seed=config.train.seed,
            micro_batch_size=config.train.micro_batch_size,
        ),
        foresight=_foresight(aligned, prompts, config),
        method=_method(config, scorer, teacher, aligned),
        plan=BatchPlan(config.loss.reduction, config.train.micro_batch_size, config.train.micro_batch_tokens),
        optimiser=optimiser,
        evaluation=_evaluation(config, problems, engine, encoder, renderer, checker, ranks.size),
    )


def close(components: Components) -> None:
    """End the checker's processes, and what the engine holds."""
    components.engine.close()
    if components.checker is not None:
        components.checker.close()


def problem_sets(config: DataConfig) -> ProblemSets:
    """The problems of `data.source`: the embedded world's, or those of a file, a data set or a generator.

    Raises `DataError` or `ConfigError` that names the row or the setting.
    """
    require_consistent(config)
    return world_problems(config) if config.source == "world" else load_problems(config)


def make_renderer(config: Config) -> Renderer:
    """Who writes the two contexts of a problem: the world in its own language, else plain text."""
    return WorldRenderer(config.views) if config.data.source == "world" else TextRenderer(config.views)


def objective(config: Config) -> Objective:
    """The configured divergence."""
    loss = config.loss
    kind, parameter = loss.divergence.kind, loss.divergence.parameter
    return Objective(kind, loss.clip, loss.threshold, config.loss_temperature, parameter)


def evaluation_params(config: Config) -> SamplingParams:
    """How completions are drawn in evaluation."""
    e = config.evaluation
    return SamplingParams(e.temperature, e.top_p, e.top_k, e.min_p, config.evaluation_tokens)


@final
class SharedChecker:
    """Each rank checks its share of the answers and learns all verdicts, so that a time-out is one on every rank."""

    def __init__(self, checker: Checker, ranks: Ranks) -> None:
        self._checker = checker
        self._ranks = ranks

    def check(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """The verdict on each pair, in order."""
        return self._ranks.map_sharded(pairs, self._checker.check)

    def close(self) -> None:
        """End this rank's processes."""
        self._checker.close()


def _alignment_scorer(
    config: Config, weights: Weights, scorer: Scorer, teacher: Teacher, encoder: PromptEncoder, optimiser: Optimiser
) -> AlignmentScorer | None:
    """The first-order look-ahead, where the exposure or the token gate needs it."""
    if not config.looks_ahead:
        return None
    exposure = config.exposure if isinstance(config.exposure, AlignedSettings) else AlignedSettings()
    return AlignmentScorer(
        SuccessDirection(weights, scorer, encoder, config, optimiser.preconditioned),
        scorer,
        teacher,
        objective(config),
        exposure.ratios,
        micro_batch_size=config.train.micro_batch_size,
        chunk_tokens=config.loss.chunk_tokens,
        reduction=config.loss.reduction,
    )


def _read_again(config: Config) -> Part | None:
    """The end of the student along which the look-ahead reads it again, if not the whole or nothing of it."""
    part = config.alignment.parameters
    return part if config.looks_ahead and part != "all" and part != "features" else None


def _foresight(aligned: AlignmentScorer | None, prompts: TeacherPrompts, config: Config) -> Foresight:
    return NoForesight() if aligned is None else AlignedForesight(aligned, prompts, config)


def _method(config: Config, scorer: Scorer, teacher: Teacher, aligned: AlignmentScorer | None) -> Method:
    """The loss of `train.method`."""
    watch, chunk = Stopwatch(scorer.device), config.loss.chunk_tokens
    if config.distils:
        return Distillation(scorer, watch, teacher, objective(config), _selector(config, aligned), chunk)
    return Likelihood(scorer, watch, 1.0 if config.train.method == "sft" else config.loss_temperature, chunk)


def _selector(config: Config, aligned: AlignmentScorer | None) -> Selector:
    """Which tokens are distilled, and from which view: `loss.gate` and `exposure.granularity: per_token`."""
    gate = config.loss.gate
    if aligned is not None and config.granularity == "per_token":
        return AlignedChoice(aligned, gated=gate.kind == "aligned")
    selector = _gate(config, aligned)
    permuted = isinstance(gate, PermutableGate) and gate.permute
    return PermutedGate(selector, config.train.seed) if permuted else selector


def _gate(config: Config, aligned: AlignmentScorer | None) -> Selector:
    """The selector of `loss.gate`, before its weights are permuted."""
    gate, chunk = config.loss.gate, config.loss.chunk_tokens
    match gate:
        case AlignedGateSettings(skip=skip) if aligned is not None:
            return AlignedGate(aligned, skips_rollouts=skip == "rollouts")
        case SoftGateSettings(sharpness=sharpness, skip=skip) if aligned is not None:
            return AlignedGate(aligned, sharpness, skips_rollouts=skip == "rollouts")
        case SdarGateSettings(beta=beta):
            return SdarGate(beta, config.loss_temperature, chunk)
        case InfluenceGateSettings(scale=scale, bound=bound):
            return InfluenceGate(scale, bound, objective(config), chunk)
        case CorrectGateSettings():
            return CorrectGate()
        case RandomGateSettings(share=share):
            return RandomGate(share, config.train.seed)
        case RankedGateSettings(kind=kind, share=share, side=side):
            return RankedGate(kind, share, side, objective(config), chunk)
        case _:
            return EveryToken()


def _evaluation(
    config: Config,
    problems: ProblemSets,
    engine: Engine,
    encoder: PromptEncoder,
    renderer: Renderer,
    checker: Checker | None,
    ranks: int,
) -> SplitEvaluation:
    return SplitEvaluation(
        problems,
        engine=engine,
        encoder=encoder,
        renderer=renderer,
        checker=checker,
        params=evaluation_params(config),
        samples=config.evaluation.samples,
        seed=config.train.seed,
        together=ranks * config.sampling.batch_size,
    )
