"""What torch sees of ``quantize_rows``: one registered op with a fake, and the launcher behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.core.backends import Backends
from mtllm_fast.core.devices import compute_capability, why_not_triton
from mtllm_fast.core.registered import differentiable_once, register
from mtllm_fast.ops.quantize_rows.e4m3 import E4M3

MAX_WIDTH = 32768  # of the kernel, which holds a row in registers


def why_not_kernel(x: Tensor) -> str | None:
    if not 0 < x.shape[1] <= MAX_WIDTH:
        return f"its kernel takes widths from 1 to {MAX_WIDTH} and the rows have {x.shape[1]}"
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
        "triton": lambda x: why_not_triton(x) or why_not_kernel(x) or why_not_interpreted(x),
        "reference": lambda x: None,
    },
)


def launch(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    module = BACKENDS.load(backend, x)
    return module.quantize(x if x.stride(1) == 1 else x.contiguous())


def _fake(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[0], 1, dtype=torch.float32)


quantize_op = register("quantize_rows", "(Tensor x, str backend) -> (Tensor, Tensor)", launch, _fake)
differentiable_once("mtllm_fast::quantize_rows")
