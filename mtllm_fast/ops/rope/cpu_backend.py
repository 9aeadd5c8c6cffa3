"""The kernel of ``rope`` for the CPU (csrc/cpu/layers.cpp): float32 inside, rounded once; one pass over the heads.

Floor at T=2048, 32 + 8 heads of 128 in float32: q and k read and written, 84 MB. With v, that is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.core import native_cpu


def rotate(inputs: list[Tensor], outputs: list[Tensor], cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """q, k and perhaps v -> the same rotated, v copied; all ``[T, heads, hd]``, the tables ``[T, hd]``."""
    cos, sin = cos.float(), sin.float()
    for source, out in zip(inputs[:2], outputs[:2], strict=True):
        status = native_cpu.extension().rope(
            native_cpu.level(), native_cpu.heads(source), cos.data_ptr(), sin.data_ptr(), cos.stride(0),
            -1.0 if inverse else 1.0, out.data_ptr(), out.stride(0), torch.get_num_threads(),
        )  # fmt: skip
        native_cpu.check("rope", status)
    if len(inputs) == 3:
        outputs[2].copy_(inputs[2])
