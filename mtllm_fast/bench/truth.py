"""The oracle of the benchmark: the method's forward in float64, written from its definition and from nothing else.

Texts run packed without any padding, and each weight is upcast for the one product that needs it, so the truth of an
8B stack costs one layer's extra memory. No Hugging Face forward is called: a mask that silently stayed causal, a
wrong position or a missed rotary scaling in any peer shows up as an error here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtllm_fast.bench.sizes import Stack
from mtllm_fast.bench.workloads import IdArray, flat


def _linear(x_TK: Tensor, module: nn.Linear) -> Tensor:
    bias = None if module.bias is None else module.bias.double()
    return F.linear(x_TK, module.weight.double(), bias)


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


def _llm(llm: Any, x_TD: Tensor, positions_T: Tensor, lengths: list[int]) -> Tensor:
    rotary = llm.rotary_emb
    angles = positions_T.double()[:, None] * rotary.inv_freq.double()
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
    head_dim = cos.shape[-1]
    x = x_TD
    for layer in llm.layers:
        h = _rms_norm(x, layer.input_layernorm)
        q, k, v = (
            _linear(h, getattr(layer.self_attn, name)).unflatten(-1, (-1, head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = _attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, lengths)
        x = x + _linear(attended, layer.self_attn.o_proj)
        h = _rms_norm(x, layer.post_attention_layernorm)
        x = x + _linear(F.silu(_linear(h, layer.mlp.gate_proj)) * _linear(h, layer.mlp.up_proj), layer.mlp.down_proj)
    return _rms_norm(x, llm.norm)


@torch.inference_mode()
def true_embeddings(stack: Stack, texts: Sequence[IdArray]) -> Tensor:
    """Mean-pooled embeddings float64 [B, D]: ``mean_t RMSNorm(LLM(W_up Encoder(ids)))``.

    Args:
        stack: an NLLB encoder, an up-projection and a Llama, in any dtype.
        texts: token ids of each text, ``[language code] tokens </s>``.
    """
    packed, _ = flat(texts)
    lengths = [len(text) for text in texts]
    ids = torch.from_numpy(packed).to(stack.device)
    positions = torch.cat([torch.arange(length, device=stack.device) for length in lengths])
    encoded = _encoder(stack.encoder, ids, positions, lengths)
    hidden = _llm(stack.llm, _linear(encoded, stack.up_proj), positions, lengths)
    return torch.stack([part.mean(0) for part in hidden.split(lengths)])
