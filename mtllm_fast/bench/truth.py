"""The oracle of the benchmark: the method's forward in float64, written from its definition and from nothing else.

Texts run packed without any padding, and each weight is upcast for the one product that needs it, so the truth of an
8B stack costs one layer's extra memory. No Hugging Face forward is called: a mask that silently stayed causal, a
wrong position or a missed rotary scaling in any peer shows up as an error here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtllm_fast.bench.sizes import Stack
from mtllm_fast.bench.workloads import IdArray, flat


def _linear(x_TK: Tensor, module: Any, adapters: bool = True) -> Tensor:
    """``x Wᵀ + b``, plus ``s (x Aᵀ) Bᵀ`` where the module is PEFT's LoRA and adapters are on; no dropout."""
    base = getattr(module, "base_layer", module)
    y = F.linear(x_TK, base.weight.double(), None if base.bias is None else base.bias.double())
    if base is module or not adapters:
        return y
    for name in module.active_adapters:
        a, b = module.lora_A[name].weight.double(), module.lora_B[name].weight.double()
        y = y + module.scaling[name] * F.linear(F.linear(x_TK, a), b)
    return y


def _layer_norm(x_Td: Tensor, module: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x_Td, (x_Td.shape[-1],), module.weight.double(), module.bias.double(), module.eps)


def _rms_norm(x_TD: Tensor, module: Any) -> Tensor:
    rstd = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return x_TD * rstd * module.weight.double()


def _attention(q_THk: Tensor, k_TGk: Tensor, v_TGk: Tensor, lengths: list[int]) -> Tensor:
    """Each text attends to all of itself; a group of query heads shares one key/value head. Returns [T, H*hd]."""
    group = q_THk.shape[1] // k_TGk.shape[1]
    outputs = []
    for q, k, v in zip(q_THk.split(lengths), k_TGk.split(lengths), v_TGk.split(lengths), strict=True):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhk,lhk->hql", q, k) / math.sqrt(q.shape[-1])
        outputs.append(torch.einsum("hql,lhk->qhk", scores.softmax(-1), v).flatten(1))
    return torch.cat(outputs)


def _encoder(encoder: Any, ids_T: Tensor, positions_T: Tensor, lengths: list[int]) -> Tensor:
    config = encoder.config
    width, heads = config.d_model, config.encoder_attention_heads
    scale = math.sqrt(width) if config.scale_embedding else 1.0
    half = width // 2
    rates = torch.exp(torch.arange(half, device=ids_T.device, dtype=torch.float64) * (-math.log(10000) / (half - 1)))
    angles = (positions_T + 2).double()[:, None] * rates
    x = F.embedding(ids_T, encoder.embed_tokens.weight).double() * scale + torch.cat([angles.sin(), angles.cos()], -1)
    for layer in encoder.layers:
        h = _layer_norm(x, layer.self_attn_layer_norm)
        q, k, v = (
            _linear(h, getattr(layer.self_attn, name)).unflatten(-1, (heads, -1))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = x + _linear(_attention(q, k, v, lengths), layer.self_attn.out_proj)
        h = _layer_norm(x, layer.final_layer_norm)
        x = x + _linear(F.relu(_linear(h, layer.fc1)), layer.fc2)
    return _layer_norm(x, encoder.layer_norm)


def _rotate(x_THk: Tensor, cos_Tk: Tensor, sin_Tk: Tensor) -> Tensor:
    first, second = x_THk.chunk(2, dim=-1)
    return x_THk * cos_Tk[:, None] + torch.cat([-second, first], -1) * sin_Tk[:, None]


def _llm_layer(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int], adapters: bool) -> Tensor:
    linear = functools.partial(_linear, adapters=adapters)
    h = _rms_norm(x, layer.input_layernorm)
    q, k, v = (
        linear(h, getattr(layer.self_attn, name)).unflatten(-1, (-1, cos.shape[-1]))
        for name in ("q_proj", "k_proj", "v_proj")
    )
    attended = _attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, lengths)
    x = x + linear(attended, layer.self_attn.o_proj)
    h = _rms_norm(x, layer.post_attention_layernorm)
    return x + linear(F.silu(linear(h, layer.mlp.gate_proj)) * linear(h, layer.mlp.up_proj), layer.mlp.down_proj)


def _llm(llm: Any, x_TD: Tensor, positions_T: Tensor, lengths: list[int], adapters: bool = True) -> Tensor:
    rotary = llm.rotary_emb
    angles = positions_T.double()[:, None] * rotary.inv_freq.double()
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
    # With a gradient, upcast weights would all live until the backward: a layer makes its own again.
    run: Any = functools.partial(checkpoint, _llm_layer, use_reentrant=False) if x_TD.requires_grad else _llm_layer
    x = x_TD
    for layer in llm.layers:
        x = run(layer, x, cos, sin, lengths, adapters)
    return _rms_norm(x, llm.norm)


def _packed(texts: Sequence[IdArray], device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Ids and positions [T], and the lengths."""
    lengths = [len(text) for text in texts]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    return torch.from_numpy(flat(texts)[0]).to(device), positions, lengths


def _pooled(hidden_TD: Tensor, lengths: list[int]) -> Tensor:
    return torch.stack([part.mean(0) for part in hidden_TD.split(lengths)])


@torch.inference_mode()
def true_embeddings(stack: Stack, texts: Sequence[IdArray]) -> Tensor:
    """Mean-pooled embeddings float64 [B, D]: ``mean_t RMSNorm(LLM(W_up Encoder(ids)))``.

    Args:
        stack: an NLLB encoder, an up-projection and a Llama, in any dtype.
        texts: token ids of each text, ``[language code] tokens </s>``.
    """
    ids, positions, lengths = _packed(texts, stack.device)
    encoded = _encoder(stack.encoder, ids, positions, lengths)
    return _pooled(_llm(stack.llm, _linear(encoded, stack.up_proj), positions, lengths), lengths)


class Step(NamedTuple):
    """What one training step comes to."""

    loss: float
    gradients: dict[str, Tensor]


def true_step(
    stack: Stack, texts: Sequence[IdArray], llm_texts: Sequence[IdArray], trained: Mapping[str, Tensor]
) -> Step:
    """One step of self-distillation: ``mean over [B, D] of (student - teacher)²`` and its gradients, in float64 (the
    gradients are rounded to the dtypes of ``trained`` at the very end).

    Args:
        stack: its ``llm`` with PEFT's LoRA; the teacher is that LLM without it.
        texts: the encoder's token ids, which the student reads.
        llm_texts: the LLM's, which the teacher reads.
        trained: the parameters by name.
    """
    with torch.no_grad():
        ids, positions, lengths = _packed(llm_texts, stack.device)
        embedded = F.embedding(ids, stack.llm.embed_tokens.weight).double()
        teacher = _pooled(_llm(stack.llm, embedded, positions, lengths, adapters=False), lengths)
        ids, positions, lengths = _packed(texts, stack.device)
        encoded = _encoder(stack.encoder, ids, positions, lengths)
    student = _pooled(_llm(stack.llm, _linear(encoded, stack.up_proj), positions, lengths), lengths)
    loss = (student - teacher).square().mean()
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return Step(float(loss), dict(zip(trained, gradients, strict=True)))
