"""Load and save models: a folder, a hub id, an embedded world model, or the fetched SmolLM2."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from atesd.config import LoraConfig, ModelConfig
from atesd.errors import ModelError
from atesd.maths.keyed import generator
from atesd.models.fetch import smollm2_folder
from atesd.models.model_checks import (
    NEEDS_CODE,
    end_ids,
    explained,
    first_line,
    require_fixed_rotary,
    require_forward,
    require_untied,
    require_vocabulary,
)
from atesd.models.model_folder import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    CONFIG,
    GENERATION,
    TOKENIZER,
    TOKENIZER_CONFIG,
    layers_in,
    read_object,
    require_adapter,
    require_shapes,
    require_sound,
    weight_files,
    weight_shapes,
)
from atesd.models.processor import adapters_as_their_inputs, attention_of, chooses_bfloat16
from atesd.models.prompts import end_of_turn
from atesd.models.quiet import quiet
from atesd.models.ranks import SINGLE_PROCESS, Ranks
from atesd.refusals import replacing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""The types of `model.dtype`."""
NO_WORDS = (
    ". They are in a clone of the repository, in its folder checkpoints/words, and not in the package; or make one in "
    "half an hour: atesd world pretrain words --seed 0 --attempts 1 --out FOLDER, and set model.path: FOLDER"
)


