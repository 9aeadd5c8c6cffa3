"""What torch sees of ``layer_norm``: two registered ops with fakes and a gradient, and the launchers behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core.backends import Backends
from mtllm_fast.core.devices import why_not_triton
from mtllm_fast.core.dispatch import savable, watched
from mtllm_fast.core.registered import differentiable_once, register, register_gradient
from mtllm_fast.core.tensors import adjacent_columns, wide_dtype

MAX_WIDTH = 8192  # of the kernels, which hold a row in registers


def why_not_kernels(hidden_states: Tensor) -> str | None:
    if hidden_states.dtype == torch.float64:
        return "its kernels compute in float32 and the states are float64"
    if not 0 < hidden_states.shape[1] <= MAX_WIDTH:
        return f"its kernels take widths from 1 to {MAX_WIDTH} and the states have {hidden_states.shape[1]}"
    return None


BACKENDS = Backends(
    "layer_norm",
    {
        "triton": lambda hidden_states: why_not_triton(hidden_states) or why_not_kernels(hidden_states),
        "reference": lambda hidden_states: None,
    },
)


def compute_forward(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    sum_bias: Tensor | None,
    eps: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(normed [T, d], summed [T, d], mean [T], rstd [T])"""
    return BACKENDS.load(backend, hidden_states).forward(
        adjacent_columns(hidden_states),
        weight.contiguous(),
        bias.contiguous(),
        None if residual is None else adjacent_columns(residual),
        None if sum_bias is None else sum_bias.contiguous(),
        eps,
        save,
    )


def launch_forward(hidden_states: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with an empty tensor in place of one that is not asked for, as the registered op must have it."""
    outputs = compute_forward(hidden_states, *arguments)
    normed, summed, mean, rstd = (hidden_states.new_empty(0) if output is None else output for output in outputs)
    return normed, summed, mean, rstd


def launch_backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    states: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    needs_states: bool,
    needs_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the sum [T, d], of weight [d], of bias [d]), an empty tensor in place of one that is not needed"""
    outputs = BACKENDS.load(backend, states).backward(
        grad_normed.contiguous(),
        None if grad_summed is None else grad_summed.contiguous(),
        adjacent_columns(states),
        mean,
        rstd,
        weight.contiguous(),
        needs_states,
        needs_parameters,
    )
    grad_states, grad_weight, grad_bias = (states.new_empty(0) if output is None else output for output in outputs)
    return grad_states, grad_weight, grad_bias


def _fake_forward(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    sum_bias: Tensor | None,
    eps: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = residual is None and sum_bias is None
    normed, summed = (
        hidden_states.new_empty(shape) for shape in (hidden_states.shape, 0 if nothing else hidden_states.shape)
    )
    if not save:
        return normed, summed, hidden_states.new_empty(0), hidden_states.new_empty(0)
    mean, rstd = (
        hidden_states.new_empty(hidden_states.shape[0], dtype=wide_dtype(hidden_states.dtype)) for _ in range(2)
    )
    return normed, summed, mean, rstd


def _fake_backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    states: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    needs_states: bool,
    needs_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_states = states.new_empty(states.shape if needs_states else 0)
    if not needs_parameters:
        return grad_states, states.new_empty(0), states.new_empty(0)
    grad_weight, grad_bias = (states.new_empty(states.shape[1], dtype=wide_dtype(states.dtype)) for _ in range(2))
    return grad_states, grad_weight, grad_bias


forward_op = register(
    "layer_norm",
    "(Tensor hidden_states, Tensor weight, Tensor bias, Tensor? residual, Tensor? sum_bias, float eps, bool save,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    launch_forward,
    _fake_forward,
)
backward_op = register(
    "layer_norm_backward",
    "(Tensor grad_normed, Tensor? grad_summed, Tensor states, Tensor mean, Tensor rstd, Tensor weight,"
    " bool needs_states, bool needs_parameters, str backend) -> (Tensor, Tensor, Tensor)",
    launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    hidden_states, weight, bias, residual, sum_bias, _, _, ctx.backend = inputs
    _, summed, mean, rstd = output
    if sum_bias is not None:
        raise RuntimeError("layer_norm has no gradient with sum_bias: leave the bias to the projection")
    ctx.mark_non_differentiable(mean, rstd, *(() if residual is not None else (summed,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(savable(hidden_states) if residual is None else summed, mean, rstd, savable(weight))
    ctx.dtypes = weight.dtype, bias.dtype


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    grad_normed, grad_summed = grads[:2]
    needs_hidden, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    if grad_normed is None:
        grad_states = grad_weight = grad_bias = None
        if needs_hidden or needs_residual:
            grad_states = grad_summed
    else:
        states, mean, rstd, weight = ctx.saved_tensors
        tensors = (grad_normed, grad_summed, states, mean, rstd, weight)
        launch: Any = backward_op if watched(*(t for t in tensors if t is not None)) else launch_backward
        needs = (needs_hidden or needs_residual, needs_weight or needs_bias)
        grad_states, grad_weight, grad_bias = launch(*tensors, *needs, ctx.backend)
        grad_weight, grad_bias = grad_weight.to(ctx.dtypes[0]), grad_bias.to(ctx.dtypes[1])
    return (
        grad_states if needs_hidden else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        grad_states if needs_residual else None,
        *(None,) * 4,
    )


EagerLayerNorm = register_gradient("layer_norm", launch_forward, _setup_context, _backward)
differentiable_once("mtllm_fast::layer_norm_backward")
