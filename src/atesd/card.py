"""The model card of a trained model: data, recipe, exposure, scores with intervals, and what they do not show."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from atesd.config import Config, dump_config, method_name
from atesd.maths.statistics import paired_bootstrap
from atesd.runs import RunFolder
from atesd.text import visible

Row = Mapping[str, Any]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_BARS = "▁▂▃▄▅▆▇█"
_PARTS = 10


def write_model_card(folder: Path, config: Config, run: RunFolder) -> Path:
    """Write README.md into the folder of the trained model, from what the run recorded. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    path.write_text(model_card(config, run), "utf-8")
    return path


def model_card(config: Config, run: RunFolder, *, adapter: bool | None = None) -> str:
    """The card's text: a YAML header that the hub reads, then Markdown. Foreign texts in it are escaped.

    `adapter`: whether the folder holds an adapter; None: it does if one was trained.
    """
    adapter = config.model.lora is not None if adapter is None else adapter
    metrics, evaluations, manifest = run.rows("metrics"), run.whole_rows("evaluations"), run.manifest
    sections = [
        f"# {plain(run.path.resolve().name)}",
        _opening(config, metrics),
        "## Data",
        _data(config, manifest),
        "## Recipe",
        _recipe(config, manifest),
        *(["## Exposure", _exposure(metrics)] if config.distils else []),
        "## Scores",
        _scores(config, evaluations),
        "## Read with care",
        "\n".join(f"- {caveat}" for caveat in _caveats(config, metrics, evaluations, manifest)),
        "## Use",
        _use(config, adapter),
    ]
    return f"---\n{_header(config, adapter)}---\n\n" + "\n\n".join(sections) + "\n"


def plain(text: str) -> str:
    """A text that means nothing to Markdown, HTML or a table: punctuation escaped, invisible characters written out."""
    shown = visible(" ".join(text.split()))
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", shown)


def fenced(text: str, language: str = "") -> str:
    """A code block that its own content cannot close."""
    shown = visible(text.strip("\n"))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", shown)), default=0))
    return f"{fence}{language}\n{shown}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def exposure_curve(metrics: Sequence[Row]) -> list[tuple[int, int, float, float]]:
    """(first update, last update, mean reveal ratio, mean effective ratio) for each tenth of the run, in order."""
    rows = [row for row in metrics if row.get("reveal_ratio") is not None]
    parts = [rows[i * len(rows) // _PARTS : (i + 1) * len(rows) // _PARTS] for i in range(_PARTS)]
    return [
        (
            part[0]["update"],
            part[-1]["update"],
            statistics.fmean(row["reveal_ratio"] for row in part),
            statistics.fmean(row["effective_ratio"] for row in part),
        )
        for part in parts
        if part
    ]


def sparkline(ratios: Sequence[float]) -> str:
    """Ratios in [0, 1] as bars."""
    return "".join(_BARS[round(ratio * (len(_BARS) - 1))] for ratio in ratios)


def _header(config: Config, adapter: bool) -> str:
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["atesd", "self-distillation", "on-policy-distillation"],
    }
    base, data = hub_id(config.model.path), [name for source in config.data.sources if (name := hub_id(source))]
    if base:
        header = {"base_model": base, **header}
    if data:
        header["datasets"] = data
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True)


def hub_id(name: str) -> str | None:
    """The hub id that a model path or data source stands for; None for a local file and for what is built in."""
    name = _HUB_NAMES.get(name, name)
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _opening(config: Config, metrics: Sequence[Row]) -> str:
    base = plain(_HUB_NAMES.get(config.model.path, config.model.path))
    how = {
        "distill": "on-policy self-distillation: the model, with a reference solution in its context, taught itself "
        "without one, on text that it had written itself",
        "sft": "supervised training on reference solutions",
        "grpo": "reinforcement of its own verified solutions (GRPO)",
    }[config.train.method]
    updates = metrics[-1]["update"] + 1 if metrics else 0
    what = "a LoRA adapter for" if config.model.lora else "trained from"
    return f"This model is {what} {base}, made in {updates:,} updates of {how}."


