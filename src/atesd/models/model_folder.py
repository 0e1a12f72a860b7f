"""What the files of a local model folder must be, before transformers, tokenizers or PEFT read them.

Each fault is a `ModelError` that names file, field, value, what is allowed, and the fix. Nothing of a folder is ever
run: weights are read from safetensors alone, never from pickles, and the code that `auto_map` names is left alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

from atesd.errors import ModelError

CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"
TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX, ADAPTER_WEIGHTS = "model.safetensors.index.json", "adapter_model.safetensors"
_FIX = "mend the file, or fetch the model again"
_MOST = 2**24  # rows, columns or layers: larger ones would fill the memory before anything else is noticed
_MOST_HEADER_BYTES = 10**8  # what safetensors allows
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_ITEM_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}

Allowed = tuple[Callable[[object], bool], str]
Shapes = Mapping[str, tuple[int, ...]]


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    each = value if isinstance(value, list) else [value]  # a few architectures have one for every layer
    return bool(each) and all(_is_int(one) and 1 <= one <= _MOST for one in each)


def _is_count(value: object) -> bool:
    return value is None or (_is_int(value) and 0 <= value <= _MOST)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_ids(value: object) -> bool:
    return all(_is_int(one) and one >= 0 for one in (value if isinstance(value, list) else [value]))


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _is_template(value: object) -> bool:
    named = isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in value
    )
    return isinstance(value, str) or named


def _are_added_tokens(value: object) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and int(key) <= _MOST and isinstance(one, dict) and isinstance(one.get("content"), str)
        for key, one in value.items()
    )


_TEXT: Allowed = (lambda value: isinstance(value, str), "text")
_TEXTS: Allowed = (_is_text_list, "a list of texts")
_FLAG: Allowed = (lambda value: isinstance(value, bool), "true or false")
_SIZE: Allowed = (_is_size, f"an integer from 1 to {_MOST}")
_COUNT: Allowed = (_is_count, f"an integer from 0 to {_MOST}")
_NUMBER: Allowed = (_is_number, "a finite number")
_IDS: Allowed = (_are_ids, "a token id or a list of them")
_TOKEN: Allowed = (_is_token, "a token's text, or {content: its text}")
_OBJECT: Allowed = (lambda value: isinstance(value, dict), "an object")
_TARGETS: Allowed = (
    lambda value: _is_text_list(value) or (isinstance(value, str) and len(value) <= 1000),
    "a list of module names, or a short pattern",
)
_NO_CODE: Allowed = (lambda value: not value, "null: it names code, which is never run")
_BUILT_IN: Allowed = (lambda value: isinstance(value, str) and "/" not in value, "a name without /, which is no code")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_PAD: Allowed = (lambda value: _is_int(value) and value >= -1, "a token id; -1 or null for none")
_ENDS = {"eos_token_id": _IDS, "pad_token_id": _PAD, "bos_token_id": _IDS}
_FIELDS: Mapping[str, Mapping[str, Allowed]] = {
    CONFIG: {
        "model_type": _TEXT,
        "architectures": _TEXTS,
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), _SIZE),
        **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"), _SIZE),
        "hidden_act": _TEXT,
        "tie_word_embeddings": _FLAG,
        "rope_theta": _NUMBER,
        "rms_norm_eps": _NUMBER,
        "initializer_range": _NUMBER,
        "attention_dropout": _NUMBER,
        "rope_scaling": _OBJECT,
        "rope_parameters": _OBJECT,
        "layer_types": _TEXTS,
        "text_config": _OBJECT,
        **dict.fromkeys(("attn_implementation", "_attn_implementation", "experts_implementation"), _BUILT_IN),
        **_ENDS,
    },
    GENERATION: {**_ENDS, "temperature": _NUMBER, "top_p": _NUMBER, "top_k": _COUNT, "do_sample": _FLAG},
    TOKENIZER_CONFIG: {
        **dict.fromkeys(_SPECIAL, _TOKEN),
        "chat_template": (_is_template, "text, or a list of {name, template}"),
        "added_tokens_decoder": (_are_added_tokens, "an object of token ids, each with {content: its text}"),
        "tokenizer_class": _TEXT,
        "model_max_length": _NUMBER,
        "split_special_tokens": _FLAG,
    },
    "special_tokens_map.json": dict.fromkeys(_SPECIAL, _TOKEN),
    TOKENIZER: {
        "model": _OBJECT,
        "added_tokens": (
            lambda value: isinstance(value, list) and all(isinstance(one, dict) and _is_token(one) for one in value),
            "a list of objects with id and content",
        ),
    },
    ADAPTER: {
        "base_model_name_or_path": _TEXT,
        "peft_type": _TEXT,
        "task_type": _TEXT,
        "r": (lambda value: _is_int(value) and 1 <= value <= 2**16, "an integer from 1 to 65536"),
        "lora_alpha": _NUMBER,
        "lora_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
        "target_modules": _TARGETS,
        "modules_to_save": _TEXTS,
        "megatron_config": _NO_CODE,  # PEFT would import whatever module megatron_core names
        "rank_pattern": _OBJECT,
        "alpha_pattern": _OBJECT,
    },
    WEIGHTS_INDEX: {"weight_map": _OBJECT},
}


def require_sound(folder: Path) -> None:
    """Raise `ModelError` for a file of the folder that cannot be read or holds a field of another type."""
    for name, fields in _FIELDS.items():
        if (folder / name).is_file():
            _require_fields(folder / name, read_object(folder / name), fields)
    if (folder / TEMPLATE).is_file():
        _text(folder / TEMPLATE)
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: its weights are only in {pickles[0]}, a pickle, which can run code and is never read; save "
            "them as safetensors (save_pretrained of transformers or PEFT does)"
        )


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file. Raises `ModelError` if it is none."""
    text = _text(path)
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a character: could be read, and neither tokenised nor written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not valid JSON at line {error.lineno}: {error.msg}; {_FIX}") from None
    except RecursionError:
        raise ModelError(f"{path}: its JSON is nested too deeply; {_FIX}") from None
    except UnicodeEncodeError:
        raise ModelError(f"{path}: holds half of a character, a \\ud... without its other half; {_FIX}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ModelError(f"{path}: not valid JSON: {error}; {_FIX}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {_shown(value)}, expected an object of settings; {_FIX}")
    return value


def weight_shapes(folder: Path, pattern: str = "*.safetensors") -> Shapes:
    """The shape of every weight, from the headers alone. Raises `ModelError` for a damaged or truncated file."""
    return {name: shape for path in sorted(folder.glob(pattern)) for name, shape in _header(path)}


def weight_files(folder: Path) -> dict[str, Path]:
    """The file that holds each weight, of those that transformers reads; none where it is not said plainly."""
    if (folder / WEIGHTS_INDEX).is_file():
        places = read_object(folder / WEIGHTS_INDEX).get("weight_map")
        return {name: folder / str(file) for name, file in places.items()} if isinstance(places, dict) else {}
    return {name: folder / WEIGHTS for name, _ in _header(folder / WEIGHTS)} if (folder / WEIGHTS).is_file() else {}


def require_adapter(folder: Path) -> str:
    """The base model that an adapter's folder names; the rank that it states is that of its weights."""
    settings, path = read_object(folder / ADAPTER), folder / ADAPTER
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{path}: base_model_name_or_path is empty; write the base model's path there")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder}: {ADAPTER_WEIGHTS} is missing; fetch the adapter again")
    shapes = weight_shapes(folder, ADAPTER_WEIGHTS)
    rank, ranks = settings.get("r"), {shape[0] for name, shape in shapes.items() if "lora_A" in name and shape}
    if rank is not None and ranks and rank not in ranks and not settings.get("rank_pattern"):
        raise ModelError(f"{path}: r: {rank}, its weights have rank {min(ranks)}; {_FIX}")
    return str(base)


def require_shapes(described: Shapes, held: Shapes, folder: Path) -> None:
    """The weights that config.json describes are those in the files, and no large ones are made up beside them."""
    for name, shape in described.items():
        if name in held and held[name] != shape:
            raise ModelError(
                f"{folder / CONFIG}: describes {name} as {list(shape)}, its file holds {list(held[name])}; {_FIX}"
            )
    total, there = (sum(math.prod(shape) for shape in shapes.values()) for shapes in (described, held))
    if total > 4 * there + 10**6:
        raise ModelError(f"{folder / CONFIG}: describes {total:,} numbers of weights, the files hold {there:,}; {_FIX}")


def layers_in(shapes: Shapes) -> int:
    """At most how many layers these weights can belong to."""
    return max((int(number) for name in shapes for number in re.findall(r"\.(\d{1,9})\.", name)), default=-1) + 1


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def _require_fields(path: Path, values: Mapping[str, object], fields: Mapping[str, Allowed]) -> None:
    for name, value in values.items():
        fits, expected = fields.get(name, (None, ""))
        if fits is None and path.name == CONFIG and name.startswith("num_"):
            fits, expected = _COUNT
        if fits is not None and value is not None and not fits(value):
            raise ModelError(f"{path}: {name}: {_shown(value)} is not allowed; expected {expected}; {_FIX}")
    if path.name == TOKENIZER_CONFIG and values.get("split_special_tokens"):
        raise ModelError(
            f"{path}: split_special_tokens: true would read the control tokens of the chat template as text; set false"
        )
    inner = values.get("text_config")
    if path.name == CONFIG and isinstance(inner, dict):
        _require_fields(path, inner, fields)


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a safetensors file, whose data are all there."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            held = path.stat().st_size - 8 - size
            if size > _MOST_HEADER_BYTES or held < 0:
                raise ModelError(f"{path}: cannot be loaded: its header is cut off or no header; fetch the file again")
            header = json.loads(file.read(size).decode("utf-8"))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            shape = tuple(int(count) for count in entry["shape"])
            if not 0 <= begin <= end <= held or min(shape, default=0) < 0 or _lacks(entry["dtype"], shape, end - begin):
                raise ModelError(
                    f"{path}: cannot be loaded: {name} is {shape} at bytes {begin} to {end} of {held}; it is cut off "
                    "or damaged: fetch the file again"
                )
            yield name, shape
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise ModelError(f"{path}: cannot be loaded: its header is damaged ({reason}); fetch the file again") from None


def _lacks(dtype: object, shape: tuple[int, ...], size: int) -> bool:
    """Whether so many bytes are not what a tensor takes; types of less than a byte are left to safetensors."""
    return isinstance(dtype, str) and dtype in _ITEM_BYTES and _ITEM_BYTES[dtype] * math.prod(shape) != size


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
