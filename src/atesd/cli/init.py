"""`atesd init`: a commented recipe for a file or data set, written after looking at it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atesd.config import Config, config_from_mapping, parse_yaml, yaml_value
from atesd.control.budget import Learner
from atesd.data.entries import Entry
from atesd.data.rows import SAME_PROBLEM
from atesd.data.segments import split_reference
from atesd.data.sources import load_problems
from atesd.data.splits import SHARES, Shares, split_of
from atesd.data.survey import Survey, best_segmenter, survey
from atesd.data.views import TextRenderer
from atesd.errors import ConfigError, DataError, ModelError
from atesd.records import Problem, Split
from atesd.text import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MODEL = "Qwen/Qwen3-1.7B"
SMALL = 4e8  # parameters: below them a CPU will do
LEAST_ROWS = 20
MOST_BAD = 0.5
_SIZES: Mapping[Split, int] = {"validation": 200, "probe": 64, "test": 300}
_SMALL_SHARES: Shares = (("train", 0.60), ("validation", 0.10), ("probe", 0.15), ("test", 0.15))
_ROWS_FOR_SHARES = 2200  # from here on the default shares give 64 probes
_ENOUGH_PROBES = 48
_CHARACTERS = 3  # of a token, where no tokenizer is at hand: mathematics has few
_MEASURED = 300  # problems
_LONGEST = 20
_SPARE = 1.05  # for rows that were not measured: the longest in bytes and in characters were
_FRAME = 250  # tokens of the texts around a reference


@dataclass(frozen=True)
class Lengths:
    """Longest contexts and references, and the reference that 95 % stay below, in tokens; measured or guessed."""

    student: int
    teacher: int
    reference: int
    usual: int
    measured: bool


@dataclass(frozen=True)
class Target:
    """The model, its tokenizer if it is at hand, its parameters and window if they are known, and its thinking mode."""

    path: str
    tokenizer: PreTrainedTokenizerBase | None
    parameters: float | None
    window: int | None

    @property
    def small(self) -> bool:
        """Whether it is small enough for a CPU."""
        return self.parameters is not None and self.parameters < SMALL

    @property
    def thinks(self) -> bool:
        """Whether its chat template knows a thinking mode."""
        template = str(getattr(self.tokenizer, "chat_template", None) or "")
        return "enable_thinking" in template or (self.tokenizer is None and "qwen3" in self.path.lower())


def write_recipe(sources: Sequence[str], model: str, out: Path | None) -> list[str]:
    """Look at the sources, write a recipe that trains on them, and say what was found.

    Raises `ConfigError` if the file exists, `DataError` where the data cannot be used, `ModelError` for a model folder
    that cannot be read. What is written was loaded and read before.
    """
    path = out or Path(f"{Path(sources[0].rstrip('/')).stem or 'recipe'}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {path}: a recipe's name ends in .yaml; write {path}.yaml")
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists, and nothing was overwritten; name another file with --out")
    found = survey(sources)
    usable, bad = len(found.reading.entries), len(found.reading.bad)
    damaged = [row for row in found.reading.bad if not row.reason.startswith(SAME_PROBLEM)]
    if len(damaged) > MOST_BAD * (usable + len(damaged)):
        listed = "\n  ".join(f"{found.reading.place(row.number)}: {row.reason}" for row in damaged[:5])
        raise DataError(
            f"{found.reading.name}: {len(damaged)} of {usable + bad} rows cannot be used, the first:\n  {listed}\nMend "
            "them, or write a recipe of your own with data.on_bad_row: skip"
        )
    if usable < LEAST_ROWS:
        raise DataError(f"{found.reading.name}: {usable} usable rows; a run needs at least {LEAST_ROWS}, better 2,000")
    text = recipe_text(found, target_of(model), path)
    config = config_from_mapping(parse_yaml(text, str(path)), str(path))
    sets = load_problems(config.data)
    _write_new(path, text)
    sizes = ", ".join(f"{name} {len(getattr(sets, name))}" for name in ("train", "validation", "probe", "test"))
    said = [f"found: {'; '.join(found.found)}", f"rows: {usable} usable, {bad} not", f"problems: {sizes}"]
    return [*said, f"written: {path}", *(f"next: {command}" for command in _commands(path))]


def _write_new(path: Path, text: str) -> None:
    """Write a file that must not exist; what the disk refuses midway leaves none."""
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            path.unlink(missing_ok=True)
            raise


def target_of(path: str) -> Target:
    """What can be known of a model without fetching anything."""
    folder = Path(path).expanduser()
    if not (folder.is_dir() or path == "smollm2" or _cached(path)):
        return Target(path, None, None, None)

    from atesd.config import ModelConfig
    from atesd.models.load import load_tokenizer

    config = ModelConfig(path=path)
    tokenizer = load_tokenizer(config)
    values: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        values = json.loads((folder / "config.json").read_text("utf-8"))
    hidden, layers = values.get("hidden_size"), values.get("num_hidden_layers")
    vocabulary = values.get("vocab_size") or 0
    size = 135e6 if path == "smollm2" else None
    if isinstance(hidden, int) and isinstance(layers, int):
        size = 12.0 * layers * hidden**2 + vocabulary * hidden
    return Target(path, tokenizer, size, values.get("max_position_embeddings"))


def _cached(path: str) -> bool:
    """Whether the tokenizer of a hub id is in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(path, "tokenizer.json"), str)
    except HFValidationError:
        raise ModelError(f"--model {path}: neither a folder nor a hub id nor smollm2") from None