@dataclass(frozen=True)
class Deferred:
    """Parameters whose values are still in their files: the model has their shapes, and no memory for them."""

    places: Mapping[int, tuple[torch.nn.Parameter, Path, str]]

    def read(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """The values of a parameter, from its file; None of one that has them."""
        if id(parameter) not in self.places:
            return None
        _, path, name = self.places[id(parameter)]
        with safe_open(path, "pt") as file:
            values: Tensor = file.get_tensor(name)
        return values.to(parameter.dtype)


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
    ranks: Ranks = SINGLE_PROCESS
    deferred: Deferred | None = None


def load_model(config: ModelConfig, seed: int = 0, *, divided: bool = False) -> LoadedModel:
    """Load model and tokenizer as `config` says; a new adapter's initial weights are a function of `seed`.

    `divided`: ranks are about to divide the weights. They stay on the CPU, or, of a folder whose files name them as the
    model does, in the files (`Deferred`), for `weights_of` to read a layer at a time.
    A folder, `world:NAME`, `words:NAME` and `smollm2` never touch the network. Raises `ModelError` that names the
    setting or the fix.
    """
    source, local = _resolve(config.path)
    device = _device(config.device)
    tokenizer = _tokenizer(config, source, local)
    model, deferred = (_skeleton(config, Path(source)) if divided and local else None) or (
        _weights(config, source, local),
        None,
    )
    require_vocabulary(config.path, tokenizer, model)
    require_fixed_rotary(config, model.config)
    if config.lora is not None:
        model = _with_adapter(model, config.lora, seed)
    if chooses_bfloat16(config):
        adapters_as_their_inputs(model)
    torch.nn.Module.to(model, "cpu" if divided else device).train(False)
    if deferred is None:
        require_forward(config.path, model, int(tokenizer.eos_token_id))
    if config.gradient_checkpointing:
        _enable_checkpointing(model)
    ends = end_ids(config.path, model, tokenizer) | {end_of_turn(tokenizer, config)}
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return LoadedModel(model, tokenizer, device, ends, pad_id, deferred=deferred)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer alone, to look at contexts without loading weights. Raises `ModelError` as `load_model` does."""
    source, local = _resolve(config.path)
    return _tokenizer(config, source, local)


def save_model(loaded: LoadedModel, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write safetensors and tokenizer so that `AutoModelForCausalLM` reads them; of an adapter, PEFT's folder.

    `tensors` are those to write where the model's own are divided over ranks (`Weights.saved`).
    An adapter's folder names its base model; `load_model` reads both. Whatever had the folder's name is replaced once
    all is written: nothing is written through a link, and no half-written model bears the name.
    """
    # PEFT would ask the hub whether the base's vocabulary has changed; adapters here never touch the embedding's size.
    options: dict[str, Any] = {"save_embedding_layers": False} if hasattr(loaded.model, "peft_config") else {}
    if tensors is not None:
        options["state_dict"] = dict(tensors)
    with replacing(folder) as part:
        part.mkdir(parents=True)
        try:
            with quiet():
                loaded.model.save_pretrained(part, **options)
            loaded.tokenizer.save_pretrained(part)
        except Exception as error:
            # safetensors and tokenizers tell what a disk refuses in exceptions of their own, the latter in a bare one.
            if isinstance(error, SafetensorError) or type(error) is Exception:
                raise _refused(error) from error
            raise


def _refused(error: Exception) -> OSError:
    """What a disk refused, from the text of an exception that has lost its number."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


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

    transformers checkpoints only layers in training mode, so the flag is set on the layers, not on what is inside. Its
    hook on the embedding goes again: only reentrant checkpointing needs an input that requires a gradient.
    """
    with quiet():
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    model.disable_input_require_grads()  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def model_source(path: str) -> str:
    """The folder or hub id that a `model.path` stands for. Raises `ModelError` if it is none."""
    return _resolve(path)[0]


def _resolve(path: str) -> tuple[str, bool]:
    """What transformers should read, and whether it is a local folder."""
    if path == "smollm2":
        return str(smollm2_folder()), True
    kind, _, name = path.partition(":")
    if kind == "world":
        return str(_one_of(_package() / "world_models", name, f"embedded model {path}")), True
    if kind == "words":
        return str(_one_of(_package().parents[1] / "checkpoints" / "words", name, path, NO_WORDS)), True
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file() and not (folder / ADAPTER).is_file():
            raise ModelError(f"model.path: {path} holds neither {CONFIG} nor {ADAPTER}; it is not a model folder")
        require_sound(folder)
        _require_no_code(folder)
        return str(folder.absolute()), True  # an adapter names its base by this, and is read from anywhere
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(
            f"model.path: there is no folder {path}; give a model folder, a hub id, smollm2, world:NAME or words:NAME"
        )
    return path, False


def _require_no_code(folder: Path) -> None:
    """Nothing in the folder needs code that it brings along: transformers knows its architecture and its tokenizer."""
    architectures, tokenizer_class = cast(Any, CONFIG_MAPPING), cast(Any, tokenizer_class_from_name)
    for file, setting in ((CONFIG, "model_type"), (TOKENIZER_CONFIG, "tokenizer_class")):
        values = read_object(folder / file) if (folder / file).is_file() else {}
        name = values.get(setting) or ""
        known = name in architectures if file == CONFIG else tokenizer_class(name) is not None
        if values.get("auto_map") and not known:
            raise ModelError(f"{folder / file}: {setting}: {name!r} {NEEDS_CODE}")


def _package() -> Path:
    return Path(str(importlib.resources.files("atesd")))


def _one_of(folder: Path, name: str, what: str, otherwise: str = "") -> Path:
    names = sorted(one.name for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []
    if name not in names:
        raise ModelError(f"model.path: there is no {what}; there are: {', '.join(names) or 'none'}{otherwise}")
    return folder / name


def _device(setting: str) -> torch.device:
    if setting == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "model.device: cuda was asked for, but torch sees no CUDA device; set model.device: cpu or auto"
        )
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _tokenizer(config: ModelConfig, source: str, local: bool) -> PreTrainedTokenizerBase:
    if (Path(source) / CONFIG).is_file():  # AutoTokenizer reads it too, and would be blamed for it
        _described(config, source, local)
    with explained(config.path, f"{TOKENIZER} and {TOKENIZER_CONFIG}"):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, local_files_only=local, trust_remote_code=False
        )
        ends = tokenizer.eos_token_id
        tokenizer.encode("1 + 1", add_special_tokens=False)
    if ends is None:
        raise ModelError(f"{config.path}: its tokenizer has no end token; set eos_token in tokenizer_config.json")
    if config.chat_template and not tokenizer.chat_template:
        raise ModelError(f"{config.path}: its tokenizer has no chat template; set model.chat_template: false")
    return tokenizer


