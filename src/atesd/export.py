"""A trained model as a folder that transformers and PEFT read, for `atesd export`; checked before it is called done.

What was trained and what the exported folder gives, loaded by the libraries themselves, are compared on a few texts.
Nothing is sent anywhere unless a name to push to is given.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from atesd.card import model_card
from atesd.config import Config, ModelConfig
from atesd.errors import ConfigError, ModelError, RunError
from atesd.maths.keyed import generator
from atesd.models.load import DTYPES, LoadedModel, load_adapted, load_model, save_model
from atesd.models.merging import MOST_LOST, swallowed_share
from atesd.models.model_folder import ADAPTER, read_object
from atesd.models.processor import attention_of
from atesd.models.quiet import quiet
from atesd.refusals import refusals_told, replacing
from atesd.runs import RunFolder
from atesd.session import config_of_trained

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of a logit that passes, as a share of the largest logit: rounding through all layers (ours)."""
TEXTS, TOKENS = 4, 64
"""How many texts are compared, and how many tokens of each at most."""
HUB_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]{0,95}")

Kind = Literal["adapter", "merged", "model"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: `difference` as in `TOLERANCES`; `lost` as in `MOST_LOST`, None where nothing was merged.

    `base` is what an adapter needs beside it: a hub id, or a folder of this machine.
    """

    folder: Path
    kind: Kind
    dtype: str
    difference: float
    lost: float | None
    base: str | None


def export_run(run: RunFolder, out: Path, *, merged: bool = False, dtype: str | None = None) -> Exported:
    """Write the trained model of a finished run to `out`, which appears only once its logits are those of the run's.

    `merged`: the adapter added into the weights of its base, in float32, then rounded to `dtype`. Raises `RunError` for
    a run that is not finished, a folder with something in it and logits that differ, `ConfigError` for what cannot be
    asked of this run, `ModelError` for a merge that rounding would swallow.
    """
    trained = config_of_trained(run).model
    if run.manifest["status"] != "finished":
        raise RunError(f"{run.path} is {run.manifest['status']}; let `atesd train` finish it first")
    kind = _kind(run.config, run.path, merged, dtype)
    with refusals_told(out, "read"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"{out} already holds something; give another --out, or empty it")
    base = _base_of(run) if kind == "adapter" else None
    saved_as, lost = dtype or trained.dtype, None
    # Weights that become float32 are compared in float32: what they would give if nothing were rounded on the way.
    loaded = load_model(trained.model_copy(update={"dtype": saved_as}) if saved_as == "float32" else trained)
    texts = _texts(run, loaded)
    wanted = _logits(loaded.model, texts)
    with _written(out) as part:
        if kind == "adapter":
            _copy_adapter(run, part)
        elif kind == "merged":
            whole, lost = _merged(loaded, trained, saved_as)
            save_model(whole, part)
        else:
            torch.nn.Module.to(loaded.model, DTYPES[saved_as])
            save_model(loaded, part)
        difference = _difference(part, kind, trained, texts, wanted)
        _require_equal(out, difference, saved_as)
        done = Exported(out, kind, saved_as, difference, lost, base)
        (part / "README.md").write_text(_card(run, done), "utf-8")
    return done


def lines(done: Exported) -> Iterator[str]:
    """What was written and how it was checked."""
    kept = "" if done.lost is None else f", {100 * (1 - done.lost):.1f} % of the adapter's change survives the rounding"
    yield f"exported: {done.folder} ({done.kind}, {done.dtype}{kept})"
    yield (
        f"logits: within {done.difference:.1g} of the trained model's, as a share of the largest (allowed: "
        f"{TOLERANCES[done.dtype]:g})"
    )
    if done.base is not None:
        yield f"the adapter needs its base, {done.base}" + (
            ", a folder of this machine; --merged stands alone" if Path(done.base).exists() else ""
        )


def push(folder: Path, name: str) -> str:
    """Upload a folder to a private repository of the hub; returns its address.

    Raises `RunError` where the hub refuses, or the repository was there and is public.
    """
    try:
        from huggingface_hub import HfApi

        hub = HfApi()
        address = str(hub.create_repo(name, private=True, exist_ok=True))
        if not hub.repo_info(name).private:
            raise RunError(
                f"--push {name}: {address} is there already and public; make it private, or give another name. The "
                f"export is whole in {folder}"
            )
        hub.upload_folder(repo_id=name, folder_path=folder)
    except RunError:
        raise
    except Exception as error:  # of the network, of the hub, of a missing package: their classes have no common base
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"--push {name}: {first}; the export is whole in {folder}. Needed are a network, HF_HUB_OFFLINE unset and "
            "`hf auth login`; then: hf upload " + f"{name} {folder}"
        ) from error
    return address


def require_hub_name(name: str) -> None:
    """Raise `ConfigError` for what cannot name a repository of the hub."""
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(f"--push {name}: expected OWNER/NAME, of letters, digits, '-', '_' and '.'")


def _kind(config: Config, path: Path, merged: bool, dtype: str | None) -> Kind:
    if config.model.lora is None and merged:
        raise ConfigError(f"--merged: {path} trained no adapter (model.lora), its model is whole; leave --merged out")
    if config.model.lora is not None and not merged and dtype is not None:
        raise ConfigError(f"--dtype {dtype}: an adapter is kept as it was trained; add --merged, or leave --dtype out")
    return "model" if config.model.lora is None else "merged" if merged else "adapter"


def _base_of(run: RunFolder) -> str:
    """What the adapter lies on, as it names it. `ConfigError` where that is an adapter, which PEFT cannot load."""
    base = str(read_object(run.final / ADAPTER)["base_model_name_or_path"])
    base = str(Path(base).absolute()) if Path(base).is_dir() else base  # adapters of earlier versions may be relative
    if (Path(base) / ADAPTER).is_file():
        raise ConfigError(f"{run.path}: its adapter lies on another adapter, {base}; export both in one with --merged")
    return base


@contextmanager
def _written(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, unless something has come to lie there."""
    with refusals_told(out, "written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as part:
            yield part
            if out.exists():
                out.rmdir()


def _copy_adapter(run: RunFolder, part: Path) -> None:
    """The adapter's folder, with its base and the revision of that, which PEFT does not know of."""
    shutil.copytree(run.final, part)
    named = {"base_model_name_or_path": _base_of(run), "revision": run.config.model.revision}
    settings = read_object(part / ADAPTER) | named
    (part / ADAPTER).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _merged(loaded: LoadedModel, trained: ModelConfig, dtype: str) -> tuple[LoadedModel, float]:
    """The adapter added to its base in float32 and rounded to `dtype`, and the share of it that rounding swallows.

    Raises `ModelError` where it is beyond `MOST_LOST`.
    """
    model: Any = load_adapted(trained.model_copy(update={"dtype": "float32"}))
    lost = swallowed_share(model, DTYPES[dtype])
    if lost > MOST_LOST:
        raise ModelError(
            f"--merged: rounding the merged weights to {dtype} would swallow {100 * lost:.0f} % of what the adapter "
            f"changes, allowed are {100 * MOST_LOST:.0f} %; add --dtype float32, or export the adapter by itself"
        )
    with quiet():
        model = model.merge_and_unload()
    return replace(loaded, model=model.to(DTYPES[dtype])), lost


def _require_equal(out: Path, difference: float, dtype: str) -> None:
    if not difference <= TOLERANCES[dtype]:
        raise RunError(
            f"{out} was not written: loaded back, its logits differ from the trained model's by {difference:.2g} of "
            f"the largest, allowed in {dtype} are {TOLERANCES[dtype]:g}; please report it with the run's manifest.json"
        )


def _texts(run: RunFolder, loaded: LoadedModel) -> list[Tensor]:
    """Token ids [1, tokens] to compare logits on: what the run has logged, else draws from the vocabulary."""
    rows = run.whole_rows("samples")[-TEXTS:]
    tokenizer: Any = loaded.tokenizer
    logged = [tokenizer.encode(row["student_context"], add_special_tokens=False)[-TOKENS:] for row in rows]
    drawn = [
        generator(0, "export", number).integers(len(tokenizer), size=TOKENS // 2).tolist() for number in range(TEXTS)
    ]
    return [torch.tensor([ids]) for ids in [*filter(None, logged), *drawn][:TEXTS]]


def _logits(model: Any, texts: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu() for ids in texts]


def _difference(
    folder: Path, kind: Kind, trained: ModelConfig, texts: Sequence[Tensor], wanted: Sequence[Tensor]
) -> float:
    """How far the logits of a folder, loaded by transformers or PEFT, lie from the wanted ones; see `TOLERANCES`."""
    loader: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": "auto"}
    if kind == "adapter":
        from peft import AutoPeftModelForCausalLM

        loader, options = AutoPeftModelForCausalLM, {"dtype": DTYPES[trained.dtype]}
    with quiet():
        model = loader.from_pretrained(str(folder), attn_implementation=attention_of(trained), **options).eval()
        known = len(AutoTokenizer.from_pretrained(str(folder)))
    found = _logits(model, texts)
    apart = [(a[..., :known] - b[..., :known]).abs().max().item() for a, b in zip(found, wanted, strict=True)]
    largest = max(logits[..., :known].abs().max().item() for logits in wanted)
    return math.inf if any(map(math.isnan, apart)) else max(apart) / max(largest, torch.finfo(torch.float32).tiny)


def _card(run: RunFolder, done: Exported) -> str:
    """The run's model card, and what was exported and checked."""
    adapter = done.kind == "adapter"
    what = {"adapter": "the LoRA adapter", "merged": "the model with its adapter merged", "model": "the whole model"}
    said = (
        f"This folder is {what[done.kind]}, in {done.dtype}. Loaded back by {'PEFT' if adapter else 'transformers'}, "
        f"its logits on {TEXTS} texts differ from the trained model's by {done.difference:.1g} of the largest "
        f"(allowed: {TOLERANCES[done.dtype]:g})."
    )
    if done.lost is not None:
        said += f" Rounding swallowed {100 * done.lost:.1f} % of what the adapter changes in the weights."
    return f"{model_card(run.config, run, adapter=adapter)}\n## Export\n\n{said}\n"
