"""Load and save models: a folder, a hub id, an embedded world model, or the fetched SmolLM2."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from atesd.config import LoraConfig, ModelConfig
from atesd.errors import ModelError
from atesd.maths.keyed import generator
from atesd.models.fetch import smollm2_folder
from atesd.models.prompts import end_of_turn
from atesd.models.quiet import quiet
from atesd.models.ranks import ALONE, Ranks

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model (inside a PEFT wrapper if it has an adapter) ready to sample, score and train.

    The model is in evaluation mode, and stays so: dropout never acts, gradients still flow. `end_ids` are the tokens
    that end a completion. `pad_id` only fills places that a mask hides; masks come from lengths, never from it. Each of
    `ranks` holds the same model, and sampling and scoring are shared between them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    end_ids: frozenset[int]
    pad_id: int
    ranks: Ranks = ALONE


def load_model(config: ModelConfig, seed: int = 0) -> LoadedModel:
    """Load model and tokenizer as `config` says; a new adapter's initial weights are a function of `seed`.

    A folder, `world:NAME` and `smollm2` never touch the network. Raises `ModelError` that names the setting or the fix.
    """
    source, local = _resolve(config.path)
    device = _device(config.device)
    tokenizer = _tokenizer(config, source, local)
    model = _weights(config, source, local)
    rows = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(f"{config.path}: its tokenizer has {len(tokenizer)} tokens, the model has {rows}; they differ")
    if config.lora is not None:
        model = _with_adapter(model, config.lora, seed)
    torch.nn.Module.to(model, device).train(False)
    if config.gradient_checkpointing:
        _enable_checkpointing(model)
    end_ids = _end_ids(model, tokenizer) | {end_of_turn(tokenizer, config)}
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return LoadedModel(model, tokenizer, device, end_ids, pad_id)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer alone, to look at contexts without loading weights. Raises `ModelError` as `load_model` does."""
    source, local = _resolve(config.path)
    return _tokenizer(config, source, local)


def trainable_parameters(loaded: LoadedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that training moves, by name: all of them, or with LoRA the adapter's alone."""
    return {name: parameter for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}


def save_model(loaded: LoadedModel, folder: Path) -> None:
    """Write safetensors and tokenizer so that `AutoModelForCausalLM` reads them; of an adapter, PEFT's folder.

    An adapter's folder names its base model; `load_model` reads both.
    """
    # PEFT would ask the hub whether the base's vocabulary has changed; adapters here never touch the embedding's size.
    options: dict[str, Any] = {"save_embedding_layers": False} if hasattr(loaded.model, "peft_config") else {}
    with quiet():
        loaded.model.save_pretrained(folder, **options)
    loaded.tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def without_checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """Within it a KV cache works; transformers drops the cache of a layer that checkpoints."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def _enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute layers in the backward pass, with dropout off all the same.

    transformers checkpoints only layers in training mode, so the flag is set on the layers, not on what is inside.
    """
    with quiet():
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _resolve(path: str) -> tuple[str, bool]:
    """What transformers should read, and whether it is a local folder."""
    if path == "smollm2":
        return str(smollm2_folder()), True
    if path.startswith("world:"):
        return str(_world_folder(path.removeprefix("world:"))), True
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / _ADAPTER_FILE).is_file():
            raise ModelError(
                f"model.path: {path} holds neither config.json nor {_ADAPTER_FILE}; it is not a model folder"
            )
        return str(folder), True
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"model.path: there is no folder {path}; give a model folder, a hub id, smollm2 or world:NAME")
    return path, False


def _world_folder(name: str) -> Path:
    worlds = Path(str(importlib.resources.files("atesd"))) / "world_models"
    names = sorted(folder.name for folder in worlds.iterdir() if folder.is_dir()) if worlds.is_dir() else []
    if name not in names:
        raise ModelError(
            f"model.path: there is no embedded model world:{name}; there are: {', '.join(names) or 'none'}"
        )
    return worlds / name


