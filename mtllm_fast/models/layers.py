"""Encoder and decoder layers that run on packed tokens ``[T, D]``.

Each class is the Hugging Face layer with one more way to call it: with ``packed=`` the hidden states are packed
tokens, without it the layer is what it was. Parameters, names and hooks (PEFT, quantised Linears, FSDP, accelerate,
gradient checkpointing) are therefore those of the original. ``to_packed_layers`` changes the class of the layers of
an existing tower in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.m2m_100.modeling_m2m_100 import M2M100EncoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from mtllm_fast.models.linear import (
    accumulate,
    accumulates,
    gated,
    is_silu,
    joint_product,
    linear,
    onednn_serves,
    project,
)
from mtllm_fast.models.lora import idle_base
from mtllm_fast.models.norms import add_norm, norm, norm_for
from mtllm_fast.models.plain import Rows8, is_layer_norm
from mtllm_fast.ops.lora_linear import RmsNormed
from mtllm_fast.ops.rope import rope, rope_qkv
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


def _heads(
    modules: Sequence[nn.Module], normed: Tensor | Rows8, head_dim: int, source: RmsNormed | None = None
) -> list[Tensor]:
    """q, k and v: ``[T, D] -> [T, heads, hd]`` each."""
    return [y.unflatten(-1, (-1, head_dim)) for y in project(modules, normed, source)]


def _add_then_norm(
    projection: nn.Module, x: Tensor, residual: Tensor, following: nn.Module, readers: Sequence[nn.Module],
    sum_bias: Tensor | None = None,
) -> tuple[Tensor | Rows8, Tensor, RmsNormed | None]:  # fmt: skip
    """``following(s)`` for its ``readers``, a new ``s + sum_bias`` and what the former is made of; ``s = residual +
    projection(x)``."""
    projection = idle_base(projection)
    if onednn_serves(projection, x) and sum_bias is None:
        summed = linear(projection, x, plus=residual)
        return norm(following, summed), summed, None
    return add_norm(readers, following, linear(projection, x), residual, sum_bias)


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
        normed = norm(self.self_attn_layer_norm, hidden_states)
        q, k, v = _heads((attn.q_proj, attn.k_proj, attn.v_proj), normed, attn.head_dim)
        attended = _attend(q, k, v, attn, attn.dropout, packed)
        if self.training and (self.dropout > 0 or self.activation_dropout > 0):
            hidden_states = self._with_dropout(hidden_states, attended)
        else:
            hidden_states = self._fused(hidden_states, attended)
        if hidden_states.dtype == torch.float16:  # as the original: residuals of NLLB overflow fp16
            limit = torch.finfo(torch.float16).max - 1000
            hidden_states = hidden_states.clamp(-limit, limit)
        return hidden_states

    def _fused(self, residual: Tensor, attended: Tensor) -> Tensor:
        """What follows attention. fc2's product goes onto the sum in place where it can, its bias ahead of it."""
        following, before = self.final_layer_norm, self.self_attn.out_proj
        trained = (residual, *before.parameters(), *following.parameters())
        in_place = is_layer_norm(following) and accumulates(self.fc2, attended, *trained)  # a hook may keep the sum
        bias = self.fc2.bias if in_place else None
        normed, summed, _ = _add_then_norm(before, attended, residual, following, (self.fc1,), bias)
        inner = linear(self.fc1, normed, activation=self.activation_fn)
        return accumulate(self.fc2, inner, summed) if in_place else linear(self.fc2, inner, plus=summed)

    def _with_dropout(self, residual: Tensor, attended: Tensor) -> Tensor:
        residual = residual + F.dropout(self.self_attn.out_proj(attended), self.dropout)
        inner = linear(self.fc1, norm(self.final_layer_norm, residual), activation=self.activation_fn)
        return residual + F.dropout(self.fc2(F.dropout(inner, self.activation_dropout)), self.dropout)


class _PackedDecoderLayer:
    """Pre-RMSNorm layer with RoPE, grouped-query attention and a gated MLP; optional q/k norms (Qwen3)."""

    def forward(self, hidden_states: Tensor, *args: Any, packed: PackedContext | None = None, **kwargs: Any) -> Tensor:
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        attended = self._attention(hidden_states, packed)
        following, mlp = self.post_attention_layernorm, self.mlp
        readers = (mlp.gate_proj, mlp.up_proj) if is_silu(mlp.act_fn) else ()
        normed, summed, source = _add_then_norm(self.self_attn.o_proj, attended, hidden_states, following, readers)
        inner, made_of = gated(mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn, normed, source)
        # The sum may be written over if only our norm has seen it: a hook may have kept it.
        if source is not None and accumulates(mlp.down_proj, inner) and mlp.down_proj.bias is None:
            return accumulate(mlp.down_proj, inner, summed)
        return linear(mlp.down_proj, inner, plus=summed, source=made_of)

    def _attention(self, hidden_states: Tensor, packed: PackedContext) -> Tensor:
        """What ``o_proj`` projects, ``[T, H * hd]``."""
        attn = self.self_attn
        _check_window(attn, packed.max_seqlen)
        q, k, v = self._qkv(hidden_states, packed) if packed.qkv is None else packed.qkv
        return _attend(q, k, v, attn, attn.attention_dropout, packed)

    def _qkv(self, hidden_states: Tensor, packed: PackedContext) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.self_attn
        modules = (attn.q_proj, attn.k_proj, attn.v_proj)
        normed, source = norm_for(modules, self.input_layernorm, hidden_states)
        if hasattr(attn, "q_norm"):
            q, k, v = _heads(modules, normed, attn.head_dim, source)
            return *rope(norm(attn.q_norm, q), norm(attn.k_norm, k), packed.cos, packed.sin), v
        whole = joint_product(modules, normed, source)
        if whole is None:
            q, k, v = (linear(module, normed).unflatten(-1, (-1, attn.head_dim)) for module in modules)
            return *rope(q, k, packed.cos, packed.sin), v
        heads, kv_heads = (attn.config.num_attention_heads, attn.config.num_key_value_heads)
        return rope_qkv(whole, packed.cos, packed.sin, num_heads=heads, num_kv_heads=kv_heads)


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
