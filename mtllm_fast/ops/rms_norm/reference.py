"""The specification of ``rms_norm`` in plain torch; also what runs on a CPU.

    x = hidden_states + residual (rounded)      normed = weight ⊙ x · rstd      rstd = rsqrt(mean(x²) + eps)

Computed in float32 (float64 for float64 states), rounded once at the end. States come as ``[T, H, D]``. On a CPU
everything is made block by block of tokens in a core's cache: memory is read once and written once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mtllm_fast.core.tensors import wide_dtype
from mtllm_fast.ops.norm_pool.reference import BLOCK_ELEMENTS, rstd_of


def forward(
    hidden_states: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(normed [T, H, D], summed [T, H, D], rstd [T, H] in the wide dtype)"""
    shape, dtype = hidden_states.shape, wide_dtype(hidden_states.dtype)
    gain = weight.to(dtype)
    normed = hidden_states.new_empty(shape)
    summed = None if residual is None else hidden_states.new_empty(shape)
    rstd = hidden_states.new_empty(shape[:-1], dtype=dtype)
    for start, stop in token_blocks(hidden_states):
        rows = hidden_states[start:stop]
        if residual is not None and summed is not None:
            rows = torch.add(rows, residual[start:stop], out=summed[start:stop])
        rows = rows.to(dtype)
        rstd[start:stop] = r = rstd_of(rows, eps)
        out = normed[start:stop] if normed.dtype == dtype else rows  # a widened copy
        torch.mul(rows, r[..., None], out=out).mul_(gain)
        if normed.dtype != dtype:
            normed[start:stop] = out
    return normed, summed, rstd


def backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    states: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(grad [T, H, D], grad of the weight [D] in the wide dtype or None)

    grad = rstd (g − x̂ mean(g ⊙ x̂)) + grad_summed with g = weight ⊙ grad_normed; of the weight Σ grad_normed ⊙ x̂.
    """
    (T, H, D), dtype = states.shape, rstd.dtype
    rstd = rstd.view(T, H)
    gain = weight.to(dtype)
    grad = states.new_empty(T, H, D)
    grad_weight = gain.new_zeros(D) if needs_weight else None
    for start, stop in token_blocks(states):
        rows, dy, r = states[start:stop].to(dtype), grad_normed[start:stop].to(dtype), rstd[start:stop, :, None]
        g = dy * r
        if grad_weight is not None:
            grad_weight += (g * rows).sum((0, 1))
        g *= gain
        with torch.autocast(g.device.type, enabled=False):  # it would round the products
            along = torch.linalg.vecdot(g, rows)[..., None].mul_(r).mul_(r).div_(-D)
        g.addcmul_(rows, along)
        if grad_summed is not None:
            g += grad_summed[start:stop]
        grad[start:stop] = g
    return grad, grad_weight


def token_blocks(states: Tensor) -> Iterable[tuple[int, int]]:
    """Where blocks of ``states`` [T, ...] start and stop: they stay in a core's cache; all at once on a GPU."""
    T = states.shape[0]
    per_token = states[0].numel() if T else 0
    size = max(1, BLOCK_ELEMENTS // max(1, per_token)) if states.is_cpu else max(1, T)
    return [(start, min(start + size, T)) for start in range(0, T, size)]