def _data(config: Config, manifest: Row) -> str:
    data = config.data
    rows = [
        ("source", plain(data.source_name) + (f" (preset {data.preset})" if data.preset else "")),
        ("fingerprint of the problems", plain(str(manifest["data_fingerprint"]))),
        ("training problems", "all there are" if data.train_size is None else f"at most {data.train_size:,}"),
        ("held-out test problems", plain(data.test_source) if data.test_source else f"at most {data.test_size:,}"),
        ("references cut by", data.segmenter),
        ("answers checked by", config.checker),
    ]
    if data.source == "world":
        anywhere = data.leap_probability is not None
        rows.append(
            ("probability that a step leaps", f"{data.leap_probability:g}")
            if anywhere
            else ("share of references that leap", f"{data.leap_share:g}")
        )
    return table(["", ""], rows) + (
        "\n\nA hash of each problem's text decides whether it is for training, validation, probes or testing, so that "
        "no text is in two of them."
    )


def _recipe(config: Config, manifest: Row) -> str:
    train, versions = config.train, manifest["versions"]
    rows = [
        ("method", train.method),
        ("updates", f"{train.num_updates:,} of {train.batch_size} rollouts"),
        ("learning rate", f"{train.learning_rate:g}, {train.learning_rate_schedule}"),
    ]
    if config.distils:
        rows += [
            ("exposure of the teacher", plain(method_name(config))),
            ("teacher weights", config.teacher.weights),
            ("loss", f"{config.loss.divergence.kind}, clip {config.loss.clip}, {config.loss.reduction} mean"),
        ]
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    rows += [
        ("seed", str(manifest["seed"])),
        ("software", plain(software)),
        ("commit", plain(manifest["commit"] or "not from a checkout")),
        ("hardware", plain(f"{manifest['cpu']}, {manifest['cores']} cores, {config.model.dtype}")),
    ]
    settings = f"<details><summary>Every setting</summary>\n\n{fenced(dump_config(config), 'yaml')}\n\n</details>"
    return f"{table(['', ''], rows)}\n\n{settings}"


def _exposure(metrics: Sequence[Row]) -> str:
    curve = exposure_curve(metrics)
    if not curve:
        return "No update was logged."
    rows = [
        (str(first) if first == last else f"{first} to {last}", f"{asked:.2f}", f"{shown:.2f}")
        for first, last, asked, shown in curve
    ]
    said = (
        "How much of the reference the teacher saw, on average over each tenth of the run: the share asked for (reveal "
        "ratio) and the share of the segments really shown."
    )
    spark = sparkline([asked for _, _, asked, _ in curve])
    return f"{said}\n\n`{spark}`\n\n{table(['updates', 'reveal ratio', 'shown'], rows)}"


def _scores(config: Config, evaluations: Sequence[Row]) -> str:
    if not evaluations:
        return "The model was not evaluated."
    newest = {(row["split"], row["update"]): row for row in evaluations}
    splits = sorted({split for split, _ in newest}, key=lambda split: (split != "test", split))
    rows, gains = [], []
    for split in splits:
        updates = sorted(update for name, update in newest if name == split)
        base, final = newest[split, updates[0]], newest[split, updates[-1]]
        rows += [_score(row, config) for row in ([base, final] if base is not final else [final])]
        gains += _gain(base, final) if base is not final else []
    head = ["split", "model", "Average@k", "pass@k", "k", "problems", "tokens", "cut off", "in loops", "not parsed"]
    drawn = ", ".join(f"{plain(name)} {value}" for name, value in evaluations[-1]["sampler"].items())
    said = f"Percent. In brackets: 95 % intervals by bootstrap over problems. Sampled with {drawn}."
    return "\n\n".join([said, table(head, rows), *gains])


