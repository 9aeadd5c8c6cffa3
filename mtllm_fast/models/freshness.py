"""Whether weights that something was derived from have changed."""

from __future__ import annotations

import torch
from torch import Tensor


def checksum(tensor: Tensor, sample: int | None = None) -> int:
    """Of the memory as integers: sums of the rows and columns of a square, weighted by their number, so that moving
    values about shows too; or the plain sum of about ``sample`` of them."""
    memory = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = memory.numel() % 8 == 0 and memory.data_ptr() % 8 == 0
    words = memory.view(torch.int64) if whole else memory
    if sample:
        return int(words[:: max(1, words.numel() // sample)].sum(dtype=torch.int64))
    width = 1 << (words.numel().bit_length() // 2)
    body = words.numel() // width * width
    square = words[:body].view(-1, width)
    sums = torch.cat([square.sum(0, dtype=torch.int64), square.sum(1, dtype=torch.int64), words[body:].to(torch.int64)])
    return int((sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum())
