"""The specification of ``bias_relu`` in plain torch; also what runs on a CPU.

    y = where(x + bias < 0, 0, x + bias)        dx = where(y <= 0, 0, dy)

torch's own ReLU keeps NaN, forward and backward.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """y [T, F]"""
    return x.relu() if bias is None else (x + bias).relu_().to(x.dtype)


def backward(grad: Tensor, y: Tensor, needs_bias: bool) -> tuple[Tensor, Tensor | None]:
    """(dx [T, F], dbias [F] in the wide dtype)"""
    grad_x = torch.ops.aten.threshold_backward(grad, y, 0)
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    return grad_x, grad_x.sum(0, dtype=wide) if needs_bias else None
