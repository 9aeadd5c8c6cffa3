"""What torch sees of ``rope``: two registered ops with fakes and a gradient, and the launcher behind them.

``heads`` are those of q, with ``k`` beside them; or those of q, k and v together, ``[T, H + 2 KV, hd]``, and no ``k``.
"""

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

MAX_HEADS_WIDTH = 16384  # of the kernels, which hold the heads of a token in registers


def why_not_kernels(q: Tensor) -> str | None:
    if q.dtype == torch.float64:
        return "its kernels compute in float32 and q is float64"
    if q.shape[1] * q.shape[2] > MAX_HEADS_WIDTH:
        return f"its kernels take up to {MAX_HEADS_WIDTH} elements per token and q has {q.shape[1] * q.shape[2]}"
    return None


BACKENDS = Backends(
    "rope",
    {
        "triton": lambda q: why_not_triton(q) or why_not_kernels(q),
        "cpu": native_cpu.why_not_cpu,
        "reference": lambda q: None,
    },
)


def launch_forward(
    heads: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, num_heads: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(q [T, H, hd], k [T, KV, hd], v [T, KV, hd] or an empty tensor if ``k`` is given)"""
    parts = _split(heads, num_heads) if k is None else (heads, k)
    outputs = [buffers.new_empty(part, *part.shape) for part in parts]
    _launch([adjacent_columns(part) for part in parts], outputs, cos, sin, False, backend)
    return outputs[0], outputs[1], outputs[2] if k is None else heads.new_empty(0)


def launch_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor | None, cos: Tensor, sin: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """(the gradient of q, that of k); with ``grad_v`` one of all heads in one buffer, and an empty tensor."""
    if grad_v is None:
        grad, grad_heads_k = grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)
        grads, outputs = [grad_q, grad_k], [grad, grad_heads_k]
    else:
        T, H, hd = grad_q.shape
        grad, grad_heads_k = grad_q.new_empty(T, H + 2 * grad_k.shape[1], hd), grad_q.new_empty(0)
        grads, outputs = [grad_q, grad_k, grad_v], list(_split(grad, H))
    _launch([adjacent_columns(part) for part in grads], outputs, cos, sin, True, backend)
    return grad, grad_heads_k


def _launch(inputs: list[Tensor], outputs: list[Tensor], cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> None:
    module = BACKENDS.load(backend, inputs[0])
    module.rotate(inputs, outputs, cos.contiguous(), sin.contiguous(), inverse)


def _split(heads: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = (heads.shape[1] - num_heads) // 2
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    return q, k, v


def _fake_forward(
    heads: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, num_heads: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if k is not None:
        return heads.new_empty(heads.shape), k.new_empty(k.shape), heads.new_empty(0)
    q, k, v = (part.new_empty(part.shape) for part in _split(heads, num_heads))
    return q, k, v


def _fake_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor | None, cos: Tensor, sin: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if grad_v is None:
        return grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)
    T, H, hd = grad_q.shape
    return grad_q.new_empty(T, H + 2 * grad_k.shape[1], hd), grad_q.new_empty(0)


forward_op = register(
    "rope",
    "(Tensor heads, Tensor? k, Tensor cos, Tensor sin, int num_heads, str backend) -> (Tensor, Tensor, Tensor)",
    launch_forward,
    _fake_forward,
)
backward_op = register(
    "rope_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor? grad_v, Tensor cos, Tensor sin, str backend) -> (Tensor, Tensor)",
    launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, k, cos, sin, _, ctx.backend = inputs
    ctx.merged = k is None
    if not ctx.merged:
        ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(savable(cos), savable(sin))


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    grad_q, grad_k, grad_v = grads
    launch = backward_op if watched(grad_q, grad_k, cos, sin) else launch_backward
    grad, grad_of_k = launch(grad_q, grad_k, grad_v if ctx.merged else None, cos, sin, ctx.backend)
    needs_heads, needs_k = ctx.needs_input_grad[:2]
    return grad if needs_heads else None, grad_of_k if needs_k and not ctx.merged else None, None, None, None, None


EagerRope = register_gradient("rope", launch_forward, _setup_context, _backward)
differentiable_once("mtllm_fast::rope_backward")