def recipe_text(found: Survey, target: Target, path: Path) -> str:
    """The recipe, with what was found as comments."""
    lengths = _lengths(found, target)
    found_tokens = max(lengths.teacher, lengths.student + lengths.reference) + _completion(lengths, target)
    needed = _up(_SPARE * found_tokens, 256)
    window = min(needed, target.window or needed)
    lines = [*_head(found, path), *_model(found, target, lengths, window), *_data(found, cut=needed > window)]
    return "\n".join([*lines, *_rest(found, target, lengths), ""])


def _commands(path: Path) -> tuple[str, ...]:
    words = ("preview {}", "train {} --dry-run", "profile {}", "audit {}", "train {}")
    return tuple(f"atesd {each.format(path)}" for each in words)


def _head(found: Survey, path: Path) -> Iterator[str]:
    usable, bad = len(found.reading.entries), len(found.reading.bad)
    yield f"# {_plain(found.reading.name)}: the learned exposure, as written by atesd init. Change whatever you like."
    yield f"# Found: {_plain('; '.join(found.found))}."
    yield f"# {usable:,} usable rows" + (f", {bad:,} bad ones." if bad else ".")
    yield "# Paths are as seen from the folder where atesd is started; `atesd config` explains every setting. Next:"
    yield from (f"#   {_plain(command)}" for command in _commands(path))


def _model(found: Survey, target: Target, lengths: Lengths, window: int) -> Iterator[str]:
    yield "model:"
    yield f"  path: {yaml_value(target.path)}"
    if not target.small:
        yield "  dtype: bfloat16"
        yield "  gradient_checkpointing: true"
    rank = 16 if target.small else 64
    yield f"  lora: {{rank: {rank}, alpha: {2 * rank}}}  # the frozen teacher is the same model with the adapter off"
    if target.tokenizer is not None and not target.tokenizer.chat_template:
        yield "  chat_template: false  # the tokenizer has none"
    if target.thinks:
        yield "  student_template: {enable_thinking: false}"
        yield "  teacher_template: {enable_thinking: false}"
    if found.system:
        yield f"  system_prompt: {yaml_value(found.system)}  # that of every chat in the data"
    how = "tokens" if lengths.measured else f"tokens, guessed from {_CHARACTERS} characters each"
    yield f"  # The longest teacher context has {lengths.teacher} {how}. Of a longer one the last segments are"
    yield "  # left out, which the dry run counts; a problem that leaves no room for a completion is refused."
    yield f"  max_context_tokens: {window}"


def _data(found: Survey, cut: bool) -> Iterator[str]:
    """`cut`: the longest contexts are beyond the model's window."""
    settings = {**found.settings}
    yield "data:"
    yield f"  source: {yaml_value(settings.pop('source'))}"
    for name, value in settings.items():
        yield f"  {name}: {yaml_value(value)}" + _DATA_COMMENTS.get(name, "")
    if cut and not found.reading.bad:
        yield "  on_bad_row: skip  # problems beyond the model's window; the dry run lists them"
    elif found.reading.bad:
        yield f"  on_bad_row: skip  # {len(found.reading.bad):,} rows, such as {_plain(found.reading.faults[0])}"
    without = sum(not entry.solution for entry in found.reading.entries)
    if without:
        yield f"  on_missing_reference: keep  # {without:,} rows have no solution: nothing of them can be shown in part"
    segmenter, counts = best_segmenter(found.reading)
    yield f"  segmenter: {segmenter}  # references by their number of segments: {_counted(counts)}"
    shares, sizes = _split(found.reading.entries)
    if shares != SHARES:
        listed = ", ".join(f"{split}: {share:g}" for split, share in shares)
        yield f"  shares: {{{listed}}}  # by a hash of the text: no copy is in two splits"
    yield f"  train_size: null  # all there are: {sizes['train']:,}"
    yield from (f"  {split}_size: {size}" for split, size in sizes.items() if split != "train")


_DATA_COMMENTS = {
    "system_message": "  # of the chats; keep: in front of the problem",
    "earlier_turns": "  # some chats have several; the last exchange alone is used",
}


