"""Products of CPU tensors in 8-bit integers by oneDNN: a scale per output channel, and one per row of the input.

torch's own dynamic quantisation takes one scale for a whole batch, so a text's result would depend on what it was
batched with; here every row has its own, which multiplies the rows of the product. Weights are symmetric in -127..127.
Activations are unsigned with a zero point in the middle, the one form that oneDNN multiplies fast on every x86.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_SMALLEST = 2.0**-100  # what a row's largest value is taken for if it is less, so that no reciprocal overflows


def why_not_available() -> str | None:
    """Why this CPU or torch has no such product, or None."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "this PyTorch comes without oneDNN's products of 8-bit integers"
    return None


@cache
def activation_bits() -> int:
    """8, or 7 on a CPU that adds pairs of products in saturating 16 bits (x86 before VNNI), found out by trying."""
    ones = torch.full((16, 256), 127, dtype=torch.int8)
    full = torch.full((16, 256), 255, dtype=torch.uint8)
    product = _multiply(full, 0, torch.ops.onednn.qlinear_prepack(ones, None), torch.ones(16))
    return 8 if bool((product == 256 * 127 * 255).all()) else 7


def _multiply(x: Tensor, zero_point: int, packed: Tensor, scale: Tensor) -> Tensor:
    """``(x - zero_point) weightᵀ scale``, x uint8 ``[T, K]``, packed ``[N, K]``, scale ``[N]`` -> fp32 ``[T, N]``."""
    zero_points = torch.zeros_like(scale, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, zero_point, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _row_scales(x: Tensor, levels: int) -> Tensor:
    """``[T, 1]``; NaN for a row that holds NaN or an infinity, which makes its product NaN."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True)
    return (largest.clamp(min=_SMALLEST) + largest * 0) / levels


class Int8Weight:
    """A weight ``[N, K]`` as 8-bit integers in oneDNN's layout, with a scale per row."""

    def __init__(self, weight: Tensor) -> None:
        wide = weight.detach().float()
        scale = _row_scales(wide, 127)
        self.scale = scale.flatten()
        self.zero_point = 1 << (activation_bits() - 1)  # of activations
        self.packed = torch.ops.onednn.qlinear_prepack((wide / scale).round_().to(torch.int8), None)

    @property
    def nbytes(self) -> int:
        return self.packed.numel() + self.scale.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """``x weightᵀ``: ``[T, K]`` of any floating dtype -> float32 ``[T, N]``."""
        x = x.float()
        scale = _row_scales(x, self.zero_point - 1)
        # The cast cuts off what is behind the point: with the half, it rounds.
        shifted = (x * scale.reciprocal()).add_(self.zero_point + 0.5).to(torch.uint8)
        return _multiply(shifted, self.zero_point, self.packed, self.scale).mul_(scale)
