"""The weights of a dense Llama, Qwen2 or Qwen3 model, laid out for decoding, with a LoRA adapter where there is one.

They are read anew for every call of `sample`: nothing here outlives an optimiser step. Up to a limit of bytes they are
copied into the layout that multiplies fastest, a float32 adapter merged: queries, keys and values in one matrix, and on
a CPU the blocked layout of oneDNN, whose products of a few rows are up to twice as fast as those of plain matrices on
AMD processors. Beyond the limit they are used as they are, with the adapter beside them; so is an adapter on bfloat16
weights, whose rounding would swallow it. It computes as in training (`RoundedLinear`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atesd.models.processor import RoundedLinear

_FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Their tables do not depend on how long a sequence has become; those of `dynamic` and `longrope` do.
_ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
_COPY_LIMIT = 2**30  # bytes of weights that are copied; ours: a copy costs about as much as three steps of decoding
_PACKED_WORK = 2**21  # multiplications below which a blocked product is no faster; measured


@runtime_checkable
class _Norm(Protocol):
    weight: Tensor


@runtime_checkable
class _Attention(Protocol):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module


@runtime_checkable
class _FeedForward(Protocol):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module


@runtime_checkable
class _Block(Protocol):
    """One layer of the families, as transformers names its parts."""

    self_attn: _Attention
    mlp: _FeedForward
    input_layernorm: _Norm
    post_attention_layernorm: _Norm


@runtime_checkable
class _Decoder(Protocol):
    embed_tokens: nn.Module
    norm: _Norm
    layers: Sequence[_Block]


@runtime_checkable
class _CausalLM(Protocol):
    model: _Decoder
    lm_head: nn.Module


@dataclass(frozen=True, slots=True)
class Projection:
    """y = x W^T + b of one or several linear layers side by side, plus a low-rank part (x A^T) B^T in its own dtype."""

    parts: tuple[tuple[Tensor, Tensor | None], ...]  # W [out, in], b [out] or None
    packed: bool = False  # there is one part, and its W is in the layout of oneDNN
    down: Tensor | None = None  # A [ranks, in]
    up: Tensor | None = None  # B [all outs, ranks], times the adapter's scale

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., all outs]."""
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, *self.parts[0], "none", [], "")
        elif len(self.parts) == 1:
            y = F.linear(x, *self.parts[0])
        else:
            y = torch.cat([F.linear(x, weight, bias) for weight, bias in self.parts], -1)
        if self.down is None or self.up is None:
            return y
        return (y + F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)).to(y.dtype)


@dataclass(frozen=True, slots=True)
class Layer:
    """One block: attention and gated feed-forward, each after a norm."""

    attention_norm: Tensor
    qkv: Projection
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]; Qwen3
    attention_out: Projection
    forward_norm: Tensor
    gate_up: Projection
    forward_out: Projection


