"""The specification of ``layer_norm`` in plain torch; also what runs on a CPU.

    s = hidden_states + residual        rounded to the dtype of the states
    normed = x̂ ⊙ weight + bias          x̂ = (s − mean) · rstd,  rstd = 1 / √(mean((s − mean)²) + eps)
    summed = s + sum_bias

A CPU's norm takes states of half precision with parameters and statistics in float32; a GPU's does not, so they are
widened there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.core.tensors import wide_dtype


def forward(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    sum_bias: Tensor | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(normed [T, d], summed [T, d], mean [T], rstd [T])"""
    states = hidden_states if residual is None else hidden_states + residual
    dtype = wide_dtype(states.dtype)
    rows = _normable(states)
    normed, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], weight.to(dtype), bias.to(dtype), eps)
    summed = None if residual is None else states
    if sum_bias is not None:
        summed = (states + sum_bias).to(states.dtype)
    return normed.to(states.dtype), summed, mean.flatten() if save else None, rstd.flatten() if save else None


def backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    states: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    needs_states: bool,
    needs_parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx = rstd (g − mean(g) − x̂ mean(g ⊙ x̂)) + grad_summed with g = weight ⊙ grad_normed; Σ_t grad_normed ⊙ x̂; Σ_t
    grad_normed. The latter two [d] in the wide dtype."""
    rows, parameter = _normable(states), weight.to(wide_dtype(states.dtype))
    grads = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(rows.dtype), rows, rows.shape[1:], mean[:, None], rstd[:, None], parameter, parameter,
        [needs_states, needs_parameters, needs_parameters],
    )  # fmt: skip
    grad_states, grad_weight, grad_bias = grads
    if not needs_states:
        return None, grad_weight, grad_bias
    if grad_summed is not None:
        grad_states = grad_states.add_(grad_summed)
    return grad_states.to(states.dtype), grad_weight, grad_bias


def _normable(states: Tensor) -> Tensor:
    return states if states.is_cpu else states.to(wide_dtype(states.dtype))
