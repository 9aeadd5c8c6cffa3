"""Encoder and decoder layers that run on packed tokens ``[T, D]``.

Each class is the Hugging Face layer with one more way to call it: with ``packed=`` the hidden states are packed
tokens, without it the layer is what it was. Parameters, names and hooks (PEFT, quantised Linears, FSDP, accelerate,
gradient checkpointing) are therefore those of the original. ``to_packed_layers`` changes the class of the layers of
an existing tower in place.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.m2m_100.modeling_m2m_100 import M2M100EncoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.models.linear import is_hooked, linear
from mtllm_fast.ops.stack_projection.reference import apply_rope
from mtllm_fast.ops.varlen_attention import varlen_attention


@dataclass(frozen=True)
class PackedContext:
    """What every layer of a tower needs beside the hidden states."""

    cu_seqlens: Tensor
    max_seqlen: int
    attention_backend: str
    dead_tail: bool = False
    cos: Tensor | None = None  # [T, hd], the LLM only
    sin: Tensor | None = None
    qkv: tuple[Tensor, Tensor, Tensor] | None = None  # of this layer, rotated, when they are known already

    def to(self, device: torch.device, non_blocking: bool = False) -> PackedContext:
        """Lets accelerate's hooks carry the context along when layers live on several devices."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{k: v.to(device, non_blocking=non_blocking) for k, v in moved.items()})


def _attend(q: Tensor, k: Tensor, v: Tensor, attention: nn.Module, dropout_p: float, packed: PackedContext) -> Tensor:
    """Attention within each sentence: q ``[T, H, hd]``, k and v ``[T, KV, hd]`` -> ``[T, H * hd]``."""
    out = varlen_attention(
        q,
        k,
        v,
        packed.cu_seqlens,
        packed.max_seqlen,
        scale=attention.scaling,
        dropout_p=dropout_p if attention.training else 0.0,
        dead_tail=packed.dead_tail,
        backend=packed.attention_backend,
    )
    return out.flatten(1)


def _heads(projection: nn.Module, normed: Tensor, head_dim: int) -> Tensor:
    """``[T, D] -> [T, heads, hd]``."""
    return linear(projection, normed).unflatten(-1, (-1, head_dim))


