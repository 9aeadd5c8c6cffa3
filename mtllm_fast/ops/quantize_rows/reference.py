"""The specification of ``quantize_rows`` in plain torch; also what runs on a CPU.

    m_t = max(max_k |x_tk|, 2^-100) + Σ_k 0 x_tk        scale_t = m_t / 448        q_tk = e4m3(x_tk (1 / scale_t))

The sum is 0, or NaN if the row holds NaN or an infinity: every backend then gives a row of NaN.
"""

from __future__ import annotations

from torch import Tensor

from mtllm_fast.ops.quantize_rows.e4m3 import E4M3, LARGEST, SMALLEST


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q [T, K] float8_e4m3fn, scale [T, 1] float32)"""
    wide = x.float()
    if x.shape[1] == 0:
        return wide.to(E4M3), wide.new_full((x.shape[0], 1), SMALLEST / LARGEST)
    largest = wide.abs().amax(1, keepdim=True)
    largest = largest.clamp(min=SMALLEST) + largest * 0
    scale = largest * (1 / LARGEST)
    return (wide * scale.reciprocal()).to(E4M3), scale
