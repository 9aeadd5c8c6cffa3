"""The towers' norms and the residual addition before them: one pass where a module is the family's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mtllm_fast.models.linear import reads_rows8
from mtllm_fast.models.plain import Rows8, is_layer_norm, is_rms_norm
from mtllm_fast.ops.layer_norm import layer_norm
from mtllm_fast.ops.lora_linear import RmsNormed
from mtllm_fast.ops.quantize_rows import quantize_rows
from mtllm_fast.ops.rms_norm import rms_norm


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``. torch's own LayerNorm is one pass already."""
    return module(x) if not is_rms_norm(module) else rms_norm(x, module.weight, eps=module.variance_epsilon)


def norm_for(readers: Sequence[nn.Module], module: nn.Module, x: Tensor) -> tuple[Tensor | Rows8, RmsNormed | None]:
    """``module(x)``, and what a LoRA group may keep in its place for the backward.

    In 8 bits if that is how ``readers``, the projections of it, read it.
    """
    if not is_rms_norm(module):
        return module(x), None
    if reads_rows8(readers, x.shape[-1], x, module.weight):
        return Rows8(*quantize_rows(x, norm_weight=module.weight, eps=module.variance_epsilon), x.dtype), None
    normed, rstd = rms_norm(x, module.weight, eps=module.variance_epsilon, return_rstd=True)
    return normed, RmsNormed(x, rstd, module.weight) if x.dim() == 2 else None


def add_norm(
    readers: Sequence[nn.Module], module: nn.Module, x: Tensor, residual: Tensor, sum_bias: Tensor | None = None
) -> tuple[Tensor | Rows8, Tensor, RmsNormed | None]:
    """``module(s)``, ``s + sum_bias`` and as above, with ``s = x + residual``; the first two are new tensors."""
    if x.dtype == residual.dtype and sum_bias is None and is_rms_norm(module):
        weight, eps = module.weight, module.variance_epsilon
        if reads_rows8(readers, x.shape[-1], x, residual, weight):
            q, scale, summed = quantize_rows(x, norm_weight=weight, eps=eps, residual=residual)
            return Rows8(q, scale, x.dtype), summed, None
        normed, summed, rstd = rms_norm(x, weight, eps=eps, residual=residual, return_rstd=True)
        return normed, summed, RmsNormed(summed, rstd, weight)
    if x.dtype == residual.dtype and is_layer_norm(module):
        weight, bias, eps = module.weight, module.bias, module.eps
        return *layer_norm(x, weight, bias, eps=eps, residual=residual, sum_bias=sum_bias), None
    summed = x + residual
    return module(summed), summed if sum_bias is None else summed + sum_bias, None
