"""What a run would do, for `atesd train --dry-run`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from atesd.config import Component, Config, TrainConfig, describe_settings, method_name, yaml_value
from atesd.control.budget import Learner, affordable, decisions
from atesd.data.own_checker import checker_line
from atesd.importing import sha256_of
from atesd.models.load import merging_note
from atesd.models.processor import attention_note
from atesd.models.prompts import control_line
from atesd.records import Split
from atesd.text import duration, visible
from atesd.train.components import Components

MEASURED = 512  # training problems whose contexts are measured
LISTED = 5  # skipped rows that are shown
MANY_DECISIONS = 128  # beyond them one simulated controller is enough, and takes its time


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a reader wants first: whether it fits, whether it can learn, how long it takes."""

    text: str


def plan_lines(components: Components) -> Iterator[str]:
    """Data, model, contexts, and what the budget of updates affords."""
    config, train = components.config, components.config.train
    problems = {split: getattr(components.problems, split) for split in get_args(Split)}
    yield "problems: " + ", ".join(f"{split} {len(some):,}" for split, some in problems.items())
    yield from map(visible, components.problems.notes)
    skipped = components.problems.skipped
    yield f"rows skipped: {len(skipped)}"
    yield from (f"  {reason}" for reason in skipped[:LISTED])
    if len(skipped) > LISTED:
        yield f"  and {len(skipped) - LISTED} more"
    trained = sum(parameter.numel() for parameter in components.weights.trained.values())
    total = sum(parameter.numel() for parameter in components.loaded.model.parameters())
    yield f"model: {config.model.path} on {components.loaded.device}, {total:,} parameters, {trained:,} trained"
    yield from filter(None, (attention_note(config.model), merging_note(config.model)))
    yield from acting_lines(config)
    yield from map(visible, components.encoder.notes())
    yield visible(control_line(problems["train"], components.encoder))
    yield from own_lines(components)
    yield from _contexts(components)
    yield segment_line([len(problem.segments) for problem in problems["train"]])
    yield f"updates: {train.num_updates}, with {train.num_updates * train.batch_size:,} rollouts ({train.method})"
    if config.sampling.engine == "server":
        server = config.sampling.server
        yield f"rollouts: from {', '.join(server.urls)}, which answer; draws: {server.draws}, weights: {server.publish}"
        waits = [server.answer_seconds(n) for n in (config.sampling.completion_tokens, config.evaluation_tokens)]
        yield f"  an answer may take {duration(waits[0])}, in evaluation {duration(waits[1])}, longer where many wait"
    yield _evaluations(components)
    if config.decides:
        finished, _ = affordable(train.num_updates, config.credit, config.policy)
        yield f"exposure decisions: {decisions(train.num_updates, config.credit)}, {finished} of them rewarded in time"
    if config.rule_note:
        yield config.rule_note


def learning_verdict(config: Config) -> Iterator[Verdict]:
    """How often a learned exposure's policy is updated, and whether that is enough; nothing for other kinds."""
    if config.decides and config.exposure.kind == "learned":
        _, updates = affordable(config.train.num_updates, config.credit, config.policy)
        yield Verdict(f"policy updates: {updates}; {budget_line(config)}")


def own_lines(components: Components) -> Iterator[str]:
    """The functions of the user's that decide, and what the checker among them makes of the references."""
    for setting, name in components.config.factories.items():
        yield f"{setting}: {visible(name)}, SHA-256 {str(sha256_of(name))[:12]}"
    if "data.checker" in components.config.factories and components.checker is not None:
        yield checker_line(components.checker, components.problems.train)


def budget_line(config: Config) -> str:
    """How far the run's policy updates could move the learned policy at best, and what would be enough."""
    learner, updates = Learner(config.credit, config.policy, config.bounds), config.train.num_updates
    taken = decisions(updates, config.credit)
    reach = learner.reach(taken, seeds=1 if taken > MANY_DECISIONS else None)
    best = f"a reward without any noise would take the mean ratio from 0.50 to {reach.down:.2f} or {reach.up:.2f}"
    if reach.enough:
        return best
    needed = learner.updates_needed(updates)
    mend = f"train.num_updates: {needed} would do" if needed else "no number of updates would do"
    return f"too few to teach the policy anything: even {best} only; {mend} (atesd audit)"


