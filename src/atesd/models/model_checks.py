"""What must hold of a model, its tokenizer and its adapter once they are read, and errors of libraries in one line.

Whatever would show only in the first update, at the end of a run, or in nothing but wrong figures is refused here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from atesd.config import ModelConfig
from atesd.errors import ModelError
from atesd.models.model_folder import CONFIG, GENERATION, TOKENIZER

NEEDS_CODE = (
    "needs code of its own (auto_map), which is never run; use a model whose architecture and tokenizer transformers "
    "knows"
)


@contextlib.contextmanager
def explained(path: str, files: str) -> Iterator[None]:
    """Turn whatever is raised for a bad source, from one of some files, into one line that a user can act on."""
    try:
        yield
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"{path}: a package is missing: {first_line(error)}") from None
    except Exception as error:
        raise _bad_source(path, files, error) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what tokenizers and safetensors raise where Rust gives up
            raise
        raise _bad_source(path, files, error) from None


def _bad_source(path: str, files: str, error: BaseException) -> ModelError:
    if _unreachable(error):
        return ModelError(
            f"{path}: neither a local folder nor in the hub cache, and the hub cannot be reached; "
            "check the name and the network, or set model.path to a folder (HF_HUB_OFFLINE=1 in the environment "
            "skips the retries)"
        )
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return ModelError(
            f"{path}: does not fit into memory: {first_line(error)}; take a smaller model, or set model.dtype: bfloat16"
        )
    if "trust_remote_code" in str(error):
        return ModelError(f"{path}: {NEEDS_CODE}")
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return ModelError(
        f"{path}: cannot be loaded: {kind}{first_line(error)} (in {files}); mend the files, or fetch the model again"
    )


def require_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Every id that the tokenizer can give is a row of the model's embedding."""
    rows = _rows(model)
    if len(tokenizer) > rows:
        raise ModelError(f"{path}: its tokenizer has {len(tokenizer)} tokens, the model has {rows}; they differ")
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise ModelError(f"{path}: {TOKENIZER}: {token!r} has id {largest}, the model has {rows} rows; they differ")


def require_forward(path: str, model: PreTrainedModel, token: int) -> None:
    """One step of the model on a single token: what is wrong in its config shows now, not in the first update."""
    with explained(path, f"{CONFIG}, or model.attention and model.dtype"), torch.no_grad():
        ids = torch.full((1, 2), token, device=model.device)
        finite = bool(model(input_ids=ids, use_cache=False).logits.isfinite().all())
    if not finite:
        raise ModelError(
            f"{path}: the model gives numbers that are not finite on its own end token; its weights or {CONFIG} are "
            "damaged: fetch it again"
        )


def require_fixed_rotary(config: ModelConfig, described: PreTrainedConfig) -> None:
    """No rotary table changes with the length of the rows read together, as far as rows may be long in this run.

    Those of `longrope` and `dynamic` do beyond some length: a token would have other probabilities in a batch than
    alone, and other ones before and after its context has grown.
    """
    for field, kind, length in _varying_rotary(described.to_dict(), "", None):
        if length is None or config.max_context_tokens > length:
            beyond = "a length it does not state" if length is None else f"{length} tokens"
            fix = "use another model" if length is None else f"set model.max_context_tokens: {length}"
            raise ModelError(
                f"{config.path}: {CONFIG}: {field}: {kind} reads every row with another rotary table once one of the "
                f"rows beside it passes {beyond}, and model.max_context_tokens: {config.max_context_tokens} allows "
                f"that; {fix}, or take a model whose rotary table is fixed"
            )


def _varying_rotary(
    values: Mapping[str, object], path: str, length: int | None
) -> Iterator[tuple[str, str, int | None]]:
    """Field, kind and length of the switch of each rotary table that depends on the rows, however deep it is kept."""
    stated: list[Any] = [values.get(name) for name in ("original_max_position_embeddings", "max_position_embeddings")]
    length = min([int(one) for one in (*stated, length) if one], default=None)
    kind = values.get("rope_type", values.get("type"))
    if "rope" in path and isinstance(kind, str) and (kind in ("longrope", "su") or "dynamic" in kind):
        yield f"{path}rope_type", kind, length
    for name, inner in values.items():
        if isinstance(inner, Mapping):
            yield from _varying_rotary(inner, f"{path}{name}.", length)


@runtime_checkable
class Embedding(Protocol):
    """A model with a module on either side of its layers, adapted by PEFT or not."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """From tokens to states."""

    def get_output_embeddings(self) -> torch.nn.Module:
        """From states to logits."""

    def named_modules(self) -> Iterable[tuple[str, torch.nn.Module]]:
        """All modules."""


def require_untied(adapted: Embedding, setting: str) -> None:
    """No adapter on one side of a weight that is both embedding and output head: merged, it would change both."""
    tied = [adapted.get_input_embeddings(), adapted.get_output_embeddings()]
    base = [getattr(module, "get_base_layer", lambda module=module: module)() for module in tied]
    weights = [getattr(getattr(module, "original_module", module), "weight", None) for module in base]
    if weights[0] is None or weights[0] is not weights[1]:
        return
    names = {id(module): name for name, module in adapted.named_modules()}
    touched = [names.get(id(module), "") for module in tied if len(list(module.parameters())) > 1]
    if touched:
        raise ModelError(
            f"{setting}: {' and '.join(touched)} shares its weight (tie_word_embeddings), and an adapter on one side "
            "would be merged into both, into another model; leave lm_head and embed_tokens out"
        )


def end_ids(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end tokens that generation config and tokenizer name; `ModelError` for one that the model does not have."""
    generation = getattr(model, "generation_config", None)
    ends = generation.eos_token_id if generation is not None else None
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    rows = _rows(model)
    beyond = [token for token in listed if not 0 <= token < rows]
    if beyond:
        raise ModelError(
            f"{path}: {GENERATION} or {CONFIG}: eos_token_id: {beyond[0]}, the model has {rows} tokens; correct it"
        )
    return frozenset({*listed, tokenizer.eos_token_id})


def _rows(model: PreTrainedModel) -> int:
    """How many tokens the model embeds."""
    weight = cast(torch.Tensor, model.get_input_embeddings().weight)
    return int(weight.shape[0])


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


def first_line(error: BaseException) -> str:
    """The first line of an error, with the one that it announces."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