def _weights(config: ModelConfig, source: str, local: bool, above: tuple[str, ...] = ()) -> PreTrainedModel:
    """The model in a folder or on the hub; `above` are the adapters' folders that lead to it."""
    if local and (Path(source) / ADAPTER).is_file():
        return _with_saved_adapter(config, Path(source), above)
    described = _described(config, source, local)
    if local:
        _require_weights(config, described, Path(source))
        _require_generation(Path(source))
    with explained(config.path, f"{CONFIG} and its weights"), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.revision,
            local_files_only=local,
            trust_remote_code=False,
            use_safetensors=True,  # the other format is a pickle
            dtype=DTYPES[config.dtype],
            attn_implementation=attention_of(config),
            output_loading_info=True,
        )
    model, report = loaded
    # transformers fills what a file lacks with random numbers and only logs it.
    lacking = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in report[kind])
    if lacking:
        raise ModelError(f"{config.path}: its weights lack {', '.join(lacking[:3])} ({len(lacking)} in all)")
    return cast(PreTrainedModel, model)


def _skeleton(config: ModelConfig, folder: Path) -> tuple[PreTrainedModel, Deferred] | None:
    """The model of a folder without its weights; None where these are not, by name, those in its files.

    Every parameter is one number repeated: of its shape, type and device, and changed by nobody before it is read.
    """
    described = None if (folder / ADAPTER).is_file() else _described(config, str(folder), True)
    if described is None or getattr(described, "quantization_config", None) is not None:
        return None
    _require_weights(config, described, folder)
    _require_generation(folder)
    with explained(config.path, CONFIG), quiet(), _parameters_on_meta():
        model: PreTrainedModel = cast(Any, AutoModelForCausalLM).from_config(
            described, trust_remote_code=False, dtype=DTYPES[config.dtype], attn_implementation=attention_of(config)
        )
    files, named = weight_files(folder), dict(model.named_parameters())
    stored = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if not named.keys() <= files.keys() or model.state_dict().keys() != stored or model._keep_in_fp32_modules:
        return None
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    repeated = {
        id(p): torch.nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), p.requires_grad)
        for p in named.values()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = repeated[id(parameter)]
    placed = {name: repeated[id(p)] for name, p in named.items()}
    return model, Deferred({id(p): (p, files[name], name) for name, p in placed.items()})


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, a module keeps of its new parameters their shapes; buffers are as ever."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is, is tied to another
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _described(config: ModelConfig, source: str, local: bool) -> PreTrainedConfig:
    with explained(config.path, CONFIG):
        described: PreTrainedConfig = AutoConfig.from_pretrained(
            source, revision=config.revision, local_files_only=local, trust_remote_code=False
        )
    return described


def _require_weights(config: ModelConfig, described: PreTrainedConfig, folder: Path) -> None:
    """The files hold the weights that config.json describes: found out before any memory is taken for them."""
    held = weight_shapes(folder)
    if not held or getattr(described, "quantization_config", None) is not None:
        return  # transformers will say what is missing; packed weights have other shapes
    layers = getattr(described.get_text_config(), "num_hidden_layers", None) or 0
    if layers > layers_in(held):
        raise ModelError(
            f"{folder / CONFIG}: num_hidden_layers: {layers}, its weights lack all but {layers_in(held)} layers; mend "
            "the file, or fetch the model again"
        )
    with explained(config.path, CONFIG), torch.device("meta"):
        skeleton: Any = cast(Any, AutoModelForCausalLM).from_config(described, trust_remote_code=False)
    require_shapes({name: tuple(value.shape) for name, value in skeleton.state_dict().items()}, held, folder)


