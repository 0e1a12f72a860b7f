"""The shape of a model from its config.json alone: built on the meta device, where tensors have sizes and no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from atesd.config import ModelConfig
from atesd.forecast.arithmetic import ModelShape
from atesd.models.load import model_source
from atesd.models.model_checks import explained
from atesd.models.model_folder import ADAPTER, CONFIG, require_adapter
from atesd.models.quiet import quiet

_PLAIN = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def described_shape(config: ModelConfig) -> ModelShape:
    """The shape of `model.path`: of a folder that needs no weights, of the hub's cache, or of the hub.

    Of an adapter's folder it is that of the base, into which the adapter is merged. Raises `ModelError` as a load does.
    """
    source = model_source(config.path)
    if (Path(source) / ADAPTER).is_file():
        return described_shape(config.model_copy(update={"path": require_adapter(Path(source))}))
    local = Path(source).is_dir()
    with explained(config.path, CONFIG), quiet(), torch.device("meta"):
        described = AutoConfig.from_pretrained(
            source, revision=config.revision, local_files_only=local, trust_remote_code=False
        )
        model: Any = cast(Any, AutoModelForCausalLM).from_config(described, trust_remote_code=False)
    return shape_of(model)


def shape_of(causal_lm: nn.Module) -> ModelShape:
    """The shape of a model without an adapter, on any device; sizes that its config does not name are the usual."""
    model: Any = causal_lm
    text = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    intermediate = getattr(text, "intermediate_size", None)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return ModelShape(
        layers=int(text.num_hidden_layers),
        hidden=hidden,
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
        intermediate=intermediate if isinstance(intermediate, int) else 4 * hidden,
        vocabulary=int(text.vocab_size),
        tied=head is not None and head.weight is embedding.weight,
        qk_norm=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linears=tuple((name, m.in_features, m.out_features) for name, m in linears if m is not head),
        plain=type(model).__name__ in _PLAIN,
    )
