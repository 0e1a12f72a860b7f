"""What a recipe needs of each device and how long an update takes, for `atesd train --dry-run`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from atesd.build import make_renderer, problem_sets
from atesd.cli.plan import MEASURED, Verdict, acting_lines
from atesd.config import Config
from atesd.data.views import Renderer
from atesd.errors import AtesdError, ConfigError, ModelError
from atesd.forecast.advice import fits, kinds_that_fit, several_changes, single_changes
from atesd.forecast.arithmetic import (
    FAST,
    SLOW,
    Lengths,
    Work,
    memory,
    peak,
    seconds,
    sharding_of,
)
from atesd.forecast.devices import DeviceKind, kind_named, kind_of_card
from atesd.forecast.measured import completions_line
from atesd.models.load import load_tokenizer, model_source
from atesd.models.prompts import PromptEncoder
from atesd.models.shape import described_shape
from atesd.records import Problem
from atesd.table import Table, render_text
from atesd.text import span, visible
from atesd.train.components import Components
from atesd.train.views import TeacherPrompts

NOTHING_DONE = "nothing was trained and nothing was written (--dry-run)"
PROBLEM_TOKENS, REFERENCE_TOKENS = 200, 2048
_GB = 1e9
_PARTS = ("weights", "teacher copy", "optimiser", "gradients", "activations", "KV cache", "logits", "buffers")


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of the dry run: how many devices of which kind, and how long the contexts are; None: not given."""

    devices: int | None = None
    kind: str | None = None
    problem_tokens: int | None = None
    reference_tokens: int | None = None

    @property
    def anything(self) -> bool:
        """Whether any of them is given: then nothing of the model but its config.json is read."""
        return any(value is not None for value in (self.devices, self.kind, self.problem_tokens, self.reference_tokens))


def verdicts_first(lines: Iterable[str | Verdict]) -> list[str]:
    """The lines of a plan, its verdicts before all others."""
    said = list(lines)
    return [line.text for line in said if isinstance(line, Verdict)] + [line for line in said if isinstance(line, str)]


def described_lines(config: Config, asked: Asked) -> list[str]:
    """The plan of a recipe for devices that need not be here. No weights are read and no memory is taken for any.

    Raises `ConfigError` for an unknown kind, `ModelError` for a model without a readable config.json.
    """
    return verdicts_first(_described(config, asked))


def _described(config: Config, asked: Asked) -> Iterator[str | Verdict]:
    devices = asked.devices or 1
    kind = kind_named(asked.kind) if asked.kind is not None else this_machine(config, devices)
    shape = described_shape(config.model)
    lengths, origin = _lengths(config, asked)
    work = Work(config, shape, lengths, kind, devices)
    yield (
        f"model: {config.model.path}, {shape.parameters:,} parameters by its config.json, {work.trained:,} trained; no "
        "weights were read"
    )
    yield from acting_lines(config)
    yield f"updates: {config.train.num_updates}, with {config.train.batch_size} rollouts each ({config.train.method})"
    yield from forecast_lines(work, origin)
    yield NOTHING_DONE


def built_lines(components: Components) -> Iterator[str | Verdict]:
    """The plan of what was built, on this machine, for as many ranks as torchrun has started."""
    config = components.config
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    given = components.encoder, components.renderer, components.prompts
    lengths = measured_lengths(components.problems.train, *given)
    work = Work(config, described_shape(config.model), lengths, this_machine(config, ranks), ranks)
    yield from forecast_lines(work, f"of the first {min(MEASURED, len(components.problems.train))} training problems")


def forecast_lines(work: Work, origin: str) -> Iterator[str | Verdict]:
    """Devices, contexts, the bytes of every phase, whether they fit or what makes them fit, and the seconds."""
    kind, lengths = work.kind, work.lengths
    named = f"{work.devices} x {visible(kind.name)}, {kind.memory / _GB:,.1f} GB each"
    yield f"devices: {named}{_speeds(kind)}; {_copies(work)}"
    teacher = f", teacher up to {lengths.teacher_longest:,}" if work.config.distils else ""
    yield (
        f"contexts {origin}: student up to {lengths.student_longest:,}{teacher} tokens; completions up to "
        f"{work.completion:,}"
    )
    known = completions_line(work.config)
    if known:
        yield known
    yield f"rows on a device: {work.rows} in an update, {work.together} of them scored together"
    idle = work.devices - work.config.train.batch_size
    if idle > 0:
        yield (
            f"train.batch_size {work.config.train.batch_size} leaves {idle} of {work.devices} devices without a row; "
            f"--set train.batch_size={work.devices}, or fewer devices"
        )
    yield render_text(_table(work)).rstrip()
    yield from _verdict(work)
    yield from _times(work)
    yield from _doubts(work)


