"""What torch sees of ``norm_pool``: two registered ops with fakes and a gradient, and the launcher behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core import native, native_cpu
from mtllm_fast.core.backends import Backends
from mtllm_fast.core.devices import why_not_triton
from mtllm_fast.core.dispatch import savable, watched
from mtllm_fast.core.registered import differentiable_once, register, register_gradient
from mtllm_fast.core.tensors import adjacent_columns

MAX_WIDTH = 16384  # of the kernels, which hold a row in registers


def why_not_kernels(hidden_states: Tensor) -> str | None:
    if hidden_states.dtype == torch.float64:
        return "its kernels compute in float32 and the states are float64"
    if not 0 < hidden_states.shape[1] <= MAX_WIDTH:
        return f"its kernels take widths from 1 to {MAX_WIDTH} and the states have {hidden_states.shape[1]}"
    return None


BACKENDS = Backends(
    "norm_pool",
    {
        "cuda": lambda hidden_states: native.why_not_cuda(hidden_states) or why_not_kernels(hidden_states),
        "triton": lambda hidden_states: why_not_triton(hidden_states) or why_not_kernels(hidden_states),
        "cpu": native_cpu.why_not_cpu,
        "reference": lambda hidden_states: None,
    },
)


def launch_forward(
    hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str, save: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(pooled [B, D], what the weight's gradient needs [B, D], or an empty tensor unless ``save``)"""
    module = BACKENDS.load(backend, hidden_states)
    arguments = (adjacent_columns(hidden_states), weight.contiguous(), cu_seqlens.contiguous(), eps, pooling)
    pooled, normed_mean = module.forward(*arguments, save)
    return pooled, hidden_states.new_empty(0) if normed_mean is None else normed_mean


def launch_backward(
    grad_pooled: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    pooling: str,
    backend: str,
) -> Tensor:
    module = BACKENDS.load(backend, hidden_states)
    arguments = (adjacent_columns(hidden_states), weight.contiguous(), cu_seqlens.contiguous(), eps, pooling)
    return module.backward(grad_pooled.contiguous(), *arguments)


def _fake_forward(
    hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str, save: bool, backend: str
) -> tuple[Tensor, Tensor]:
    pooled = hidden_states.new_empty(cu_seqlens.shape[0] - 1, hidden_states.shape[1])
    wide = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    return pooled, torch.empty_like(pooled, dtype=wide) if save else hidden_states.new_empty(0)


def _fake_backward(
    grad_pooled: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    pooling: str,
    backend: str,
) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


forward_op = register(
    "norm_pool",
    "(Tensor hidden_states, Tensor weight, Tensor cu_seqlens, float eps, str pooling, bool save, str backend)"
    " -> (Tensor, Tensor)",
    launch_forward,
    _fake_forward,
    launches=2,
)
backward_op = register(
    "norm_pool_backward",
    "(Tensor grad_pooled, Tensor hidden_states, Tensor weight, Tensor cu_seqlens, float eps, str pooling, str backend)"
    " -> Tensor",
    launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden_states, weight, cu_seqlens, ctx.eps, ctx.pooling, _, ctx.backend = inputs
    normed_mean = output[1]
    ctx.mark_non_differentiable(normed_mean)
    ctx.set_materialize_grads(False)
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        *((hidden_states, savable(weight), savable(cu_seqlens)) if needs_hidden else (None, None, None)),
        normed_mean if needs_weight else None,
    )
    ctx.weight_dtype = weight.dtype


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    grad_pooled: Tensor | None = grads[0]
    if grad_pooled is None:
        return (None,) * 7
    hidden_states, weight, cu_seqlens, normed_mean = ctx.saved_tensors
    grad_hidden = grad_weight = None
    if hidden_states is not None:
        launch = backward_op if watched(grad_pooled, hidden_states, weight, cu_seqlens) else launch_backward
        grad_hidden = launch(grad_pooled, hidden_states, weight, cu_seqlens, ctx.eps, ctx.pooling, ctx.backend)
    if normed_mean is not None:
        grad_weight = (grad_pooled * normed_mean).sum(0).to(ctx.weight_dtype)  # in normed_mean's wide dtype
    return grad_hidden, grad_weight, None, None, None, None, None


EagerNormPool = register_gradient("norm_pool", launch_forward, _setup_context, _backward)
differentiable_once("mtllm_fast::norm_pool_backward")
