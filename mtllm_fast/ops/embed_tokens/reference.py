"""The specification of ``embed_tokens`` in plain torch; also what runs on a CPU.

    out = scale · weight[input_ids] + table[position_ids + offset]

The wider of the two dtypes is computed in, and the sum of scaled rows is one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(
    input_ids: Tensor, weight: Tensor, position_ids: Tensor, table: Tensor, scale: float, offset: int
) -> Tensor:
    """[T, d]"""
    embedded = F.embedding(input_ids, weight)
    positions = table.index_select(0, position_ids + offset)
    if positions.dtype == embedded.dtype:
        return torch.add(positions, embedded, alpha=scale, out=embedded)
    return torch.add(positions, embedded, alpha=scale).to(weight.dtype)