def _require_generation(folder: Path) -> None:
    """generation_config.json can be read now, and written beside the trained model at the end of the run."""
    if (folder / GENERATION).is_file():
        with explained(str(folder), GENERATION):
            GenerationConfig.from_pretrained(str(folder), local_files_only=True).validate(strict=True)


def load_adapted(config: ModelConfig) -> PreTrainedModel:
    """The model of an adapter's folder in `config.dtype`, on the CPU, with the adapter beside the weights; no LoRA."""
    source, _ = _resolve(config.path)
    return _adapted(config, Path(source), ())


def _with_saved_adapter(config: ModelConfig, adapter: Path, above: tuple[str, ...]) -> PreTrainedModel:
    """The base model that an adapter's folder names, at `config.revision`, with the adapter added into its weights.

    On a bfloat16 base the adapter, itself in float32, is kept beside the weights as in training: what it changes is
    about as small as their rounding, and merged it would be lost. Only an adapter on top, new or saved, asks for
    merging there: PEFT reads none back on a model that is wrapped already.
    """
    adapted: Any = _adapted(config, adapter, above)
    if config.dtype == "bfloat16" and config.lora is None and not above:
        return cast(PreTrainedModel, adapted)
    with explained(str(adapter), f"{ADAPTER} and its weights"), quiet():
        merged: PreTrainedModel = adapted.merge_and_unload()
    # An adapter trained on top names its base by this: without it, it would be read back on the model below both.
    merged.name_or_path = str(adapter.resolve())
    return merged


def merging_note(config: ModelConfig) -> str | None:
    """What is lost of an adapter in `model.path` below a new one; None where nothing is."""
    if config.dtype != "bfloat16" or config.lora is None or not (Path(model_source(config.path)) / ADAPTER).is_file():
        return None
    return (
        f"model.path: {config.path} is an adapter, and the new one lies on bfloat16 weights with it merged in: what it "
        "changes by less than their rounding (about 1/256 of a weight) is lost; with model.dtype: float32 nothing is, "
        "and `atesd export RUN --merged --dtype float32` writes that model by itself"
    )


def _adapted(config: ModelConfig, adapter: Path, above: tuple[str, ...]) -> PreTrainedModel:
    base = require_adapter(adapter)
    above = (*above, str(adapter.resolve()))
    source, local = _resolve(base)
    if local and str(Path(source).resolve()) in above:
        raise ModelError(
            f"{adapter / ADAPTER}: base_model_name_or_path: {base} leads back to this adapter; write the path of the "
            "model below it"
        )
    model = _weights(config.model_copy(update={"path": base}), source, local, above)
    peft = _peft()
    with explained(str(adapter), f"{ADAPTER} and its weights"), quiet():
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)  # PEFT leaves those as they began
        try:
            adapted: PreTrainedModel = peft.PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
        except UserWarning as warning:
            raise ModelError(
                f"{adapter / ADAPTER_WEIGHTS}: {first_line(warning):.200}; fetch the adapter again"
            ) from None
    require_untied(adapted, f"{adapter / ADAPTER}: target_modules and modules_to_save")
    return adapted


def _with_adapter(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PreTrainedModel:
    peft = _peft()
    targets = lora.target_modules
    whole = targets == "all-linear"
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="all-linear" if whole else [targets] if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with quiet(), torch.random.fork_rng(devices=[]):  # PEFT draws from torch's global generator; it must not notice
        torch.manual_seed(int(generator(seed, "load", "adapter").integers(2**63)))
        try:
            wrapped: PreTrainedModel = peft.get_peft_model(model, settings)
        except ValueError as error:
            raise ModelError(f"model.lora.target_modules: {targets}: {first_line(error)}") from None
    require_untied(wrapped, f"model.lora.target_modules: {targets}")
    return wrapped


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise ModelError('model.lora needs the extra `lora`: pip install "atesd[lora]"') from None
    return peft
