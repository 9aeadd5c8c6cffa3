"""The specification of ``quantize_rows`` in plain torch; also what runs on a CPU.

    m_t = max(max_k |x_tk|, 2^-100) + Σ_k 0 x_tk        scale_t = m_t / 448        q_tk = e4m3(x_tk (1 / scale_t))

The sum is 0, or NaN if the row holds NaN or an infinity: every backend then gives a row of NaN. What comes before is
what ``rms_norm`` and ``swiglu`` specify, in float32 and rounded once to the dtype of x.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mtllm_fast.ops.quantize_rows.e4m3 import E4M3, LARGEST, SMALLEST
from mtllm_fast.ops.rms_norm import reference as rms_norm


def quantize(
    x: Tensor, norm_weight: Tensor | None, residual: Tensor | None, eps: float, gated: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q [T, K] float8_e4m3fn, scale [T, 1] float32, x + residual [T, K] or None)"""
    summed = None
    if gated:
        gate, up = x.float().chunk(2, 1)
        x = (F.silu(gate) * up).to(x.dtype)
    elif norm_weight is not None:
        rows = None if residual is None else residual[:, None]
        normed, summed, _ = rms_norm.forward(x[:, None], norm_weight, rows, eps)
        x, summed = normed[:, 0], None if summed is None else summed[:, 0]
    return *_rounded(x), summed


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    if x.shape[1] == 0:
        return wide.to(E4M3), wide.new_full((x.shape[0], 1), SMALLEST / LARGEST)
    largest = wide.abs().amax(1, keepdim=True)
    largest = largest.clamp(min=SMALLEST) + largest * 0
    scale = largest * (1 / LARGEST)
    return (wide * scale.reciprocal()).to(E4M3), scale
