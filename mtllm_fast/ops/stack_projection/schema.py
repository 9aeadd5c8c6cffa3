"""What torch sees of ``stack_projection``: registered ops with fakes, a gradient, FLOPs, and the launchers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtllm_fast.core import native
from mtllm_fast.core.backends import Backends
from mtllm_fast.core.devices import why_not_triton
from mtllm_fast.core.dispatch import savable, watched
from mtllm_fast.core.registered import differentiable_once, register, register_gradient
from mtllm_fast.core.tensors import wide_dtype
from mtllm_fast.ops.stack_projection.composite import FEW_TOKENS, Composite, wide_mm


def _why_not_kernels(states: Tensor, head_dim: int) -> str | None:
    if states.dtype == torch.float64:
        return "its kernels compute in float32 and the states are float64"
    if not 2 <= head_dim <= 256 or head_dim % 2:
        return f"its kernels take even head sizes up to 256, got {head_dim}"
    return None


def _why_not_triton(states: Tensor, width: int, head_norms: Tensor | None, head_dim: int) -> str | None:
    if reason := why_not_triton(states) or _why_not_kernels(states, head_dim):
        return reason
    if head_norms is not None and head_dim & (head_dim - 1):
        return f"it norms heads whose size is a power of two, got {head_dim}"
    return None


def _why_not_cuda(states: Tensor, width: int, head_norms: Tensor | None, head_dim: int) -> str | None:
    if reason := native.why_not_cuda(states) or _why_not_kernels(states, head_dim):
        return reason
    if head_norms is not None:
        return "it has no norms of q and k"
    if states.dtype == torch.float32:
        return "its products are of half precision"
    if states.shape[1] % 8 or width % 8 or head_dim % 8:
        sizes = f"{states.shape[1]}, {width} and {head_dim}"
        return f"the states' width, the LLM's width and the head size must be multiples of 8, got {sizes}"
    return None


_WHY_NOT = {"cuda": _why_not_cuda, "triton": _why_not_triton, "reference": lambda *call: None}
# Few tokens are bound by reading the weights, which the CUDA kernel is made for; many by the tensor cores.
FEW = Backends("stack_projection", _WHY_NOT)
MANY = Backends("stack_projection", {name: _WHY_NOT[name] for name in ("triton", "cuda", "reference")})


def backends_for(states: Tensor) -> Backends:
    return FEW if states.shape[0] <= FEW_TOKENS else MANY


def _backend(name: str, states: Tensor, width: int, head_norms: Tensor | None, head_dim: int) -> ModuleType:
    return backends_for(states).load(name, states, width, head_norms, head_dim)


def launch_forward(
    encoder_states: Tensor, up_weight: Tensor, up_bias: Tensor | None, weight: Tensor, residual: Tensor | None,
    bias: Tensor, qkv_bias: Tensor | None, head_norms: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    position_ids: Tensor | None, num_rotated: int, head_dim: int, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(x [T, D], qkv [T, N], rstd [T]). A composite wider than the states is rounded here, corrected for their mean."""
    e = encoder_states.contiguous()
    if weight.dtype != e.dtype:
        # No tokens, or one that is not finite: columns without a mean go uncorrected.
        mean = e.mean(0, dtype=wide_dtype(e.dtype)).nan_to_num(0.0, 0.0, 0.0)
        composite = Composite(weight, bias).rounded(e.dtype, mean)
        weight, bias = composite.weight, composite.bias
    cos, sin, position_ids = (None if t is None else t.contiguous() for t in (cos, sin, position_ids))
    module = _backend(backend, e, up_weight.shape[0], head_norms, head_dim)
    return module.forward(
        e, up_weight.contiguous(), up_bias, weight.contiguous(), residual, bias, qkv_bias, head_norms,
        cos, sin, position_ids, num_rotated, head_dim, eps,
    )  # fmt: skip