def measured_lengths(
    problems: Sequence[Problem], encoder: PromptEncoder, renderer: Renderer, prompts: TeacherPrompts
) -> Lengths:
    """Tokens of both contexts of the first training problems, the teacher's with the whole reference."""
    some = problems[:MEASURED]
    student = [len(context) for context in encoder.students([renderer.student(problem) for problem in some])]
    teacher = [len(prompts.view(problem, 1.0).context) for problem in some]
    reference = [len(encoder.completion(problem.reference)) for problem in some]
    return Lengths(max(student), fmean(student), max(teacher), fmean(teacher), max(reference), fmean(reference))


def _lengths(config: Config, asked: Asked) -> tuple[Lengths, str]:
    """The contexts' lengths and where they are from: the options, else the data, else what is usually there."""
    given = asked.problem_tokens is not None or asked.reference_tokens is not None
    if not given:
        try:
            _require_tokenizer(config)
            encoder = PromptEncoder(load_tokenizer(config.model), config.model)
            problems, renderer = problem_sets(config.data).train, make_renderer(config)
            prompts = TeacherPrompts(config, encoder, renderer, problems)
            found = measured_lengths(problems, encoder, renderer, prompts)
            return found, f"of the first {min(MEASURED, len(problems))} training problems"
        except AtesdError as error:
            reason = str(error).partition("\n")[0]
            origin = f"as assumed (not measured: {visible(reason)}); --problem-tokens and --reference-tokens say others"
    problem = PROBLEM_TOKENS if asked.problem_tokens is None else asked.problem_tokens
    reference = REFERENCE_TOKENS if asked.reference_tokens is None else asked.reference_tokens
    room = config.model.max_context_tokens - config.sampling.completion_tokens
    if problem > room:
        raise ConfigError(
            f"--problem-tokens {problem}: model.max_context_tokens {config.model.max_context_tokens} less "
            f"sampling.completion_tokens {config.sampling.completion_tokens} leaves room for {room}"
        )
    teacher = min(problem + reference, room)  # a reference that does not fit loses its last segments
    lengths = Lengths(problem, problem, teacher, teacher, reference, reference)
    return lengths, "as asked" if given else origin


def _require_tokenizer(config: Config) -> None:
    """A folder with nothing but config.json has none, though transformers would make an empty one of it."""
    folder = Path(model_source(config.model.path))
    if folder.is_dir() and not any(folder.glob("*token*")):
        raise ModelError(f"{config.model.path} holds no tokenizer")


def this_machine(config: Config, ranks: int) -> DeviceKind:
    """The card of this machine; on a processor the share of its memory that one of the ranks has."""
    if config.model.device != "cpu" and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        return kind_of_card(card.name, card.total_memory)
    return DeviceKind("cpu", min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *memory_limits()) / ranks)