def _checkpoint(updates_done: int, config: Config) -> str:
    """Which model a score is of."""
    final = " (final)" if updates_done == config.train.num_updates else ""
    return f"after {updates_done:,} updates{final}" if updates_done else "base"


def _score(row: Row, config: Config) -> list[str]:
    unread = row["verdicts"]["unparseable"] + row["verdicts"]["timeout"]
    return [
        plain(row["split"]),
        _checkpoint(row["update"], config),
        _interval(row["average"]),
        _interval(row["pass_at_k"]),
        str(row["samples"]),
        str(row["problems"]),
        f"{row['mean_tokens']:.0f}",
        f"{100 * row['truncated_share']:.1f}",
        f"{100 * row['loop_share']:.1f}",
        f"{100 * unread / sum(row['verdicts'].values()):.1f}",
    ]


def _interval(estimate: Row) -> str:
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def _gain(base: Row, final: Row) -> list[str]:
    """The paired difference of two evaluations of the same problems, as a sentence; none if they are not the same."""
    before, after = base["correct_counts"], final["correct_counts"]
    if before.keys() != after.keys() or not before:
        return []
    pairs = [(after[name] / final["samples"], before[name] / base["samples"]) for name in before]
    low, high = paired_bootstrap([a for a, _ in pairs], [b for _, b in pairs])
    gain = statistics.fmean(a - b for a, b in pairs)
    return [
        f"Gain of the last over the first on {plain(base['split'])}, paired by problem: "
        f"{100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points."
    ]


def _caveats(config: Config, metrics: Sequence[Row], evaluations: Sequence[Row], manifest: Row) -> Iterator[str]:
    looks = len({row["update"] for row in evaluations if row["split"] == "validation"})
    yield (
        f"One run with one seed ({manifest['seed']}). The intervals are over problems; they say nothing of how much "
        "another seed would differ."
    )
    yield (
        "No checkpoint was picked: this is the model after the last update. "
        f"Validation problems were scored {_times(looks)} on the way, and chose nothing."
    )
    skipped = sum(row.get("skipped") is not None for row in metrics)
    if skipped:
        yield f"{skipped} of {len(metrics)} updates were skipped because a loss or gradient was not finite."
    if len(manifest["sessions"]) > 1:
        notes = [note for session in manifest["sessions"][1:] for note in session.get("notes", [])]
        said = f": {plain('; '.join(notes))}" if notes else ", under the same settings and software"
        yield f"The run was resumed {_times(len(manifest['sessions']) - 1)}{said}."
    if config.data.source == "world":
        leaps = "; its leaping references were designed to make full exposure harmful" if config.data.leaps else ""
        yield f"The embedded world is a toy made for this project{leaps}. Its figures say nothing of language models."
    if config.exposure.reference_ablation != "off":
        ablation = config.exposure.reference_ablation
        yield f"The teacher did not see the true reference (control: {ablation}); this is a control run."
    if config.exposure.kind in ("learned", "bandit") and config.credit.preset == "paper":
        yield (
            "The controller was rewarded by the paper's formula taken literally. That reward rises when the ratio "
            "falls, with no learning at all; do not read the exposure curve as what was best for the student."
        )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _use(config: Config, adapter: bool) -> str:
    loader, imports = "AutoModelForCausalLM", "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if adapter:
        loader = "AutoPeftModelForCausalLM"
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n"
    code = (
        f"{imports}\n"
        'folder = "path/to/this/folder"\n'
        f"model = {loader}.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)"
    )
    if config.data.source == "world":
        return fenced(code, "python")
    message = f"{config.views.problem_text}\n\n{config.views.instruction}"
    kind = "the user's message in the chat template" if config.model.chat_template else "plain text"
    return f"{fenced(code, 'python')}\n\nIt was trained to answer this prompt, as {kind}:\n\n{fenced(message)}"