def _device(setting: str) -> torch.device:
    if setting == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "model.device: cuda was asked for, but torch sees no CUDA device; set model.device: cpu or auto"
        )
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _tokenizer(config: ModelConfig, source: str, local: bool) -> PreTrainedTokenizerBase:
    with _explained(config.path):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision, local_files_only=local)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{config.path}: its tokenizer has no end token; set eos_token in tokenizer_config.json")
    if config.chat_template and not tokenizer.chat_template:
        raise ModelError(f"{config.path}: its tokenizer has no chat template; set model.chat_template: false")
    return tokenizer


def _weights(config: ModelConfig, source: str, local: bool) -> PreTrainedModel:
    if local and (Path(source) / _ADAPTER_FILE).is_file():
        return _with_saved_adapter(config, Path(source))
    with _explained(config.path), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.revision,
            local_files_only=local,
            dtype=_DTYPES[config.dtype],
            attn_implementation=config.attention,
            output_loading_info=True,
        )
    model, report = loaded
    # transformers fills what a file lacks with random numbers and only logs it.
    lacking = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in report[kind])
    if lacking:
        raise ModelError(f"{config.path}: its weights lack {', '.join(lacking[:3])} ({len(lacking)} in all)")
    return cast(PreTrainedModel, model)


def _with_saved_adapter(config: ModelConfig, adapter: Path) -> PreTrainedModel:
    """The base model that an adapter's folder names, at `config.revision`, with the adapter added into its weights.

    On a bfloat16 base the adapter, itself in float32, is kept beside the weights as in training: what it changes is
    about as small as their rounding, and merged it would be lost. Only a new adapter on top asks for merging there.
    """
    base = json.loads((adapter / _ADAPTER_FILE).read_text("utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{adapter / _ADAPTER_FILE}: base_model_name_or_path is empty; write the base model's path there"
        )
    source, local = _resolve(base)
    model = _weights(config.model_copy(update={"path": base}), source, local)
    with _explained(str(adapter)), quiet():
        adapted = _peft().PeftModel.from_pretrained(model, str(adapter))
        if config.dtype == "bfloat16" and config.lora is None:
            return cast(PreTrainedModel, adapted)
        merged: PreTrainedModel = adapted.merge_and_unload()
    # An adapter trained on top names its base by this: without it, it would be read back on the model below both.
    merged.name_or_path = str(adapter.resolve())
    return merged


def _with_adapter(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PreTrainedModel:
    peft = _peft()
    targets = lora.target_modules
    whole = targets == "all-linear"
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if whole else [targets] if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with quiet(), torch.random.fork_rng(devices=[]):  # PEFT draws from torch's global generator; it must not notice
        torch.manual_seed(int(generator(seed, "load", "adapter").integers(2**63)))
        try:
            wrapped: PreTrainedModel = peft.get_peft_model(model, settings)
        except ValueError as error:
            raise ModelError(f"model.lora.target_modules: {targets}: {_first_line(error)}") from None
    return wrapped


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ModelError('model.lora needs the extra `lora`: pip install "atesd[lora]"') from None
    return peft


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    ends = generation.eos_token_id if generation is not None else None
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return frozenset({*listed, tokenizer.eos_token_id})


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what transformers raises for a bad source into one line that a user can act on."""
    try:
        yield
    except ImportError as error:
        raise ModelError(f"{path}: a package is missing: {_first_line(error)}") from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if _unreachable(error):
            raise ModelError(
                f"{path}: neither a local folder nor in the hub cache, and the hub cannot be reached; "
                "check the name and the network, or set model.path to a folder (HF_HUB_OFFLINE=1 in the environment "
                "skips the retries)"
            ) from None
        raise ModelError(f"{path}: cannot be loaded: {_first_line(error)}") from None


def _unreachable(error: BaseException) -> bool:
    chain: BaseException | None = error
    while chain is not None:
        if type(chain).__name__ in (
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "ConnectError",
            "ConnectTimeout",
        ):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