def memory_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Bytes that the groups of this process, from its own up to the root, may take (cgroup v2 and v1); inf: any."""
    yield math.inf
    lines = own.read_text("utf-8").splitlines() if own.is_file() else []
    groups = [line.split(":", 2)[1:] for line in [*lines, "0::/", "0:memory:/"] if line.count(":") >= 2]
    for controllers, group in groups:
        v1 = "memory" in controllers.split(",")
        folder, name = (root / "memory", "memory.limit_in_bytes") if v1 else (root, "memory.max")
        place = Path(group.lstrip("/"))
        for file in (folder / part / name for part in (place, *place.parents)):
            text = file.read_text("utf-8").strip() if (v1 or not controllers) and file.is_file() else "max"
            if text.isdecimal():
                yield float(text)


def _speeds(kind: DeviceKind) -> str:
    if not kind.flops:
        return ""
    speeds = f"{kind.flops / 1e12:,.0f} bfloat16 TFLOP/s, {kind.bandwidth / 1e12:.2f} TB/s, {kind.link / _GB:.0f} GB/s"
    return f" ({speeds} to a neighbour: {kind.source})"


def _copies(work: Work) -> str:
    sharding = sharding_of(work.config)
    return "every one holds the whole model" if sharding == "none" else f"{sharding}: {work.shards} share a model"


def _table(work: Work) -> Table:
    phases = memory(work)
    used = [part for part in _PARTS if any(phase.parts.get(part) for phase in phases)]
    # As wide as its heading, which would be broken otherwise.
    rows = tuple(
        (p.name, *(_gb(p.parts.get(part, 0.0)).rjust(len(part)) for part in used), _gb(p.total)) for p in phases
    )
    return Table("memory of a device in each phase, GB (1e9 bytes)", ("phase", *used, "together"), rows)


def _gb(size: float) -> str:
    """Three digits, two decimals at most; a dash for nothing."""
    return (
        f"{size / _GB:,.{max(0, 2 - int(math.log10(max(size / _GB, 1))))}f}"
        if size >= 5e6
        else "-"
        if not size
        else "0.00"
    )


def _verdict(work: Work) -> Iterator[str | Verdict]:
    """Whether it fits; if not, the settings that make it fit."""
    most, usable = peak(memory(work)), work.kind.usable
    said = f"{_gb(most.total)} GB in {most.name}, of {_gb(usable)} GB that may be filled"
    if fits(work):
        yield Verdict(f"it fits: {said} ({work.kind.reserved:.0%} are left for the device's own needs)")
        return
    yield Verdict(f"it does not fit: {said} ({work.kind.reserved:.0%} are left for the device's own needs)")
    singles = single_changes(work)
    if singles:
        yield "any one of these makes it fit:"
        yield from (f"  --set {change}  ({_gb(size)} GB; {change.cost})" for change, size in singles)
        return
    several, size = several_changes(work)
    if size <= usable:
        yield f"no single setting makes it fit; together these do, at {_gb(size)} GB:"
        yield from (f"  --set {change}  ({change.cost})" for change in several)
        return
    tried = " ".join(f"--set {change}" for change in several) or "none that helps"
    yield f"no settings make it fit: with {tried} it still takes {_gb(size)} GB"
    kinds = list(kinds_that_fit(work))
    yield f"kinds on which it fits as it is: {', '.join(kinds) or 'none of those known; take a smaller model'}"


def _times(work: Work) -> Iterator[str | Verdict]:
    fast, slow = seconds(work, FAST), seconds(work, SLOW)
    if not fast:
        named = visible(work.kind.name)
        yield f"seconds per update: not known for {named}; atesd profile measures one, --device-kind plans for a card"
        return
    low, high, updates = sum(fast.values()), sum(slow.values()), work.config.train.num_updates
    parts = ", ".join(f"{name} {span(value, slow[name])}" for name, value in fast.items())
    hours = span(updates * low / 3600, updates * high / 3600)
    yield Verdict(f"seconds per update, an estimate: {span(low, high)}; {parts}")
    yield (
        f"  so {updates:,} updates take {hours} hours, without evaluations, checkpoints and the controller's probes; "
        "every completion is taken to be as long as it may, and shorter ones take less"
    )
    shares = ", ".join(
        f"{getattr(SLOW, name):.0%} to {getattr(FAST, name):.0%} of {whose}"
        for name, whose in (("flops", "the operations"), ("bandwidth", "the memory's speed"), ("link", "the links'"))
    )
    step = f"{FAST.layer_step * 1e6:.0f} to {SLOW.layer_step * 1e6:.0f} microseconds a layer and token at least"
    yield (
        f"  the range is assumed, as no run on a GPU has checked it: {shares}, {step}; compare with `seconds` in "
        "metrics.jsonl"
    )


def _doubts(work: Work) -> Iterator[str]:
    """What the figures leave out, or were never held against."""
    if not work.shape.plain:
        yield "memory and times are those of Llama's layers in this model's sizes: its own were not checked"
    if work.config.looks_ahead:
        copies = ", and its copies of the trained weights" if work.config.alignment.displaces else ""
        yield f"not counted is the look-ahead of aligned exposure: its time{copies}"
    if sharding_of(work.config) != "none":
        yield "the memory of sharded weights was not held against a run"
    if work.config.sampling.engine == "server":
        yield "rollouts: as if each address of sampling.server.urls were one GPU of this kind, beside the trainer's"
