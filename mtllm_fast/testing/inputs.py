"""Random packed inputs with the corners that kernels get wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ODD_LENGTHS = (3, 0, 41, 1, 130, 0)
"""Sentence lengths: one token, none (in the middle and at the end), less than a chunk, several chunks."""


def cu_seqlens_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """int32 [B+1], from 0 on."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def packed_states(
    lengths: Sequence[int],
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    dead_tail: int = 0,
    row_stride: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Random states ``[T, width]`` of sentences of these lengths, drawn on the CPU, the same on every device.

    Args:
        dead_tail: so many more rows, which belong to no sentence and are NaN: whoever reads them is found out.
        row_stride: elements from one row to the next, if not ``width``; what lies between is NaN too.
    """
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((tokens + dead_tail, row_stride or width), float("nan"))
    # Rows of different size, around a common mean: as in a model, the mean of normed rows is not near zero.
    scale = 4 * torch.rand(tokens, 1, generator=generator) + 0.1
    rows[:tokens, :width] = scale * (
        torch.randn(tokens, width, generator=generator) + torch.randn(width, generator=generator)
    )
    return rows.to(device, dtype)[:, :width]
