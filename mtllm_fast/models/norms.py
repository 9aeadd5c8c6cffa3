"""The towers' norms and the residual addition before them: one pass where a module is the family's own."""

from __future__ import annotations

from torch import Tensor, nn

from mtllm_fast.models.plain import is_layer_norm, is_rms_norm
from mtllm_fast.ops.layer_norm import layer_norm
from mtllm_fast.ops.rms_norm import rms_norm


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``. torch's own LayerNorm is one pass already."""
    return rms_norm(x, module.weight, eps=module.variance_epsilon) if is_rms_norm(module) else module(x)


def add_norm(module: nn.Module, x: Tensor, residual: Tensor, sum_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(module(s), s + sum_bias)`` with ``s = x + residual``; both are new tensors."""
    if x.dtype == residual.dtype:
        if is_rms_norm(module) and sum_bias is None:
            return rms_norm(x, module.weight, eps=module.variance_epsilon, residual=residual)
        if is_layer_norm(module):
            weight, bias, eps = module.weight, module.bias, module.eps
            return layer_norm(x, weight, bias, eps=eps, residual=residual, sum_bias=sum_bias)
    summed = x + residual
    return module(summed), summed if sum_bias is None else summed + sum_bias