@dataclass(frozen=True, slots=True)
class Network:
    """What a decoder needs of a model: its tensors at this moment, and its sizes."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Projection
    rotary: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    epsilon: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of the KV cache."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device


def unsupported(model: nn.Module) -> str | None:
    """Why this model cannot be decoded by the builtin engine, in a few words; None: it can."""
    causal: Any = _causal_lm(model)
    kind = _kind(causal)
    name = kind.__name__
    if name not in _FAMILIES or not kind.__module__.startswith("transformers.models."):
        return f"{name} is none of {', '.join(_FAMILIES)}"
    config = causal.config
    rotary = config.rope_parameters or {}
    head_dim = causal.model.layers[0].self_attn.head_dim
    dtypes = {p.dtype for n, p in causal.named_parameters() if "lora_" not in n}
    reasons = {
        "layers with a sliding window": set(getattr(config, "layer_types", None) or ()) - {"full_attention"},
        f"rotary type {rotary.get('rope_type')}": rotary.get("rope_type", "default") not in _ROTARY_TYPES,
        "partly rotated heads": 2 * causal.model.rotary_emb.inv_freq.numel() != head_dim,
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        f"attention {config._attn_implementation}": config._attn_implementation not in _ATTENTIONS,
        "weights of several types": len(dtypes) != 1 or not all(dtype.is_floating_point for dtype in dtypes),
        "weights on several devices": len({p.device for p in causal.parameters()}) != 1,
        "an embedding with a largest norm": getattr(causal.model.embed_tokens, "max_norm", None) is not None,
        "hooks on its modules": any(any(map(_acts, _hooks(m))) for m in model.modules()),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or next((why for module in _read_by_us(causal) if (why := _foreign(module)) is not None), None)


def read_network(model: nn.Module, rows: int) -> Network:
    """The network of a model that `unsupported` has nothing against, as its weights are now, to decode `rows` together.

    Call without gradient.
    """
    causal: Any = _causal_lm(model)
    config, backbone = causal.config, causal.model
    blocks = backbone.layers[: config.num_hidden_layers]
    attention = blocks[0].self_attn
    layout = _Layout(rows, sum(p.nbytes for p in causal.parameters()) <= _COPY_LIMIT)
    return Network(
        embedding=backbone.embed_tokens.weight,
        layers=tuple(_layer(block, config.num_attention_heads, config.num_key_value_heads, layout) for block in blocks),
        norm=backbone.norm.weight,
        head=layout.projection([causal.lm_head]),
        rotary=backbone.rotary_emb,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=float(attention.scaling),
        epsilon=torch.tensor(config.rms_norm_eps, dtype=torch.float32, device=backbone.norm.weight.device),
    )


def _causal_lm(model: nn.Module) -> nn.Module:
    wrapped: Any = model
    inner: nn.Module = wrapped.get_base_model() if hasattr(model, "peft_config") else model
    return inner


def _layer(block: _Block, heads: int, kv_heads: int, layout: _Layout) -> Layer:
    attention, forward = block.self_attn, block.mlp
    qk_norm = None
    if hasattr(attention, "q_norm") and hasattr(attention, "k_norm"):
        norms = [attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(kv_heads, -1)]
        qk_norm = torch.cat(norms)
    return Layer(
        attention_norm=block.input_layernorm.weight,
        qkv=layout.projection([attention.q_proj, attention.k_proj, attention.v_proj]),
        qk_norm=qk_norm,
        attention_out=layout.projection([attention.o_proj]),
        forward_norm=block.post_attention_layernorm.weight,
        gate_up=layout.projection([forward.gate_proj, forward.up_proj]),
        forward_out=layout.projection([forward.down_proj]),
    )


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear layer and the adapter that acts on it now."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None

    def merged(self) -> Tensor:
        if self.down is None or self.up is None:
            return self.weight
        return torch.addmm(self.weight, self.up, self.down)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """A and B; of rank 0 where there is no adapter."""
        if self.down is None or self.up is None:
            return self.weight.new_zeros(0, self.weight.shape[1]), self.weight.new_zeros(len(self.weight), 0)
        return self.down, self.up


@dataclass(frozen=True, slots=True)
class _Layout:
    """How weights are laid out for batches of `rows`: copied into one matrix, or left where they are."""

    rows: int
    copy: bool

    def projection(self, modules: Sequence[nn.Module]) -> Projection:
        """One or several linear layers of the same input."""
        linears = [_linear(module) for module in modules]
        if not self.copy:
            return _beside(linears)
        if linears[0].weight.dtype == torch.float32:
            linears = [_Linear(linear.merged(), linear.bias) for linear in linears]
        joined = linears[0] if len(linears) == 1 else _joined(linears)
        beside = _beside([joined])
        if not self._worth_packing(joined.weight):
            return beside
        packed = torch.ops.mkldnn._reorder_linear_weight(joined.weight, self.rows)
        return replace(beside, parts=((packed, joined.bias),), packed=True)

    def _worth_packing(self, weight: Tensor) -> bool:
        x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere neither tried nor timed
        mkldnn = x86 and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        return (
            mkldnn
            and weight.device.type == "cpu"
            and _has_products(weight.dtype)
            and self.rows * weight.numel() >= _PACKED_WORK
        )


def _has_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies such matrices; bfloat16 only where it does so for plain ones too: the same sums."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _beside(linears: Sequence[_Linear]) -> Projection:
    """The layers as they are, their adapters side by side too."""
    parts = tuple((linear.weight, linear.bias) for linear in linears)
    if all(linear.down is None for linear in linears):
        return Projection(parts)
    downs, ups = zip(*(linear.low_rank() for linear in linears), strict=True)
    return Projection(parts, False, torch.cat(downs), torch.block_diag(*ups))  # type: ignore[no-untyped-call]


def _joined(linears: Sequence[_Linear]) -> _Linear:
    """One layer that gives what these give, one after another."""
    bias = None
    if any(linear.bias is not None for linear in linears):
        zeros = [linear.weight.new_zeros(len(linear.weight)) for linear in linears]
        bias = torch.cat([z if linear.bias is None else linear.bias for z, linear in zip(zeros, linears, strict=True)])
    weight = torch.cat([linear.weight for linear in linears])
    beside = _beside(linears)
    return _Linear(weight, bias, beside.down, beside.up)


def _linear(module: nn.Module) -> _Linear:
    """The layer with its active adapters side by side, as PEFT adds them."""
    if _kind(module) is nn.Linear:
        return _Linear(module.weight, module.bias)  # type: ignore[arg-type]
    adapted: Any = module
    base, names = adapted.base_layer, [name for name in adapted.active_adapters if name in adapted.lora_A]
    if adapted.disable_adapters or adapted.merged or not names:
        return _Linear(base.weight, base.bias)
    down = torch.cat([adapted.lora_A[name].weight for name in names])
    up = torch.cat([adapted.lora_B[name].weight * adapted.scaling[name] for name in names], 1)
    if all(isinstance(adapted.lora_A[name], RoundedLinear) for name in names):
        down, up = down.to(base.weight.dtype), up.to(base.weight.dtype)
    return _Linear(base.weight, base.bias, down, up)


def _hooks(module: nn.Module) -> Iterable[Callable[..., object]]:
    return (*module._forward_pre_hooks.values(), *module._forward_hooks.values())


def _acts(hook: Callable[..., object]) -> bool:
    """Whether a hook may change what is computed.

    Those that only ask for the embedding's gradient do not, nor those that gather divided weights: they are whole here.
    """
    marks = ("make_inputs_require_grads", "make_inputs_require_grad")  # of transformers and of PEFT
    home = hook.__module__
    asks = home.partition(".")[0] in ("transformers", "peft") and getattr(hook, "__name__", "") in marks
    return not (asks or home.startswith("torch.distributed.fsdp."))


def _kind(module: object) -> type:
    """The class of a module, whether its weights are divided over ranks or not."""
    kind = type(module)  # FSDP2 makes a class above the module's own; to import it takes seconds
    return kind.__mro__[2] if kind.__module__.startswith("torch.distributed.fsdp.") else kind


def _read_by_us(causal: _CausalLM) -> list[object]:
    """Every module whose tensors the builtin engine reads without calling it."""
    found: list[object] = [causal.model.embed_tokens, causal.lm_head, causal.model.norm]
    for block in causal.model.layers:
        attention, forward = block.self_attn, block.mlp
        found += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        found += [forward.gate_proj, forward.up_proj, forward.down_proj]
        found += [block.input_layernorm, block.post_attention_layernorm]
        found += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return found


def _foreign(module: object) -> str | None:
    """What is unusual about a module; None: a plain linear layer, embedding or norm, or one with a plain adapter."""
    kind = _kind(module)
    norm = kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.models.")
    if kind in (nn.Linear, nn.Embedding) or norm:
        return None
    adapted: Any = module
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear") or type(
        adapted.base_layer
    ) is not nn.Linear:
        return f"a {kind.__name__} of {kind.__module__}"
    variants = bool(adapted.lora_variant) or adapted.fan_in_fan_out or adapted.training or adapted.merged
    biased = any(layer.bias is not None for layer in adapted.lora_B.values())
    return "an adapter that is not plain LoRA" if variants or biased else None