class PackedM2M100EncoderLayer(M2M100EncoderLayer):
    """Pre-LayerNorm encoder layer of M2M-100 and NLLB."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed: PackedContext | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if packed is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        attn = self.self_attn
        normed = self.self_attn_layer_norm(hidden_states)
        q, k, v = (_heads(p, normed, attn.head_dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        attended = _attend(q, k, v, attn, attn.dropout, packed)
        hidden_states = self._add(hidden_states, attn.out_proj, attended)

        inner = linear(self.fc1, self.final_layer_norm(hidden_states), activation=self.activation_fn)
        inner = F.dropout(inner, self.activation_dropout, self.training)
        hidden_states = self._add(hidden_states, self.fc2, inner)
        if hidden_states.dtype == torch.float16:  # as the original: residuals of NLLB overflow fp16
            limit = torch.finfo(torch.float16).max - 1000
            hidden_states = hidden_states.clamp(-limit, limit)
        return hidden_states

    def _add(self, residual: Tensor, projection: nn.Module, x: Tensor) -> Tensor:
        """``residual + dropout(projection(x))``."""
        if self.training and self.dropout > 0:
            return residual + F.dropout(projection(x), self.dropout)
        return linear(projection, x, plus=residual)


_RMS_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether the module is a family's own RMSNorm that nothing has wrapped, replaced or hooked into."""
    return type(module) in _RMS_NORMS and not is_hooked(module)


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``; what is no plain RMSNorm is called as it is."""
    if not is_rms_norm(norm):
        return norm(x)
    if x.device.type == "cpu" and not (watched(x, norm.weight) or needs_grad(x, norm.weight)):
        return _rms_norm_on_cpu(x, norm.weight, norm.variance_epsilon)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rms_norm_on_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``F.rms_norm`` in half of the passes over memory that PyTorch's CPU kernels make of it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    rstd = torch.rsqrt(norm.square_() / x.shape[-1] + eps)
    return (x * weight).mul_(rstd) if x.dtype == dtype else (x.to(dtype) * rstd).mul_(weight).to(x.dtype)


class _PackedDecoderLayer:
    """Pre-RMSNorm layer with RoPE, grouped-query attention and a gated MLP; optional q/k norms (Qwen3)."""

    def forward(self, hidden_states: Tensor, *args: Any, packed: PackedContext | None = None, **kwargs: Any) -> Tensor:
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        attended = self._attention(hidden_states, packed)
        hidden_states = linear(self.self_attn.o_proj, attended, plus=hidden_states)
        mlp = self.mlp
        normed = rms_norm(self.post_attention_layernorm, hidden_states)
        gated = linear(mlp.up_proj, normed, times=linear(mlp.gate_proj, normed, activation=mlp.act_fn))
        return linear(mlp.down_proj, gated, plus=hidden_states)

    def _attention(self, hidden_states: Tensor, packed: PackedContext) -> Tensor:
        """What ``o_proj`` projects, ``[T, H * hd]``."""
        attn = self.self_attn
        _check_window(attn, packed.max_seqlen)
        q, k, v = self._qkv(hidden_states, packed) if packed.qkv is None else packed.qkv
        return _attend(q, k, v, attn, attn.attention_dropout, packed)

    def _qkv(self, hidden_states: Tensor, packed: PackedContext) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.self_attn
        normed = rms_norm(self.input_layernorm, hidden_states)
        q, k, v = (_heads(p, normed, attn.head_dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        if hasattr(attn, "q_norm"):
            q, k = rms_norm(attn.q_norm, q), rms_norm(attn.k_norm, k)
        return apply_rope(q, packed.cos, packed.sin), apply_rope(k, packed.cos, packed.sin), v


def _check_window(attn: nn.Module, max_seqlen: int) -> None:
    window = getattr(attn, "sliding_window", None) or getattr(attn.config, "sliding_window", None)
    windowed = getattr(attn, "layer_type", None) in (None, "sliding_attention")
    if window is not None and windowed and max_seqlen > window:
        raise ValueError(
            f"a sentence of up to max_seqlen={max_seqlen} tokens exceeds the LLM's sliding window of {window}; "
            f"truncate with max_length <= {window}, or pass the max_seqlen of a packed batch"
        )


class PackedLlamaDecoderLayer(_PackedDecoderLayer, LlamaDecoderLayer):
    """Llama's layer."""


class PackedMistralDecoderLayer(_PackedDecoderLayer, MistralDecoderLayer):
    """Mistral's layer; full attention, so sentences must fit its sliding window."""


class PackedQwen2DecoderLayer(_PackedDecoderLayer, Qwen2DecoderLayer):
    """Qwen2's layer: q, k and v have biases."""


class PackedQwen3DecoderLayer(_PackedDecoderLayer, Qwen3DecoderLayer):
    """Qwen3's layer: RMSNorm on each head of q and k."""


_PACKED_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    M2M100EncoderLayer: PackedM2M100EncoderLayer,
    LlamaDecoderLayer: PackedLlamaDecoderLayer,
    MistralDecoderLayer: PackedMistralDecoderLayer,
    Qwen2DecoderLayer: PackedQwen2DecoderLayer,
    Qwen3DecoderLayer: PackedQwen3DecoderLayer,
}


def to_packed_layers(layers: nn.ModuleList) -> bool:
    """Give each layer its packed class, in place; False (and no change) when one is of another family."""
    packed_classes = tuple(_PACKED_CLASS.values())
    if not all(type(layer) in _PACKED_CLASS or isinstance(layer, packed_classes) for layer in layers):
        return False
    for layer in layers:
        if not isinstance(layer, packed_classes):
            layer.__class__ = _PACKED_CLASS[type(layer)]
    return True


# model_type of the LLMs whose layers are above.
PACKED_LLMS = ("llama", "mistral", "qwen2", "qwen3")
PACKED_LAYER_NAMES = tuple(c.__name__ for c in _PACKED_CLASS.values())
