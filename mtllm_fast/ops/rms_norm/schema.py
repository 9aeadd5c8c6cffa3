"""What torch sees of ``rms_norm``: two registered ops with fakes and a gradient, and the launcher behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core import native_cpu
from mtllm_fast.core.backends import Backends
from mtllm_fast.core.devices import why_not_triton
from mtllm_fast.core.dispatch import savable, watched
from mtllm_fast.core.registered import differentiable_once, register, register_gradient
from mtllm_fast.core.tensors import adjacent_columns, wide_dtype

MAX_WIDTH = 8192  # of the kernels, which hold rows in registers: wider ones spill in the backward


def why_not_kernels(hidden_states: Tensor) -> str | None:
    if hidden_states.dtype == torch.float64:
        return "its kernels compute in float32 and the states are float64"
    if not 0 < hidden_states.shape[-1] <= MAX_WIDTH:
        return f"its kernels take widths from 1 to {MAX_WIDTH} and the states have {hidden_states.shape[-1]}"
    return None


BACKENDS = Backends(
    "rms_norm",
    {
        "triton": lambda hidden_states: why_not_triton(hidden_states) or why_not_kernels(hidden_states),
        "cpu": native_cpu.why_not_cpu,
        "reference": lambda hidden_states: None,
    },
)


def launch_forward(
    hidden_states: Tensor, weight: Tensor, residual: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed [..., D], summed [..., D] or an empty tensor without a residual, rstd [...] in the wide dtype)"""
    module = BACKENDS.load(backend, hidden_states)
    residual = None if residual is None else _head_rows(residual)
    normed, summed, rstd = module.forward(_head_rows(hidden_states), weight.contiguous(), residual, eps)
    shape = hidden_states.shape
    summed = normed.new_empty(0) if summed is None else summed.view(shape)
    return normed.view(shape), summed, rstd.view(shape[:-1])


def launch_backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    states: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(the gradient of the states that were normed [..., D], that of the weight [D] or an empty tensor)"""
    module = BACKENDS.load(backend, states)
    grad_summed = None if grad_summed is None else _head_rows(grad_summed)
    grad, grad_weight = module.backward(
        _head_rows(grad_normed), grad_summed, _head_rows(states), weight.contiguous(), rstd.contiguous(), needs_weight
    )
    return grad.view(states.shape), weight.new_empty(0) if grad_weight is None else grad_weight.to(weight.dtype)


def _head_rows(states: Tensor) -> Tensor:
    """``[T, H, D]`` with adjacent columns, without a copy if two strides can address the rows."""
    states = adjacent_columns(states)
    if states.dim() == 2:
        return states[:, None]
    return states if states.dim() == 3 else states.flatten(0, -3)


def _fake_forward(
    hidden_states: Tensor, weight: Tensor, residual: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = hidden_states.shape
    summed = hidden_states.new_empty(0 if residual is None else shape)
    rstd = hidden_states.new_empty(shape[:-1], dtype=wide_dtype(hidden_states.dtype))
    return hidden_states.new_empty(shape), summed, rstd


def _fake_backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    states: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return states.new_empty(states.shape), weight.new_empty(weight.shape if needs_weight else 0)


forward_op = register(
    "rms_norm",
    "(Tensor hidden_states, Tensor weight, Tensor? residual, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    launch_forward,
    _fake_forward,
)
backward_op = register(
    "rms_norm_backward",
    "(Tensor grad_normed, Tensor? grad_summed, Tensor states, Tensor weight, Tensor rstd, bool needs_weight,"
    " str backend) -> (Tensor, Tensor)",
    launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_states, weight, residual, _, ctx.backend = inputs
    _, summed, rstd = output
    ctx.mark_non_differentiable(*((rstd, summed) if residual is None else (rstd,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(savable(hidden_states) if residual is None else summed, savable(weight), rstd)


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    grad_normed, grad_summed = grads[:2]
    needs_hidden, needs_weight, needs_residual = ctx.needs_input_grad[:3]
    grad, grad_weight = grad_summed, None
    if grad_normed is not None:
        states, weight, rstd = ctx.saved_tensors
        launch = backward_op if watched(grad_normed, states, weight) else launch_backward
        grad, grad_weight = launch(grad_normed, grad_summed, states, weight, rstd, needs_weight, ctx.backend)
    return (
        grad if needs_hidden else None,
        grad_weight if needs_weight else None,
        grad if needs_residual else None,
        None,
        None,
    )


EagerRMSNorm = register_gradient("rms_norm", launch_forward, _setup_context, _backward)
differentiable_once("mtllm_fast::rms_norm_backward")
