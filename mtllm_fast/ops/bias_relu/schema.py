"""What torch sees of ``bias_relu``: two registered ops with fakes and a gradient, and the launchers behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core.backends import Backends
from mtllm_fast.core.devices import why_not_triton
from mtllm_fast.core.dispatch import watched
from mtllm_fast.core.registered import differentiable_once, register, register_gradient


def why_not_kernels(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "its kernels compute in float32 and x is float64"
    if x.shape[1] == 0:
        return "x has no columns"
    return None


BACKENDS = Backends(
    "bias_relu",
    {
        "triton": lambda x: why_not_triton(x) or why_not_kernels(x),
        "reference": lambda x: None,
    },
)


def launch_forward(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """y [T, F]"""
    rows = x if x.stride(1) == 1 else x.contiguous()  # any row stride, but adjacent columns
    return BACKENDS.load(backend, x).forward(rows, None if bias is None else bias.contiguous())


def launch_backward(grad: Tensor, y: Tensor, needs_bias: bool, backend: str) -> tuple[Tensor, Tensor]:
    """(dx [T, F], dbias [F], or an empty tensor unless ``needs_bias``)"""
    grad_x, grad_bias = BACKENDS.load(backend, y).backward(grad.contiguous(), y, needs_bias)
    return grad_x, y.new_empty(0) if grad_bias is None else grad_bias


def _fake_forward(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: Tensor, y: Tensor, needs_bias: bool, backend: str) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    return y.new_empty(y.shape), y.new_empty(y.shape[1], dtype=wide) if needs_bias else y.new_empty(0)


forward_op = register("bias_relu", "(Tensor x, Tensor? bias, str backend) -> Tensor", launch_forward, _fake_forward)
backward_op = register(
    "bias_relu_backward",
    "(Tensor grad, Tensor y, bool needs_bias, str backend) -> (Tensor, Tensor)",
    launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, ctx.backend = inputs
    ctx.save_for_backward(output)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    (grad,), (y,) = grads, ctx.saved_tensors
    needs_x, needs_bias = ctx.needs_input_grad[:2]
    launch: Any = backward_op if watched(grad, y) else launch_backward
    grad_x, grad_bias = launch(grad, y, needs_bias, ctx.backend)
    return grad_x if needs_x else None, grad_bias.to(ctx.bias_dtype) if needs_bias else None, None


EagerBiasReLU = register_gradient("bias_relu", launch_forward, _setup_context, _backward)
differentiable_once("mtllm_fast::bias_relu_backward")
