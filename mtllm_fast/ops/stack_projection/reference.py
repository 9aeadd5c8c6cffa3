"""The specification of ``stack_projection`` in plain torch, and its absorbed form, which also is the CPU path.

``specification`` is what the modules compute, one after the other. ``forward`` and ``backward`` are the absorbed form
with the arguments that every backend takes; weights in the order and precision that ``composite.py`` explains.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mtllm_fast.core import onednn
from mtllm_fast.core.tensors import wide_dtype
from mtllm_fast.ops.stack_projection.composite import StackWeights, deinterleave, interleave


def specification(
    encoder_states: Tensor, weights: StackWeights, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, D], q [T, H, hd], k [T, KV, hd], v [T, KV, hd]; cos and sin [T, hd]. Differentiable by autograd.

    x = e W_upᵀ + b; n = γ ⊙ x · rsqrt(mean(x²) + eps); q = rope(W_q n + b_q), k = rope(W_k n + b_k), v = W_v n + b_v.
    """
    w = weights
    x = F.linear(encoder_states, w.up, w.up_bias)
    normed = rms_norm(x, w.norm, w.eps)
    q, k, v = (
        F.linear(normed, weight, bias).unflatten(-1, (-1, w.head_dim))
        for weight, bias in ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias))
    )
    if w.q_norm is not None and w.k_norm is not None:
        q, k = rms_norm(q, w.q_norm, w.eps), rms_norm(k, w.k_norm, w.eps)
    return x, apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Statistics at least in float32, rounded to the dtype of x before the gain, as the models do."""
    wide = x.to(wide_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE: x ``[T, H, hd]``, cos and sin ``[T, hd]`` whose two halves are equal."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def forward(
    encoder_states: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    bias: Tensor,
    qkv_bias: Tensor | None,
    head_norms: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    num_rotated: int,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x [T, D], qkv [T, N] rotated and in the order of the heads, rstd [T])"""
    e = encoder_states
    wide = wide_dtype(e.dtype)
    x = _linear(e, up_weight, up_bias)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
    rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    y = _accumulated(e, weight, residual, bias).to(wide) * rstd[:, None]
    if qkv_bias is not None:
        y += qkv_bias
    if head_norms is not None:
        y = _normed_heads(y, head_norms, num_rotated, head_dim, eps)
    if cos is None or sin is None:
        return x, deinterleave(y, head_dim).to(e.dtype), rstd
    qkv = e.new_empty(y.shape)
    heads, rotated = qkv.unflatten(1, (-1, 2, head_dim // 2)), num_rotated // head_dim
    pairs = y.unflatten(1, (-1, head_dim // 2, 2))
    cos, sin = (_half_table(table, position_ids, wide)[:, None] for table in (cos, sin))
    a, b = pairs[:, :rotated, :, 0], pairs[:, :rotated, :, 1]
    heads[:, :rotated, 0] = a * cos - b * sin
    heads[:, :rotated, 1] = b * cos + a * sin
    heads[:, rotated:] = pairs[:, rotated:].transpose(2, 3)
    return x, qkv, rstd


def backward(
    grad_x: Tensor,
    grad_qkv: Tensor,
    x: Tensor,
    qkv: Tensor,
    rstd: Tensor,
    qkv_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    num_rotated: int,
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    """(grad_hidden [T, D], of x by both ways; grad_raw [T, N], of e Cᵀ + c, interleaved)

    With y = rstd · raw + b_qkv and its gradient dy (dqkv, rotated back): draw = rstd · dy, and through rstd
    dx -= rstd² / D · ⟨dy, y - b_qkv⟩ x. Rotation keeps products, so ⟨dy, y⟩ = ⟨dqkv, qkv⟩: raw is not needed again.
    """
    wide = rstd.dtype
    dqkv = grad_qkv.to(wide)
    pairs = interleave(dqkv.t(), head_dim).t().unflatten(1, (-1, head_dim // 2, 2))
    if cos is not None and sin is not None:
        rotated = num_rotated // head_dim
        cos, sin = (_half_table(table, position_ids, wide)[:, None] for table in (cos, sin))
        a, b = pairs[:, :rotated, :, 0], pairs[:, :rotated, :, 1]
        back = torch.stack((a * cos + b * sin, b * cos - a * sin), dim=-1)
        pairs = torch.cat((back, pairs[:, rotated:]), dim=1)
    dy = pairs.flatten(1)
    along = (dqkv * qkv.to(wide)).sum(-1)
    if qkv_bias is not None:
        along = along - dy @ qkv_bias.to(wide)
    grad_hidden = grad_x.to(wide) - (rstd.square() * along / x.shape[-1])[:, None] * x.to(wide)
    return grad_hidden.to(x.dtype), (dy * rstd[:, None]).to(x.dtype)


def _half_table(table: Tensor, position_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = table if position_ids is None else table.index_select(0, position_ids)
    return rows[:, : rows.shape[1] // 2].to(dtype)


def _normed_heads(y: Tensor, head_norms: Tensor, num_rotated: int, head_dim: int, eps: float) -> Tensor:
    """RMSNorm of each head of q and k; head_norms [num_rotated], interleaved like y."""
    heads = y[:, :num_rotated].unflatten(1, (-1, head_dim))
    rstd = torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps)
    normed = (heads * rstd).flatten(1) * head_norms
    return torch.cat((normed, y[:, num_rotated:]), dim=1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if onednn.serves(x, weight):
        return onednn.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _accumulated(e: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor) -> Tensor:
    """``e (weight + residual)ᵀ + bias``, the bias added before anything is rounded to the dtype of e."""
    if e.dtype.itemsize == 2 and e.device.type == "cpu" and onednn.product_dtype(e.dtype) == e.dtype:
        return _accumulated_in_halves(e, weight, residual, bias)
    wide = wide_dtype(e.dtype)
    weight = weight.to(wide) if residual is None else weight.to(wide) + residual.to(wide)
    return _linear(e.to(wide), weight, bias.to(wide))


def _accumulated_in_halves(e: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor) -> Tensor:
    """The same as one half-precision product, whose accumulators are float32: the bias becomes columns of the weight.

    Three halves hold a float32. Bias and mean term nearly cancel in some stacks, so a rounded bias would not do.
    """
    columns, rest = [weight] if residual is None else [weight, residual], bias
    states = [e] * len(columns)
    for _ in range(3):
        columns.append(rest.to(e.dtype)[:, None])
        rest = rest - columns[-1][:, 0].to(rest.dtype)
    padding = -(len(states) * e.shape[1] + 3) % 32
    ones = F.pad(e.new_ones(e.shape[0], 3), (0, padding))
    columns.append(weight.new_zeros(weight.shape[0], padding))
    return _linear(torch.cat((*states, ones), 1), torch.cat(columns, 1), None)
