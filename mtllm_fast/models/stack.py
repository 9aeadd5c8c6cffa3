"""The way into the LLM: up-projection, and q, k and v of its first layer by the fused op where that is right and pays.

Training absorbs the live weights on every step from the break-even number of tokens on; a LoRA on q, k or v is a branch
on the normed x beside the absorbed base. Inference absorbs after ``fuse()`` (``fusing.py``). In every other case, and
for modules that are not what the op expects, the modules run one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtllm_fast.core.dispatch import autocast_dtype, needs_grad
from mtllm_fast.models.lora import base_linear, is_lora, why_not_simple_lora
from mtllm_fast.models.plain import is_hooked, is_rms_norm, why_not_linear
from mtllm_fast.models.towers import rope_tables
from mtllm_fast.ops.stack_projection import StackWeights, stack_projection
from mtllm_fast.ops.stack_projection.composite import break_even_tokens, building_cost, splits
from mtllm_fast.ops.stack_projection.reference import apply_rope, rms_norm
from mtllm_fast.packing import PackedLayout

if TYPE_CHECKING:
    from mtllm_fast.models.modeling import MTLLM

Rope = tuple[Tensor, Tensor]
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Entry:
    """What the layers start from: x ``[T, D]``, and, where they are known already, q, k, v and the rotary tables."""

    x: Tensor
    qkv: QKV | None = None
    rope: Rope | None = None


def enter(model: MTLLM, encoded_Td: Tensor, layout: PackedLayout) -> Entry:
    """From the encoder's states to the first layer of a packed LLM."""
    composite = model.composite(encoded_Td)
    if composite is None and not _absorbs_live_weights(model, encoded_Td):
        return Entry(model.up_proj(encoded_Td))
    attn, norm = model.llm2vec.layers[0].self_attn, model.llm2vec.layers[0].input_layernorm
    rope = rope_tables(model.llm2vec, encoded_Td.to(compute_dtype(encoded_Td)), layout.position_ids)
    x, q, k, v = stack_projection(encoded_Td, stack_weights(model), *rope, composite=composite, form="absorbed")
    deltas = _lora_deltas((attn.q_proj, attn.k_proj, attn.v_proj), norm, x)
    if deltas is not None:
        q, k, v = (
            t if delta is None else t + (apply_rope(_heads(delta, t), *rope) if rotated else _heads(delta, t))
            for t, delta, rotated in zip((q, k, v), deltas, (True, True, False), strict=True)
        )
    return Entry(x, (q, k, v), rope)


def stack_weights(model: MTLLM) -> StackWeights:
    """The live parameters of the stage. Ask ``why_not_fusable`` first."""
    layer = model.llm2vec.layers[0]
    attn = layer.self_attn
    q, k, v = (base_linear(getattr(attn, name)) for name in ("q_proj", "k_proj", "v_proj"))
    has_norms = hasattr(attn, "q_norm")
    return StackWeights(
        up=model.up_proj.weight, up_bias=model.up_proj.bias,
        norm=layer.input_layernorm.weight, eps=layer.input_layernorm.variance_epsilon, head_dim=attn.head_dim,
        q=q.weight, k=k.weight, v=v.weight, q_bias=q.bias, k_bias=k.bias, v_bias=v.bias,
        q_norm=attn.q_norm.weight if has_norms else None, k_norm=attn.k_norm.weight if has_norms else None,
    )  # fmt: skip


def why_not_fusable(model: MTLLM) -> str | None:
    """Why the modules of the stage cannot be read as plain weights, or None if they can."""
    if not model.packed_llm:
        return f"{type(model.llm2vec).__name__} has no packed layers"
    layer = model.llm2vec.layers[0]
    attn = layer.self_attn
    norms = [layer.input_layernorm] + [getattr(attn, name) for name in ("q_norm", "k_norm") if hasattr(attn, name)]
    if is_hooked(layer) or not all(map(is_rms_norm, norms)):
        return "something has hooked into the first layer, or its norms are not the family's own"
    linears = {"up_proj": model.up_proj} | {name: getattr(attn, name) for name in ("q_proj", "k_proj", "v_proj")}
    for name, module in linears.items():
        reason = _why_not_plain(module, allow_lora=name != "up_proj" and not hasattr(attn, "q_norm"))
        if reason:
            return f"{name} {reason}"
    return None


def _why_not_plain(module: nn.Module, allow_lora: bool) -> str | None:
    base: Any = module
    if allow_lora and is_lora(module):
        base = module.base_layer
        if reason := why_not_simple_lora(module):
            return reason
        if is_hooked(module):
            return "is hooked"
    return why_not_linear(base) or ("is not loaded" if base.weight.is_meta else None)


def _absorbs_live_weights(model: MTLLM, encoded_Td: Tensor) -> bool:
    """In training, where a composite pays. Evaluation without ``fuse()`` never does: its results would depend on T."""
    if not model.training or why_not_fusable(model) is not None:
        return False
    weights = stack_weights(model)
    # A layer that is checkpointed with re-entrance differentiates what it is given a second time. And how a compiled
    # graph multiplies halves into float32 on a GPU is not known to be fast.
    layer = model.llm2vec.layers[0]
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", False)
    if (reentrant and layer.gradient_checkpointing) or (torch.compiler.is_compiling() and splits(weights.q)):
        return False
    enough = break_even_tokens(weights.up.shape[1], weights.up.shape[0], building_cost(weights.q))
    return encoded_Td.shape[0] >= enough and differentiates(model, encoded_Td)


def differentiates(model: MTLLM, encoded_Td: Tensor) -> bool:
    """Whether autograd records the stage."""
    if not torch.is_grad_enabled():
        return False
    layer = model.llm2vec.layers[0]
    modules = (model.up_proj, layer.input_layernorm, layer.self_attn)
    return needs_grad(encoded_Td, *(parameter for module in modules for parameter in module.parameters()))


def compute_dtype(states: Tensor) -> torch.dtype:
    """Of the stage's products: autocast's where it is on."""
    return autocast_dtype(states) or states.dtype


def _lora_deltas(modules: tuple[nn.Module, ...], norm: nn.Module, x: Tensor) -> list[Tensor | None] | None:
    """What the active adapters add to q, k and v, ``[T, H * hd]`` each; None where there is none."""
    if not any(is_lora(m) and not m.merged and not m.disable_adapters for m in modules):
        return None
    normed = rms_norm(x, norm.weight, norm.variance_epsilon)
    return [_lora_delta(module, normed) if is_lora(module) else None for module in modules]


def _lora_delta(module: Any, normed: Tensor) -> Tensor | None:
    """Σ scaling · B A dropout(x) over the active adapters, as PEFT's own forward computes it."""
    if module.merged or module.disable_adapters:
        return None
    total: Tensor | None = None
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        lora_a, lora_b = module.lora_A[name], module.lora_B[name]
        inputs = module.lora_dropout[name](module._cast_input_dtype(normed, lora_a.weight.dtype))
        delta = lora_b(lora_a(inputs)) * module.scaling[name]
        total = delta if total is None else total + delta
    return None if total is None else total.to(normed.dtype)


def _heads(delta: Tensor, like: Tensor) -> Tensor:
    return delta.view(like.shape)