def _rest(found: Survey, target: Target, lengths: Lengths) -> Iterator[str]:
    """Exposure, reward, sampling, training and evaluation: a budget in which the controller can learn."""
    _, sizes = _split(found.reading.entries)
    batch = 8 if target.small else 32
    updates = _enough_updates()
    yield "exposure: {kind: learned, policy: {decisions_per_policy_update: 2}}"
    if sizes["probe"] < _ENOUGH_PROBES:
        yield f"credit: {{progress_signal: probe_gain}}  # less noise than probe_success, for {sizes['probe']} probes"
    usual = f"95 % of the references have up to {lengths.usual} tokens"
    yield f"# {usual}; how long this model's completions are is a guess until `atesd profile` has measured them."
    yield f"sampling: {{completion_tokens: {_completion(lengths, target)}}}"
    rate = "1e-4" if target.small else "5e-6"
    epochs = updates * batch / max(1, sizes["train"])
    yield "train:"
    yield f"  num_updates: {updates}  # enough to teach the controller, by the rule of atesd audit; {epochs:.1f} epochs"
    yield f"  batch_size: {batch}"
    yield f"  learning_rate: {rate}"
    yield "evaluation: {samples: 2}  # Average@2; raise it for figures to report"


@cache
def _enough_updates() -> int:
    """The least updates, 100 or more, in which the exposure of the recipe could learn."""
    config = Config.model_validate({"exposure": {"kind": "learned", "policy": {"decisions_per_policy_update": 2}}})
    return Learner(config.credit, config.policy, config.bounds).updates_needed(100) or 100


def _split(entries: Sequence[Entry]) -> tuple[Shares, dict[Split, int]]:
    """The shares of the splits, and how many problems each has."""
    shares = SHARES if len(entries) >= _ROWS_FOR_SHARES else _SMALL_SHARES
    counts = Counter(split_of(entry.text, shares) for entry in entries)
    if not counts["probe"] or not counts["train"]:
        raise DataError(f"{len(entries)} rows leave none for training or for the probes; a run needs more")
    limits = {split: min(counts[split], most) for split, most in _SIZES.items()}
    return shares, {"train": counts["train"], **limits}


def _lengths(found: Survey, target: Target) -> Lengths:
    """How long contexts and references are, of the longest and of some other problems."""
    entries = sorted(found.reading.entries, key=lambda entry: -len(entry.text) - len(entry.solution))
    others = entries[_LONGEST:]
    by_bytes = sorted(others, key=lambda entry: -len((entry.text + entry.solution).encode()))[:_LONGEST]
    even = entries[:: max(1, len(entries) // _MEASURED)]  # one in so many, of every length alike
    problems = [_problem(entry) for entry in (*entries[:_LONGEST], *by_bytes, *even)]
    if target.tokenizer is None:
        student = [(len(one.text) + len(found.system)) // _CHARACTERS + _FRAME // 3 for one in problems]
        references = [len(one.reference) // _CHARACTERS for one in problems]
        teacher = [a + b + _FRAME for a, b in zip(student, references, strict=True)]
        return _summary(student, teacher, references, len(even), False)

    from atesd.config import ModelConfig, ViewsConfig
    from atesd.models.prompts import PromptEncoder

    bare = not target.tokenizer.chat_template
    encoder = PromptEncoder(
        target.tokenizer, ModelConfig(path=target.path, chat_template=not bare, system_prompt=found.system or None)
    )
    renderer = TextRenderer(ViewsConfig())
    student = [len(encoder.student(renderer.student(one))) for one in problems]
    teacher = [len(encoder.teacher(renderer.teacher(one, len(one.segments), True))) for one in problems]
    return _summary(student, teacher, [len(encoder.completion(one.reference)) for one in problems], len(even), True)


def _summary(
    student: Sequence[int], teacher: Sequence[int], references: Sequence[int], even: int, measured: bool
) -> Lengths:
    """The longest of all, and what is usual among the last `even`, which are the data's own mixture."""
    usual = sorted(references[-even:])[math.ceil(0.95 * even) - 1]
    return Lengths(max(student), max(teacher), max(references), usual, measured)


def _problem(entry: Entry) -> Problem:
    segments, closing = split_reference(entry.solution, entry.answer, "auto")
    return Problem(entry.id, entry.text, segments, closing, entry.answer, entry.difficulty)


def _completion(lengths: Lengths, target: Target) -> int:
    """Room for a completion: half as long again as most references are, 64 to 4,096 tokens, at most half the window.

    A model from elsewhere writes in its own style, however short the references are: at least 512 tokens.
    """
    most = min(4096, (target.window or 8192) // 2)
    return min(most, max(64 if target.small else 512, _up(1.5 * lengths.usual, 64)))


def _up(number: float, step: int) -> int:
    return math.ceil(number / step) * step


def _counted(counts: Sequence[int]) -> str:
    kinds = Counter(min(count, 10) for count in counts)
    return ", ".join(f"{'10 or more' if count == 10 else count}: {kinds[count]}" for count in sorted(kinds)) or "none"


def _plain(text: str) -> str:
    """Text that can stand in a comment: on one line, with nothing invisible in it."""
    return visible(" ".join(text.split()))
