"""What torch sees of ``quantize_rows``: one registered op with a fake, and the launcher behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.core.backends import Backends
from mtllm_fast.core.devices import compute_capability, why_not_triton
from mtllm_fast.core.registered import differentiable_once, register
from mtllm_fast.core.tensors import adjacent_columns
from mtllm_fast.ops.quantize_rows.e4m3 import E4M3

MAX_WIDTH = 32768  # of the kernel, which holds a row in registers
MAX_FUSED_WIDTH = 16384  # with a norm or a gate before, which hold two


def why_not_kernel(x: Tensor, fused: bool, gated: bool) -> str | None:
    width, most = x.shape[1] // 2 if gated else x.shape[1], MAX_FUSED_WIDTH if fused else MAX_WIDTH
    if not 0 < width <= most:
        return f"its kernel takes widths from 1 to {most} and the rows have {width}"
    if x.is_cuda and torch.version.hip is not None:
        return "e4m3 on AMD has another range"
    if x.is_cuda and compute_capability(x.device.index) < (8, 9):
        return "the GPU converts to 8-bit floats from compute capability 8.9 on"
    return None


def why_not_interpreted(x: Tensor) -> str | None:
    """Triton 3.9's interpreter loses the carry of a rounded mantissa, and NaN."""
    return None if x.is_cuda else "Triton's interpreter converts to 8-bit floats wrongly"


BACKENDS = Backends(
    "quantize_rows",
    {
        "triton": lambda x, *how: why_not_triton(x) or why_not_kernel(x, *how) or why_not_interpreted(x),
        "reference": lambda x, *how: None,
    },
)


def launch(
    x: Tensor, norm_weight: Tensor | None, residual: Tensor | None, eps: float, gated: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(q [T, K], scale [T, 1], summed [T, K] or an empty tensor without a residual)"""
    module = BACKENDS.load(backend, x, gated or norm_weight is not None, gated)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    q, scale, summed = module.quantize(_rows(x), norm_weight, _rows(residual), eps, gated)
    return q, scale, x.new_empty(0) if summed is None else summed


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else adjacent_columns(x)


def _fake(
    x: Tensor, norm_weight: Tensor | None, residual: Tensor | None, eps: float, gated: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    T, K = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    summed = x.new_empty(0 if residual is None else (T, K))
    return x.new_empty(T, K, dtype=E4M3), x.new_empty(T, 1, dtype=torch.float32), summed


quantize_op = register(
    "quantize_rows",
    "(Tensor x, Tensor? norm_weight, Tensor? residual, float eps, bool gated, str backend) -> (Tensor, Tensor, Tensor)",
    launch,
    _fake,
)
differentiable_once("mtllm_fast::quantize_rows")
