"""The registered op of the CPU path; the GPU paths call ops that their libraries have registered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core.tensors import wide_dtype
from mtllm_fast.ops.varlen_attention import cpu

torch.library.define(
    "mtllm_fast::varlen_attention_cpu",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale) -> (Tensor, Tensor)",
)
torch.library.define(
    "mtllm_fast::varlen_attention_cpu_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, float scale)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("mtllm_fast::varlen_attention_cpu", "CPU", cpu.forward)
torch.library.impl("mtllm_fast::varlen_attention_cpu_backward", "CPU", cpu.backward)


@torch.library.register_fake("mtllm_fast::varlen_attention_cpu")
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))


@torch.library.register_fake("mtllm_fast::varlen_attention_cpu_backward")
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return None, None, None, None, None
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    grads = varlen_attention_cpu_backward(grad_out, q, k, v, out, lse, cu_seqlens, ctx.scale)
    return (*grads, None, None)


torch.library.register_autograd("mtllm_fast::varlen_attention_cpu", _backward, setup_context=_setup_context)

varlen_attention_cpu = torch.ops.mtllm_fast.varlen_attention_cpu.default
varlen_attention_cpu_backward = torch.ops.mtllm_fast.varlen_attention_cpu_backward.default