def acting_lines(config: Config) -> Iterator[str]:
    """Exposure, loss, teacher, learning rate and seed as they will act, with what their kinds read."""
    loss, train = config.loss, config.train
    if config.distils:
        changed = [s for s in describe_settings(config) if s.path.startswith("exposure.") and s.changed]
        own = "".join(f", {s.path.removeprefix('exposure.')} {yaml_value(s.value)}" for s in changed)
        yield f"exposure: {config.exposure.kind}{own}: {method_name(config)}"
        if config.group_note:
            yield config.group_note
        if config.decides and config.credit.discount_note:
            yield config.credit.discount_note
        clip = "not clipped" if loss.clip == "none" else f"clip {loss.clip} at {loss.threshold:g} nats"
        means = f"{loss.reduction} mean, temperature {config.loss_temperature:g}"
        yield f"loss: {_kind(loss.divergence, 'kind')}, {clip}, {means}, gate {_kind(loss.gate, 'kind')}"
        if config.estimate_note:
            yield config.estimate_note
        yield f"teacher: {_kind(config.teacher, 'weights')}"
    else:
        yield f"exposure: none, as {train.method} has no teacher"
        trained = {"sft": "the references", "grpo": f"completions by their advantage {_among(train)}"}
        yield f"loss: likelihood of {trained[train.method]}, {loss.reduction} mean"
        yield f"teacher: none ({train.method})"
    if config.hinted.rollouts:
        reader = {"distill": "the success direction", "grpo": f"GRPO, under the {config.hinted.prompt} prompt"}
        yield (
            f"hinted: {config.hinted.rollouts} of {train.batch_size} rollouts an update, for {reader[train.method]}; "
            f"the ratio moves until {config.hinted.target_success:.0%} of them are right"
        )
    warm = f"after {train.warmup_updates} updates of warm-up, " if train.warmup_updates else ""
    yield f"learning rate: {train.learning_rate:g}, {warm}{train.learning_rate_schedule}"
    yield f"seed: {train.seed}"


def _among(train: TrainConfig) -> str:
    """With what a reward is compared."""
    return f"in groups of {train.group_size}" if train.baseline == "group" else "among those of their difficulty"


def _kind(component: Component, tag: str) -> str:
    """The kind of a group, and the values of its other settings: `ema (decay 0.99)`."""
    values = component.model_dump()
    said = [f"{name} {yaml_value(value)}" for name, value in values.items() if name != tag]
    return f"{values[tag]} ({', '.join(said)})" if said else str(values[tag])


def segment_line(counts: Sequence[int]) -> str:
    """How many references have how many segments; ranges of ten where there are many kinds."""
    kinds = Counter(counts)
    if len(kinds) > 12:
        kinds = Counter(count // 10 * 10 for count in counts)
        return "segments: " + ", ".join(f"{low}-{low + 9}: {kinds[low]}" for low in sorted(kinds))
    return "segments: " + ", ".join(f"{count}: {kinds[count]}" for count in sorted(kinds))


def _contexts(components: Components) -> Iterator[str]:
    """Lengths of both contexts at full exposure."""
    config, encoder, renderer = components.config, components.encoder, components.renderer
    some = components.problems.train[:MEASURED]
    student = [len(encoder.student(renderer.student(problem))) for problem in some]
    yield f"student context: {_lengths(student)} (first {len(some)} training problems)"
    if config.distils:
        prompts = [components.prompts.view(problem, 1.0) for problem in some]
        short = sum(prompt.view.effective_ratio < 1 for prompt in prompts)
        note = f", {short} references do not fit whole" * bool(short)
        yield f"teacher context at ratio 1: {_lengths([len(prompt.context) for prompt in prompts])}{note}"
    room = config.sampling.completion_tokens
    yield f"completions: up to {room} tokens; context and completion: up to {config.model.max_context_tokens}"


def _lengths(lengths: Sequence[int]) -> str:
    return f"median {statistics.median(lengths):g}, longest {max(lengths)} tokens"


def _evaluations(components: Components) -> str:
    """Validations before, on the way and after; test before and after."""
    train, problems = components.config.train, components.problems
    if not train.evaluate_every:
        return "evaluations: none (train.evaluate_every: 0)"
    times = len({*range(0, train.num_updates + 1, train.evaluate_every), train.num_updates})
    answers = (times * len(problems.validation) + 2 * len(problems.test)) * components.config.evaluation.samples
    return f"evaluations: {times} on validation, 2 on test, with {answers:,} completions"
