"""What torch sees of ``swiglu``: two registered ops with fakes and a gradient, and the launcher behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core import buffers, native_cpu
from mtllm_fast.core.backends import Backends
from mtllm_fast.core.devices import why_not_triton
from mtllm_fast.core.dispatch import savable, watched
from mtllm_fast.core.registered import differentiable_once, register, register_gradient
from mtllm_fast.core.tensors import adjacent_columns


def why_not_kernels(gate: Tensor) -> str | None:
    return "its kernels compute in float32 and gate is float64" if gate.dtype == torch.float64 else None


BACKENDS = Backends(
    "swiglu",
    {
        "triton": lambda gate: why_not_triton(gate) or why_not_kernels(gate),
        "cpu": native_cpu.why_not_cpu,
        "reference": lambda gate: None,
    },
)


def launch_forward(gate: Tensor, up: Tensor | None, backend: str) -> Tensor:
    out = buffers.new_empty(gate, *_shape(gate, up))
    if out.numel():
        BACKENDS.load(backend, gate).forward(*_halves(gate, up), _rows(out))
    return out


def launch_backward(grad: Tensor, gate: Tensor, up: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """(the gradient of gate, that of up or an empty tensor if both are merged)"""
    grad_gate = gate.new_empty(gate.shape)
    grad_up = gate.new_empty(0) if up is None else gate.new_empty(gate.shape)
    if grad.numel():
        outputs = _halves(grad_gate, None if up is None else grad_up)
        BACKENDS.load(backend, gate).backward(_rows(grad), *_halves(gate, up), *outputs)
    return grad_gate, grad_up


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as ``[T, F]``."""
    if up is not None:
        return _rows(gate), _rows(up)
    rows = _rows(gate)
    half = rows.shape[1] // 2
    return rows[:, :half], rows[:, half:]


def _rows(x: Tensor) -> Tensor:
    """``[T, F]`` with adjacent columns; rows of a 2-D tensor may be strided."""
    x = adjacent_columns(x)
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _shape(gate: Tensor, up: Tensor | None) -> tuple[int, ...]:
    return (*gate.shape[:-1], gate.shape[-1] // 2 if up is None else gate.shape[-1])


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else gate.shape)


forward_op = register(
    "swiglu",
    "(Tensor gate, Tensor? up, str backend) -> Tensor",
    launch_forward,
    lambda gate, up, backend: gate.new_empty(_shape(gate, up)),
)
backward_op = register(
    "swiglu_backward",
    "(Tensor grad, Tensor gate, Tensor? up, str backend) -> (Tensor, Tensor)",
    launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(savable(gate), None if up is None else savable(up))


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    launch = backward_op if watched(grads[0], gate) else launch_backward
    grad_gate, grad_up = launch(grads[0], gate, up, ctx.backend)
    needs_gate, needs_up = ctx.needs_input_grad[:2]
    return grad_gate if needs_gate else None, grad_up if needs_up and up is not None else None, None


EagerSwiGLU = register_gradient("swiglu", launch_forward, _setup_context, _backward)
differentiable_once("mtllm_fast::swiglu_backward")
