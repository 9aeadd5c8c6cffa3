"""What the ops ask of tensors in common: dtypes, and a layout that every backend reads."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of states, weights and gradients."""


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Of statistics, sums and gradients of parameters: float64 if one of ``dtypes`` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def adjacent_columns(states: Tensor) -> Tensor:
    """``states``, copied only if neighbours in a row lie apart: backends read any strides of the other axes."""
    return states if states.stride(-1) == 1 else states.contiguous()