def launch_backward(
    grad_x: Tensor, grad_qkv: Tensor, x: Tensor, qkv: Tensor, rstd: Tensor, qkv_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, position_ids: Tensor | None, num_rotated: int, head_dim: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(grad_hidden [T, D], grad_raw [T, N]); what is left are matrix products."""
    cos, sin, position_ids = (None if t is None else t.contiguous() for t in (cos, sin, position_ids))
    module = _backend(backend, x, x.shape[1], None, head_dim)
    return module.backward(
        grad_x.contiguous(),
        grad_qkv.contiguous(),
        x,
        qkv,
        rstd,
        qkv_bias,
        cos,
        sin,
        position_ids,
        num_rotated,
        head_dim,
    )


def _fake_forward(encoder_states: Tensor, up_weight: Tensor, up_bias: Any, weight: Tensor, *rest: Any) -> Any:
    tokens = encoder_states.shape[0]
    x, qkv = (encoder_states.new_empty(tokens, matrix.shape[0]) for matrix in (up_weight, weight))
    return x, qkv, encoder_states.new_empty(tokens, dtype=wide_dtype(encoder_states.dtype))


def _fake_backward(grad_x: Tensor, grad_qkv: Tensor, x: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), qkv.new_empty(qkv.shape)


forward_op = register(
    "stack_projection",
    "(Tensor encoder_states, Tensor up_weight, Tensor? up_bias, Tensor weight, Tensor? residual, Tensor bias,"
    " Tensor? qkv_bias, Tensor? head_norms, Tensor? cos, Tensor? sin, Tensor? position_ids, int num_rotated,"
    " int head_dim, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    launch_forward,
    _fake_forward,
    launches=2,
)
backward_op = register(
    "stack_projection_backward",
    "(Tensor grad_x, Tensor grad_qkv, Tensor x, Tensor qkv, Tensor rstd, Tensor? qkv_bias, Tensor? cos, Tensor? sin,"
    " Tensor? position_ids, int num_rotated, int head_dim, str backend) -> (Tensor, Tensor)",
    launch_backward,
    _fake_backward,
)


@register_flop_formula(torch.ops.mtllm_fast.stack_projection)
def _flops(states: Any, up: Any, up_bias: Any, weight: Any, residual: Any, *rest: Any, **keywords: Any) -> int:
    (tokens, d), products = states, (up, weight) if residual is None else (up, weight, residual)
    return sum(2 * tokens * d * shape[0] for shape in products)


@register_flop_formula(torch.ops.mtllm_fast.stack_projection_backward)
def _backward_flops(*shapes: Any, **keywords: Any) -> int:
    return 0  # element by element; its matrix products are ops of their own


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    e, up_weight, up_bias, weight, residual, bias, qkv_bias, head_norms, cos, sin, position_ids, *scalars = inputs
    ctx.num_rotated, ctx.head_dim, _, ctx.backend = scalars
    if head_norms is not None or residual is not None:
        raise RuntimeError("stack_projection has no gradient through norms of q and k or a residual: pass neither")
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    kept = (e, up_weight, weight, qkv_bias, cos, sin, position_ids)
    ctx.save_for_backward(*(None if t is None else savable(t) for t in kept), *output)
    ctx.dtypes = [None if t is None else t.dtype for t in (up_bias, bias, qkv_bias)]


def _backward(ctx: Any, grad_x: Tensor | None, grad_qkv: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_x is None and grad_qkv is None:
        return (None,) * 15
    e, up_weight, weight, qkv_bias, cos, sin, position_ids, x, qkv, rstd = ctx.saved_tensors
    grad_x = torch.zeros_like(x) if grad_x is None else grad_x
    grad_qkv = torch.zeros_like(qkv) if grad_qkv is None else grad_qkv
    launch = backward_op if watched(grad_x, grad_qkv, e, up_weight, weight) else launch_backward
    grad_hidden, grad_raw = launch(
        grad_x, grad_qkv, x, qkv, rstd, qkv_bias, cos, sin, position_ids, ctx.num_rotated, ctx.head_dim, ctx.backend
    )
    needs_e, needs_up, needs_up_bias, needs_weight, _, needs_bias, needs_qkv_bias = ctx.needs_input_grad[:7]
    wide = rstd.dtype
    grads: list[Tensor | None] = [None] * 15
    if needs_e:
        grads[0] = torch.addmm(grad_hidden @ up_weight, grad_raw, weight.to(grad_raw.dtype))
    if needs_up:
        grads[1] = wide_mm(grad_hidden.t(), e).to(up_weight.dtype)
    if needs_up_bias:
        grads[2] = grad_hidden.sum(0, dtype=wide).to(ctx.dtypes[0])
    if needs_weight:
        grads[3] = wide_mm(grad_raw.t(), e).to(weight.dtype)
    if needs_bias:
        grads[5] = grad_raw.sum(0, dtype=wide).to(ctx.dtypes[1])
    if needs_qkv_bias:
        grads[6] = torch.mv(grad_raw.to(wide).t(), 1 / rstd).to(ctx.dtypes[2])
    return tuple(grads)


EagerStackProjection = register_gradient("stack_projection", launch_forward, _setup_context, _backward)
differentiable_once("mtllm_fast::stack_projection_backward")
